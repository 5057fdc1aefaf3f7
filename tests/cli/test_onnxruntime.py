"""Finding ONNX Runtime: in the wheel that is installed, by its files, without importing it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import deltamem_rt as dm
from deltamem_rt import _onnxruntime
from deltamem_rt._onnxruntime import find_library


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for packages, in the place of the environment's own."""
    monkeypatch.delenv("DELTAMEM_ORT_LIBRARY", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def install(site: Path, library: str, *distributions: str, version: str = "1.32.0") -> Path:
    capi = site / "onnxruntime" / "capi"
    capi.mkdir(parents=True, exist_ok=True)
    (site / "onnxruntime" / "__init__.py").write_text("raise AssertionError('it must not be imported')")
    (capi / library).touch()
    for name in distributions:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return capi / library


def test_it_finds_the_environments_own():
    found = find_library()
    assert found.path.is_file()
    assert found.distribution in ("onnxruntime", "onnxruntime-gpu")


@pytest.mark.parametrize("library", ["libonnxruntime.so.1.32.0", "libonnxruntime.1.32.0.dylib", "onnxruntime.dll"])
def test_it_knows_the_library_of_every_platform(site, library):
    path = install(site, library, "onnxruntime")
    assert find_library() == _onnxruntime.LibraryInfo(path, "1.32.0", "onnxruntime")


def test_of_both_wheels_the_files_decide_which_one_lies_there(site):
    install(site, "libonnxruntime.so.1.32.0", "onnxruntime", "onnxruntime-gpu")
    assert find_library().distribution == "onnxruntime"
    install(site, "libonnxruntime_providers_cuda.so")
    assert find_library().distribution == "onnxruntime-gpu"


def test_the_newest_of_two_libraries_is_taken(site):
    install(site, "libonnxruntime.so.1.9.0")
    newest = install(site, "libonnxruntime.so.1.32.0")
    assert find_library().path == newest


def test_none_installed_names_both_commands(site):
    with pytest.raises(dm.OnnxRuntimeNotFoundError) as caught:
        find_library()
    assert 'pip install "deltamem-rt[cpu]"' in str(caught.value)
    assert 'pip install "deltamem-rt[cuda]"' in str(caught.value)
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, dm.DeltaMemError)


def test_too_old_says_found_and_needed(site):
    install(site, "libonnxruntime.so.1.30.2", "onnxruntime", version="1.30.2")
    with pytest.raises(dm.OnnxRuntimeNotFoundError, match=r"1\.30\.2.*1\.31 or later is needed"):
        find_library()


def test_the_environment_variable_goes_first(site, monkeypatch):
    install(site, "libonnxruntime.so.1.32.0", "onnxruntime")
    named = site / "elsewhere.so"
    named.touch()
    monkeypatch.setenv("DELTAMEM_ORT_LIBRARY", str(named))
    assert find_library() == _onnxruntime.LibraryInfo(named.resolve(), None, None)


def test_a_variable_that_names_nothing_says_so(site, monkeypatch):
    monkeypatch.setenv("DELTAMEM_ORT_LIBRARY", str(site / "nowhere.so"))
    with pytest.raises(dm.OnnxRuntimeNotFoundError, match=r"nowhere\.so"):
        find_library()

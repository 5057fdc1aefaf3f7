"""Finding ONNX Runtime: in the wheel that is installed, by its files, without importing it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import deltamem_rt as dm
from deltamem_rt import _onnxruntime
from deltamem_rt._onnxruntime import find_library, may_use_cuda, open_cuda_libraries


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


# CUDA's libraries


def test_a_bundle_for_cuda_asks_for_a_card_only_where_the_provider_lies(site):
    library = install(site, "libonnxruntime.so.1.32.0", "onnxruntime")
    bundles = {}
    for name, manifest in {
        "cpu": {"precision": "fp32", "graph": {"device": "cpu"}},
        "old": {"precision": "int4", "graph": {}},
        "both": {"precision": "fp32", "graph": {}, "graphs": [{"device": "cuda"}]},
        "cuda": {"precision": "int4", "graph": {"device": "cuda"}},
        "16 bits": {"precision": "fp16", "graph": {}},
        "no bundle": None,
        "no manifest": [],
    }.items():
        bundles[name] = site / name
        bundles[name].mkdir()
        if manifest is not None:
            (bundles[name] / "deltamem.json").write_text(json.dumps(manifest))
    assert not any(may_use_cuda(library, bundle) for bundle in bundles.values())
    assert open_cuda_libraries(library) == []
    install(site, "libonnxruntime_providers_cuda.so")
    assert {name for name, bundle in bundles.items() if may_use_cuda(library, bundle)} == {"both", "cuda", "16 bits"}


def test_cuda_libraries_are_opened_from_nvidias_wheels_newest_first_and_broken_ones_left_out(site, monkeypatch):
    library = install(site, "libonnxruntime.so.1.32.0", "onnxruntime-gpu")
    install(site, "libonnxruntime_providers_cuda.so")
    for name in (
        "cu13/lib/libcudart.so.13",
        "cu13/lib/libcublas.so.13",
        "cublas/lib/libcublas.so.12",
        "cu13/lib/libcurand.so.10",
    ):
        path = site / "nvidia" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    asked = []

    def opened(path: str) -> None:
        asked.append(path)
        if path.endswith(("libcublas.so.13", "libcurand.so.10")):
            raise OSError("wrong ELF class")

    monkeypatch.setattr(_onnxruntime.ctypes, "CDLL", opened)
    names = [path.name for path in open_cuda_libraries(library)]
    assert names == ["libcudart.so.13", "libcublas.so.12"]
    assert [Path(path).name for path in asked] == [
        "libcudart.so.13",
        "libcublas.so.13",
        "libcublas.so.12",
        "libcurand.so.10",
    ]

"""Who may know whom: arrows between crates go one way, and the runtime needs NumPy and ONNX Runtime's file, nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOWNWARD = ["deltamem-py", "deltamem-engine", "deltamem-store", "deltamem-cuda", "deltamem-kernel", "deltamem-core"]
NEVER = {
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime_genai",
    "onnx",
    "tokenizers",
    "safetensors",
    "deltamem_export",
}


def manifests() -> dict[str, dict]:
    found = (tomllib.loads(path.read_text()) for path in ROOT.glob("rust/*/Cargo.toml"))
    return {manifest["package"]["name"]: manifest for manifest in found}


def test_arrows_between_crates_go_down():
    for name, manifest in manifests().items():
        tables = ("dependencies", "dev-dependencies", "build-dependencies")
        needed = {crate for table in tables for crate in manifest.get(table, {}) if crate.startswith("deltamem-")}
        allowed = set(DOWNWARD[DOWNWARD.index(name) + 1 :])
        assert needed <= allowed, f"{name} must not know {needed - allowed}"


@pytest.mark.parametrize(
    ("crate", "forbidden"),
    [
        ("deltamem-core", {"ort", "pyo3", "numpy", "tokenizers", "redb", "redis"}),
        ("deltamem-kernel", {"ort", "pyo3", "numpy", "tokenizers", "serde_json"}),
        ("deltamem-cuda", {"ort", "pyo3", "numpy", "tokenizers", "serde_json", "deltamem-kernel"}),
        ("deltamem-store", {"ort", "pyo3", "numpy", "tokenizers"}),
        ("deltamem-engine", {"pyo3", "numpy"}),
        ("deltamem-py", {"ort", "tokenizers", "safetensors"}),
    ],
)
def test_a_crate_does_not_need_what_belongs_elsewhere(crate, forbidden):
    manifest = manifests().get(crate)
    if manifest is None:
        pytest.skip(f"{crate} is not part of the workspace yet")
    assert not forbidden & manifest.get("dependencies", {}).keys()


def test_unsafe_code_stands_only_where_it_is_listed():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(
        re.findall(r"^\| `(rust/\S+\.rs)` \|", page.split("## Unsafe code")[1].split("\n## ")[0], re.MULTILINE)
    )
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("rust/**/*.rs")
        if "allow(unsafe_code)" in path.read_text(encoding="utf-8")
    }
    assert found == listed


def loaded_modules(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_importing_the_runtime_and_its_command_imports_nothing_of_the_exporters():
    assert not NEVER & loaded_modules("import deltamem_rt, deltamem_rt._cli\ndeltamem_rt._cli.parser()")


def test_a_loaded_and_running_model_needs_none_of_it_either():
    code = (
        "import deltamem_rt as dm\n"
        "with dm.Model.load(dm.default_bundle(), device='cpu').session() as session:\n"
        "    session.chat('Hello.', max_new_tokens=2).read()"
    )
    assert not NEVER & loaded_modules(code)


def test_the_exporter_is_not_needed_to_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [need.split(">")[0] for need in project["dependencies"]] == ["numpy"]
    assert {extra: len(needs) for extra, needs in project["optional-dependencies"].items()} == {"cpu": 1, "cuda": 1}

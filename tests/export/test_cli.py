"""The command line: one line and exit code 2 for what a person did wrong, and what `inspect`, `convert`
and `verify` show and write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deltamem_export.adapter import convert
from deltamem_export.cli import main


@pytest.fixture
def run(capsys):
    """`run("inspect", path)` → exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_bundle_writes_a_bundle_and_says_what_it_does(run, parity_data: Path, tmp_path: Path) -> None:
    case = parity_data / "qwen3_tsw_qo"
    out = tmp_path / "b"
    code, _, said = run("bundle", "--backbone", case / "backbone", "--adapter", case / "adapter", "--out", out)
    assert code == 0
    assert (out / "deltamem.json").is_file()
    for step in ("reading", "building", "comparing", "grafting", "wrote"):
        assert step in said
    code, shown, _ = run("inspect", out)
    assert code == 0
    for word in (
        "Qwen3ForCausalLM",
        "[3, 1, 8, 8]",
        "λ = 1 − β",
        "takes token ids only",
        "transformers",
        "model.onnx.data",
    ):
        assert word in shown
    (out / "model.onnx").write_bytes(b"")
    assert "DAMAGED" in run("inspect", out)[1]
    code, _, said = run("bundle", "--backbone", case / "backbone", "--adapter", case / "adapter", "--out", out)
    assert code == 2
    assert said.count("\n") == 1
    assert "--force" in said


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--backbone", "nowhere", "config.json: not found"),
        ("--adapter", "nowhere", "no such adapter directory"),
        ("--out", "no/such/place", "no such directory"),
        ("--int4-block-size", "31", "block size is 31"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, parity_data, tmp_path, monkeypatch, option, value, words) -> None:
    monkeypatch.chdir(tmp_path)
    case = parity_data / "qwen3_tsw_qo"
    arguments = {"--backbone": case / "backbone", "--adapter": case / "adapter", "--out": "b"} | {option: value}
    code, out, said = run("bundle", *[part for pair in arguments.items() for part in pair])
    assert (code, out) == (2, "")
    assert words in said
    assert said.strip().splitlines()[-1].startswith("deltamem-export: ")
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_convert_writes_the_other_form_and_inspect_shows_it(run, parity_data: Path, tmp_path: Path) -> None:
    code, said, _ = run("convert", parity_data / "qwen3_tsw_qo" / "adapter", tmp_path / "ours")
    assert code == 0
    assert "27 tensors" in said
    code, shown, _ = run("inspect", tmp_path / "ours")
    assert code == 0
    for word in ("adapter.safetensors", "gates per row", "10,776", "alpha/rank = 2"):
        assert word in shown
    code, said, _ = run("convert", tmp_path / "ours", tmp_path / "back", "--to", "official")
    assert code == 0
    assert "delta_mem_adapter.pt" in said
    code, _, said = run("convert", tmp_path / "ours", tmp_path / "back")
    assert code == 2
    assert "exists already" in said


# ---------------------------------------------------------------------- verify


@pytest.fixture
def case(parity_data: Path) -> Path:
    return parity_data / "llama_tsw_qo"


def test_verify_prints_layers_and_a_verdict_and_ends_with_0_or_1(run, case, parity_bundle, tmp_path: Path) -> None:
    bundle = parity_bundle("llama_tsw_qo")
    text = tmp_path / "text.txt"
    text.write_text("My sister lives in Oslo. Her train leaves at eight.\n" * 5)
    given = ("--backbone", case / "backbone", "--adapter", case / "adapter", "--text", text)
    code, shown, _ = run("verify", bundle, *given)
    assert code == 0
    for word in ("identity   the checkpoint that was exported", "attention output", "no place differs", "good: "):
        assert word in shown
    assert [line.split()[0] for line in shown.splitlines() if line[:1].isdigit()] == ["0", "1", "2"]

    other = tmp_path / "other"
    convert(case / "adapter", other)
    path = other / "adapter.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.delta_o_proj"] += 0.1
    save_file(tensors, path)
    code, shown, _ = run(
        "verify", bundle, "--backbone", case / "backbone", "--adapter", other, "--json", "--tokens", 40
    )
    assert code == 1
    found = json.loads(shown)
    assert found["good"] is False
    assert found["tokens"] == 40
    assert found["first"] == "layer 1: the memory's correction of o"
    assert "the adapter's tensors are not those that were exported" in found["identity"][0]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--backbone", "nowhere", "config.json: not found"),
        ("--adapter", "nowhere", "no such adapter directory"),
        ("--text", "nowhere", "nowhere: No such file"),
        ("--text", "bytes", "is not text in UTF-8"),
        ("--tokens", "5", "5 tokens are too few"),
        ("bundle", "nowhere", "No such file"),
    ],
)
def test_what_cannot_be_verified_is_one_line_and_exit_code_2(
    run, case, parity_bundle, tmp_path, monkeypatch, option, value, words
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bytes").write_bytes(b"\xff\xfe")
    options = {"--backbone": case / "backbone", "--adapter": case / "adapter"}
    bundle = parity_bundle("llama_tsw_qo")
    if option == "bundle":
        bundle = value
    else:
        options[option] = value
    code, out, said = run("verify", bundle, *[part for pair in options.items() for part in pair])
    assert (code, out) == (2, "")
    assert words in said
    assert "Traceback" not in said


def test_a_damaged_data_file_is_not_run_to_a_traceback(run, case, parity_bundle, tmp_path: Path) -> None:
    bundle = shutil.copytree(parity_bundle("llama_tsw_qo"), tmp_path / "b")
    data = bundle / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    code, _, said = run("verify", bundle, "--backbone", case / "backbone", "--adapter", case / "adapter")
    assert code == 2
    assert "model.onnx: cannot be run" in said
    assert said.count("\n") < 8


# ---------------------------------------------------------------------- the check


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--check", "layers"), "each layer alone within"),
        (("--check", "whole"), "logits within"),
        (("--check", "none"), "no: exported with --no-check"),
        (("--no-check",), "no: exported with --no-check"),
    ],
)
def test_inspect_shows_how_the_graph_was_checked(run, case, tmp_path: Path, options, words) -> None:
    out = tmp_path / "b"
    code, _, said = run(
        "bundle", "--backbone", case / "backbone", "--adapter", case / "adapter", "--out", out, *options
    )
    assert code == 0
    assert ("comparing" in said) == ("no" not in words.split(":")[0])
    assert words in run("inspect", out)[1]


def test_inspect_says_when_a_directory_is_neither(run, tmp_path: Path) -> None:
    assert run("inspect", tmp_path)[0] == 2
    assert run("inspect", tmp_path / "nowhere")[0] == 2


def test_train_lists_its_recipes_and_other_commands_do_not_load_it(capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["train", "--help"])
    assert leaving.value.code == 0
    assert "--recipe" in capsys.readouterr().out

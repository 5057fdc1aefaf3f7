"""The command line: one line and exit code 2 for what a person did wrong, and what `inspect` and `convert` show and write."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_convert_writes_our_format_and_inspect_shows_it(run, parity_data: Path, tmp_path: Path) -> None:
    code, said, _ = run("convert", parity_data / "qwen3_tsw_qo" / "adapter", tmp_path / "ours")
    assert code == 0
    assert "27 tensors" in said
    code, shown, _ = run("inspect", tmp_path / "ours")
    assert code == 0
    for word in ("adapter.safetensors", "gates per row", "10,776", "alpha/rank = 2"):
        assert word in shown


def test_inspect_says_when_a_directory_is_neither(run, tmp_path: Path) -> None:
    assert run("inspect", tmp_path)[0] == 2
    assert run("inspect", tmp_path / "nowhere")[0] == 2


def test_train_lists_its_recipes_and_other_commands_do_not_load_it(capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["train", "--help"])
    assert leaving.value.code == 0
    assert "--recipe" in capsys.readouterr().out

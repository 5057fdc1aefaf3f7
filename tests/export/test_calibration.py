"""Calibration: the stream's form, what bounds are made of, and that a bundle gets them whole or not at all."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import deltamem_rt as dm
from deltamem_export import calibration
from deltamem_export.bundle import export_bundle
from deltamem_export.calibration import MARGIN, Stream, calibrate
from deltamem_export.cli import main
from deltamem_export.errors import ExportError
from deltamem_export.training.healthy import healthy_stream

QUIET = {"say": lambda _: None, "check": False}


@pytest.fixture
def stream() -> Stream:
    """Two conversations of token ids, 30 turns each."""
    rng = np.random.default_rng(0)
    turns = [" ".join(map(str, rng.integers(3, 60, rng.integers(4, 40)))) for _ in range(60)]
    return Stream([turns[:30], turns[30:]], "a test's")


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir()}


def test_bounds_are_the_largest_figures_of_the_stream_with_a_margin(
    stream, make_backbone, make_adapter, tmp_path
) -> None:
    backbone = make_backbone("llama")
    adapter = make_adapter(backbone, num_state_heads=2)
    plain = export_bundle(backbone, adapter, tmp_path / "plain", **QUIET)
    bundle = export_bundle(backbone, adapter, tmp_path / "bundle", calibration=stream, **QUIET)
    model = dm.Model.load(bundle, device="cpu")
    assert model.fingerprint == dm.Model.load(plain, device="cpu").fingerprint
    health = model.manifest["health"]
    assert health["stream"]["turns"] == 60

    norms, changes, paths = [], [], []
    for conversation in stream.conversations:
        with model.session() as session:
            moved = []
            for message in conversation:
                before = session.memory
                session.feed([int(part) for part in message.split()])
                session.end_turn()
                moved.append(np.linalg.norm(session.memory - before, axis=(2, 3)))
                norms.append(np.linalg.norm(session.memory, axis=(2, 3)))
                changes.append(moved[-1])
                paths.append(np.sum(moved[-16:], axis=0))
    for name, seen in (("norm", norms), ("change", changes), ("path", paths)):
        np.testing.assert_allclose(health["bounds"][name], MARGIN * np.max(seen, axis=0), rtol=1e-4, err_msg=name)
        assert np.shape(health["figures"][name]) == (3, 2, 5)
    assert np.shape(health["bounds"]["delta_ratio"]) == (3, len(adapter.config.delta_heads))


def test_a_rare_reply_that_runs_into_its_limit_sets_no_bounds(
    make_backbone, make_adapter, tmp_path, monkeypatch
) -> None:
    """And where such replies are many, they are how the model is."""
    turns = [" ".join(map(str, ids)) for ids in np.random.default_rng(1).integers(3, 60, (200, 8))]
    stream = Stream([turns[:100], turns[100:]], "a test's")
    states, cut_off, really = [], set(), calibration._say_to

    def say(session, message, chats, text):
        really(session, message, chats, text)
        states.append(session.memory)
        return len(states) - 1 in cut_off

    monkeypatch.setattr(calibration, "_say_to", say)
    backbone = make_backbone("llama")
    bundle = export_bundle(backbone, make_adapter(backbone), tmp_path / "bundle", calibration=stream, **QUIET)
    empty = np.zeros_like(states[0])
    changes = [
        np.linalg.norm(after - before, axis=(2, 3)).max()
        for first in (0, 100)
        for before, after in pairwise([empty, *states[first : first + 100]])
    ]
    worst = int(np.argmax(changes))
    behind = min(worst + 33, worst // 100 * 100 + 100)
    for those, left_out, most in (
        (set(), 0, changes[worst]),
        ({worst}, behind - worst, max(changes[:worst] + changes[behind:])),
        ({worst, 3, 103}, 0, changes[worst]),
    ):
        states.clear()
        cut_off.clear()
        cut_off.update(those)
        calibrate(bundle, stream)
        health = json.loads((bundle / "deltamem.json").read_text())["health"]
        assert (health["stream"]["turns"], health["stream"]["left_out"]) == (200, left_out)
        assert np.max(health["bounds"]["change"]) == pytest.approx(MARGIN * most, rel=1e-4)


def test_calibrating_again_changes_the_manifest_alone(stream, make_backbone, make_adapter, tmp_path) -> None:
    backbone = make_backbone("llama")
    bundle = export_bundle(backbone, make_adapter(backbone), tmp_path / "bundle", calibration=stream, **QUIET)
    before = contents(bundle)
    calibrate(bundle, Stream(stream.conversations[:1], "half of it"))
    after = contents(bundle)
    assert {name for name in before if before[name] != after[name]} == {"deltamem.json"}
    assert json.loads(after["deltamem.json"])["health"]["stream"]["description"] == "half of it"
    assert [path.name for path in tmp_path.glob(".*partial")] == []


def test_a_stream_that_cannot_be_played_leaves_the_bundle_as_it_was(make_backbone, make_adapter, tmp_path) -> None:
    backbone = make_backbone("llama")
    bundle = export_bundle(backbone, make_adapter(backbone), tmp_path / "bundle", **QUIET)
    before = contents(bundle)
    with pytest.raises(ExportError, match=r"cannot be played: .*100000"):
        calibrate(bundle, Stream([["3 4 5"] * 20, ["3 4 100000"]], "wrong"))
    assert contents(bundle) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_stream_is_a_message_a_line_and_an_empty_line_between_conversations(tmp_path) -> None:
    file = tmp_path / "talk.txt"
    file.write_text("\n\nHello.\nMy dog is called Rex.\n\n \n" + "Hm.\n" * 20, encoding="utf-8")
    stream = Stream.load(file)
    assert stream.description == "talk.txt"
    assert [list(c) for c in stream.conversations] == [["Hello.", "My dog is called Rex."], ["Hm."] * 20]
    file.write_text("Hello.\n", encoding="utf-8")
    with pytest.raises(ExportError, match="holds 1 messages, expected at least 20"):
        Stream.load(file)
    file.write_bytes(b"\xff\xfe" * 40)
    with pytest.raises(ExportError, match="is not text in UTF-8"):
        Stream.load(file)


def test_the_command_line_calibrates_and_says_what_is_wrong(make_backbone, make_adapter, tmp_path, capsys) -> None:
    backbone = make_backbone("llama")
    bundle = export_bundle(backbone, make_adapter(backbone), tmp_path / "bundle", **QUIET)
    file = tmp_path / "talk.txt"
    file.write_text("3 4 5 6\n" * 25, encoding="utf-8")
    assert main(["calibrate", str(bundle), "--stream", str(file)]) == 0
    assert "calibrated" in capsys.readouterr().out
    assert json.loads((bundle / "deltamem.json").read_text())["health"]["stream"]["description"] == "talk.txt"
    assert main(["calibrate", str(bundle), "--stream", str(tmp_path / "none.txt")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path), "--stream", str(file)]) == 2


def test_the_shipped_bundle_says_what_it_was_calibrated_on() -> None:
    manifest = json.loads((dm.default_bundle() / "deltamem.json").read_text(encoding="utf-8"))
    made = healthy_stream()
    assert manifest["health"]["stream"]["description"] == made.description
    assert manifest["health"]["stream"]["conversations"] == len(made.conversations)
    assert manifest["health"]["stream"]["turns"] == sum(map(len, made.conversations))

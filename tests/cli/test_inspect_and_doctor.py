"""`deltamem inspect` and `deltamem doctor`: what they say of a good thing, and of a bad one."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys

import pytest

import deltamem_rt as dm


def test_a_bundle_is_described(deltamem, bundle):
    outcome = deltamem("inspect", bundle)
    assert outcome.code == 0, outcome.err
    manifest = json.loads((bundle / "deltamem.json").read_text())
    for words in (manifest["name"], manifest["fingerprint"], manifest["memory"]["update_mode"], "model.onnx.data"):
        assert words in outcome.out
    assert json.loads(deltamem("inspect", "--json", bundle).out)["manifest"] == manifest


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("memory", {}, "each token by itself"),
        ("memory", {"write_granularity": "message"}, "the mean of each message; token ids need spans"),
        ("memory", {"write_granularity": "sentence"}, "the mean of each sentence; token ids need spans"),
        ("graph", {}, "a KV cache of 4 layers (0-3) in float32"),
        ("graph", {"kv_dtype": "int8", "kv_layers": [1, 2, 5]}, "a KV cache of 3 layers (1-2, 5) in int8"),
        ("graph", {"shared_kv": False}, "in float32, past and present in separate buffers"),
        (
            "graph",
            {"states": [{"input": "past.0.conv", "output": "present.0.conv", "dtype": "float16", "shape": [64, 2]}]},
            "past.0.conv float16 [64, 2]",
        ),
        ("check", {}, "largest difference in the logits"),
        ("check", {"method": "layers"}, "layer by layer on sampled inputs"),
        ("check", None, "no: exported with --no-check"),
    ],
)
def test_what_a_bundle_writes_carries_and_was_compared_with_is_told(
    deltamem, bundle, tmp_path, section, changes, words
):
    manifest = json.loads((bundle / "deltamem.json").read_text())
    manifest[section] = None if changes is None else manifest[section] | changes
    manifest["files"] = {}
    (tmp_path / "deltamem.json").write_text(json.dumps(manifest))
    outcome = deltamem("inspect", tmp_path)
    assert outcome.code == 0
    assert words in " ".join(outcome.out.split())


def test_a_bundle_that_lost_a_file_or_some_bytes_says_which(deltamem, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "model.onnx").unlink()
    with (copy / "model.onnx.data").open("r+b") as file:
        file.truncate(10)
    outcome = deltamem("inspect", copy)
    assert outcome.code == 1
    assert "model.onnx is missing" in outcome.out
    assert "model.onnx.data has 10 bytes" in outcome.out


def test_a_snapshot_is_described(deltamem, bundle, tmp_path):
    model = dm.Model.load(bundle, device="cpu")
    with model.session() as session:
        session.feed("Hello there.")
        session.end_turn()
        snapshot = session.snapshot()
    file = tmp_path / "memory.safetensors"
    file.write_bytes(snapshot.to_bytes())
    outcome = deltamem("inspect", file)
    assert outcome.code == 0, outcome.err
    assert model.fingerprint in outcome.out
    found = json.loads(deltamem("inspect", "--json", file).out)
    assert (found["kind"], found["tokens_seen"], found["turns"]) == ("snapshot", snapshot.tokens_seen, 1)


def test_an_adapter_is_described_and_nothing_is_unpickled(deltamem, tmp_path):
    (tmp_path / "delta_mem_config.json").write_text('{"rank": 8, "alpha": 16.0}')
    (tmp_path / "delta_mem_adapter.pt").write_bytes(b"not even a pickle")
    outcome = deltamem("inspect", tmp_path)
    assert outcome.code == 0
    assert "rank" in outcome.out
    assert "deltamem-export reads it" in outcome.out


def test_a_tensor_file_is_described(deltamem, tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "F32 [1]" in deltamem("inspect", file).out


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\xff" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 5) + b"{1:2}",
        struct.pack("<Q", 9) + b'{"a": {}}',
    ],
)
def test_any_other_file_is_refused_in_one_line(deltamem, tmp_path, content):
    file = tmp_path / "thing"
    file.write_bytes(content)
    outcome = deltamem("inspect", file)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err


def test_a_path_that_is_not_there_or_holds_nothing_is_named(deltamem, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        outcome = deltamem("inspect", path)
        assert outcome.code == 2
        assert str(path) in outcome.err


def test_the_doctor_says_what_is_here(deltamem):
    outcome = deltamem("doctor", "--json")
    assert outcome.code == 0, outcome.out
    found = json.loads(outcome.out)
    assert found["ok"]
    assert found["version"] == dm.__version__
    assert found["ort_distribution"] in ("onnxruntime", "onnxruntime-gpu")
    assert "CPUExecutionProvider" in found["providers"]
    assert found["threads"] >= 1
    shown = deltamem("doctor").out
    for words in ("library", "providers", "memory on a card", "CPU features", "models can run here"):
        assert words in shown


def test_the_doctor_names_what_is_missing(deltamem, monkeypatch, tmp_path):
    monkeypatch.setenv("DELTAMEM_ORT_LIBRARY", str(tmp_path / "nowhere.so"))
    outcome = deltamem("doctor")
    assert outcome.code == 1
    assert "no model can run here" in outcome.out
    assert "nowhere.so" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "code"), [((), 2), (("dance",), 2), (("demo", "--people", "0"), 2), (("--version",), 0)]
)
def test_a_wrong_command_line_ends_with_code_2(deltamem, arguments, code):
    assert deltamem(*arguments).code == code


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m deltamem_rt._cli doctor | true"
    done = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert "Traceback" not in done.stderr

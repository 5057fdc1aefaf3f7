"""Whatever a caller passes: a clear error, the session as it was, the process alive."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import deltamem_rt as dm
from sealing import resealed


def rng_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 256, count, dtype=np.int32)


# feed


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([3, 256], ValueError, "token id 256 at index 1 is outside the vocabulary of 256"),
        ([-1], ValueError, "token id -1 at index 0"),
        ([2**70], ValueError, "outside the vocabulary"),
        ([3, "x"], TypeError, "found str at index 1"),
        ([3, 1.5], TypeError, "found float at index 1"),
        ([True], TypeError, "found a bool"),
        (7, TypeError, "found int, expected text"),
        (None, TypeError, "found NoneType"),
        (np.array([3.0]), TypeError, "float64, expected int32 or int64"),
        (np.array([True]), TypeError, "bool, expected int32 or int64"),
        (np.array([[3, 4]], np.int32), ValueError, r"shape \[1, 2\], expected shape \[T\]"),
        (np.array(3, np.int32), ValueError, r"expected shape \[T\]"),
        (np.array([3, 300], np.int64), ValueError, "token id 300 at index 1"),
        (np.array([2**40], np.int64), ValueError, f"token id {2**40}"),
        (np.array([-5], np.int32), ValueError, "token id -5"),
        ("text", dm.SessionError, "has no tokenizer, so it takes token ids only"),
    ],
)
@pytest.mark.parametrize("logits", [False, True])
def test_what_cannot_be_fed(
    session: dm.Session, value: object, error: type[Exception], message: str, logits: bool
) -> None:
    session.feed(rng_ids(5))
    before = session.snapshot().to_bytes()
    with pytest.raises(error, match=message):
        session.feed(value, logits=logits)
    assert session.snapshot().to_bytes() == before
    assert session.position == 5


def test_nothing_is_fed_by_nothing(session: dm.Session) -> None:
    assert session.feed([]) is None
    assert session.feed(np.zeros(0, np.int32), logits=True).shape == (0, 256)
    assert session.tokens_seen == session.position == 0


def test_every_form_of_ids_is_the_same_stream(ids_model: dm.Model) -> None:
    ids = rng_ids(40)
    strided = np.repeat(ids, 2)[::2]
    forms = [
        ids,
        ids.astype(np.int64),
        ids.tolist(),
        tuple(ids.tolist()),
        list(ids),
        strided,
        ids.astype(">i4").astype(np.int32),
    ]
    states = []
    for form in forms:
        with ids_model.session() as session:
            session.feed(form)
            states.append(session.memory)
    for state in states[1:]:
        np.testing.assert_array_equal(state, states[0])


# generate


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ({"max_new_tokens": -1}, OverflowError, "negative"),
        ({"temperature": -1.0}, ValueError, "temperature is -1"),
        ({"temperature": float("nan")}, ValueError, "temperature is NaN"),
        ({"top_p": 0.0}, ValueError, "top_p is 0"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5"),
        ({"min_p": -0.1}, ValueError, "min_p is -0.1"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0"),
        ({"repetition_penalty": float("inf")}, ValueError, "repetition_penalty is inf"),
        ({"stop": 3}, TypeError, "stop is int"),
        ({"stop": [""]}, ValueError, "empty text"),
        ({"stop": ["a"]}, dm.SessionError, "no tokenizer"),
        ({"prompt": [999]}, ValueError, "token id 999"),
        ({"seed": -1}, OverflowError, "negative"),
    ],
)
def test_what_cannot_be_generated(session: dm.Session, options: dict, error: type[Exception], message: str) -> None:
    session.feed(rng_ids(5))
    before = session.memory
    with pytest.raises(error, match=message):
        session.generate(**({"prompt": [5], "max_new_tokens": 3} | options))
    np.testing.assert_array_equal(session.memory, before)
    assert session.position == 5


def test_there_must_be_something_to_go_on_from(session: dm.Session) -> None:
    for prompt in (None, []):
        with pytest.raises(dm.SessionError, match="nothing to go on from"):
            session.generate(prompt)
    with pytest.raises(dm.SessionError, match="no chat template"):
        session.chat("hello")


# load


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dm.Model.load(tmp_path / "nowhere")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises((FileNotFoundError, dm.BundleError), match=r"deltamem\.json"):
        dm.Model.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, ValueError, "expected 'auto', 'cpu' or 'cuda'"),
        ({"device": "cuda"}, dm.DeviceError, "CPU"),
        ({"threads": 0}, ValueError, "threads is 0"),
        ({"threads": -1}, OverflowError, "negative"),
    ],
)
def test_what_cannot_be_loaded(ids_model: dm.Model, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dm.Model.load(ids_model.path, **options)


@pytest.fixture
def copy(ids_model: dm.Model, tmp_path: Path) -> Path:
    target = tmp_path / "bundle"
    shutil.copytree(ids_model.path, target)
    return target


def edit(bundle: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest as a person would, and leave its digest as it was."""
    manifest = json.loads((bundle / "deltamem.json").read_text())
    change(manifest)
    (bundle / "deltamem.json").write_text(json.dumps(manifest, indent=2))


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    edit(copy, lambda manifest: manifest["memory"].update(rank=4))
    with pytest.raises(dm.BundleError, match=r"deltamem\.json"):
        dm.Model.load(copy)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_named(copy: Path, verify: bool) -> None:
    data = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(dm.BundleError, match=r"model\.onnx"):
        dm.Model.load(copy, verify=verify)


def test_a_file_that_went_missing_is_named(copy: Path) -> None:
    (copy / "model.onnx.data").unlink()
    with pytest.raises((dm.BundleError, FileNotFoundError), match=r"model\.onnx\.data"):
        dm.Model.load(copy)


def test_a_bit_flip_in_the_weights_is_named(copy: Path) -> None:
    path = copy / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(dm.BundleError, match=r"model\.onnx\.data"):
        dm.Model.load(copy)


def test_a_thousand_mutated_bundles(copy: Path) -> None:
    """Flips, cuts, insertions and swaps anywhere in any file: an error of ours each time."""
    rng = random.Random(7)
    files = sorted(path for path in copy.iterdir() if path.is_file())
    original = {path: path.read_bytes() for path in files}
    for _ in range(1000):
        path = rng.choice([*files, copy / "deltamem.json"])
        data = bytearray(original[path])
        at = rng.randrange(len(data))
        kind = rng.choice(["flip", "cut", "insert", "zero"])
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            length = min(rng.randrange(1, 65), len(data) - at)
            data[at : at + length] = bytes(length) if any(data[at : at + length]) else b"\1" * length
        path.write_bytes(data)
        with pytest.raises((dm.DeltaMemError, OSError)):
            dm.Model.load(copy)
        path.write_bytes(original[path])
    dm.Model.load(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["memory"].update(rank=4),
        lambda m: m["memory"].update(rank=2**40),
        lambda m: m["memory"].update(heads=0),
        lambda m: m["memory"].update(layers=[0, 0, 1]),
        lambda m: m["memory"].update(layers=[0, 1, 9]),
        lambda m: m["backbone"].update(vocab_size=100),
        lambda m: m["backbone"].update(num_kv_heads=2**50),
        lambda m: m["backbone"].update(head_dim=0),
        lambda m: m["graph"].update(kv_layers=[0, 1]),
        lambda m: m["graph"].update(kv_dtype="float16"),
        lambda m: m["graph"].update(kv_dtype="complex"),
        lambda m: m["graph"].update(states=[{"input": "a", "output": "b", "dtype": "float32", "shape": [2]}]),
        lambda m: m["graph"].update(states=[{"input": "a", "output": "b", "dtype": "float32", "shape": [2**40]}]),
        lambda m: m["graph"].update(span_width=32),
        lambda m: m["memory"].update(write_granularity="sentence"),
        lambda m: [m["memory"].update(write_granularity="message"), m["graph"].update(span_width=32)],
        lambda m: m["graph"].update(position_ids=True),
        lambda m: m["graph"].update(file="../model.onnx"),
        lambda m: m["graph"].update(file="/etc/passwd"),
        lambda m: m["tokens"].update(eos=[256]),
        lambda m: m.update(format="something-else"),
        lambda m: m.update(format_version=2),
        lambda m: m.pop("memory"),
        lambda m: m.update(fingerprint="0" * 63),
    ],
)
def test_a_sealed_bundle_that_contradicts_itself(copy: Path, change: Callable[[dict], None]) -> None:
    edit(copy, change)
    resealed(copy)
    with pytest.raises((dm.BundleError, FileNotFoundError)):
        dm.Model.load(copy)


@pytest.mark.parametrize(("file", "graph"), [("model.onnx", "portable"), ("model.fused.onnx", "auto")])
def test_a_sealed_bundle_whose_graph_is_none(copy: Path, file: str, graph: str) -> None:
    (copy / file).write_bytes(b"not a graph")
    resealed(copy)
    with pytest.raises(dm.DeltaMemError):
        dm.Model.load(copy, graph=graph)


# snapshots


def test_bytes_that_are_no_snapshot() -> None:
    for data in (
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        b"PK\3\4" * 100,
    ):
        with pytest.raises(dm.SnapshotError):
            dm.Snapshot.from_bytes(data)
    with pytest.raises(TypeError):
        dm.Snapshot.from_bytes("text")


def test_ten_thousand_mutated_snapshots(session: dm.Session) -> None:
    """Each is refused with our error, or is the same snapshot still (a byte that means nothing)."""
    session.feed(rng_ids(64))
    original = session.snapshot()
    data = original.to_bytes()
    rng = random.Random(3)
    accepted = 0
    for _ in range(10_000):
        mutated = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            at = rng.randrange(len(mutated)) if rng.random() < 0.5 else rng.randrange(min(len(mutated), 700))
            kind = rng.randrange(4)
            if kind == 0:
                mutated[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                mutated[at] = rng.randrange(256)
            elif kind == 2:
                del mutated[at:]
            else:
                mutated[at:at] = rng.randbytes(rng.randrange(1, 9))
            if not mutated:
                break
        try:
            snapshot = dm.Snapshot.from_bytes(bytes(mutated))
        except dm.SnapshotError:
            continue
        accepted += 1
        assert snapshot == original
    assert accepted < 200, f"{accepted} mutated snapshots were taken for the original"


def test_restore_takes_snapshots_only(session: dm.Session) -> None:
    with pytest.raises(TypeError):
        session.restore(b"bytes")


def test_a_loaded_model_outlives_its_files(copy: Path) -> None:
    model = dm.Model.load(copy)
    manifest = model.manifest
    with model.session() as session:
        session.feed(rng_ids(20))
        before = session.memory
        shutil.rmtree(copy)
        session.feed(rng_ids(20, 1))
        assert not np.array_equal(session.memory, before)
        assert model.manifest == manifest
        with pytest.raises(dm.DeltaMemError):
            session.generate([5], measure=True).read()
        session.feed(rng_ids(3))

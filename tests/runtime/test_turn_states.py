"""What a turn carries beside a shared KV cache: states of layers that are not attention, and caches whose past and present are two."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM, Lfm2Config

import deltamem_rt as dm
from agreement import assert_close
from deltamem_export.adapter import AdapterConfig
from deltamem_export.bundle import export_bundle
from deltamem_export.reference import attach
from interrupted import interrupted
from sealing import resealed

LOGITS, STATES = 1e-4, 1e-5


def rng_ids(count: int, seed: int = 0, below: int = 72) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, below, count, dtype=np.int32)


# A hybrid: LFM 2, whose convolutions carry a state


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[dm.Model, Callable[[], object]]:
    """A tiny random LFM 2 in the engine, and a function that makes the same as the PyTorch reference."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hybrid")
    config = Lfm2Config(
        vocab_size=72,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.2,
        conv_bias=True,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "backbone")

    def model() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / "backbone").eval()

    handle = attach(model(), replace(AdapterConfig(rank=4, alpha=4.0), target_layers=(1,)))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 1.0))
    adapter = handle.adapter()
    bundle = export_bundle(folder / "backbone", adapter, folder / "bundle", check=False, say=lambda _: None)

    def reference() -> tuple[torch.nn.Module, object]:
        body = model()
        memory = attach(body, adapter)
        memory.reset(1)
        return body, memory

    return dm.Model.load(bundle, device="cpu"), reference


def test_the_hybrid_carries_states_and_its_cache_is_of_one_layer(hybrid) -> None:
    graph = hybrid[0].manifest["graph"]
    assert [state["input"] for state in graph["states"]] == ["past.0.conv", "past.2.conv"]
    assert graph["kv_layers"] == [1]


def test_a_hybrid_computes_what_the_reference_computes(hybrid) -> None:
    model, reference = hybrid
    body, memory = reference()
    with model.session() as session:
        for turn, lengths in enumerate([(5,), (300, 1, 1, 40), (1, 2, 3), (600,)]):
            ids = rng_ids(sum(lengths), turn)
            with torch.no_grad():
                wanted = body(torch.from_numpy(ids[None].astype(np.int64)), use_cache=False).logits[0].numpy()
            edges = np.cumsum([0, *lengths])
            found = [session.feed(ids[a:b], logits=True) for a, b in pairwise(edges)]
            assert_close(f"turn {turn}: logits", np.concatenate(found), wanted, LOGITS)
            want = memory.state[0].numpy()
            assert_close(f"turn {turn}: states", session.memory, want, STATES * max(1.0, float(np.abs(want).max())))
            session.end_turn()


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 600), cuts=st.lists(st.integers(0, 600), max_size=6))
def test_any_split_of_a_hybrid_s_stream_is_the_same(hybrid, length, cuts) -> None:
    ids = rng_ids(length, 3)
    with hybrid[0].session() as once, hybrid[0].session() as split:
        wanted = once.feed(ids, logits=True)
        edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
        found = np.concatenate([split.feed(ids[a:b], logits=True) for a, b in pairwise(edges)])
        assert_close("logits", found, wanted, LOGITS)
        assert_close("states", split.memory, once.memory, STATES * max(1.0, float(np.abs(once.memory).max())))


# The same graph, its attention given past and present in two buffers


@pytest.fixture(scope="module")
def separate(ids_model: dm.Model, tmp_path_factory: pytest.TempPathFactory) -> dm.Model:
    """GroupQueryAttention takes one buffer or two: the manifest says which."""
    bundle = tmp_path_factory.mktemp("separate") / "bundle"
    shutil.copytree(ids_model.path, bundle)
    manifest = json.loads((bundle / "deltamem.json").read_text())
    manifest["graph"]["shared_kv"] = False
    (bundle / "deltamem.json").write_text(json.dumps(manifest))
    resealed(bundle)
    return dm.Model.load(bundle, device="cpu")


def test_separate_caches_compute_what_a_shared_one_does(ids_model: dm.Model, separate: dm.Model) -> None:
    with ids_model.session() as one, separate.session() as two:
        for turn, lengths in enumerate([(3, 1, 1, 1), (700, 1, 20), (256, 1), (1,)]):
            for step, length in enumerate(lengths):
                ids = rng_ids(length, turn * 10 + step, 250)
                a, b = one.feed(ids, logits=True), two.feed(ids, logits=True)
                assert_close(f"turn {turn}, call {step}: logits", b, a, STATES)
                assert_close(f"turn {turn}, call {step}: states", two.memory, one.memory, STATES)
            assert one.position == two.position
            one.end_turn()
            two.end_turn()
        prompt = rng_ids(20, 99, 250)
        replies = [session.generate(prompt, max_new_tokens=12) for session in (one, two)]
        assert [reply.read() for reply in replies] == ["", ""]
        assert replies[0].token_ids == replies[1].token_ids


# The laws, for both


@pytest.fixture(params=["hybrid", "separate"], scope="module")
def model(request: pytest.FixtureRequest) -> dm.Model:
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, dm.Model) else found[0]


def test_sessions_in_turn_equal_each_alone_bit_for_bit(model: dm.Model) -> None:
    streams = [[rng_ids(n, seed * 10 + n) for n in (3, 270, 1, 40)] for seed in range(3)]
    alone = []
    for parts in streams:
        with model.session() as session:
            alone.append([session.feed(part, logits=True) for part in parts])
    sessions = [model.session() for _ in streams]
    for step in range(4):
        for session, parts, wanted in zip(sessions, streams, alone, strict=True):
            np.testing.assert_array_equal(session.feed(parts[step], logits=True), wanted[step])
    for session in sessions:
        session.close()


def test_buffers_that_others_used_are_as_new(model: dm.Model) -> None:
    ids = rng_ids(50, 1)
    with model.session() as fresh:
        wanted = fresh.feed(ids, logits=True)
    for seed in range(6):
        with model.session() as other:
            other.feed(rng_ids(400, seed))
    with model.session() as again:
        np.testing.assert_array_equal(again.feed(ids, logits=True), wanted)


def test_a_call_that_is_interrupted_takes_everything_back(model: dm.Model) -> None:
    start, long, rest = rng_ids(30, 1), rng_ids(1800, 2), rng_ids(300, 3)
    with model.session() as never:
        never.feed(start)
        wanted = never.feed(rest, logits=True)
    with model.session() as timed:
        timed.feed(start)
        began = time.perf_counter()
        timed.feed(long)
        takes = time.perf_counter() - began
    for attempt in range(40):
        with model.session() as session:
            session.feed(start)
            before = session.snapshot().to_bytes()
            if interrupted(lambda: session.feed(long), takes * (attempt % 8 + 1) / 10) and session.position == 30:
                assert session.snapshot().to_bytes() == before
                np.testing.assert_array_equal(session.feed(rest, logits=True), wanted)
                return
    pytest.fail("forty feeds were never interrupted")


# A graph made by hand: sums of all ids, in caches of int8 and in a state of each type


VOCAB = 100


def handmade(folder: Path, pattern: dict, dtype: str, **graph: object) -> Path:
    """A bundle whose first three logits are the sums of all ids of the turn so far: as its keys hold them (in int8), as its values do
    (doubled), and as a state [2, 3] of `dtype` does. The memory counts the tokens that wrote."""
    element = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    memory = ["batch", 1, 1, 2, 2]
    cache = ["batch", 2, "past", 16]
    inputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in [
            ("input_ids", TensorProto.INT32, ["batch", "tokens"]),
            ("attention_mask", TensorProto.INT64, ["batch", "total"]),
            ("write_mask", TensorProto.FLOAT, ["batch", "tokens"]),
            ("logits_rows", TensorProto.INT64, ["rows"]),
            ("past_memory", TensorProto.FLOAT, memory),
            ("past_key_values.1.key", TensorProto.INT8, cache),
            ("past_key_values.1.value", TensorProto.INT8, cache),
            ("past.0.sum", element, ["batch", 2, 3]),
        ]
    ]
    outputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in [
            ("logits", TensorProto.FLOAT, ["rows", VOCAB]),
            ("present_memory", TensorProto.FLOAT, memory),
            ("present.1.key", TensorProto.INT8, ["batch", 2, "all", 16]),
            ("present.1.value", TensorProto.INT8, ["batch", 2, "all", 16]),
            ("present.0.sum", element, ["batch", 2, 3]),
        ]
    ]
    constants = {
        "axis": np.int64(1),
        "one": np.int64([1]),
        "last": np.int64([2]),
        "two_last": np.int64([1, 2]),
        "and_two_more": np.int64([3, 4]),
        "outer": np.int64([1, 3]),
        "wide": np.int64([1, 2, 1, 16]),
        "numbers_a_row": np.float32(32),
        "end": np.int64([2**62]),
        "as_column": np.int64([-1, 1]),
        "three_columns": np.int64([-1, 3]),
        "to_vocab": np.int64([0, 0, 0, VOCAB - 3]),
        "zero": np.float32(0),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        node("Shape", ["input_ids"], ["count"], start=1, end=2),
        node("Neg", ["count"], ["behind"]),
        node("Unsqueeze", ["input_ids", "outer"], ["new"]),
        node("Cast", ["new"], ["new_small"], to=TensorProto.INT8),
        node("Expand", ["new_small", "wide"], ["new_key"]),
        node("Add", ["new_key", "new_key"], ["new_value"]),
    ]
    for part in ("key", "value"):
        nodes += [
            node("Concat", [f"past_key_values.1.{part}", f"new_{part}"], [f"present.1.{part}"], axis=2),
            node("Cast", [f"present.1.{part}"], [f"{part}_float"], to=TensorProto.FLOAT),
            node("ReduceSum", [f"{part}_float", "outer"], [f"{part}_rows"], keepdims=0),
            node("CumSum", [f"{part}_rows", "axis"], [f"{part}_sums"]),
            node("Slice", [f"{part}_sums", "behind", "end", "one"], [f"{part}_mine"]),
            node("Div", [f"{part}_mine", "numbers_a_row"], [f"{part}_column"]),
        ]
    nodes += [
        node("Cast", ["past.0.sum"], ["state"], to=TensorProto.FLOAT),
        node("ReduceSum", ["ids", "one"], ["added"]),
        node("Unsqueeze", ["added", "last"], ["added_wide"]),
        node("Add", ["state", "added_wide"], ["state_after"]),
        node("Cast", ["state_after"], ["present.0.sum"], to=element),
        node("ReduceMax", ["state", "two_last"], ["state_one"], keepdims=0),
        node("Reshape", ["state_one", "as_column"], ["state_column"]),
        node("CumSum", ["ids", "axis"], ["ids_sums"]),
        node("Add", ["ids_sums", "state_column"], ["sum_column"]),
    ]
    for name in ("key_column", "value_column", "sum_column"):
        nodes.append(node("Unsqueeze", [name, "last"], [f"{name}_3"]))
    nodes += [
        node("Concat", [f"{name}_column_3" for name in ("key", "value", "sum")], ["columns"], axis=2),
        node("Reshape", ["columns", "three_columns"], ["rows_of_all"]),
        node("Pad", ["rows_of_all", "to_vocab", "zero"], ["all_logits"]),
        node("Gather", ["all_logits", "logits_rows"], ["logits"]),
        node("ReduceSum", ["write_mask", "one"], ["written"]),
        node("Unsqueeze", ["written", "last"], ["written_3"]),
        node("Unsqueeze", ["written_3", "and_two_more"], ["written_5"]),
        node("Add", ["past_memory", "written_5"], ["present_memory"]),
    ]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "sums",
            inputs,
            outputs,
            [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    folder.mkdir()
    onnx.save(made, folder / "model.onnx")
    manifest = json.loads(json.dumps(pattern))
    manifest["backbone"] |= {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "vocab_size": VOCAB}
    manifest["memory"] |= {"layers": [1], "heads": 1, "rank": 2}
    manifest["graph"] = {
        "file": "model.onnx",
        "measured_file": None,
        "kv_layers": [1],
        "kv_dtype": "int8",
        "shared_kv": False,
        "position_ids": False,
        "states": [{"input": "past.0.sum", "output": "present.0.sum", "dtype": dtype, "shape": [2, 3]}],
        "span_width": None,
        **graph,
    }
    manifest["text"] = None
    manifest["tokens"] = {"bos": None, "eos": [2], "pad": 0}
    manifest["files"] = {"model.onnx": {"bytes": 0, "blake3": "0" * 64}}
    (folder / "deltamem.json").write_text(json.dumps(manifest))
    resealed(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_states_of_each_type_and_caches_of_int8_go_on_through_a_turn(ids_model, tmp_path, dtype) -> None:
    model = dm.Model.load(handmade(tmp_path / "bundle", ids_model.manifest, dtype))
    # Sums that bfloat16 holds exactly, over chunks: most ids are 0.
    ids = np.where(np.arange(600) % 16 == 5, 3, 0).astype(np.int32)
    with model.session() as session:
        for turn in range(3):
            edges = sorted({0, 600, 7 * turn, 100 + turn, 101 + turn, 400})
            found = np.concatenate([session.feed(ids[a:b], logits=True) for a, b in pairwise(edges) if a < b])
            sums = np.cumsum(ids).astype(np.float32)
            np.testing.assert_array_equal(found[:, :3], np.stack([sums, 2 * sums, sums], axis=1))
            np.testing.assert_array_equal(session.memory, np.full((1, 1, 2, 2), 600.0 * (turn + 1), np.float32))
            session.feed(ids[:50], write=False)
            session.end_turn()


def test_another_session_starts_from_zero(ids_model, tmp_path) -> None:
    model = dm.Model.load(handmade(tmp_path / "bundle", ids_model.manifest, "float16"))
    for _ in range(3):
        with model.session() as session:
            assert session.feed([5], logits=True)[0, :3].tolist() == [5, 10, 5]
            session.feed([7] * 40)
            assert session.feed([1], logits=True)[0, :3].tolist() == [286, 572, 286]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": []}, r"found 8 inputs .*expected 7"),
        ({"kv_dtype": "float16"}, "past_key_values.1.key is i8"),
        ({"kv_layers": [0]}, "past_key_values.0.key is missing"),
        ({"states": [{"dtype": "float32"}]}, r"past\.0\.sum is f16"),
        ({"states": [{"shape": [2, 4]}]}, r"past\.0\.sum is f16 \[-1, 2, 3\], expected f16 \[-1, 2, 4\]"),
        ({"states": [{"shape": [6]}]}, r"past\.0\.sum is f16"),
        ({"states": [{"input": "past.0.other"}]}, r"the input past\.0\.other is missing"),
        ({"states": [{"output": "present.0.other"}]}, r"the output present\.0\.other is missing"),
        ({"states": [{"output": "past.0.sum"}]}, r"graph\.states\[0\]\.output"),
        ({"states": [{"dtype": "int8"}]}, r"graph\.states\[0\]\.dtype"),
    ],
)
def test_a_manifest_whose_states_are_not_the_graph_s_is_refused(ids_model, tmp_path, change, message) -> None:
    state = {"input": "past.0.sum", "output": "present.0.sum", "dtype": "float16", "shape": [2, 3]}
    if change.get("states"):
        change = {"states": [state | change["states"][0]]}
    bundle = handmade(tmp_path / "bundle", ids_model.manifest, "float16", **change)
    with pytest.raises(dm.BundleError, match=message):
        dm.Model.load(bundle)

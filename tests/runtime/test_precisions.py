"""fp16 and int4 bundles, and a KV cache in 8 bits, through the engine: they load, stay near fp32, and keep the laws that fp32 keeps.

The states of fp16 are as near as its rounded weights allow; int4 is another model than fp32 on random weights, so it is held to itself.
"""

from __future__ import annotations

import numpy as np
import pytest

import deltamem_rt as dm
from deltamem_export.bundle import export_bundle
from deltamem_export.precision import Precision


def stream(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(3, 256, count, dtype=np.int32)


@pytest.fixture(params=["fp16", "int4"], scope="module")
def model(request: pytest.FixtureRequest, parity_bundle) -> dm.Model:
    return dm.Model.load(parity_bundle("qwen3_tsw_qo", request.param))


def test_it_reads_remembers_and_answers(model: dm.Model) -> None:
    with model.session() as told, model.session() as empty:
        told.feed(stream(60))
        told.end_turn()
        with_memory, without = told.feed(stream(10), logits=True), empty.feed(stream(10), logits=True)
        assert with_memory.dtype == told.memory.dtype == np.float32
        assert np.isfinite(with_memory).all()
        assert np.abs(with_memory - without).max() > 0.01
        assert len(told.generate(max_new_tokens=5).read()) == 0
        assert told.tokens_seen == 75


def test_one_call_and_many_are_the_same_stream(model: dm.Model) -> None:
    # int4 rounds activations to int8 at the CPU's default accuracy, which moves its own logits (seen: 3.1e-2).
    tolerance = {"fp16": 1e-2, "int4": 1e-1}[model.manifest["precision"]]
    ids = stream(400)
    with model.session() as once, model.session() as parts:
        whole = once.feed(ids, logits=True)
        pieces = [parts.feed(part, logits=True) for part in np.split(ids, [1, 70, 71, 300])]
        np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=tolerance)


def test_fp16_is_near_fp32(parity_bundle, ids_model: dm.Model) -> None:
    half = dm.Model.load(parity_bundle("qwen3_tsw_qo", "fp16"))
    with half.session() as rounded, ids_model.session() as exact:
        found, expected = rounded.feed(stream(130), logits=True), exact.feed(stream(130), logits=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-2)
        np.testing.assert_allclose(rounded.memory, exact.memory, rtol=0, atol=2e-3)
        assert half.fingerprint != ids_model.fingerprint


def test_a_cache_in_8_bits_is_a_quarter_and_does_not_depend_on_the_split(parity_data, ids_model, tmp_path) -> None:
    source = parity_data / "qwen3_tsw_qo"
    form = Precision("fp32", kv="int8")
    small = dm.Model.load(
        export_bundle(source / "backbone", source / "adapter", tmp_path / "bundle", form, say=lambda _: None)
    )
    ids = stream(400)
    with small.session() as once, small.session() as parts, ids_model.session() as exact:
        whole = once.feed(ids, logits=True)
        pieces = [parts.feed(part, logits=True) for part in np.split(ids, [1, 70, 71, 300])]
        np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-4)
        np.testing.assert_allclose(parts.memory, once.memory, rtol=0, atol=1e-5)
        far = np.abs(exact.feed(ids, logits=True) - whole).mean()
        assert 0 < far < 0.05, f"8 bits move the logits by {far} on average"
        assert exact.cache_bytes == 4 * once.cache_bytes


def test_bf16_is_refused_on_a_cpu_in_words(parity_bundle) -> None:
    with pytest.raises(dm.BundleError, match=r"precision is bf16.*fp16, fp32 or int4, or run this one on CUDA"):
        dm.Model.load(parity_bundle("qwen3_tsw_qo", "bf16"))

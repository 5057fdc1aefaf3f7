"""The engine against named opponents in the same run, interleaved; medians and ratios, as a Markdown table.

scan        the Rust rule against the same rule in NumPy, 512 tokens
decode      a token a call through Session.feed against Python's onnxruntime on the same graph with its own IoBinding
streaming   Session.generate from Python against Session.feed of the same tokens: what sampling, text and iteration add
turn        a turn after 10k tokens of history against the same turn after none, and against reading the history again
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime

import deltamem_rt as dm

REPEATS = 15


def paired(
    bench: str,
    ours: str,
    opponent: str,
    mine: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int = REPEATS,
) -> None:
    """Time both in turn, after one warm-up each, and print the figures."""
    mine()
    theirs()
    pairs = []
    for _ in range(repeats):
        times = []
        for work in (mine, theirs):
            began = time.perf_counter()
            work()
            times.append((time.perf_counter() - began) * 1e3)
        pairs.append(times)
    ratios = sorted(their_ms / my_ms for my_ms, their_ms in pairs)
    mine_ms, their_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"| {bench} | {ours} | {opponent} | {mine_ms:.3f} | {their_ms:.3f} | {statistics.median(ratios):.2f}x "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {repeats} |",
        flush=True,
    )


def scan_in_numpy(q, k, v, keep, erase, write, state):  # type: ignore[no-untyped-def]
    """The rule as NumPy does it best here: all heads of a token at once."""
    state = state.copy()
    reads = np.empty_like(q)
    for t in range(len(q)):
        reads[t] = np.einsum("hij,hj->hi", state, q[t])
        update = write[t] * v[t] - erase[t] * np.einsum("hij,hj->hi", state, k[t])
        state = keep[t][:, :, None] * state + update[:, :, None] * k[t][:, None, :]
    return reads, state


def bench_scan() -> None:
    for rank in (8, 32, 64):
        rng = np.random.default_rng(rank)
        q, k, v, gate = (rng.standard_normal((512, 1, rank)).astype(np.float32) / rank**0.5 for _ in range(4))
        beta = (1 / (1 + np.exp(-gate))).astype(np.float32)
        arguments = (q, k, v, 1 - beta, beta, beta, np.zeros((1, rank, rank), np.float32))
        paired(
            f"scan, 512 tokens, rank {rank}",
            "Rust rule",
            f"NumPy {np.__version__}",
            lambda arguments=arguments: dm.scan(*arguments),
            lambda arguments=arguments: scan_in_numpy(*arguments),
        )


class PythonRuntime:
    """The same graph on Python's onnxruntime: past and present in one buffer, as its IoBinding allows."""

    def __init__(self, model: dm.Model) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(model.path / model.manifest["graph"]["file"]), options)
        backbone, graph = model.manifest["backbone"], model.manifest["graph"]
        self.cache_shape = (1, backbone["num_kv_heads"], 256, backbone["head_dim"])
        self.layers = graph["kv_layers"]
        self.memory_shape = (1, *model.geometry.shape)
        self.position_ids = graph["position_ids"]

    def decode(self, ids: list[int]) -> np.ndarray:
        memory = np.zeros(self.memory_shape, np.float32)
        caches = {
            f"{layer}.{part}": onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(self.cache_shape, np.float32))
            for layer in self.layers
            for part in ("key", "value")
        }
        binding = self.session.io_binding()
        binding.bind_cpu_input("write_mask", np.ones((1, 1), np.float32))
        binding.bind_cpu_input("logits_rows", np.zeros(1, np.int64))
        for name, cache in caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        for position, token in enumerate(ids):
            binding.bind_cpu_input("input_ids", np.array([[token]], np.int32))
            binding.bind_cpu_input("attention_mask", np.ones((1, position + 1), np.int64))
            if self.position_ids:
                binding.bind_cpu_input("position_ids", np.array([[position]], np.int64))
            binding.bind_cpu_input("past_memory", memory)
            binding.bind_output("logits")
            binding.bind_output("present_memory")
            self.session.run_with_iobinding(binding)
            memory = next(value.numpy() for value in binding.get_outputs() if tuple(value.shape()) == self.memory_shape)
        return memory[0]


def bench_decode(model: dm.Model) -> None:
    ids = np.random.default_rng(0).integers(3, model.manifest["backbone"]["vocab_size"], 200).tolist()
    opponent = PythonRuntime(model)

    def feed() -> np.ndarray:
        with model.session() as session:
            for token in ids:
                session.feed([token])
            return session.memory

    np.testing.assert_allclose(feed(), opponent.decode(ids), rtol=0, atol=1e-4)
    paired(
        "decode, 200 tokens, fp32",
        "Session.feed",
        f"onnxruntime {onnxruntime.__version__}",
        feed,
        lambda: opponent.decode(ids),
    )


def bench_streaming(model: dm.Model) -> None:
    prompt = np.array([5, 6, 7], np.int32)
    with model.session() as session:
        reply = session.generate(prompt, max_new_tokens=200, temperature=1.0, seed=0)
        reply.read()
        ids = reply.token_ids

    def generate() -> None:
        with model.session() as session:
            for _ in session.generate(prompt, max_new_tokens=len(ids), temperature=1.0, seed=0):
                pass

    def feed() -> None:
        with model.session() as session:
            session.feed(prompt)
            for token in ids:
                session.feed([token])

    paired(f"streaming, {len(ids)} tokens", "Session.generate", "Session.feed of the same tokens", generate, feed)


def bench_turn(model: dm.Model) -> None:
    rng = np.random.default_rng(1)
    vocab = model.manifest["backbone"]["vocab_size"]
    question = rng.integers(3, vocab, 24, dtype=np.int32)
    turn = min(512, model.context_length)
    history = [rng.integers(3, vocab, turn, dtype=np.int32) for _ in range(10_000 // turn)]
    fresh, old = model.session(), model.session()
    for part in history:
        old.feed(part)
        old.end_turn()

    def one_turn(session: dm.Session) -> None:
        session.feed(question)
        session.end_turn()

    def reading_again() -> None:
        with model.session() as session:
            for part in history:
                session.feed(part, write=False)
                session.end_turn()
            one_turn(session)

    paired(
        "turn of 24 tokens",
        "after 10k tokens of history",
        "after none",
        lambda: one_turn(old),
        lambda: one_turn(fresh),
        60,
    )
    paired(
        "turn of 24 tokens after 10k tokens",
        "memory",
        f"reading them again, {turn} a context",
        lambda: one_turn(old),
        reading_again,
        5,
    )


def main() -> None:
    model = dm.Model.load(dm.default_bundle())
    print(
        "## engine\n\nThe embedded default, fp32. Over 1x: ours is faster. Medians; the ratio is the median of the pairs, with its range.\n"
    )
    print("| bench | ours | opponent | ours, ms | opponent, ms | times as fast | runs |")
    print("|---|---|---|---|---|---|---|", flush=True)
    bench_scan()
    bench_decode(model)
    bench_streaming(model)
    bench_turn(model)


if __name__ == "__main__":
    main()

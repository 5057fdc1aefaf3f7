"""What a turn costs when there is a history: seconds from a message of 24 tokens to the first token of the reply.

memory             the engine with a memory that has read the whole history in turns; their KV caches are gone
reading again      the backbone alone reads the history and the message
a kept KV cache    the backbone alone has the history in its cache and reads the message
BM25               the backbone alone reads the five turns of the history that bm25s ranks first, and the message

Histories are random words of which some stand in the message, a token a word, in turns of 64. Where the machine does not reach a length in
the time it is given, a curve through what was measured stands in, and is marked so. At the end: a turn after a million tokens.

    python benches/bench_history.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from dataclasses import dataclass, field

import bm25s
import numpy as np

import deltamem_rt as dm
import models
from deltamem_export.evaluation.plots import Point, Series, line_plot
from measuring import Ratio, Table, quantity, reached, save_plot
from opening import load

MODEL, PRECISION = "smollm2-135m", "int4"
TURN, MESSAGE, RETRIEVED = 64, 24, 5
REPEATS = 9


@dataclass
class Plan:
    """How far it goes. `seconds`: what one way of reading a history again may take; `passes`: how often it is read."""

    marks: tuple[int, ...] = (1_024, 2_048, 4_096, 8_192, 16_384, 32_768)
    seconds: float = 75.0
    passes: int = 2
    million: int = 1_000_000


@dataclass
class Curve:
    """Seconds by tokens of history. `fitted`: the lengths that were not measured."""

    times: dict[int, list[float]] = field(default_factory=dict)
    fitted: set[int] = field(default_factory=set)

    def median(self, mark: int) -> float:
        return float(np.median(self.times[mark]))

    def fit(self, marks: tuple[int, ...], degree: int) -> None:
        """Fills in the marks that are missing from a polynomial of the history's length through what is there."""
        known = sorted(self.times)
        points = [(mark, time) for mark in known for time in self.times[mark]]
        # Relative errors count alike, and no power of the length can make a turn cheaper.
        powers = np.array([[mark**p for p in range(degree + 1)] for mark, _ in points], float)
        times = np.array([time for _, time in points])
        weights = non_negative(powers / times[:, None], np.ones(len(times)))
        for mark in (mark for mark in marks if mark not in self.times):
            self.times[mark] = [float(sum(w * mark**p for p, w in enumerate(weights)))]
            self.fitted.add(mark)


def non_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with no negative coefficient: those that come out negative are left out, the worst first."""
    used = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(matrix[:, used], wanted, rcond=None)[0]
        if (found >= 0).all() or len(used) == 1:
            whole = np.zeros(matrix.shape[1])
            whole[used] = np.maximum(found, 0)
            return whole
        used.pop(int(found.argmin()))


class History:
    """Random turns; a word of the text is a token of the model."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        rng = np.random.default_rng(0)
        self.ids = rng.integers(3, vocabulary, tokens, dtype=np.int32)
        self.message = np.concatenate([self.ids[5 : tokens : tokens // 12][:12], rng.integers(3, vocabulary, 12)])
        self.message = self.message[:MESSAGE].astype(np.int32)

    def turns(self, tokens: int) -> np.ndarray:
        return self.ids[:tokens].reshape(-1, TURN)


def words(ids: np.ndarray) -> str:
    return " ".join(f"w{i}" for i in ids)


def first_token(session: dm.Session, ids: np.ndarray) -> float:
    """Seconds until the first token of the reply to these tokens, which are read in the present turn."""
    began = time.perf_counter()
    reply = session.generate(ids, max_new_tokens=2)
    next(reply)
    took = time.perf_counter() - began
    reply.close()
    return took


def a_turn(session: dm.Session, ids: np.ndarray) -> float:
    took = first_token(session, ids)
    session.end_turn()
    return took


def rereading(model: dm.Model, history: History, plan: Plan) -> Curve:
    """Whole histories in one context. The time of a length is that of its first tokens in a longer pass, and of the message behind."""
    curve = Curve()
    reached_marks = plan.marks
    for _ in range(plan.passes):
        spent, read, sums = 0.0, 0, {}
        with model.session() as session:
            for mark in reached_marks:
                began = time.perf_counter()
                session.feed(history.ids[read:mark])
                spent, read = spent + time.perf_counter() - began, mark
                sums[mark] = spent
                # The next length costs at least twice as much.
                if spent * 3 > plan.seconds:
                    break
        reached_marks = tuple(sums)
        for mark, took in sums.items():
            curve.times.setdefault(mark, []).append(took)
    return curve


def against_each_other(
    with_memory: dm.Model, bare: dm.Model, history: History, plan: Plan, deepest: int
) -> dict[str, Curve]:
    """The three that do not read the history again, in turn at each length."""
    curves = {name: Curve() for name in ("memory", "a kept KV cache", "BM25, five turns")}
    ours, fresh, kept, short = with_memory.session(), with_memory.session(), bare.session(), bare.session()
    for session in (fresh, short):
        a_turn(session, history.message)
    none = curves["memory, no history"] = Curve()
    none.times[0] = [a_turn(fresh, history.message) for _ in range(REPEATS)]
    curves["without memory, no history"] = Curve({0: [a_turn(short, history.message) for _ in range(REPEATS)]})
    streamed = held = 0
    began = time.perf_counter()
    for mark in plan.marks:
        for start in range(streamed, mark, 512):
            ours.feed(history.ids[start : min(start + 512, mark)])
            ours.end_turn()
        streamed = mark
        if mark <= deepest:
            # Its own repeats grow the cache: they lie around the mark.
            start = mark - REPEATS * (MESSAGE + 1) // 2
            kept.feed(history.ids[held:start])
            held = start
        documents = history.turns(mark)
        index = bm25s.BM25()
        index.index(bm25s.tokenize([words(turn) for turn in documents], show_progress=False), show_progress=False)
        for _ in range(REPEATS):
            none.times.setdefault(mark, []).append(a_turn(fresh, history.message))
            curves["memory"].times.setdefault(mark, []).append(a_turn(ours, history.message))
            if mark <= deepest:
                curves["a kept KV cache"].times.setdefault(mark, []).append(first_token(kept, history.message))
                held = kept.position
            asked = time.perf_counter()
            query = bm25s.tokenize([words(history.message)], show_progress=False, return_ids=False)[0]
            scores = index.get_scores([word for word in query if word in index.vocab_dict])
            best = np.sort(np.argsort(scores)[-RETRIEVED:])
            prompt = np.concatenate([*documents[best], history.message])
            found = time.perf_counter() - asked
            curves["BM25, five turns"].times.setdefault(mark, []).append(found + a_turn(short, prompt))
    print(
        f"\nStreaming the {streamed:,} tokens through the memory took {time.perf_counter() - began:.0f} s with all measurements between.",
        flush=True,
    )
    for session in (ours, fresh, kept, short):
        session.close()
    return curves


def bench_curves(name: str, precision: str, plan: Plan) -> None:
    made = models.made(name, precision)
    with_memory, bare = load(made.bundle), load(made.bare)
    vocabulary = bare.manifest["backbone"]["vocab_size"]
    history = History(plan.marks[-1], vocabulary)
    print(
        f"\nModel: `{name}` at {precision} ({models.SHAPES[name].says}), random weights; opponents run the same backbone without a "
        f"memory in the same engine. A message of {MESSAGE} tokens; BM25's retrieval is counted, making its index is not. *Fitted*: a "
        f"curve a + b n + c n² (reading again) or a + b n (kept cache), no coefficient below 0, through what was measured."
    )
    again = rereading(bare, history, plan)
    deepest = max(again.times)
    curves = against_each_other(with_memory, bare, history, plan, deepest)
    plain, none = curves.pop("without memory, no history"), curves.pop("memory, no history")
    again.fit(plan.marks, 2)
    for mark in plan.marks:  # the message behind the history
        again.times[mark] = [time + plain.median(0) for time in again.times[mark]]
    curves["a kept KV cache"].fit(plan.marks, 1)
    curves = {"memory": curves["memory"], "reading again": again, **{k: v for k, v in curves.items() if k != "memory"}}

    def cell(curve: Curve, mark: int) -> str:
        if mark not in curve.times:
            return "-"
        return quantity(curve.times[mark]) + (" *fitted*" if mark in curve.fitted else "")

    table = Table("history, tokens", *curves, "reading again / memory", "memory / a new one's turn", "goal")
    table.row(0, quantity(none.times[0]), quantity(plain.times[0]), "-", "-", "-", "-", "-")
    for mark in plan.marks:
        ours = curves["memory"].median(mark)
        times = again.median(mark) / ours
        flat = Ratio.of(curves["memory"].times[mark], none.times[mark])
        goal = reached(times, 64.0) if mark == 32_768 else "-"
        cells = [cell(curve, mark) for curve in curves.values()]
        table.row(f"{mark:,}", *cells, f"**{times:,.0f}x**", flat, goal)
    plot(curves, name, precision)


COLOURS = {"memory": "#0072b2", "reading again": "#d55e00", "a kept KV cache": "#e69f00", "BM25, five turns": "#009e73"}


def plot(curves: dict[str, Curve], name: str, precision: str) -> None:
    series = []
    for who, curve in curves.items():
        points = {
            mark: Point(mark, curve.median(mark) * 1e3, min(times) * 1e3, max(times) * 1e3)
            for mark, times in curve.times.items()
            if mark
        }
        measured = [p for mark, p in points.items() if mark not in curve.fitted]
        series.append(Series(who, COLOURS[who], measured))
        if curve.fitted:
            last = max(mark for mark in points if mark not in curve.fitted)
            rest = [points[mark] for mark in sorted(points) if mark >= last]
            series.append(Series(f"{who}, fitted", COLOURS[who], rest, dashed=True))
    heights = [p.low for s in series for p in s.points] + [p.high for s in series for p in s.points]
    svg = line_plot(
        series,
        "tokens of history",
        "ms to the first token",
        x_axis="log",
        y_axis="log",
        y_range=(min(heights), max(heights)),
    )
    save_plot("turn-cost", svg, f"Time to the first token of a turn against the history, {name} at {precision}")


def bench_million(tokens: int, repeats: int) -> None:
    """The embedded default reads a million tokens; two sessions then take turns, one of them new."""
    model = dm.Model.load(dm.default_bundle())
    rng = np.random.default_rng(1)
    vocabulary = model.manifest["backbone"]["vocab_size"]
    message = rng.integers(3, vocabulary, MESSAGE, dtype=np.int32)
    old, new = model.session(), model.session()
    began = time.perf_counter()
    for _ in range(tokens // 1_000):
        old.feed(rng.integers(3, vocabulary, 1_000, dtype=np.int32))
        old.end_turn()
    took = time.perf_counter() - began
    for session in (old, new):
        a_turn(session, message)
    times: dict[str, list[float]] = {"old": [], "new": []}
    for number in range(repeats):
        for who, session in (("old", old), ("new", new)) if number % 2 else (("new", new), ("old", old)):
            times[who].append(a_turn(session, message))
    ratio = Ratio.of(times["old"], times["new"])
    verdict = "reached" if abs(ratio.value - 1) <= 0.05 else "**missed**"
    print(f"\n### A turn after {tokens:,} tokens\n\nThe embedded default, which read them in {took:.0f} s.")
    table = Table("turn", f"after {tokens:,}", "after none", "times as long", "goal", "turns")
    table.row(
        f"{MESSAGE} tokens, to the first of the reply",
        quantity(times["old"]),
        quantity(times["new"]),
        ratio,
        f"1.00 ± 0.05: {verdict}",
        repeats,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the smallest model and short histories: to see that it runs"
    )
    quick = parser.parse_args().quick
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it says every index that it makes
    plan = Plan((256, 512, 896), 1.0, 1, 5_000) if quick else Plan()
    print(
        "## history\n\nWhat a turn costs when there is a history: from the message to the first token of the reply, medians."
    )
    bench_curves("smoke" if quick else MODEL, PRECISION, plan)
    gc.collect()
    bench_million(plan.million, 5 if quick else 201)


if __name__ == "__main__":
    main()

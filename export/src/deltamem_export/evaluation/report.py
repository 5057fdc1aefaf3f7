"""report.json, and index.html made from it: one file with its plots inside, no script and nothing loaded. It knows nothing of models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from deltamem_export.errors import ExportError
from deltamem_export.evaluation.plots import Point, Series, line_plot

JSON_FILE, PAGE = "report.json", "index.html"
FORMAT = 1
COLOURS = {
    "memory": "#0072b2",
    "memory+context": "#56b4e9",
    "bm25": "#d55e00",
    "context": "#e69f00",
    "none": "#8a8a8a",
}
WHAT = {
    "controls": "Is it the memory that answers? The same questions to somebody else's memory and to none must sit at chance, and nobody "
    "must hear another user's facts.",
    "recall": "Facts told in turns of their own, then asked for. Beside it: what was never told must not be invented.",
    "distance": "Eight facts, then talk. The same conversations are asked at every mark.",
    "overwrite": "Eight facts, four of them changed 1 to 5 times.",
    "relations": "Facts that are easily mixed up, and questions that take two of them.",
    "merge": "Half of the facts on each of two branches of one memory, merged in a store.",
    "drift": "Own facts changed and asked for along a long stream; and at every mark, copies of the memory take in new facts.",
    "harm": "Perplexity of talk that needs no memory, with facts held over without: 1 is no harm.",
    "conversation": "Recorded conversations: answers by token F1, and how much better the next session is predicted with the memory of the "
    "earlier ones (under 1 is better).",
}
STYLE = """
body{font:15px/1.5 sans-serif;color:#222;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-size:13px;margin:.6rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.15rem .7rem .15rem 0;text-align:left;vertical-align:top;white-space:nowrap}
th{font-weight:600}tr.head th{border-bottom:1px solid #999}tr.first td{border-top:1px solid #e4e4e4}
.r{text-align:right}.i{color:#777}.bad{color:#b00020;font-weight:600}.good{color:#1a7f37}.scroll{overflow-x:auto}svg{max-width:100%;height:auto}
"""


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Writes both files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((JSON_FILE, json.dumps(_finite(report), indent=1) + "\n"), (PAGE, page(report))):
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


def read(folder: Path) -> dict[str, Any] | None:
    """The report in a folder, None where there is none. Raises ExportError for a file that is no report of this form."""
    path = folder / JSON_FILE
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] == FORMAT:
            return found
        what = f"format {found['format']}, expected {FORMAT}"
    except (ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
    raise ExportError(
        f"{path}: is no report that can be gone on with ({what}); leave out --resume or give another --report"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(report: Mapping[str, Any]) -> str:
    """The report as HTML."""
    bundle, tasks = report["bundle"], report["tasks"]
    failures = [line for task in tasks.values() for line in task["failures"]]
    verdict = "".join(f'<p class="bad">{escape(line)}</p>' for line in failures)
    if "controls" in tasks and not failures:
        verdict = '<p class="good">Controls passed: with somebody else\'s memory and with none, recall is not above chance.</p>'
    facts = {
        "bundle": f"{bundle['name']}, fingerprint {bundle['fingerprint'][:12]}, memory {bundle['memory_bytes']:,} bytes",
        "limits": f"prompts of at most {report['limits']['budget']:,} tokens, replies of {report['limits']['max_new_tokens']}, "
        f"BM25's best {report['limits']['turns_retrieved']} of the past turns; the same for every opponent",
        "language": report["language"],
        "made": f"{report['made']}, {report['machine']}, {', '.join(f'{k} {v}' for k, v in report['versions'].items())}",
        "training data": report["training"],
    }
    head = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    body = "".join(_section(name, task) for name, task in tasks.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(bundle["name"])}: does the memory help?</title>'
        f"<style>{STYLE}</style><h1>{escape(bundle['name'])}: does the memory help?</h1>{verdict}"
        f'<div class="scroll"><table>{head}</table></div>'
        "<p>Values with their 95 % intervals (bootstrap over episodes, never narrower than Wilson's) and n cases. Tokens read and "
        f"seconds are those of one question; bytes are what is kept of a person between turns.</p>{body}</html>\n"
    )


def _section(name: str, task: Mapping[str, Any]) -> str:
    settings = "; ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in task["settings"].items())
    notes = "".join(f"<br>{escape(note)}" for note in task["notes"])
    plots = "".join(f"<div>{plot}</div>" for plot in _plots(name, task["rows"]) if plot)
    return (
        f"<h2>{escape(name)}</h2><p>{escape(WHAT.get(name, ''))}</p>{plots}{_table(task['rows'])}"
        f'<p class="i">{escape(settings)}; took {task["seconds"]:.0f} s{notes}</p>'
    )


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _plots(name: str, rows: list[dict[str, Any]]) -> Iterable[str]:
    if name == "recall":
        yield line_plot(_series(rows, "recall"), "facts told", "recall")
        yield line_plot(
            [
                Series(
                    s, COLOURS.get(s, "#444"), [_point(r["cost"]["tokens_read"], r["figures"]["recall"]) for r in of]
                )
                for s, of in _by_opponent([r for r in rows if r["x"] is not None])
            ],
            "tokens read a question (a mark for each number of facts)",
            "recall",
            "log",
        )
    elif name == "distance":
        yield line_plot(_series(rows, "recall"), "tokens of talk since", "recall")
    elif name == "overwrite":
        changed = [r for r in rows if "an old value said" in r["figures"]]
        yield line_plot(
            [
                *_series(changed, "recall"),
                *_series(changed, "an old value said", "memory: old value", only="memory", dashed=True),
            ],
            "times changed",
            "new value said",
        )
    elif name == "drift":
        own = [r for r in rows if "an old value said" in r["figures"]]
        new = [r for r in rows if "against a fresh memory" in r["figures"]]
        yield line_plot(
            [
                *_series(new, "recall", "new facts", only="memory"),
                *_series(own, "recall", "own: ", dashed=True),
            ],
            "tokens of the stream",
            "recall",
        )
        size = _series(rows, "Frobenius norm", "state", only="memory")
        top = max((p.high for s in size for p in s.points), default=1.0)
        yield line_plot(size, "tokens of the stream", "norm of the state", y_range=(0.0, _round_up(top)))


def _round_up(top: float) -> float:
    step = 10.0 ** math.floor(math.log10(top)) / 2
    return step * math.ceil(top / step)


def _series(
    rows: list[dict[str, Any]], figure: str, name: str = "", only: str | None = None, dashed: bool = False
) -> list[Series]:
    """A line for each opponent; `name` stands before its name, or instead of it where there is only one."""
    lines = []
    for who, of in _by_opponent([r for r in rows if r["x"] is not None and figure in r["figures"]]):
        if only in (None, who):
            shown = name if only else f"{name}{who}"
            lines.append(
                Series(shown, COLOURS.get(who, "#444"), [_point(r["x"], r["figures"][figure]) for r in of], dashed)
            )
    return lines


def _by_opponent(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(who, of) for who in COLOURS if (of := [r for r in rows if r["against"] == who])]


def _point(x: float, figure: Mapping[str, float]) -> Point:
    return Point(x, figure["value"], figure["low"], figure["high"])


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    costs = any(row["cost"] for row in rows)
    head = ["", "", *names, *(("tokens read", "ms", "bytes kept") if costs else ())]
    lines, last = [], None
    # What is repeated at every mark of a stream stands together.
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    for row in sorted(rows, key=lambda row: kinds.index(_kind(row))):
        cells = [escape(row["case"]) if row["case"] != last else "", escape(row["against"])]
        cells += [_figure(row["figures"].get(name)) for name in names]
        if row["cost"]:
            cost = row["cost"]
            cells += [f"{cost['tokens_read']:,.0f}", f"{cost['seconds'] * 1e3:,.1f}", f"{cost['kept_bytes']:,}"]
        cells += [""] * (len(head) - len(cells))
        first = ' class="first"' if row["case"] != last else ""
        lines.append(f"<tr{first}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        last = row["case"]
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr class="head">{top}</tr>{"".join(lines)}</table></div>'


def _kind(row: Mapping[str, Any]) -> str:
    return str(row["case"]).partition(": ")[0]


def _figure(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["value"] is None or not math.isfinite(figure["value"]):
        return ""
    if figure["n"] == 0:
        return f"{figure['value']:.3f}"
    return f'{figure["value"]:.3f} <span class="i">[{figure["low"]:.3f}, {figure["high"]:.3f}] {figure["n"]:,}</span>'

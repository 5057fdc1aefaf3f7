"""Ordinary English that is at hand offline under a free licence: Python's own documentation (PSF licence).

`pydoc_data.topics` and the docstrings of standard-library modules, cut into passages of a few sentences. The words depend on the
Python version that runs the recipe; the model card names it. Knows nothing about tokens or models.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from functools import cache
from pathlib import Path

MODULES = (
    "argparse", "ast", "asyncio/events", "base64", "bdb", "calendar", "cmd", "codecs", "collections/__init__", "configparser", "contextlib", "copy", "csv", "ctypes/util",
    "datetime", "_pydatetime", "decimal", "_pydecimal", "difflib", "dis", "doctest", "email/message", "enum", "fileinput", "fractions", "ftplib", "functools", "gettext", "glob",
    "gzip", "heapq", "http/client", "http/cookiejar", "imaplib", "inspect", "ipaddress", "json/__init__", "locale", "logging/__init__", "logging/handlers", "mailbox", "mimetypes",
    "multiprocessing/pool", "nntplib", "numbers", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "platform", "plistlib", "poplib", "pprint", "profile", "pydoc",
    "queue", "random", "re/__init__", "sched", "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver", "sqlite3/__init__", "ssl", "statistics", "string",
    "subprocess", "sysconfig/__init__", "tarfile", "tempfile", "textwrap", "threading", "timeit", "trace", "traceback", "turtle", "typing", "unittest/case", "unittest/mock",
    "urllib/parse", "urllib/request", "uuid", "warnings", "wave", "weakref", "webbrowser", "xml/dom/minidom", "zipfile/__init__", "zipfile",
)  # fmt: skip


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    nodes = [
        n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [doc for n in nodes if (doc := ast.get_docstring(n))]


def _prose(text: str) -> list[str]:
    """Paragraphs that are mostly words: no code, no tables, no headings."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        flat = re.sub(r"\s+", " ", paragraph).strip()
        letters = sum(c.isalpha() or c == " " for c in flat)
        if len(flat) > 40 and letters > 0.9 * len(flat) and ">>>" not in flat:
            kept.append(flat)
    return kept


@cache
def passages(longest: int = 600) -> tuple[str, ...]:
    """Passages of at most `longest` characters, cut between sentences, without repetition, in a fixed order."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [topics[key] for key in sorted(topics)]
    for module in MODULES:
        sources.extend(_docstrings(root / f"{module}.py"))
    seen: dict[str, None] = {}
    for source in sources:
        for paragraph in _prose(source):
            piece = ""
            for sentence in re.split(r"(?<=[.!?]) ", paragraph):
                if piece and len(piece) + len(sentence) > longest:
                    seen.setdefault(piece)
                    piece = ""
                piece = f"{piece} {sentence}".strip()[:longest]
            if len(piece) > 30:
                seen.setdefault(piece)
    return tuple(seen)

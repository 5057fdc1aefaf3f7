"""What can go wrong on the way from a checkpoint to a bundle, as two classes: one line each for a person,
never a traceback."""

from __future__ import annotations


class ExportError(ValueError):
    """A bundle cannot be made from these inputs. The message names the thing, what was found, what was
    expected, and what to do."""


class AdapterError(ExportError):
    """An adapter's settings or tensors do not fit the format, each other, or the backbone."""


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to its first line, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

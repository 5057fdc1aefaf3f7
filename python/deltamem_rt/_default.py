"""Where the embedded default bundle lies: inside the package, in a wheel and in a work tree alike."""

from __future__ import annotations

from pathlib import Path

__all__ = ["default_bundle"]


def default_bundle() -> Path:
    """The small trained bundle that comes with the package, `tiny-assistant`.

    Returns its directory. Raises FileNotFoundError when this installation has none.
    """
    # In a work tree `models` is a link to models/ at its root; in a wheel it is a directory.
    path = Path(__file__).resolve().parent / "models" / "tiny-assistant"
    if not (path / "deltamem.json").is_file():
        raise FileNotFoundError(
            f"the embedded default is not part of this installation: there is no deltamem.json in {path}"
        )
    return path

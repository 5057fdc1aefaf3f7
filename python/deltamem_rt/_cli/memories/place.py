"""Which store, with what key, and how it is opened: for reading wherever that is enough, and never made by mistake."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from deltamem_rt._cli.arguments import UsageError
from deltamem_rt._cli.terminal import printable
from deltamem_rt._native import Store
from deltamem_rt._records import MemoryInfo
from deltamem_rt.errors import NotFoundError, StoreLockedError, UnavailableError

ENVIRONMENT_VARIABLE = "DELTAMEM_STORE"

_MOST_COMPARED = 10_000
"""With more names than this, none is looked for that a wrong one resembles."""

_KILLED = "its last writer was killed"
"""What the store says of a file that has to be opened for writing once."""

_HINTS = {
    "Store.names() lists what there is, and the first commit makes it": "deltamem names lists what there is",
    "Store.branches() lists what there is": "deltamem branch lists what there is",
    "Store.info() lists what there is": "deltamem branch and deltamem tag list what there is",
    'open the session on "main" and make the branch with session.branch(), or with Store.branch()': "deltamem branch lists what there is",
}
"""What the store's errors advise, in the words of the command."""


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --store, --key-file and --json; `opened` reads them."""
    place = os.environ.get(ENVIRONMENT_VARIABLE)
    parser.add_argument(
        "--store",
        metavar="PATH_OR_URL",
        default=place,
        required=not place,
        help=f"the store: a file, or redis://, rediss:// (default: ${ENVIRONMENT_VARIABLE})",
    )
    parser.add_argument(
        "--key-file", type=Path, metavar="FILE", help="the store's key: 32 bytes, or 64 hexadecimal digits"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_name_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the memory's NAME."""
    parser.add_argument("name", metavar="NAME", help="the memory")


@contextmanager
def opened(options: argparse.Namespace, *, writing: bool = False, strict: bool = False) -> Iterator[Store]:
    """Opens the store that the arguments name, which must be there; for reading unless `writing`.

    A file is shared, so that a look disturbs nobody who shares it too; for a command's few commits that costs nothing. With `strict`, a
    file that can be read but not be written any more (it was cut off behind its content) is damaged.
    """
    with users_words(), _open(options.store, key_of(options), writing, strict) as store:
        yield store


def is_address(place: str) -> bool:
    """Whether it is a server's address, not a path."""
    return "://" in place


def key_of(options: argparse.Namespace) -> bytes | str | None:
    """The key that --key-file names. What the file holds never stands in a message."""
    if options.key_file is None:
        return None
    data: bytes = options.key_file.read_bytes()
    if len(data) == 32:
        return data
    digits = data.strip()
    if len(digits) == 64 and all(byte in b"0123456789abcdefABCDEF" for byte in digits):
        return digits.decode("ascii")
    raise UsageError(
        f"{options.key_file} holds {len(data)} bytes, expected a key: 32 bytes, or 64 hexadecimal digits and a line's end"
    )


def _open(place: str, key: bytes | str | None, writing: bool, strict: bool) -> Store:
    if is_address(place):
        return Store(place, key=key)
    if not Path(place).exists():
        raise FileNotFoundError(f"there is no store {place}; check the path (dm.Store makes one, and deltamem import)")
    if writing:
        return Store(place, key=key, shared=True)
    try:
        return Store(place, key=key, shared=not strict, read_only=True)
    except StoreLockedError:
        if not strict:
            raise
        return Store(place, key=key, shared=True, read_only=True)
    except UnavailableError as error:
        if _KILLED not in str(error):
            raise
        # Its last writer was killed: whoever opens it for writing next puts it in order, as every commit's session does.
        Store(place, key=key, shared=True).close()
        print(
            f"deltamem: note: the last process that wrote {printable(place)} was killed; the file was put in order",
            file=sys.stderr,
        )
        return Store(place, key=key, shared=True, read_only=True)


def memory(store: Store, name: str) -> MemoryInfo:
    """What the memory of that name is; where there is none, the error names those that are called much the same."""
    try:
        return store.info(name)
    except NotFoundError:
        names = store.names()
        near = get_close_matches(name, names, 3) if len(names) <= _MOST_COMPARED else []
        hint = f"is it {' or '.join(map(repr, near))}?" if near else "deltamem names lists what there is"
        raise NotFoundError(f"there is no memory {name!r} in {store.place}; {hint}") from None


@contextmanager
def users_words() -> Iterator[None]:
    """Turns what the API says of a wrong name or a wrong text into a mistake on the command line, and its advice into commands."""
    try:
        yield
    except NotFoundError as error:
        text = str(error)
        for hint, ours in _HINTS.items():
            text = text.replace(hint, ours)
        raise NotFoundError(text) from None
    except ValueError as error:
        if isinstance(error, UnicodeEncodeError):
            raise UsageError(f"{error.object!r} is no text: it holds bytes that are not UTF-8") from None
        # The API's own classes know what they are.
        if type(error) is not ValueError:
            raise
        raise UsageError(str(error)) from None


def again(command: str, options: argparse.Namespace, *words: str, flags: Sequence[str] = ()) -> str:
    """A command line for the same store, to be copied; a server's password does not stand in it."""
    said = ["deltamem", command]
    if options.store != os.environ.get(ENVIRONMENT_VARIABLE):
        secret = is_address(options.store) and "@" in options.store
        said += ["--store", "URL" if secret else options.store]
    if options.key_file is not None:
        said += ["--key-file", str(options.key_file)]
    said += flags
    if any(word.startswith("-") for word in words):
        said.append("--")
    return printable(shlex.join([*said, *words]))

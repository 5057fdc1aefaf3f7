"""What the documents show, runs: Python blocks in order on the embedded default, commands against the commands there are."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, *languages: str) -> list[str]:
    fences = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [body for language, body in fences if language in languages]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = "\n".join(blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{page.name}\n{done.stdout}\n{done.stderr}"


def commands(page: Path) -> Iterator[list[str]]:
    for body in blocks(page, "sh", "bash", "console"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def help_of(name: str, *command: str) -> str:
    script = Path(sys.executable).with_name(name)
    done = subprocess.run([str(script), *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name} {' '.join(command)}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists_with_its_options(page):
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page):
        name, *rest = words
        if name == "make":
            for target in (word for word in rest if "=" not in word):
                assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"make has no {target}"
        elif name in {"deltamem", "deltamem-export"}:
            subcommand = [rest[0]] if rest and not rest[0].startswith("-") else []
            shown = help_of(name, *subcommand)
            for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
                assert re.search(rf"{re.escape(option)}\b", shown), f"{name} {subcommand} has no {option}"
        else:
            assert name in {"pip", "git", "cd", "python", "apt-get"}, (
                f"{page.name} shows {name}, which nothing here checks"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_is_short_enough_to_be_read():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 320

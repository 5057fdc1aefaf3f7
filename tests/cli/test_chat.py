"""The conversation in the terminal: commands, files, and leaving it."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest

import deltamem_rt as dm


@pytest.fixture
def say(deltamem, monkeypatch):
    """Types lines into `deltamem chat`, and returns what came of it."""

    def run(*lines: str, options: tuple[object, ...] = ()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return deltamem("chat", "--max-new-tokens", 24, *options)

    return run


def test_it_remembers_what_an_earlier_turn_said(say):
    outcome = say("My dog is called Bruno.", "What is my dog called?")
    assert outcome.code == 0, outcome.err
    assert "Bruno" in outcome.out.splitlines()[-1]


def test_memory_shows_bytes_norms_and_tokens(say):
    outcome = say("/memory", "Hello.", "/memory")
    assert "bytes: " in outcome.out
    assert "tokens seen    0 in 0 turns" in outcome.out
    assert "in 1 turn" in outcome.out
    assert "norm, layer 0" in outcome.out


def test_forget_empties_the_memory(say):
    lines = say("My dog is called Bruno.", "/forget", "/memory").out.splitlines()
    assert [line.split()[-1] for line in lines if "norm, layer" in line] == ["0"] * sum(
        "norm, layer" in line for line in lines
    )


def test_a_saved_memory_goes_on_in_another_conversation(say, tmp_path):
    file = tmp_path / "a memory.safetensors"
    assert say("My dog is called Bruno.", f"/save '{file}'").code == 0
    assert dm.Snapshot.from_bytes(file.read_bytes()).turns == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "nothing half-written is left beside it"
    assert "Bruno" in say("What is my dog called?", options=("--load", file)).out
    assert "Bruno" in say(f"/load '{file}'", "What is my dog called?").out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/load nowhere.safetensors", "nowhere.safetensors: No such file"),
        ("/save", "takes one file name"),
        ("/save one two", "takes one file name"),
        ("/dance", "there is no /dance"),
    ],
)
def test_a_mistake_is_answered_and_the_conversation_goes_on(say, line, words):
    outcome = say(line, "/help")
    assert outcome.code == 0
    assert words in outcome.out
    assert "/forget" in outcome.out


def test_a_file_that_is_no_snapshot_does_not_touch_the_memory(say, tmp_path):
    file = tmp_path / "broken.safetensors"
    file.write_bytes(b"\xff" * 100)
    outcome = say("My dog is called Bruno.", f"/load {file}", "What is my dog called?")
    assert "error: " in outcome.out
    assert "Bruno" in outcome.out.splitlines()[-1]


def test_a_missing_memory_on_the_command_line_ends_with_code_2(say, tmp_path):
    outcome = say("Hello.", options=("--load", tmp_path / "nowhere"))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1


class Terminal:
    """A real terminal with `deltamem chat` in it."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deltamem_rt._cli", "chat", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
            env={**os.environ, "NO_COLOR": "1", "TERM": "xterm"},
        )
        os.close(slave)
        self.seen = ""

    def until(self, words: str, seconds: float = 60, then: str = "") -> None:
        """Reads until the words have appeared since the last call, and `then` behind them."""
        found, end = "", time.monotonic() + seconds
        while then not in found.partition(words)[2] or words not in found:
            assert time.monotonic() < end, f"{words!r} did not come; the terminal shows {found!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                found += os.read(self.master, 4096).decode(errors="replace")
        self.seen += found

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def close(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            os.close(self.master)


def test_ctrl_c_stops_a_reply_and_ctrl_d_leaves():
    # So hot a sampler says noise, and with this seed until the context is full (1 s): it still does when the key is pressed.
    terminal = Terminal("--max-new-tokens", "100000", "--temperature", "50", "--seed", "0")
    terminal.until("> ")
    terminal.type("Tell me everything.\r")
    terminal.until("everything.\r\n", then=" ")
    terminal.type("\x03")
    terminal.until("[stopped]", then="> ")  # the noise of the reply may hold a "> " of its own
    assert "Traceback" not in terminal.seen
    time.sleep(0.5)  # readline sees no Ctrl-C in the moment between its prompt and its wait for keys
    terminal.type("\x03")
    terminal.until("leaves", then="> ")
    terminal.type("/memory\r")
    terminal.until("tokens seen", then="> ")  # a key pressed before the prompt is another key
    terminal.type("\x04")
    assert terminal.close() == 0

"""What goes onto a terminal: colours only where they are wanted, widths that hold, numbers that read well."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamem_rt._cli.terminal import Terminal, columns, count, duration, explain, pad, pairs, printable, shorten, size


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_need_a_terminal_and_no_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Terminal(Screen()).good("yes") == "\x1b[32myes\x1b[0m"
    assert Terminal(io.StringIO()).good("yes") == "yes"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Terminal(Screen()).good("yes") == "yes"


def test_a_line_is_cut_for_a_terminal_and_whole_for_a_program(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert Terminal(Screen()).fits("a line of\n more than thirty columns", used=10) == "a line of more than…"
    assert Terminal(Screen()).fits("日本語日本語", used=25) == "日本…"
    assert Terminal(io.StringIO()).fits("a line of\n more than thirty columns") == "a line of more than thirty columns"


def test_neighbours_have_colours_of_their_own(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    painted = [Terminal(Screen()).hue(number, "|") for number in range(7)]
    assert len(set(painted)) == 6
    assert painted[0] == painted[6] == "\x1b[31m|\x1b[0m"
    assert Terminal(io.StringIO()).hue(3, "|") == "|"


def test_a_prompt_tells_readline_what_takes_no_room(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Terminal(Screen()).prompt("> ") == "\x01\x1b[36m\x02> \x01\x1b[0m\x02"
    assert Terminal(io.StringIO()).prompt("> ") == "> "


def test_progress_is_for_terminals_only():
    piped = io.StringIO()
    Terminal(piped).progress("half way")
    Terminal(piped).progress_done()
    assert piped.getvalue() == ""


@given(st.text(), st.integers(1, 60))
def test_a_cut_line_is_one_line_and_fits(text, width):
    for cut in (shorten(text, width), pad(text, width)):
        assert columns(cut) <= width
        assert "\n" not in cut
    assert columns(pad(text, width)) == width


def test_a_reply_keeps_its_end():
    assert pad("Your grandmother's dog is called Bruno.", 20).endswith("d Bruno.")


def test_a_model_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\tc\n") == "a\ufffd[2Jb\tc\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00042, "0.42 ms"), (0.0123, "12.3 ms"), (0.42, "420 ms"), (3.14, "3.1 s"), (125.0, "2 min 5 s")],
)
def test_times_read_well(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(768, "768 bytes"), (32768, "32 KiB"), (3_565_158, "3.4 MiB"), (2**41, "2048 GiB")]
)
def test_sizes_read_well(number, text):
    assert size(number) == text


def test_counts_know_one_from_many():
    assert (count(1, "turn"), count(2_000, "turn")) == ("1 turn", "2,000 turns")


def test_names_stand_above_each_other():
    assert pairs([("a", "1"), ("long", "2")]) == ["  a     1", "  long  2"]


def test_an_error_is_one_line():
    assert explain(ValueError("two\n lines")) == "two lines"
    assert explain(FileNotFoundError(2, "No such file or directory", "here")) == "here: No such file or directory"
    assert explain(ValueError("a name\x1b[2J")) == "a name\ufffd[2J"
    assert explain(FileNotFoundError(2, "No such file", "here\x07")) == "here\ufffd: No such file"
    assert explain(KeyboardInterrupt()) == "KeyboardInterrupt"

"""What the demo shows of memory as Git: the log, two branches and their merge, a rollback, a kill. It measures nothing itself."""

from __future__ import annotations

import os
from collections.abc import Sequence

from deltamem_rt._cli.terminal import count, duration, pad, shorten
from deltamem_rt._records import Commit

from .branches import BEFORE, MERGED, OURS, THEIRS, Branched, WhatIf
from .commits import Committed
from .killed import Death, Reopened
from .screen import Screen
from .undo import Undone

BLAMED = 3
"""Shares of a blame that are shown."""

LOGGED = 12
"""Commits of the log that are shown."""


def show_committed(screen: Screen, told: Committed) -> None:
    """Every turn is a commit: the first person's log."""
    t = screen.terminal
    screen.heading(
        "Every turn is a commit",
        "When a reply ends, the memory is committed to a store, here a file. Person 1's log:",
    )
    t.line(t.dim(f"    {'commit':12}  turn  tokens  change  told"))
    for line in told.log[: -LOGGED - 1 : -1]:
        commit = line.commit
        t.line(
            f"    {t.accent(commit.short)}  {commit.meta['turn']:>4}  {commit.tokens_seen:>6}  {line.change:6.2f}  "
            + shorten(line.words, t.width - 42)
        )
    if len(told.log) > LOGGED:
        t.line(t.dim(f"    and {count(len(told.log) - LOGGED, 'older commit')}"))
    screen.note("change: Frobenius norm of what the turn moved in the memory. The words are ours: a commit holds none.")
    each = f"{told.bytes / told.commits:,.0f} bytes each"
    screen.prose(f"{count(told.commits, 'commit')}, {each}, every one on the disk before its turn was over.")


def show_branched(screen: Screen, played: WhatIf) -> None:
    """Two branches of the first person, their merge, and what all people's memories knew on each and after it."""
    t = screen.terminal
    first = played.people[0]
    half = len(first.told[OURS])
    story = (
        f"Its branches {OURS} and {THEIRS} are told {count(half, 'fact')} each, then {THEIRS} is merged into {OURS}."
    )
    if not half:
        story = "But every kind of fact that the demo has is told already: there is nothing to tell the branches."
    screen.heading("What if: two branches, merged", f"Person 1's memory is forked. {story}")
    if not half:
        return
    _graph(screen, first)
    merge = first.merge
    screen.note(
        f"Overlap of the keys that both wrote: {merge.overlap:.3f} (1: the same ones); each side's facts lose "
        f"{merge.loss_ours:.2f} and {merge.loss_theirs:.2f} (0: nothing)."
    )
    t.line()
    people = f"{len(played.people)} people" if len(played.people) > 1 else "1 person"
    t.line(t.dim(f"    {pad(f'right, {people}', 22)}{'told before':>14}{f'on {OURS}':>14}{f'on {THEIRS}':>14}"))
    for memory, label in ((OURS, f"{OURS} knows"), (THEIRS, f"{THEIRS} knows"), (MERGED, "merged, it knows")):
        cells = "".join(
            f"{f'{recall.right} of {recall.asked}':>14}"
            for recall in (played.recall[memory][group] for group in (BEFORE, OURS, THEIRS))
        )
        t.line(f"    {pad(label, 22)}" + (t.good(cells) if memory == MERGED else cells))
    if played.warned:
        screen.prose(
            f"{count(played.warned, 'merge')} of {len(played.people)} warned that both sides wrote the same keys."
        )


def _graph(screen: Screen, branched: Branched) -> None:
    """The commits as `git log --graph` has them, the newest first."""
    head = branched.merge.commit
    if head is not None:
        _node(screen, "*  ", head, OURS, f"merge of {THEIRS}")
    screen.terminal.line("    |\\")
    for commit, words in reversed(branched.told[THEIRS]):
        _node(screen, "| *", commit, THEIRS, words)
    for commit, words in reversed(branched.told[OURS]):
        _node(screen, "* |", commit, OURS, words)
    screen.terminal.line("    |/")
    _node(screen, "*  ", branched.base, "", f"what was told before, {count(branched.base.generation, 'commit')}")


def _node(screen: Screen, edge: str, commit: Commit, branch: str, words: str) -> None:
    t = screen.terminal
    t.line(f"    {edge}  {t.accent(commit.short)}  {pad(branch, 7)}  {shorten(words, t.width - 34)}")


def show_undone(screen: Screen, undone: Sequence[Undone], told: Committed) -> None:
    """A false memory of the first person, step by step, and what came of all of them."""
    t = screen.terminal
    first = undone[0]
    words = {line.commit.id: line.words for line in told.log} | {first.told_false.id: first.false.told}
    screen.heading(
        "A false memory, rolled back",
        f"Person 1 said: “{first.fact.told}” Now comes what is not so. {first.fact.question}",
    )

    def step(label: str, text: str, mark: str = "") -> None:
        t.line(f"    {t.dim(pad(label, 10))}{shorten(text, t.width - 18)}{mark}")

    step("it says", first.before)
    step("is told", first.false.told)
    step("it says", first.misled)
    shares = sorted(first.blame.shares, key=lambda share: -share.share)[:BLAMED] if first.blame else []
    for label, share in zip(["blame", *[""] * BLAMED], shares, strict=False):
        commit = share.commit
        if commit is not None:
            id_and_words = f"{t.accent(commit.short)}  {shorten(words.get(commit.id, ''), t.width - 38)}"
            t.line(f"    {t.dim(pad(label, 10))}{share.share:+.2f}  {id_and_words}")
    same = screen.verdict(first.same_bytes, "the same, bit for bit", "NOT the same")
    t.line(f"    {t.dim(pad('rollback', 10))}to {t.accent(first.back_to.short)}: the memory is {same}")
    step("it says", first.after)
    t.line()
    blamed = [one.blamed for one in undone if one.blame]
    same_bytes, same_answer = sum(one.same_bytes for one in undone), sum(one.same_answer for one in undone)
    screen.prose(
        f"Of {count(len(undone), 'false fact')}, one at a time: {sum(one.false_said for one in undone)} became the answer. After the "
        f"rollback {same_bytes} memories are bit for bit those of before, and {same_answer} answers word for word."
    )
    screen.prose(
        f"Blame (what is left of each commit in the answer's read), asked once a person, named the false commit in {sum(blamed)} of "
        f"{len(blamed)}."
    )


def show_survived(screen: Screen, death: Death, again: Reopened) -> None:
    """A process was killed at work, and the store was opened again."""
    t = screen.terminal
    how = "kill -9" if os.name == "posix" else "no chance to tidy up"
    screen.heading(
        f"The process is killed ({how})",
        "A new process opens the store and commits turn after turn to a fork of person 1's memory, until it is killed at a random moment.",
    )
    lost = screen.verdict(not again.lost, "none lost", f"{again.lost} LOST")
    acknowledged = f"{count(len(death.acknowledged), 'commit')} acknowledged, {lost}."
    t.line(f"    Process {death.pid}, killed after {duration(death.at_work_s)}: {acknowledged}")
    if again.invented:
        t.line(f"    {t.bad(f'{again.invented} commits are there that it never made known')}")
    clean = screen.verdict(not again.damages, "clean", f"{again.damages} DAMAGED")
    t.line(f"    The store opened in {duration(again.opening_s)}; every commit looked at: {clean}.")
    same = screen.verdict(again.same_bytes, "the same, bit for bit", "NOT the same")
    t.line(f"    Process {os.getpid()} reads those turns as well, and {again.tokens} tokens more:")
    t.line(f"    its memory and the one in the store are {same}.")
    t.line(t.dim(f"    the store's was asked: {again.question}"))
    t.line(t.dim(f"    and said: {shorten(again.reply, t.width - 16)}"))
    t.line("    From here on everybody's memory is the one in the store.")

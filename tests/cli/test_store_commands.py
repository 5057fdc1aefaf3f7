"""The commands over a store: what they print, what they change, and what they refuse."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import deltamem_rt as dm
from deltamem_rt._cli import main
from telling import fed

KEY = bytes(range(32))
FOREIGN = "evil \x1b]0;title\x07 \u202e \x9b2J"
COMMIT = {
    *(
        "id",
        "parents",
        "generation",
        "branch",
        "time",
        "time_ms",
        "message",
        "meta",
        "tokens_seen",
        "fingerprint",
        "parts",
    ),
    *("state", "state_bytes"),
}
MEMORY = {
    *("name", "head", "branches", "tags", "commits", "bytes", "max_commits", "max_bytes", "when_full"),
    *("created", "created_ms", "changed", "changed_ms", "expires", "expires_ms"),
}
CHANGE = {"norm_before", "norm_after", "norm_change", "cosine", "cosine_of_change", "effective_rank"}
REFS = {"name", "head", "branches", "tags"}


@pytest.fixture(scope="module")
def model(bundle) -> dm.Model:
    return dm.Model.load(bundle, device="cpu", threads=1)


def commit(session: dm.Session, seed: int, message: str = "", meta: dict | None = None) -> None:
    fed(session, seed)
    session.commit(message, meta)


def fill(model: dm.Model, store: dm.Store, name: str = "ada") -> None:
    """first - second - ours  - merge (v1) - {"turn": 5}, with `aside` behind second and the merge between."""
    with model.session(name, store=store) as session:
        commit(session, 1, "first\nand more of it")
        commit(session, 2, "second")
        session.branch("aside")
        commit(session, 3, "theirs")
        session.checkout("main")
        commit(session, 4, "ours")
        session.merge("aside")
        session.tag("v1")
        commit(session, 5, meta={"turn": 5})


@pytest.fixture(scope="module")
def filled(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "filled.db"
    with dm.Store(path) as store:
        fill(model, store)
    return path


@pytest.fixture
def path(filled, tmp_path) -> Path:
    """A store of one's own with `ada` in it."""
    return Path(shutil.copy(filled, tmp_path / "memories.db"))


@pytest.fixture
def run(deltamem, path):
    """Runs a command over that store."""
    return lambda command, *words: deltamem(command, "--store", path, *words)


@pytest.fixture
def asked(run):
    """Runs a command with --json and returns its object."""

    def found(command, *words):
        outcome = run(command, "--json", *words)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return found


def opened(path: Path, **options) -> dm.Store:
    return dm.Store(path, read_only=True, **options)


def named(text: str, path: Path, name: str = "ada") -> str:
    """The text with commits by their words instead of ids, and without times."""
    with opened(path) as store:
        for one in store.log(name, [*store.branches(name), *store.tags(name)], 1000):
            words = one.message.partition("\n")[0].replace(" ", "-") or "turn"
            text = text.replace(one.id, f"<{words}>").replace(one.short, f"<{words}>")
            text = text.replace(f"{one.time:%Y-%m-%d %H:%M:%S}", "TIME")
    return text


# ---------------------------------------------------------------- looking


def test_log_lists_commits_with_labels_and_words(run, path):
    outcome = run("log", "ada")
    assert outcome.code == 0, outcome.err
    assert sorted(named(outcome.out, path).splitlines()) == [
        "<first>  TIME  first",
        "<merge-aside-into-main>  TIME  (tag: v1) merge aside into main",
        "<ours>  TIME  ours",
        "<second>  TIME  second",
        "<theirs>  TIME  (aside) theirs",
        '<turn>  TIME  (HEAD -> main) {"turn": 5}',
    ]


def test_log_draws_a_graph(run, path):
    assert named(run("log", "ada", "--graph").out, path) == (
        '* <turn>  TIME  (HEAD -> main) {"turn": 5}\n'
        "* <merge-aside-into-main>  TIME  (tag: v1) merge aside into main\n"
        "|\\\n"
        "| * <theirs>  TIME  (aside) theirs\n"
        "* | <ours>  TIME  ours\n"
        "|/\n"
        "* <second>  TIME  second\n"
        "* <first>  TIME  first\n"
    )


def test_a_cut_off_graph_has_open_ends_and_says_that_there_is_more(run, path):
    assert named(run("log", "ada", "--graph", "-n", 2).out, path) == (
        '* <turn>  TIME  (HEAD -> main) {"turn": 5}\n'
        "* <merge-aside-into-main>  TIME  (tag: v1) merge aside into main\n"
        "|\\\n"
        "(the last 2; -n 0 lists all)\n"
    )
    assert "-n 0" not in run("log", "ada", "-n", 6).out
    assert len(run("log", "ada", "-n", 0).out.splitlines()) == 6


def test_log_begins_where_it_is_told_in_any_order_of_words(run, path):
    assert named(run("log", "ada", "-n", 1, "aside").out, path).splitlines()[0] == "<theirs>  TIME  (aside) theirs"
    assert len(run("log", "ada", "v1~1", "--graph", "aside").out.splitlines()) == 5
    run("rollback", "ada", "HEAD~2")
    assert "theirs" not in run("log", "ada").out
    assert "theirs" in run("log", "ada", "--all").out
    outcome = run("log", "ada", "--all", "aside")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


def test_log_as_json_has_full_ids_and_utc_times(asked, path):
    found = asked("log", "ada")
    assert found.keys() == REFS | {"commits", "more"}
    with opened(path) as store:
        log = store.log("ada")
        assert (found["branches"], found["tags"], found["head"]) == (store.branches("ada"), store.tags("ada"), "main")
    assert [one["id"] for one in found["commits"]] == [one.id for one in log]
    assert not found["more"]
    assert asked("log", "ada", "-n", 5)["more"]
    for one, original in zip(found["commits"], log, strict=True):
        assert one.keys() == COMMIT
        assert datetime.fromisoformat(one["time"]) == original.time
        assert one["time"].endswith("Z")
        assert one["time_ms"] == round(original.time.timestamp() * 1000)
        assert (tuple(one["parents"]), one["message"]) == (original.parents, original.message)
        assert (one["meta"], one["parts"]) == (original.meta, original.parts)


def test_show_tells_a_commit_and_what_it_moved(run, asked, path):
    lines = named(run("show", "ada", "v1").out, path).splitlines()
    assert lines[:4] == [
        "commit <merge-aside-into-main>",
        "  refs     (tag: v1)",
        "  parents  <ours>, <theirs>",
        "  branch   main",
    ]
    assert [line.split()[3].rstrip(",") for line in lines if "moved" in line] == ["<ours>", "<theirs>"]
    assert lines[-1] == "    merge aside into main"
    assert run("show", "ada", "HEAD~4").out.endswith("\n\n    first\n    and more of it\n")
    found = asked("show", "ada", "v1")
    assert found.keys() == {"commit", "refs", "changes"}
    assert found["refs"] == ["v1"]
    assert [change["parent"] for change in found["changes"]] == found["commit"]["parents"]
    with opened(path) as store:
        assert found["changes"][0]["norm_change"] == store.diff("ada", "v1~1", "v1").total.norm_change
    first = asked("show", "ada", "HEAD~4")
    assert [(one["parent"], one["norm_before"]) for one in first["changes"]] == [(None, 0)]


def test_diff_is_a_table(run, asked, path):
    with opened(path) as store:
        expected = store.diff("ada")
        table = repr(expected).splitlines()
    lines = run("diff", "ada").out.splitlines()
    assert lines[0] == table[0]
    assert [line.split() for line in lines[2:]] == [line.split() for line in table[2:]]
    assert max(map(len, lines)) <= 80
    found = asked("diff", "ada", "--directions", 1)
    assert found.keys() == {"a", "b", "total", "heads"}
    assert found["total"].keys() == CHANGE
    head = found["heads"][0]
    assert head.keys() == CHANGE | {"layer", "head", "directions"}
    assert head["directions"][0]["key"] == expected.heads[0].directions[0].key.tolist()
    assert len(head["directions"]) == 1


def test_diff_knows_what_to_compare_with(run, path):
    def title(*words):
        return named(run("diff", "ada", *words).out, path).splitlines()[0]

    assert title("aside") == "<theirs> -> <turn>"
    assert title("aside", "v1") == "<theirs> -> <merge-aside-into-main>"
    assert title("--empty", "aside") == "empty -> <theirs>"
    run("rollback", "ada", "HEAD~4")
    assert title() == "empty -> <first>"
    assert run("diff", "ada", "--empty", "aside", "v1").code == 2


def test_reflog_tells_the_way_back(run, asked, path):
    run("rollback", "ada", "aside")
    lines = named(run("reflog", "ada", "main", "-n", 3).out, path).splitlines()
    assert [line.split("  ")[-1] for line in lines] == [
        "move",
        "branch main: rollback",
        "branch main: commit",
        "branch main: merge",
    ]
    assert "<theirs>" in lines[1]
    found = asked("reflog", "ada")
    assert found.keys() == REFS | {"moves"}
    assert found["moves"][0].keys() == {"number", "kind", "name", "old", "new", "time", "time_ms", "why"}
    assert run("rollback", "ada", found["moves"][0]["old"]).code == 0


def test_names_lists_memories_with_sizes(run, asked, path, model):
    with dm.Store(path) as store, model.session("bob", store=store) as session:
        commit(session, 9)
        store.set_ttl("bob", 3600)
    lines = run("names").out.splitlines()
    assert lines[0].split() == ["commits", "bytes", "branches", "changed", "expires", "name"]
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:3]] == [("6", "ada"), ("1", "bob")]
    assert lines[3].startswith("2 memories, 7 commits, ")
    assert run("names", "-q").out == "ada\nbob\n"
    assert run("names", "-q", "b").out == "bob\n"
    assert run("names", "z").out == f"no memory whose name begins with 'z' in {path}\n"
    found = asked("names")
    assert found.keys() == {"place", "memories"}
    assert [one.keys() for one in found["memories"]] == [MEMORY, MEMORY]
    assert [one["expires"] is None for one in found["memories"]] == [True, False]


def test_blame_names_the_teller_and_writes_nothing(run, asked, path, model):
    with dm.Store(path) as store, model.session("carl", store=store, autocommit=True) as session:
        for message in ("My dog is called Bruno.", "I live in Lisbon.", "My sister is called Anna."):
            session.chat(message, max_new_tokens=16).read()
    before = path.read_bytes()
    found = asked("blame", "carl", "What is my dog called?", "--threads", 1)
    assert path.read_bytes() == before
    assert sum(share["share"] for share in found["shares"]) + found["rest"] == pytest.approx(1)
    with opened(path) as store:
        teller = store.show("carl", "HEAD~2")
    assert max(found["shares"], key=lambda share: share["share"])["commit"]["id"] == teller.id
    assert "Bruno" in found["reply"]
    lines = run("blame", "carl", "What is my dog called?", "--threads", 1, "--top", 2).out.splitlines()
    assert "Bruno" in lines[0]
    assert teller.short in lines[1]
    assert lines[-1].endswith("1 other commit")
    older = asked("blame", "carl", "What is my dog called?", "--threads", 1, "--ref", "HEAD~1")
    assert len(older["shares"]) == 2
    cut = run("blame", "carl", "What is my dog called?", "--threads", 1, "-n", 1).out.splitlines()
    assert "older commits" in cut[-1]


# ---------------------------------------------------------------- changing


def test_branches_are_made_used_and_deleted(run, asked, path):
    assert named(run("branch", "ada", "idea", "HEAD~2").out, path) == "branch idea at <ours>  ours\n"
    assert named(run("branch", "ada").out, path) == (
        '  aside  <theirs>  TIME  theirs\n  idea   <ours>  TIME  ours\n* main   <turn>  TIME  {"turn": 5}\n'
    )
    assert run("branch", "ada", "--use", "idea").out == "HEAD is idea now\n"
    assert asked("branch", "ada")["head"] == "idea"
    assert "HEAD -> idea" in run("log", "ada").out
    refused = run("branch", "ada", "-d", "idea")
    assert (refused.code, "branch that HEAD means" in refused.err) == (2, True)
    run("branch", "ada", "--use", "main")
    deleted = run("branch", "ada", "-d", "idea").out.splitlines()
    assert deleted[1].startswith("undo: deltamem branch --store ")
    assert asked("branch", "ada").keys() == REFS
    assert main(shlex.split(deleted[1].removeprefix("undo: deltamem "))) == 0
    assert sorted(asked("branch", "ada")["branches"]) == ["aside", "idea", "main"]
    assert run("branch", "ada", "x", "--use", "main").code == 2


def test_tags_are_made_and_deleted(run, asked, path):
    assert named(run("tag", "ada", "v0", "HEAD~4").out, path) == "tag v0 at <first>  first\n"
    assert [line.split()[0] for line in run("tag", "ada").out.splitlines()] == ["v0", "v1"]
    assert sorted(asked("tag", "ada", "v2")["tags"]) == ["v0", "v1", "v2"]
    assert run("tag", "ada", "-d", "v1").out.startswith("tag v1 deleted; it was at ")
    assert sorted(asked("tag", "ada")["tags"]) == ["v0", "v2"]
    assert run("tag", "ada", "main").code == 2


def test_merges_say_what_they_came_to_and_how_to_undo_them(run, asked, path, model):
    assert run("merge", "ada", "aside").out == "main holds all of aside already\n"
    forward = run("merge", "ada", "main", "--into", "aside").out.splitlines()
    assert named(forward[0], path) == "aside went forward to <turn>, as main: it had nothing of its own"
    assert main(shlex.split(forward[1].removeprefix("undo: deltamem "))) == 0
    assert "aside) theirs" in run("log", "ada", "--all").out
    with dm.Store(path) as store, model.session("ada", store=store, branch="aside") as session:
        commit(session, 11, "more of theirs")
    with opened(path) as store:
        head = store.branches("ada")["main"]
    lines = run("merge", "ada", "aside", "-m", "both", "--meta", '{"by": "me"}').out.splitlines()
    assert named(lines[0], path) == "merged aside into main: <both>, over their common <theirs>"
    assert lines[1].startswith("overlap of what both wrote 0.")
    assert main(shlex.split(lines[-1].removeprefix("undo: deltamem "))) == 0
    found = asked("merge", "ada", "aside")
    assert found.keys() == {
        *("branch", "case", "commit", "bases", "overlap", "loss_ours", "loss_theirs", "warning"),
    }
    assert (found["case"], found["commit"]["parents"][0]) == ("three-way", head)
    with opened(path) as store:
        both = store.show("ada", "main@{2}")
        assert (both.message, both.meta) == ("both", {"by": "me"})
    for meta in ("{", "[1]"):
        assert run("merge", "ada", "aside", "--meta", meta).code == 2


def test_a_merge_of_two_tellings_warns(deltamem, tmp_path, model):
    path = tmp_path / "twice.db"
    with dm.Store(path) as store, model.session("ada", store=store, autocommit=True) as session:
        session.chat("My dog is called Bruno.", max_new_tokens=8).read()
        session.branch("aside")
        session.chat("My sister is called Anna.", max_new_tokens=8).read()
        session.checkout("main")
        session.chat("My sister is called Carla.", max_new_tokens=8).read()
    outcome = deltamem("merge", "ada", "aside", "--store", path)
    assert outcome.code == 0
    assert "\nwarning: both sides wrote much the same keys" in outcome.out
    deltamem("rollback", "ada", "main@{1}", "--store", path)
    assert json.loads(deltamem("merge", "ada", "aside", "--store", path, "--json").out)["warning"].startswith("both")


def test_a_rollback_prints_how_to_undo_it_and_that_works(run, asked, path):
    def at(branch):
        with opened(path) as store:
            return store.show("ada", branch)

    before, moves = at("main").id, len(asked("reflog", "ada", "main")["moves"])
    lines = run("rollback", "ada", "HEAD~2").out.splitlines()
    assert lines[0] == f"main went from {before[:12]} to {at('main').short}  ours"
    assert run("rollback", "ada", "HEAD").out == f"main is at {at('main').short} already\n"
    assert len(asked("reflog", "ada", "main")["moves"]) == moves + 1
    assert main(shlex.split(lines[1].removeprefix("undo: deltamem "))) == 0
    assert at("main").id == before
    found = asked("rollback", "ada", "aside", "--branch", "aside")
    assert found.keys() == {"branch", "old", "commit"}
    other = run("rollback", "ada", "HEAD~1", "--branch", "aside").out.splitlines()
    assert "--branch aside" in other[1]
    assert run("rollback", "ada", "HEAD", "--branch", "nope").code == 2


# ---------------------------------------------------------------- files, garbage, damage


def test_a_memory_goes_through_a_file_into_a_new_store(run, deltamem, path, tmp_path):
    file, other = tmp_path / "ada.memory", tmp_path / "other.db"
    outcome = run("export", "ada", file)
    assert outcome.out.startswith("ada: 6 commits, 2 branches, 1 tag, written to ")
    assert run("export", "ada", file).code == 2
    assert deltamem("import", file, "--store", other).out.endswith("into a new store\n")
    assert named(deltamem("log", "ada", "--store", other).out, other) == named(run("log", "ada").out, path)
    assert run("import", file).code == 2
    found = json.loads(run("import", file, "--name", "ada again", "--json").out)
    assert found.keys() == {"path", "made_store", "memory"}
    assert (found["memory"]["name"], found["made_store"]) == ("ada again", False)
    exported = json.loads(run("export", "ada", tmp_path / "b", "--json").out)
    assert exported.keys() == {"path", "file_bytes", "memory"}
    assert exported["file_bytes"] == (tmp_path / "b").stat().st_size


def test_an_import_that_fails_leaves_no_new_store(deltamem, path, tmp_path):
    (tmp_path / "bad").write_bytes(b"no memory at all")
    before = sorted(tmp_path.iterdir())
    for words in (("bad", "new.db"), ("nothing", "new.db"), ("bad", "nowhere/new.db")):
        outcome = deltamem("import", tmp_path / words[0], "--store", tmp_path / words[1])
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert sorted(tmp_path.iterdir()) == before


def test_delete_wants_a_yes_where_nobody_can_be_asked(run, asked, path):
    refused = run("delete", "ada")
    assert (refused.code, "--yes" in refused.err) == (2, True)
    assert run("names", "-q").out == "ada\n"
    assert asked("delete", "ada", "--yes").keys() == {"deleted", "key_destroyed"}
    assert run("names", "-q").out == ""
    assert run("delete", "ada", "--yes").code == 2


def test_gc_says_what_it_freed(run, asked, path):
    assert "undo" in run("rollback", "ada", "HEAD~4").out
    run("branch", "ada", "-d", "aside")
    run("tag", "ada", "-d", "v1")
    first, second = run("gc", "--reflog", 0).out.splitlines()
    assert first.startswith("taken away: 5 commits, 5 states, ")
    assert second.startswith("freed ")
    assert len(run("log", "ada", "--all").out.splitlines()) == 1
    found = asked("gc", "--no-compact")
    assert found == {"memories": 0, "commits": 0, "states": 0, "moves": 0, "bytes_before": None, "bytes_after": None}
    assert run("gc", "--reflog", -1).code == 2
    assert run("delete", "ada", "--yes").out.splitlines()[1].startswith("its bytes leave the file with: deltamem gc ")


def test_a_clean_store_is_clean_and_needs_no_repair(run, asked, path, tmp_path):
    outcome = run("verify", "--repair", tmp_path / "out.db")
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "looked at 1 memory, 6 commits, 6 states, 8 moves",
        "all is as it was written; nothing to repair",
    ]
    assert not (tmp_path / "out.db").exists()
    assert asked("verify") == {
        "clean": True,
        "memories": 1,
        "commits": 6,
        "states": 6,
        "moves": 8,
        "unreachable": 0,
        "damages": [],
        "repair": None,
    }


def hurt(path: Path) -> None:
    """One byte of one state is another one, wherever the file has that state."""
    with opened(path) as store:
        states = {
            commit.id: store.snapshot("ada", commit.id).memory.tobytes()
            for commit in store.log("ada", ["main", "aside"])
        }
        memory = states.pop(store.show("ada", "v1").id)
    places = (memory[at : at + 32] for at in range(0, len(memory), 32))
    needle = next(place for place in places if not any(place in state for state in states.values()))
    data = path.read_bytes()
    assert needle in data
    path.write_bytes(data.replace(needle, bytes([needle[0] ^ 0xFF]) + needle[1:]))


def test_a_file_that_may_be_any_file_is_refused_and_not_repaired(run, path, tmp_path):
    path.write_bytes(b"no store at all " * 10_000)
    for words in ((), ("--repair", tmp_path / "out.db")):
        outcome = run("verify", *words)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert "is no memory store" in outcome.err
    assert not (tmp_path / "out.db").exists()


@pytest.mark.parametrize("damage", ["a bit", "cut off", "the header"])
def test_damage_is_told_line_by_line_and_what_is_whole_is_saved(run, deltamem, path, tmp_path, damage):
    if damage == "a bit":
        hurt(path)
    elif damage == "cut off":
        os.truncate(path, path.stat().st_size * 2 // 3)
    else:
        with path.open("r+b") as file:
            file.seek(64)
            file.write(b"x" * 256)
    before, out = path.read_bytes(), tmp_path / "saved.db"
    outcome = run("verify")
    assert outcome.code == 1
    assert outcome.out.startswith("damaged: ")
    assert f"verify --store {path} --repair OUT" in outcome.out
    found = json.loads(run("verify", "--json").out)
    assert not found["clean"]
    assert found["damages"][0].keys() == {"memory", "place", "what"}
    assert (found["commits"] is None) == (damage != "a bit")
    outcome = run("verify", "--repair", out)
    assert path.read_bytes() == before
    assert outcome.code == 1, outcome.err
    assert " into " in outcome.out.splitlines()[-1]
    assert any(line.startswith("lost or changed: ") for line in outcome.out.splitlines())
    assert deltamem("verify", "--store", out).code == 0
    saved = json.loads(deltamem("log", "ada", "--all", "--store", out, "--json").out)
    # Of a file that was cut, what stood before the cut.
    assert len(saved["commits"]) >= {"a bit": 5, "cut off": 1, "the header": 6}[damage]
    if damage == "a bit":
        # v1, a merge, is lost: its tag goes back along the branch it was made on, whatever the ids.
        assert json.loads(deltamem("show", "ada", "v1", "--store", out, "--json").out)["commit"]["message"] == "ours"
    again = run("verify", "--repair", out)
    assert (again.code, "is there already" in again.err) == (2, True)
    form = json.loads(run("verify", "--json", "--repair", tmp_path / "second.db").out)
    assert form["repair"].keys() == {"path", "memories", "commits", "losses"}


# ---------------------------------------------------------------- keys and places


def test_a_key_comes_from_a_file_as_bytes_or_digits(deltamem, tmp_path, model):
    path = tmp_path / "sealed.db"
    with dm.Store(path, key=KEY) as store:
        fill(model, store)
    (tmp_path / "raw").write_bytes(KEY)
    (tmp_path / "hex").write_text(f"{KEY.hex()}\n")
    (tmp_path / "other").write_bytes(bytes(32))
    (tmp_path / "word").write_text("hunter2 is no key")
    for good in ("raw", "hex"):
        assert deltamem("names", "-q", "--store", path, "--key-file", tmp_path / good).out == "ada\n"
    for bad in (
        (),
        ("--key-file", tmp_path / "other"),
        ("--key-file", tmp_path / "word"),
        ("--key-file", tmp_path / "no"),
    ):
        outcome = deltamem("names", "--store", path, *bad)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert "hunter2" not in outcome.err
    undo = deltamem("rollback", "ada", "HEAD~1", "--store", path, "--key-file", tmp_path / "hex").out.splitlines()[1]
    assert main(shlex.split(undo.removeprefix("undo: deltamem "))) == 0
    hurt_key = ("--store", path, "--key-file", tmp_path / "raw")
    os.truncate(path, path.stat().st_size * 2 // 3)
    assert deltamem("verify", *hurt_key, "--repair", tmp_path / "saved.db").code == 1
    saved = ("--store", tmp_path / "saved.db", "--key-file", tmp_path / "raw")
    assert deltamem("verify", *saved).code == 0
    gone = deltamem("delete", *saved, "ada", "--yes")
    assert "its key is destroyed" in gone.out


EVERY = [
    *(("names",), ("log", "ada"), ("show", "ada"), ("diff", "ada"), ("blame", "ada", "What?"), ("branch", "ada")),
    *(
        ("branch", "ada", "x"),
        ("tag", "ada"),
        ("tag", "ada", "x"),
        ("merge", "ada", "x"),
        ("rollback", "ada", "HEAD~1"),
    ),
    *(("reflog", "ada"), ("export", "ada", "OUT"), ("delete", "ada", "--yes"), ("gc",), ("verify",)),
]


@pytest.mark.parametrize("words", EVERY, ids=lambda words: " ".join(words))
def test_a_mistyped_path_is_told_and_makes_no_file(deltamem, tmp_path, words):
    words = [tmp_path / "out" if word == "OUT" else word for word in words]
    outcome = deltamem(*words, "--store", tmp_path / "nowhere.db")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "nowhere.db" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [words for words in EVERY if "ada" in words], ids=lambda words: " ".join(words))
def test_an_unknown_memory_is_told_with_one_that_sounds_like_it(run, path, words):
    outcome = run(*("adda" if word == "ada" else word for word in words))
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "there is no memory 'adda'" in outcome.err
    assert "is it 'ada'?" in outcome.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "ada", "nope"), "there are the branches aside, main"),
        (("show", "ada", "HEAD~9"), "goes beyond the first commit"),
        (("log", "ada", "main@{99}"), "moves ago"),
        (("branch", "ada", "main"), "already"),
        (("branch", "ada", "a b"), "expected"),
        (("branch", "ada", "-d", "nope"), "deltamem branch"),
        (("branch", "ada", "--use", "nope"), "deltamem branch"),
        (("merge", "ada", "aside", "--into", "nope"), "deltamem branch"),
        (("merge", "ada", "nope"), "names no commit"),
        (("log", "\udcff"), "not UTF-8"),
        (("log", "a\x1b[2J"), "control character"),
        (("log", "ada", "a\x1b[2J"), "names no commit"),
        (("import", "nothing"), "there is no file nothing"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(run, words, said):
    outcome = run(*words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert said in outcome.err
    assert "Store." not in outcome.err
    assert "\x1b" not in outcome.err


def test_places_that_are_no_stores_are_told(deltamem, tmp_path):
    (tmp_path / "text").write_text("a text\n" * 1000)
    for place in (tmp_path / "text", tmp_path, "http://example.com/store"):
        outcome = deltamem("log", "ada", "--store", place)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    outcome = deltamem("gc", "--store", "redis://me:hunter2@127.0.0.1:1?timeout_ms=200")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "hunter2" not in outcome.err


def test_a_name_that_looks_like_an_option_stands_behind_dashes(run, path, model):
    with dm.Store(path) as store, model.session("-x", store=store) as session:
        commit(session, 1, "one")
        commit(session, 2, "two")
    assert len(run("log", "--", "-x").out.splitlines()) == 2
    lines = run("rollback", "--", "-x", "HEAD~1").out.splitlines()
    assert lines[0].startswith("main went from ")
    assert main(shlex.split(lines[1].removeprefix("undo: deltamem "))) == 0
    assert len(run("log", "-n", 5, "--", "-x").out.splitlines()) == 2


def test_the_store_may_stand_in_the_environment(deltamem, path, monkeypatch):
    assert deltamem("log", "ada").code == 2
    monkeypatch.setenv("DELTAMEM_STORE", str(path))
    with opened(path) as store:
        before = store.branches("ada")["main"]
    assert deltamem("log", "ada").code == 0
    assert deltamem("rollback", "ada", "HEAD~1").out.endswith(f"undo: deltamem rollback ada {before[:12]}\n")


def test_foreign_text_does_not_steer_the_terminal(run, asked, path, model):
    with dm.Store(path) as store, model.session("a\u202eda", store=store) as session:
        commit(session, 1, FOREIGN, {"key": FOREIGN})
        commit(session, 2, meta={"key": FOREIGN})
        session.branch("b\u202e")
    commands = [("log", "--graph"), ("show",), ("show", "HEAD~1"), ("branch",), ("reflog",), ("diff",), ("tag",)]
    for command, *rest in commands:
        outcome = run(command, "a\u202eda", *rest)
        assert outcome.code == 0, outcome.err
        assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(outcome.out)
        assert asked(command, "a\u202eda", *[word for word in rest if word != "--graph"])
        assert run(command, "a\u202eda", *rest, "--json").out.isascii()
    assert "\u202e" not in run("names").out
    assert asked("log", "a\u202eda")["commits"][1]["message"] == FOREIGN


# ---------------------------------------------------------------- other processes, terminals


HOLDER = """
import sys, time
import deltamem_rt as dm

store = dm.Store(sys.argv[1], shared=sys.argv[2] == "shared")
store.tag("ada", "held")
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(path):
    """Starts a process that has the store open for writing."""
    started = []

    def start(how: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), how], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_store_that_another_process_writes_is_told(run, holder):
    holder("alone")
    for words in (("log", "ada"), ("rollback", "ada", "HEAD~1"), ("verify",)):
        outcome = run(*words)
        assert (outcome.code, outcome.err.count("\n")) == (1, 1)
        assert "held by another process" in outcome.err


def test_beside_a_writer_that_shares_its_file_one_may_look(run, holder):
    holder("shared")
    assert "tag: held" in run("log", "ada").out
    assert run("verify").code == 0
    assert run("gc").code == 1


def test_after_a_writer_was_killed_a_look_puts_the_file_in_order(run, holder):
    process = holder("alone")
    process.send_signal(signal.SIGKILL)
    process.wait()
    outcome = run("log", "ada")
    assert outcome.code == 0, outcome.err
    assert "tag: held" in outcome.out
    assert run("log", "ada").err == ""


class Screen:
    """`deltamem` in a terminal of so many columns."""

    def __init__(self, columns: int, *words: object, **environment: str) -> None:
        self.master, slave = pty.openpty()
        import fcntl
        import struct
        import termios

        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        around = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deltamem_rt._cli", *map(str, words)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**around, "TERM": "xterm", **environment},
        )
        os.close(slave)

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def text(self) -> str:
        """All that it shows until it ends."""
        shown = b""
        try:
            while chunk := os.read(self.master, 4096):
                shown += chunk
        except OSError:
            pass  # Linux says so when the last writer has gone
        self.process.wait(60)
        os.close(self.master)
        return shown.decode().replace("\r\n", "\n")


def test_lines_fit_a_terminal_and_programs_get_them_whole(run, path, model):
    long = "a message that goes on " * 10
    with dm.Store(path) as store, model.session("ada", store=store) as session:
        commit(session, 7, long)
    for columns in (80, 120):
        lines = Screen(columns, "log", "ada", "--graph", "--store", path, NO_COLOR="1").text().splitlines()
        assert max(map(len, lines)) == columns
        assert lines[0].endswith("…")
        for words in (("show", "ada", "v1"), ("diff", "ada"), ("reflog", "ada"), ("branch", "ada")):
            lines = Screen(columns, *words, "--store", path, NO_COLOR="1").text().splitlines()
            assert max(map(len, lines)) <= columns, lines
    assert long.strip() in run("log", "ada").out


def test_colours_are_for_terminals(run, path):
    shown = Screen(100, "log", "ada", "--graph", "--store", path).text()
    assert "\x1b[33m" in shown
    assert "\x1b[36mHEAD -> \x1b[0m\x1b[32mmain\x1b[0m" in shown
    plain = Screen(100, "log", "ada", "--graph", "--store", path, NO_COLOR="1").text()
    assert "\x1b" not in plain
    assert plain == run("log", "ada", "--graph").out


def test_delete_asks_for_the_name_on_a_terminal(run, path):
    screen = Screen(80, "delete", "ada", "--store", path)
    screen.type("bda\n")
    assert "nothing was deleted" in screen.text()
    assert screen.process.returncode == 1
    assert run("names", "-q").out == "ada\n"
    screen = Screen(80, "delete", "ada", "--store", path)
    screen.type("ada\n")
    assert "ada deleted, with 6 commits" in screen.text()
    assert run("names", "-q").out == ""


def test_the_same_commands_work_on_a_server(redis_server, deltamem, tmp_path, path, filled):
    address = f"{redis_server}?prefix={tmp_path.name}:"
    file = tmp_path / "ada.memory"
    assert deltamem("export", "ada", file, "--store", path).code == 0
    imported = json.loads(deltamem("import", file, "--store", address, "--json").out)
    assert not imported["made_store"]
    on_file = deltamem("log", "ada", "--graph", "--store", path).out
    assert deltamem("log", "ada", "--graph", "--store", address).out == on_file
    assert deltamem("rollback", "ada", "HEAD~1", "--store", address).code == 0
    assert deltamem("verify", "--store", address).code == 0
    assert deltamem("gc", "--store", address).code == 0
    assert "gc" not in deltamem("delete", "ada", "--yes", "--store", address).out
    assert deltamem("names", "-q", "--store", address).out == ""


def test_a_look_loads_neither_numpy_nor_the_other_commands(path):
    code = (
        "import sys\nfrom deltamem_rt._cli import main\n"
        "for words in (['log', 'ada', '--graph'], ['show', 'ada'], ['names'], ['verify']):\n"
        f"    assert main([*words, '--store', {str(path)!r}]) == 0\n"
        "print([name for name in sys.modules if name == 'numpy' or name.endswith(('_cli.chat', '_cli.demo'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

"""Commits, branches, tags, refs: what a session and a store say and do, on every kind of store."""

from __future__ import annotations

import shutil
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

import deltamem_rt as dm
from sealing import resealed
from telling import fed


@pytest.fixture
def session(model: dm.Model, store: dm.Store):
    with model.session("ada", store=store) as session:
        yield session


def test_a_first_commit_makes_the_memory_and_says_what_it_holds(model, store, session):
    assert (session.head, session.branch_name, session.dirty, session.log()) == (None, "main", False, [])
    assert store.names() == []
    fed(session, 1)
    assert session.dirty
    before = datetime.now(UTC)
    first = session.commit("the first", {"who": "ada", "n": [1, 2.5, None]})
    assert not session.dirty
    assert session.head == first == session.show() == store.show("ada")
    assert (first.parents, first.branch, first.generation) == ((), "main", 1)
    assert (first.message, first.meta) == ("the first", {"who": "ada", "n": [1, 2.5, None]})
    assert first.tokens_seen == session.tokens_seen == 4
    assert first.fingerprint == model.fingerprint
    assert first.parts == model.manifest["fingerprint_parts"]
    assert abs(first.time - before) < timedelta(seconds=10)
    assert first.time.tzinfo is not None
    assert store.names() == ["ada"]
    assert "ada" in store
    assert "bob" not in store
    assert store.snapshot("ada") == session.snapshot()
    with pytest.raises(AttributeError):
        first.message = "another"  # type: ignore[misc]


def test_a_session_begins_where_the_memory_was_left_bit_for_bit(model, store, session):
    fed(session, 1)
    session.commit()
    expected = session.snapshot()
    with model.session("ada", store=store) as later:
        assert later.snapshot() == expected
        assert later.head == session.head
        # The sampler goes on too: the same tokens are drawn.
        assert [later.generate("Hi.", temperature=1.0, max_new_tokens=6).read()] == [
            session.generate("Hi.", temperature=1.0, max_new_tokens=6).read()
        ]


def test_the_refs_of_git_name_commits(store, session):
    commits = []
    for seed in range(4):
        fed(session, seed)
        commits.append(session.commit(f"number {seed}"))
    session.tag("v1", "HEAD~2")
    for text, commit in {
        "HEAD": 3,
        "@": 3,
        "main": 3,
        "HEAD~2": 1,
        "HEAD^": 2,
        "main~3": 0,
        "v1": 1,
        "v1~1": 0,
        commits[2].id: 2,
        commits[2].id[:10]: 2,
        "main@{1}": 2,
        "@{2}": 1,
    }.items():
        assert session.show(text) == commits[commit], text
        assert store.show("ada", text) == commits[commit], text
    assert session.log(2) == [commits[3], commits[2]] == store.log("ada", n=2)
    assert session.log(ref="v1") == [commits[1], commits[0]]
    assert store.log("ada", ["v1", "main~1"]) == [commits[2], commits[1], commits[0]]
    assert store.branches("ada") == {"main": commits[3].id}
    assert store.tags("ada") == {"v1": commits[1].id}
    for wrong in ("HEAD~9", "nobody", "HEAD~x", "main@{99}", "^3", ""):
        with pytest.raises((dm.RefError, dm.NotFoundError)):
            session.show(wrong)
    with pytest.raises(dm.ExistsError, match="v1"):
        session.tag("v1")
    with pytest.raises(KeyError, match="there is no memory"):
        store.show("bob")


def test_head_is_where_the_session_stands_whoever_else_commits(model, store, session):
    fed(session, 1)
    mine = session.commit()
    with model.session("ada", store=store) as other:
        fed(other, 2)
        theirs = other.commit()
    assert session.show("HEAD") == mine
    assert session.show("main") == theirs
    assert store.show("ada") == theirs


def test_branches_go_their_own_ways(store, session):
    fed(session, 1)
    root = session.commit("root")
    session.branch("what-if")
    assert session.branch_name == "what-if"
    fed(session, 2)
    other = session.commit("what if")
    assert (other.branch, other.parents) == ("what-if", (root.id,))
    assert session.checkout("main") == root
    assert session.branch_name == "main"
    assert session.snapshot() == store.snapshot("ada", "main")
    assert store.branches("ada") == {"main": root.id, "what-if": other.id}
    with pytest.raises(dm.ExistsError):
        session.branch("what-if")
    store.delete_branch("ada", "what-if")
    with pytest.raises(dm.RefError, match="in use"):
        store.delete_branch("ada", "main")


def test_a_branch_made_before_the_first_commit_gets_it(store, session):
    session.branch("trunk")
    fed(session, 1)
    assert session.commit().branch == "trunk"
    assert set(store.branches("ada")) == {"trunk"}
    assert store.show("ada").branch == "trunk"


def test_a_branch_takes_along_what_is_not_committed(session):
    fed(session, 1)
    session.commit()
    fed(session, 2)
    state = session.memory
    session.branch("aside")
    assert session.dirty
    assert np.array_equal(session.memory, state)


def test_a_commit_by_itself_is_looked_at_and_left_by_a_branch(session):
    fed(session, 1)
    first = session.commit()
    fed(session, 2)
    session.commit()
    session.checkout(first.id[:12])
    assert (session.branch_name, session.head) == (None, first)
    fed(session, 3)
    with pytest.raises(dm.RefError, match=r"on no branch; session\.branch"):
        session.commit()
    assert session.dirty
    session.branch("from-here")
    assert session.commit().parents == (first.id,)


@pytest.mark.parametrize(
    "leave", [lambda s: s.checkout("HEAD~1"), lambda s: s.rollback("HEAD~1"), lambda s: s.merge("aside")]
)
def test_what_is_not_committed_is_not_given_up_without_force(session, leave):
    fed(session, 1)
    session.commit()
    session.branch("aside")
    fed(session, 2)
    session.commit()
    session.checkout("main")
    fed(session, 3)
    session.commit()
    fed(session, 4)
    state, head = session.snapshot(), session.head
    with pytest.raises(dm.SessionError, match=r"not committed; commit\(\) it first, or give it up with force=True"):
        leave(session)
    assert (session.snapshot(), session.head) == (state, head)


def test_force_gives_up_what_is_not_committed(session):
    fed(session, 1)
    session.commit()
    expected = session.snapshot()
    fed(session, 2)
    session.checkout("HEAD", force=True)
    assert session.snapshot() == expected
    assert session.branch_name == "main"
    session.feed([5, 6, 7])  # a turn that goes on
    session.rollback("HEAD", force=True)
    assert (session.snapshot(), session.position) == (expected, 0)


def test_a_rollback_is_bit_equal_and_can_be_taken_back(store, session):
    states = []
    for seed in range(3):
        fed(session, seed)
        session.commit()
        states.append(session.snapshot())
    last = session.head
    session.rollback("HEAD~2")
    assert session.snapshot() == states[0] == store.snapshot("ada")
    assert session.memory.tobytes() == states[0].memory.tobytes()
    assert session.rollback("main@{1}") == last
    assert session.snapshot() == states[2]
    assert [move.why for move in store.reflog("ada", n=3)] == ["rollback", "rollback", "commit"]
    assert store.reflog("ada")[0].new == last.id


def test_a_rollback_does_not_undo_what_another_worker_committed(model, store, session):
    for seed in range(2):
        fed(session, seed)
        session.commit()
    with model.session("ada", store=store) as other:
        fed(other, 9)
        theirs = other.commit()
    state = session.snapshot()
    with pytest.raises(dm.ConflictError) as caught:
        session.rollback("HEAD~1")
    assert caught.value.found == theirs.id
    assert store.show("ada") == theirs
    assert session.snapshot() == state


def test_a_fork_goes_its_own_way(model, store, session):
    fed(session, 1)
    session.commit()
    fed(session, 2)
    head = session.commit()
    session.fork("ada, copied")
    fed(session, 3)
    session.commit()
    with model.session("ada, copied", store=store) as copy:
        assert copy.head == head
    with pytest.raises(dm.ExistsError):
        session.fork("ada, copied")
    store.fork("ada", "ada, early", "HEAD~2")
    assert len(store.log("ada, early")) == 1
    store.delete("ada")
    assert store.names("ada") == ["ada, copied", "ada, early"]


def test_a_diff_says_what_changed(session):
    fed(session, 1)
    first = session.commit()
    fed(session, 2)
    second = session.commit()
    diff = session.diff()
    assert (diff.a, diff.b) == (first, second)
    before, after = session.diff(None, "HEAD~1"), session.diff(None)
    assert before.a is None
    assert before.total.norm_before == 0.0
    assert before.total.norm_after == pytest.approx(diff.total.norm_before)
    assert after.total.norm_after == pytest.approx(diff.total.norm_after)
    layers, heads, rank, _ = session.memory.shape
    assert [(head.layer, head.head) for head in diff.heads] == [(i, h) for i in range(layers) for h in range(heads)]
    # The directions of a head add up to its change, the largest first.
    sizes = [direction.size for direction in session.diff(directions=rank).heads[0].directions]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(size**2 for size in sizes) == pytest.approx(diff.heads[0].change.norm_change ** 2)
    direction = diff.heads[0].directions[0]
    assert direction.key.shape == direction.value.shape == (rank,)
    fed(session, 3)
    now = session.diff("HEAD", None)
    assert now.b is None
    assert now.total.norm_change > 0
    assert session.diff("HEAD", "HEAD").total.norm_change == 0


def test_names_are_any_unicode_and_no_paths(model, store):
    names = ["ada", "../../etc/passwd", "Zoë", "日本", "é" * 256, "a b\u202ec"]
    for name in names:
        with model.session(name, store=store) as session:
            session.commit()
    assert store.names() == sorted(names, key=str.encode)
    assert store.names("a") == ["a b\u202ec", "ada"]
    for wrong in ("", "a\nb", "é" * 257):
        with pytest.raises(ValueError, match="name"):
            model.session(wrong, store=store)


def test_a_quota_refuses_or_prunes(model, store, session):
    fed(session, 0)
    session.commit()
    store.set_quota("ada", max_commits=2)
    fed(session, 1)
    session.commit()
    fed(session, 2)
    with pytest.raises(dm.QuotaError, match="its quota is 2"):
        session.commit()
    assert session.dirty
    store.set_quota("ada", max_commits=2, when_full="prune")
    head = session.commit()
    assert session.log() == [head, *session.log()[1:]]
    assert len(session.log()) <= 2
    assert store.info("ada").when_full == "prune"


def test_a_memory_of_another_model_is_refused_by_what_differs(model, store, session, tmp_path):
    fed(session, 1)
    session.commit()
    copy = tmp_path / "other"
    shutil.copytree(dm.default_bundle(), copy)
    other = made_of_another(copy, "adapter")
    with pytest.raises(dm.FingerprintError, match="the adapter differs") as caught:
        other.session("ada", store=store)
    assert caught.value.differs == ("adapter",)
    assert isinstance(caught.value, ValueError)


def made_of_another(bundle: Path, part: str) -> dm.Model:
    """The same bundle under a fingerprint of which one part is another."""
    import json

    from blake3 import blake3

    path = bundle / "deltamem.json"
    manifest = json.loads(path.read_text())
    old = manifest["fingerprint"]
    manifest["fingerprint_parts"][part] = blake3(b"another").hexdigest()
    path.write_text(json.dumps(manifest, indent=2))
    resealed(bundle)
    try:
        return dm.Model.load(bundle, threads=1)
    except dm.BundleError as error:
        # The message says which fingerprint the parts make.
        import re

        made = next(text for text in re.findall(r"[0-9a-f]{64}", str(error)) if text != old)
    manifest["fingerprint"] = made
    path.write_text(json.dumps(manifest, indent=2))
    resealed(bundle)
    return dm.Model.load(bundle, threads=1)


def test_calls_without_a_store_say_what_is_missing(model):
    with model.session("ada") as session:
        for call in (
            session.commit,
            session.log,
            session.merge,
            lambda: session.checkout("main"),
            lambda: session.blame("x"),
        ):
            with pytest.raises(dm.SessionError, match=r"has no store.*session\(name, store=store\)"):
                call()
        assert (session.head, session.branch_name, session.dirty) == (None, None, False)
    with pytest.raises(ValueError, match="needs a name"):
        model.session(store=dm.Store.in_memory())
    with pytest.raises(ValueError, match="without a store"):
        model.session("ada", autocommit=True)


def test_a_branch_that_is_not_there_is_no_empty_memory(model, store, session):
    fed(session, 1)
    session.commit()
    with pytest.raises(dm.NotFoundError, match='no branch "mian"'):
        model.session("ada", store=store, branch="mian")


def test_what_cannot_be_a_commit_is_refused_before_anything_is_written(store, session):
    for meta in ({"x": float("nan")}, {"x": object()}, [1], {"x": "y" * 20_000}):
        with pytest.raises((ValueError, TypeError)):
            session.commit(meta=meta)
    with pytest.raises(ValueError, match="65536"):
        session.commit("x" * 70_000)
    assert store.names() == []


def test_eight_threads_commit_to_one_store_each_to_its_own_memory(model, store):
    errors = []

    def work(number: int) -> None:
        try:
            with model.session(f"user {number}", store=store, autocommit=True) as session:
                for turn in range(10):
                    fed(session, 100 * number + turn)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in range(8):
        log = store.log(f"user {number}")
        assert [commit.meta["turn"] for commit in log] == list(range(10, 0, -1))
    assert store.verify().clean

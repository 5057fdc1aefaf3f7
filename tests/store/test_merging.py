"""Merges: of branches, of workers on one memory, and what they cost."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest

import deltamem_rt as dm
from telling import fed, knows, tell


@pytest.fixture
def session(model: dm.Model, store: dm.Store):
    with model.session("ada", store=store) as session:
        yield session


def two_branches(session: dm.Session) -> None:
    """main and aside, with a commit each of its own, on main."""
    fed(session, 1)
    session.commit("root")
    session.branch("aside")
    fed(session, 2)
    session.commit("aside")
    session.checkout("main")
    fed(session, 3)
    session.commit("ours")


def test_a_merge_is_the_sum_of_both_changes(store, session):
    two_branches(session)
    base, ours, theirs = (store.snapshot("ada", ref) for ref in ("main~1", "main", "aside"))
    merged = session.merge("aside", "both")
    assert (merged.case, merged.commit.message) == ("three-way", "both")
    assert merged.commit.parents == (session.show("main@{1}").id, session.show("aside").id)
    assert merged.bases == (session.show("aside~1").id,)
    expected = ours.memory.astype(np.float64) + theirs.memory - base.memory
    np.testing.assert_array_equal(session.memory, expected.astype(np.float32))
    assert session.tokens_seen == 12
    assert session.turns == 3
    assert session.snapshot() == store.snapshot("ada")
    assert 0 <= merged.overlap <= 1
    # And a second time there is nothing left to merge.
    assert session.merge("aside").case == "up-to-date"
    assert session.show() == merged.commit


def test_a_fast_forward_makes_no_commit(store, session):
    fed(session, 1)
    session.commit()
    session.branch("aside")
    fed(session, 2)
    theirs = session.commit()
    state = session.snapshot()
    session.checkout("main")
    merged = session.merge("aside")
    assert (merged.case, merged.commit) == ("fast-forward", theirs)
    assert session.snapshot() == state
    assert store.branches("ada") == {"main": theirs.id, "aside": theirs.id}
    assert store.reflog("ada", "main")[0].why == "fast-forward"


def test_a_store_merges_without_a_model(store, session):
    two_branches(session)
    result = store.merge("ada", "aside")
    assert result.case == "three-way"
    assert result.commit.message == "merge aside into main"
    assert store.merge("ada", "main", into="aside").case == "fast-forward"
    assert store.branches("ada")["aside"] == store.branches("ada")["main"] == result.commit.id


def test_two_branches_that_merged_each_other_are_merged_once(store, session):
    # main and aside each take the other's first change, then go on: the change of aside must not come in twice.
    two_branches(session)
    root = store.snapshot("ada", "main~1").memory.astype(np.float64)
    ours, theirs = store.snapshot("ada", "main").memory, store.snapshot("ada", "aside").memory
    store.tag("ada", "ours", "main")
    session.merge("aside")
    fed(session, 4)
    session.commit()
    main_own = session.memory.astype(np.float64) - store.snapshot("ada", "main~1").memory
    session.checkout("aside")
    session.merge("ours")
    fed(session, 5)
    session.commit()
    aside_own = session.memory.astype(np.float64) - store.snapshot("ada", "aside~1").memory
    merged = session.merge("main")
    assert merged.case == "three-way"
    assert len(merged.bases) == 2
    expected = ours.astype(np.float64) + theirs - root + main_own + aside_own
    np.testing.assert_allclose(session.memory, expected, atol=1e-5)


def test_the_loser_of_a_race_gets_both_heads_and_merges(model, store, session):
    fed(session, 1)
    root = session.commit()
    with model.session("ada", store=store) as other:
        fed(other, 2)
        fed(session, 3)
        theirs = other.commit("theirs")
        before = session.snapshot()
        with pytest.raises(dm.ConflictError) as caught:
            session.commit("ours")
        assert (caught.value.expected, caught.value.found) == (root.id, theirs.id)
        assert session.snapshot() == before
        merged = session.merge(message="ours")
        assert (merged.case, merged.commit.message) == ("three-way", "ours")
        assert merged.commit.parents == (theirs.id,)
        base = store.snapshot("ada", root.id).memory.astype(np.float64)
        expected = before.memory + store.snapshot("ada", theirs.id).memory.astype(np.float64) - base
        np.testing.assert_array_equal(session.memory, expected.astype(np.float32))
        # The winner has nothing of its own any more, so it only catches up.
        caught_up = other.merge()
        assert (caught_up.case, caught_up.commit) == ("fast-forward", merged.commit)
        assert other.snapshot().memory.tobytes() == session.snapshot().memory.tobytes()


@pytest.mark.filterwarnings("ignore::deltamem_rt.MergeWarning")
def test_a_rollback_by_another_worker_is_not_undone_by_a_merge(model, store, session):
    fed(session, 1)
    root = session.commit()
    fed(session, 2)
    session.commit("false")
    with model.session("ada", store=store) as other:
        fed(other, 3)
        session.rollback(root.id)
        merged = other.merge()
        assert merged.commit.parents == (root.id,)
        # What came in is the other's own turn, without the commit that it grew on.
        change = store.snapshot("ada").memory.astype(np.float64) - store.snapshot("ada", root.id).memory
        fresh = other.diff(root.id, "HEAD")
        assert fresh.total.norm_change == pytest.approx(float(np.linalg.norm(change)), rel=1e-6)
        assert [commit.message for commit in other.log()] == ["", ""]


@pytest.mark.filterwarnings("ignore::deltamem_rt.MergeWarning")
def test_two_first_commits_are_brought_together(model, store, session):
    with model.session("ada", store=store) as other:
        fed(other, 1)
        other.commit()
        fed(session, 2)
        with pytest.raises(dm.ConflictError) as caught:
            session.commit()
        assert caught.value.expected is None
        ours, theirs = session.memory, other.memory
        session.merge()
        np.testing.assert_array_equal(session.memory, (ours.astype(np.float64) + theirs).astype(np.float32))


def test_a_memory_that_was_deleted_does_not_come_back_by_itself(model, store, session):
    fed(session, 1)
    session.commit()
    store.delete("ada")
    fed(session, 2)
    for call in (session.commit, session.merge):
        with pytest.raises(dm.ConflictError) as caught:
            call()
        assert caught.value.found is None
    assert store.names() == []


def test_eight_threads_on_one_memory_lose_nothing(model, store):
    with model.session("ada", store=store) as first:
        first.commit("root")
    failures = []

    def work(number: int) -> None:
        try:
            with model.session("ada", store=store) as session:
                for turn in range(5):
                    fed(session, 10 * number + turn, count=2)
                    try:
                        session.commit(f"{number}.{turn}")
                    except dm.ConflictError:
                        session.merge(message=f"{number}.{turn}")
        except BaseException as error:
            failures.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dm.MergeWarning)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    log = store.log("ada", n=100)
    told = sorted(f"{number}.{turn}" for number in range(8) for turn in range(5))
    assert sorted(commit.message for commit in log) == [*told, "root"]
    assert log[0].tokens_seen == 80
    assert store.snapshot("ada").turns == 40
    assert store.verify().clean


def test_a_merge_warns_by_a_figure_when_both_sides_wrote_the_same_keys(model, relations):
    relation = next(relation for relation in relations if relation.name == "sister name")
    with dm.Store.in_memory() as store, model.session("ada", store=store, autocommit=True) as session:
        session.chat("My dog is called Bruno.").read()
        session.branch("aside")
        session.chat(relation.tell[0].format(value="Anna")).read()
        session.checkout("main")
        session.chat(relation.tell[0].format(value="Carla")).read()
        with pytest.warns(dm.MergeWarning, match=r"overlap 0\.\d\d"):
            result = session.merge("aside")
    assert max(result.loss_ours, result.loss_theirs) >= 5**-0.5


def test_facts_told_on_two_branches_are_both_recalled(model, facts, record_property):
    right = asked = alone = 0
    with dm.Store.in_memory() as store, warnings.catch_warnings():
        warnings.simplefilter("error", dm.MergeWarning)
        for seed in range(30):
            drawn = facts(7000 + seed)
            with model.session(f"user {seed}", store=store, autocommit=True) as session:
                session.commit("root")
                session.branch("aside")
                for fact in drawn[:4]:
                    tell(session, fact)
                alone += sum(knows(model, session, fact) for fact in drawn[:4])
                session.checkout("main")
                for fact in drawn[4:]:
                    tell(session, fact)
                alone += sum(knows(model, session, fact) for fact in drawn[4:])
                assert session.merge("aside").case == "three-way"
                right += sum(knows(model, session, fact) for fact in drawn)
                asked += len(drawn)
    record_property("recall after merge", f"{right} of {asked}; before, each on its branch: {alone}")
    print(f"recall after merge: {right} of {asked}; before, each on its branch: {alone}")
    assert right >= 0.90 * asked, f"{right} of {asked} after the merge, {alone} before it"

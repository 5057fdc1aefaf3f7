"""Blame: whose writes a read consists of, and whether it names the commit that told a fact."""

from __future__ import annotations

import pytest

import deltamem_rt as dm
from telling import knows, tell


@pytest.fixture
def store():
    with dm.Store.in_memory() as store:
        yield store


@pytest.fixture
def session(model: dm.Model, store: dm.Store):
    with model.session("ada", store=store, autocommit=True) as session:
        yield session


def total(blame: dm.Blame) -> float:
    return sum(share.share for share in blame.shares) + blame.rest


@pytest.mark.parametrize("attribution", ["difference", "surviving"])
def test_shares_add_up_and_the_session_stays_as_it_is(session, facts, attribution):
    drawn = facts(1, 4)
    for fact in drawn:
        tell(session, fact)
    before = session.snapshot()
    blame = session.blame(drawn[1].question, attribution=attribution)
    assert session.snapshot() == before
    assert not session.dirty
    assert total(blame) == pytest.approx(1, abs=1e-9)
    assert blame.rest == pytest.approx(0, abs=1e-9)
    assert [share.commit for share in blame.shares] == session.log()
    for share in blame.shares:
        assert sum(share.layers) == pytest.approx(share.share)
    assert sum(blame.layers) == pytest.approx(1)
    assert blame.top.commit == session.log()[2]
    assert drawn[1].value in blame.reply
    assert blame.tokens > len(session.blame(drawn[1].question, max_new_tokens=0).shares)


def test_a_walk_that_is_cut_off_says_what_is_left(session, facts):
    for fact in facts(2, 4):
        tell(session, fact)
    whole = session.blame("What is my dog called?")
    cut = session.blame("What is my dog called?", 2)
    assert [share.share for share in cut.shares] == [share.share for share in whole.shares[:2]]
    assert cut.rest == pytest.approx(sum(share.share for share in whole.shares[2:]))
    assert "older commits" in repr(cut)


def test_history_that_was_pruned_is_rest(model, facts):
    with (
        dm.Store.in_memory(max_commits=4, when_full="prune") as store,
        model.session("ada", store=store, autocommit=True) as session,
    ):
        for fact in facts(3, 6):
            tell(session, fact)
        blame = session.blame("What is my dog called?")
        assert len(blame.shares) < len(session.log()) <= 4
        assert total(blame) == pytest.approx(1)
        assert abs(blame.rest) > 1e-3


def test_what_is_not_committed_has_its_own_share(model, store, facts):
    drawn = facts(4, 3)
    with model.session("bob", store=store) as session:
        tell(session, drawn[0])
        blame = session.blame(drawn[0].question)
        assert [share.commit for share in blame.shares] == [None]
        assert "not committed" in repr(blame)
        session.commit()
        tell(session, drawn[1])
        blame = session.blame(drawn[1].question)
        assert [share.commit for share in blame.shares] == [None, session.head]
        assert blame.top.commit is None
        assert total(blame) == pytest.approx(1)


def test_token_ids_are_read_as_they_are(session, facts, model):
    tell(session, facts(5, 1)[0])
    ids = model.encode("What is my dog called?")
    blame = session.blame(ids)
    assert (blame.tokens, blame.reply) == (len(ids), None)


def test_an_empty_memory_reads_nothing(session):
    session.commit()
    with pytest.raises(ValueError, match="reads nothing"):
        session.blame("What is my dog called?")
    with pytest.raises(ValueError, match='expected "difference" or "surviving"'):
        session.blame("What?", attribution="other")


def test_a_merges_sides_get_their_own_shares_also_when_branches_merged_each_other(session, store, facts):
    drawn = facts(6, 6)
    tell(session, drawn[0])
    session.branch("aside")
    tell(session, drawn[1])
    aside = session.head
    session.checkout("main")
    tell(session, drawn[2])
    ours = session.head
    store.tag("ada", "ours", "main")
    session.merge("aside")
    tell(session, drawn[3])
    session.checkout("aside")
    session.merge("ours")
    tell(session, drawn[4])
    assert len(session.merge("main").bases) == 2
    blame = session.blame(drawn[1].question)
    assert blame.merges == 3
    assert total(blame) == pytest.approx(1, abs=1e-9)
    assert blame.rest == pytest.approx(0, abs=1e-9)
    assert len(blame.shares) == len(session.log()) == 8
    assert blame.top.commit == aside
    assert session.blame(drawn[2].question).top.commit == ours
    for share in blame.shares:
        if len(share.commit.parents) == 2:
            assert abs(share.share) < 1e-5


def test_blame_names_the_commit_that_told_the_fact(model, facts, record_property):
    figures = {}
    with dm.Store.in_memory() as store:
        named = {"difference": 0, "surviving": 0}
        asked = recalled = named_recalled = 0
        for seed in range(15):
            drawn = facts(8000 + seed)
            with model.session(f"user {seed}", store=store, autocommit=True) as session:
                tellers = []
                for fact in drawn:
                    tell(session, fact)
                    tellers.append(session.head)
                for fact, teller in zip(drawn, tellers, strict=True):
                    known = knows(model, session, fact)
                    for attribution in named:
                        hit = session.blame(fact.question, attribution=attribution).top.commit == teller
                        named[attribution] += hit
                        named_recalled += hit and known and attribution == "difference"
                    asked += 1
                    recalled += known
        figures = f"named {named} of {asked}; difference, of the {recalled} that are recalled: {named_recalled}"
    record_property("blame", figures)
    print(figures)
    assert named["difference"] >= 0.90 * asked, figures

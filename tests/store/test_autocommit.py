"""Every way a turn ends is a commit, and a commit that fails loses no turn."""

from __future__ import annotations

import asyncio

import pytest

import deltamem_rt as dm


@pytest.fixture
def store():
    with dm.Store.in_memory() as store:
        yield store


@pytest.fixture
def session(model: dm.Model, store: dm.Store):
    session = model.session("ada", store=store, autocommit=True)
    yield session
    session.close(discard=True)


def turns(store: dm.Store) -> list[int]:
    return [commit.meta["turn"] for commit in reversed(store.log("ada"))] if "ada" in store else []


def test_at_end_turn_if_there_was_a_turn(store, session):
    assert session.autocommit
    session.end_turn()
    assert turns(store) == []
    session.feed("One.")
    assert turns(store) == []
    session.end_turn()
    session.end_turn()
    assert turns(store) == [1]
    assert not session.dirty


def test_at_the_end_of_a_chats_reply(store, session):
    reply = session.chat("My dog is called Bruno.")
    pieces = list(reply)
    assert turns(store) == [1]
    assert "".join(pieces) == reply.text
    session.chat("My sister is called Anna.").read()
    assert turns(store) == [1, 2]
    assert store.snapshot("ada") == session.snapshot()


def test_at_the_end_of_a_reply_in_asyncio(store, session):
    async def talk() -> None:
        async for _ in session.chat("My dog is called Bruno."):
            pass

    asyncio.run(talk())
    assert turns(store) == [1]


def test_when_a_reply_is_closed(store, session):
    reply = session.chat("My dog is called Bruno.")
    next(reply)
    reply.close()
    assert turns(store) == [1]
    reply.close()
    assert turns(store) == [1]


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.feed("More."),
        lambda s: s.generate("More.", max_new_tokens=1),
        lambda s: s.chat("More."),
        lambda s: s.end_turn(),
        lambda s: s.snapshot(),
        lambda s: s.checkout("HEAD"),
        lambda s: s.diff(None, None),
    ],
    ids=["feed", "generate", "chat", "end_turn", "snapshot", "checkout", "diff"],
)
def test_at_the_next_call_after_a_reply_that_was_broken_off(store, session, call):
    session.chat("My dog is called Bruno.").read()
    for _ in session.chat("My sister is called Anna."):
        break
    assert session.dirty
    assert turns(store) == [1]
    call(session)
    assert turns(store) == [1, 2]
    # The commit holds the turn that was broken off and nothing of what came after it.
    assert store.snapshot("ada").turns == 2


def test_an_explicit_commit_takes_the_place_of_the_automatic_one(store, session):
    for _ in session.chat("My sister is called Anna."):
        break
    session.commit("by hand")
    assert [commit.message for commit in store.log("ada")] == ["by hand"]


def test_at_close_also_when_the_turn_goes_on_or_the_block_fails(model, store):
    with model.session("ada", store=store, autocommit=True) as session:
        session.feed("A turn that nobody ended.")
    assert turns(store) == [1]

    def failing() -> None:
        with model.session("ada", store=store, autocommit=True) as session:
            for _ in session.chat("A reply that nobody waits for."):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert turns(store) == [1, 2]
    with model.session("ada", store=store, autocommit=True):
        pass
    assert turns(store) == [1, 2]


def test_reset_and_restore_end_no_turn(store, session):
    session.feed("One.")
    session.reset()
    assert turns(store) == []
    assert not session.dirty
    session.feed("Two.")
    session.end_turn()
    snapshot = session.snapshot()
    session.feed("Three.")
    session.restore(snapshot)
    assert turns(store) == [1]
    assert not session.dirty


@pytest.mark.parametrize("end", [lambda s: s.end_turn(), lambda s: s.close()], ids=["end_turn", "close"])
def test_a_commit_that_fails_keeps_the_turn_for_the_next_one(store, session, end):
    session.chat("My dog is called Bruno.").read()
    store.set_quota("ada", max_commits=1)
    session.feed("A turn that finds no room.")
    state = None
    with pytest.raises(dm.QuotaError):
        end(session)
    state = session.snapshot()
    assert state.turns == 2
    assert session.dirty
    assert turns(store) == [1]
    store.set_quota("ada")
    session.feed("And another turn.")
    session.end_turn()
    assert turns(store) == [1, 3]
    assert store.snapshot("ada") == session.snapshot()


def test_a_reply_is_given_whole_before_its_commit_fails(store, session):
    session.chat("My dog is called Bruno.").read()
    store.set_quota("ada", max_commits=1)
    reply = session.chat("My sister is called Anna.")
    with pytest.raises(dm.QuotaError):
        reply.read()
    assert reply.text.endswith(".")
    assert reply.stats.finish_reason == "eos"
    assert list(reply) == []


def test_a_session_that_could_not_commit_stays_open_until_it_can_or_is_given_up(model, tmp_path):
    store = dm.Store(tmp_path / "memories.db")
    session = model.session("ada", store=store, autocommit=True)
    session.feed("One.")
    store.close()
    with pytest.raises(dm.UnavailableError):
        session.close()
    assert not session.closed
    assert session.snapshot().tokens_seen > 0
    session.close(discard=True)
    assert session.closed
    session.close()


def test_a_conflict_at_the_end_of_a_turn_is_merged(model, store, session):
    session.chat("My dog is called Bruno.").read()
    with model.session("ada", store=store, autocommit=True) as other:
        other.chat("My sister is called Anna.").read()
    reply = session.chat("My aunt is called Karen.")
    with pytest.raises(dm.ConflictError) as caught:
        reply.read()
    assert (caught.value.expected, caught.value.found) == (session.head.id, store.show("ada").id)
    assert (caught.value.memory, caught.value.branch) == ("ada", "main")
    result = session.merge()
    assert result.case == "three-way"
    assert result.commit.meta == {"turn": 3}
    assert not session.dirty
    for question, answer in (("What is my dog called?", "Bruno"), ("What is my sister's name?", "Anna")):
        assert answer in session.chat(question).read()
    assert turns(store) == [1, 2, 3, 4, 5]

"""Export and import, deletion that can be proved, keys, redaction, damage, time to live: what a person does to memories without a model."""

from __future__ import annotations

import secrets
import time
from datetime import timedelta
from pathlib import Path

import pytest

import deltamem_rt as dm
from telling import fed, knows, tell


def grown(model: dm.Model, store: dm.Store, name: str = "ada", commits: int = 3) -> list[dm.Commit]:
    with model.session(name, store=store) as session:
        for seed in range(commits):
            fed(session, seed)
            session.commit(f"{name}: number {seed}")
        session.tag("v1", "HEAD~1")
        return session.log()


def test_an_exported_memory_is_the_same_in_any_other_store(model, store, tmp_path):
    log = grown(model, store)
    store.export("ada", tmp_path / "ada.memory")
    with pytest.raises(FileExistsError):
        store.export("ada", tmp_path / "ada.memory")
    with pytest.raises(dm.ExistsError):
        store.import_(tmp_path / "ada.memory")
    assert store.import_(tmp_path / "ada.memory", "ada again") == "ada again"
    with dm.Store(tmp_path / "another.db", key=secrets.token_bytes(32)) as other:
        assert other.import_(str(tmp_path / "ada.memory")) == "ada"
        for found, name in ((other, "ada"), (store, "ada again")):
            assert found.log(name) == log
            assert found.tags(name) == store.tags("ada")
            assert found.snapshot(name) == store.snapshot("ada")
    with pytest.raises(FileNotFoundError):
        store.import_(tmp_path / "nothing")
    (tmp_path / "bad").write_bytes(b"no memory at all")
    with pytest.raises((dm.StoreFormatError, dm.DamagedError)):
        store.import_(tmp_path / "bad")
    data = bytearray((tmp_path / "ada.memory").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(dm.DamagedError):
        store.import_(tmp_path / "bad")


@pytest.mark.parametrize("key", [None, secrets.token_bytes(32)], ids=["plain", "key"])
def test_deleted_bytes_leave_the_file(model, tmp_path, key):
    path = tmp_path / "memories.db"
    with dm.Store(path, key=key) as store:
        grown(model, store, "bob")
        with model.session("ada, to be forgotten", store=store) as session:
            fed(session, 7)
            session.commit("the secret of ada")
            state = session.memory.tobytes()[:64]
            full = session.memory.tobytes()
        needle = next(full[at : at + 32] for at in range(0, len(full), 32) if full[at : at + 32].count(0) < 8)
        store.gc()
        before = path.read_bytes()
        assert (needle in before, b"the secret of ada" in before) == ((True, True) if key is None else (False, False))
        store.delete("ada, to be forgotten")
        report = store.gc()
        assert report.bytes_after <= report.bytes_before
        after = path.read_bytes()
        assert needle not in after
        assert b"ada, to be forgotten" not in after
        assert b"the secret of ada" not in after
        assert store.names() == ["bob"]
        assert store.verify().clean
    assert state


def test_a_key_is_32_bytes_and_the_only_one(model, tmp_path):
    path, key = tmp_path / "memories.db", secrets.token_bytes(32)
    with dm.Store(path, key=key) as store:
        assert store.encrypted
        grown(model, store)
    assert b"ada" not in path.read_bytes()
    with dm.Store(path, key=key.hex()) as store:
        assert store.names() == ["ada"]
    for wrong in (secrets.token_bytes(32), None):
        with pytest.raises(dm.StoreKeyError):
            dm.Store(path, key=wrong)
    with dm.Store(tmp_path / "plain.db"):
        pass
    with pytest.raises(dm.StoreKeyError):
        dm.Store(tmp_path / "plain.db", key=key)
    for bad in (b"short", "zz" * 32, "hunter2", key.hex()[:-2]):
        with pytest.raises(ValueError, match="expected 32 bytes or 64 hexadecimal digits") as caught:
            dm.Store(tmp_path / "other.db", key=bad)
        assert str(bad) not in str(caught.value)
    with pytest.raises(TypeError):
        dm.Store(tmp_path / "other.db", key=7)
    assert not (tmp_path / "other.db").exists()


def test_places_that_are_no_stores_are_named(tmp_path):
    (tmp_path / "text").write_text("a text\n" * 1000)
    with pytest.raises(dm.StoreFormatError, match="no memory store"):
        dm.Store(tmp_path / "text")
    with pytest.raises(ValueError, match="no store for http://"):
        dm.Store("http://example.com/store")
    with pytest.raises(dm.UnavailableError, match="does not answer"):
        dm.Store("redis://127.0.0.1:1?timeout_ms=200")
    with pytest.raises(ValueError, match="are for files"):
        dm.Store("redis://127.0.0.1:1", read_only=True)
    with pytest.raises(FileNotFoundError):
        dm.Store(tmp_path / "nothing.db", read_only=True)
    for options in ({"ttl": 0}, {"ttl": float("nan")}, {"max_commits": 0}, {"when_full": "burst"}):
        with pytest.raises(ValueError, match="expected"):
            dm.Store.in_memory(**options)


def test_a_closed_store_refuses_and_says_so(tmp_path, model):
    store = dm.Store(tmp_path / "memories.db")
    store.close()
    store.close()
    with pytest.raises(dm.UnavailableError, match="closed"):
        store.names()


def test_a_memory_expires_without_a_change(model):
    with dm.Store.in_memory(ttl=timedelta(milliseconds=150)) as store:
        grown(model, store, commits=2)
        assert store.info("ada").expires is not None
        store.set_ttl("ada", None)
        time.sleep(0.2)
        assert store.names() == ["ada"]
        store.set_ttl("ada", 0.05)
        time.sleep(0.1)
        assert store.names() == []
        with pytest.raises(dm.NotFoundError):
            store.log("ada")
        assert store.stats().expired == 1
        assert store.gc().memories == 1
        assert store.stats().expired == 0


def test_what_nothing_names_goes_with_the_reflog(model, store):
    grown(model, store)
    with model.session("ada", store=store) as session:
        session.rollback("HEAD~2")
    store.delete_tag("ada", "v1")
    assert store.gc().commits == 0
    report = store.gc(reflog=0)
    assert (report.commits, report.states) == (2, 2)
    assert len(store.log("ada")) == store.info("ada").commits == 1
    assert store.verify().clean


def test_stats_say_what_there_is(model, store):
    grown(model, store)
    grown(model, store, "bob", 2)
    stats = store.stats()
    assert (stats.memories, stats.commits, stats.expired) == (2, 5, 0)
    assert stats.encrypted is store.encrypted
    assert stats.place == store.place
    assert stats.bytes > 0
    assert stats.durability


def test_the_last_commit_is_redacted_to_the_bit(model, store):
    log = grown(model, store)
    expected = store.snapshot("ada", "HEAD~1")
    redaction = store.redact("ada", "HEAD")
    assert (redaction.survived, redaction.unseparated, redaction.rewritten) == (1.0, 0.0, 0)
    assert store.snapshot("ada") == expected
    assert redaction.commit == log[1] == store.show("ada")
    assert redaction.still_in == ()
    assert set(store.branches("ada")) == {"main"}
    store.gc(reflog=0)
    with pytest.raises((dm.RefError, dm.NotFoundError)):
        store.show("ada", log[0].id)


def test_a_redacted_fact_is_forgotten_and_the_others_stay(model, facts, record_property):
    forgotten = kept = asked = others = 0
    with dm.Store.in_memory() as store:
        for seed in range(8):
            drawn = facts(9000 + seed, 5)
            name = f"user {seed}"
            with model.session(name, store=store, autocommit=True) as session:
                for fact in drawn[:3]:
                    tell(session, fact)
                secret = session.show("HEAD~1")
                session.branch("aside")
                tell(session, drawn[3])
                session.checkout("main")
                tell(session, drawn[4])
                session.merge("aside")
                before = [knows(model, session, fact) for fact in drawn]
                redaction = store.redact(name, secret.id)
                assert redaction.still_in == ("branch aside",)
                assert redaction.rewritten == 4
                log = store.log(name)
                assert secret not in log
                assert len(log) == 5
                assert [len(commit.parents) for commit in log].count(2) == 1
                assert session.merge().case == "fast-forward"
                after = [knows(model, session, fact) for fact in drawn]
            asked += before[1]
            forgotten += before[1] and not after[1]
            others += sum(before) - before[1]
            kept += sum(a and b for at, (a, b) in enumerate(zip(before, after, strict=True)) if at != 1)
        assert store.verify().clean
    figures = f"redacted facts forgotten {forgotten} of {asked}, others kept {kept} of {others}"
    record_property("redact", figures)
    print(figures)
    assert forgotten >= 0.9 * asked, figures
    assert kept >= 0.9 * others, figures


def test_what_cannot_be_redacted_says_why(model, store):
    grown(model, store, commits=2)
    with model.session("ada", store=store) as session:
        session.branch("aside")
        fed(session, 8)
        aside = session.commit()
        session.checkout("main")
        fed(session, 9)
        session.commit()
        merge = session.merge("aside").commit
    with pytest.raises(dm.RefError, match="is a merge"):
        store.redact("ada", merge.id)
    store.rollback("ada", "main~1")
    with pytest.raises(dm.RefError, match="not in the history of branch"):
        store.redact("ada", aside.id)
    grown(model, store, "bob", 2)
    store.rollback("bob", "HEAD~1")
    with pytest.raises(dm.RefError, match="all that branch"):
        store.redact("bob", "HEAD")


def test_the_first_commit_can_be_redacted(model, store):
    with model.session("ada", store=store) as session:
        for seed in range(3):
            fed(session, seed)
            session.commit(f"number {seed}", {"n": seed})
        redaction = store.redact("ada", "HEAD~2")
        log = store.log("ada")
    assert redaction.rewritten == 2
    assert [(commit.message, commit.meta["n"]) for commit in log] == [("number 2", 2), ("number 1", 1)]
    assert log[1].parents == ()
    assert store.verify().clean


def test_a_damaged_file_is_told_and_saved_as_far_as_it_is_whole(model, tmp_path):
    path = tmp_path / "memories.db"
    with dm.Store(path) as store:
        for number in range(20):
            grown(model, store, f"user {number}", 2)
        assert store.verify().clean
        with pytest.raises(dm.StoreKeyError):
            store.repair(tmp_path / "copy.db", key=secrets.token_bytes(32))
        report = store.repair(tmp_path / "copy.db")
        assert (report.memories, report.commits, report.losses) == (20, 40, ())
    data = bytearray(path.read_bytes())
    states = [at for at in range(0, len(data), 512) if b"memory" in data[at : at + 512]]
    data[states[len(states) // 2] + 100] ^= 0xFF
    path.write_bytes(data)
    report = dm.Store.salvage(path, tmp_path / "saved.db")
    assert report.memories >= 19
    assert report.losses
    with dm.Store(tmp_path / "saved.db") as saved:
        assert saved.verify().clean
        assert len(saved.names("user")) >= 19
    with pytest.raises(FileExistsError):
        dm.Store.salvage(path, tmp_path / "saved.db")


def test_a_fleets_key_may_stand_beside_a_servers_password(redis_server, tmp_path: Path):
    address = f"{redis_server}?prefix={tmp_path.name}-k:"
    key = secrets.token_bytes(32)
    with dm.Store(address, key=key):
        pass
    with pytest.raises(dm.StoreKeyError):
        dm.Store(address)

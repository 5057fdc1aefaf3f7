"""Several processes, and processes that are killed."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import deltamem_rt as dm

TALKER = """
import sys
import deltamem_rt as dm

model = dm.Model.load(dm.default_bundle(), threads=1, verify=False)
with dm.Store(sys.argv[1]) as store, model.session("ada", store=store, autocommit=True) as session:
    print("ready", flush=True)
    while True:
        session.feed([5 + session.turns % 1000, 7, 9])
        session.end_turn()
        print(session.head.id, session.turns, flush=True)
"""

WORKER = """
import sys, warnings
import deltamem_rt as dm

warnings.simplefilter("ignore", dm.MergeWarning)
number, address = int(sys.argv[1]), sys.argv[2]
model = dm.Model.load(dm.default_bundle(), threads=1, verify=False)
with dm.Store(address) as store, model.session("ada", store=store) as session:
    for turn in range(25):
        session.feed([100 + number, 200 + turn])
        session.end_turn()
        try:
            session.commit(f"{number}.{turn}")
        except dm.ConflictError:
            session.merge(message=f"{number}.{turn}")
            print("merged", flush=True)
"""


def started(program: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kill_9_loses_no_acknowledged_commit(tmp_path: Path):
    path = tmp_path / "memories.db"
    rng = random.Random(5)
    acknowledged: list[str] = []
    for _ in range(5):
        process = started(TALKER, path)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(rng.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        # The same stream to its end: `communicate` would not see what `readline` has buffered.
        out = process.stdout.read()
        process.wait()
        # A line that was cut off was not read as one by anybody.
        acknowledged += [line.split()[0] for line in out.splitlines(keepends=True) if line.endswith("\n")]
        with dm.Store(path) as store:
            assert store.verify().clean
            if not acknowledged:
                continue
            log = store.log("ada", n=100_000)
            assert set(acknowledged) <= {commit.id for commit in log}
            # At most one more than what was told: the one whose line the kill cut off, in each run.
            assert [commit.meta["turn"] for commit in log] == list(range(len(log), 0, -1))
            assert store.snapshot("ada").turns == len(log)
    assert len(acknowledged) > 10


def test_one_process_writes_a_file_and_a_second_is_told(tmp_path: Path, model):
    path = tmp_path / "memories.db"
    opening = "import sys, deltamem_rt as dm\ndm.Store(sys.argv[1])"
    with dm.Store(path) as store, model.session("ada", store=store) as session:
        session.commit()
        with pytest.raises(dm.StoreLockedError, match="held by another process"):
            dm.Store(path)
        second = started(opening, path)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "StoreLockedError" in errors
    second = started(opening, path)
    assert second.communicate(timeout=60) == ("", "")


def test_a_reader_sees_what_a_writer_commits_when_both_share_the_file(tmp_path: Path, model):
    path = tmp_path / "memories.db"
    with dm.Store(path, shared=True) as store, model.session("ada", store=store) as session:
        session.commit("one")
        with dm.Store(path, shared=True, read_only=True) as reader:
            assert [commit.message for commit in reader.log("ada")] == ["one"]
            session.commit("two")
            assert [commit.message for commit in reader.log("ada")] == ["two", "one"]
            with model.session("ada", store=reader) as looking, pytest.raises(dm.ReadOnlyError):
                looking.commit()


def test_a_server_that_lets_a_commit_wait_holds_up_no_other_thread(redis_server: str, tmp_path: Path, model):
    with dm.Store(f"{redis_server}?prefix={tmp_path.name}:") as store, model.session("ada", store=store) as session:
        session.commit()
        host, port = redis_server.removeprefix("redis://").split(":")
        with socket.create_connection((host, int(port))) as console:
            console.sendall(b"CLIENT PAUSE 400\r\n")
            assert console.recv(100) == b"+OK\r\n"
            waiting = threading.Thread(target=session.commit)
            began = time.monotonic()
            waiting.start()
            ticks = 0
            while waiting.is_alive():
                time.sleep(0.005)
                ticks += 1
        assert time.monotonic() - began > 0.2
        assert ticks > 20
        assert len(session.log()) == 2


class Relay:
    """Stands before a server. It passes everything on, or loses the answers, or loses the requests."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("redis://").split(":")
        self.server = (host, int(port))
        self.losing: str | None = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.server)
            for way in ((client, server, "requests"), (server, client, "answers")):
                threading.Thread(target=self.pump, args=way, daemon=True).start()

    def pump(self, source: socket.socket, target: socket.socket, what: str) -> None:
        try:
            while data := source.recv(1 << 16):
                if self.losing != what:
                    target.sendall(data)
        except OSError:
            pass
        finally:
            target.close()


@pytest.mark.filterwarnings("ignore::deltamem_rt.MergeWarning")
@pytest.mark.parametrize("losing", ["answers", "requests"])
def test_a_turn_whose_commit_has_an_unknown_fate_is_there_once(redis_server: str, tmp_path: Path, model, losing: str):
    relay = Relay(redis_server)
    with (
        model.session() as alone,
        dm.Store(f"redis://127.0.0.1:{relay.port}?prefix={tmp_path.name}:&timeout_ms=300") as store,
        model.session("ada", store=store, autocommit=True) as session,
    ):

        def turn(number: int) -> None:
            for each in (alone, session):
                each.feed([10 + number, 20 + number])
                each.end_turn()

        turn(1)
        relay.losing = losing
        with pytest.raises(dm.UnavailableError, match="not acknowledged"):
            turn(2)
        assert session.turns == 2
        relay.losing = None
        turn(3)
        turns = [commit.meta["turn"] for commit in store.log("ada")]
        assert turns == ([3, 2, 1] if losing == "answers" else [3, 1])
        assert store.snapshot("ada").memory.tobytes() == session.memory.tobytes() == alone.memory.tobytes()

        # The same for a merge: what was put on top of another worker's commit is not put there twice.
        with model.session("ada", store=store) as other:
            other.feed([70, 80])
            other.end_turn()
            other.commit("other")
        other_change = store.snapshot("ada").memory.astype("f8") - session.memory
        session.feed([14, 24])
        with pytest.raises(dm.ConflictError):
            session.end_turn()
        alone.feed([14, 24])
        alone.end_turn()
        relay.losing = losing
        with pytest.raises(dm.UnavailableError):
            session.merge()
        relay.losing = None
        session.feed([15, 25])
        alone.feed([15, 25])
        with pytest.raises(dm.ConflictError):
            session.end_turn()
        alone.end_turn()
        session.merge()
        both = alone.memory + other_change
        assert abs(store.snapshot("ada").memory - both).max() < 1e-5
        assert store.snapshot("ada").turns == 6
        assert store.verify().clean
    relay.listener.close()


def test_a_commit_that_is_asked_for_again_is_made_once(redis_server: str, tmp_path: Path, model):
    relay = Relay(redis_server)
    with (
        dm.Store(f"redis://127.0.0.1:{relay.port}?prefix={tmp_path.name}:&timeout_ms=300") as store,
        model.session("ada", store=store) as session,
    ):
        session.commit("one")
        relay.losing = "answers"
        session.feed([1, 2])
        with pytest.raises(dm.UnavailableError):
            session.commit("two", {"n": 2})
        relay.losing = None
        two = session.commit("two", {"n": 2})
        assert [commit.message for commit in store.log("ada")] == ["two", "one"]
        assert session.head == two == store.show("ada")
        assert session.commit("two", {"n": 2}) != two
    relay.listener.close()


def test_four_processes_on_one_name_lose_nothing(redis_server: str, tmp_path: Path, model):
    address = f"{redis_server}?prefix={tmp_path.name}:"
    with dm.Store(address) as store:
        with model.session("ada", store=store) as session:
            session.commit("root")
        workers = [started(WORKER, number, address) for number in range(4)]
        outputs = [worker.communicate(timeout=300) for worker in workers]
        assert [worker.returncode for worker in workers] == [0] * 4, outputs
        log = store.log("ada", n=1000)
        told = [f"{number}.{turn}" for number in range(4) for turn in range(25)]
        assert sorted(commit.message for commit in log) == sorted([*told, "root"])
        assert log[0].tokens_seen == 200
        assert store.snapshot("ada").turns == 100
        # They did get in each other's way.
        assert any("merged" in out for out, _ in outputs)
        assert store.verify().clean

"""Ownership in the store: one owner at a time, told who it is, succeeded when it is dead; with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from haltscale.platform import lease
from haltscale.platform.lease import Lease, LeaseHeldError, LeaseLostError
from haltscale.platform.store import RunStore

OWN = """
import sys
from haltscale.platform.lease import Lease, LeaseHeldError
from haltscale.platform.store import RunStore
store = RunStore(sys.argv[1])
mine = Lease(store, store.path("study"))
try:
    mine.acquire()
except LeaseHeldError as error:
    print("held", error, flush=True)
    sys.exit(3)
print("owner", flush=True)
sys.stdin.readline()
if len(sys.argv) > 2:
    mine.release()
print("released", flush=True)
"""

RACE = """
import sys
from haltscale.platform.lease import Lease, LeaseHeldError
from haltscale.platform.store import RunStore
store = RunStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
counter = f"{store.path('study')}/counter"
for _ in range(int(sys.argv[2])):
    mine = Lease(store, store.path("study"))
    mine.acquire(wait_seconds=120)
    value = int(store.fs.cat_file(counter) if store.fs.exists(counter) else 0)  # read, then write: not atomic
    store.fs.pipe_file(counter, str(value + 1).encode())
    mine.release()
"""


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    if request.param == "folder":
        return RunStore(tmp_path / "runs")
    return RunStore(f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}")


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(store: RunStore) -> Iterator[Start]:
    started = []

    def run(script: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, store.root, *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def own(store: RunStore) -> Lease:
    mine = Lease(store, store.path("study"))
    mine.acquire()
    return mine


def test_a_second_process_is_told_who_owns_it_and_since_when(store: RunStore, start: Start) -> None:
    owner = start(OWN, "release")
    assert line(owner) == "owner"
    with pytest.raises(LeaseHeldError, match=rf"process {owner.pid} since \d{{4}}-\d\d-\d\d .* heartbeat \d+ s ago"):
        own(store)
    assert line(start(OWN)).startswith(f"held owned by {lease._user()}@")
    print("go", file=owner.stdin, flush=True)
    assert line(owner) == "released"
    own(store).release()


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_a_killed_owner_never_blocks(store: RunStore, start: Start) -> None:
    owner = start(OWN)
    assert line(owner) == "owner"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    began = time.monotonic()
    own(store).release()
    assert time.monotonic() - began < lease.EXPIRY_SECONDS / 2, "its process is gone: nobody waits for its heartbeat"


def test_an_owner_elsewhere_is_succeeded_when_its_heartbeat_is_dead(
    store: RunStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process cannot be looked at; and its clock is wrong by a year, which nobody asks."""
    monkeypatch.setattr(lease, "_machine", lambda: "another machine")
    monkeypatch.setattr(lease, "RENEW_SECONDS", 1000.0)
    silent = Lease(store, store.path("study"))
    silent._document["since"] = time.time() + 3e7
    silent.acquire()
    monkeypatch.undo()
    with pytest.raises(LeaseHeldError):
        own(store)
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 1.0)
    successor = Lease(store, store.path("study"))
    successor.acquire(wait_seconds=60)
    silent._document["since"] = 0.0
    assert not silent._is_newest()
    successor.release()


def test_an_owner_that_comes_back_too_late_finds_out_and_stops(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a laptop's sleep: another one took over."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    lost: list[bool] = []
    slept = Lease(store, store.path("study"))
    slept.acquire(on_lost=lambda: lost.append(True))
    slept.check()
    later = Lease(store, store.path("study"))
    with monkeypatch.context() as patch:
        patch.setattr(lease.Holder, "is_dead", lambda self: True)
        later.acquire()
    assert slept._thread
    slept._thread.join(timeout=60)
    assert lost == [True]
    with pytest.raises(LeaseLostError, match="another process took over"):
        slept.check()
    slept.release()
    assert (holder := store.holder("study"))
    assert holder.document["owner"] == later._document["owner"], "the late one released nothing of the other's"
    assert not holder.is_released
    later.release()


def test_a_lease_is_renewed_for_as_long_as_its_owner_lives(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    renewed: list[float] = []
    mine = Lease(store, store.path("study"))
    write = mine._write
    monkeypatch.setattr(mine, "_write", lambda document: (write(document), renewed.append(time.monotonic())))
    mine.acquire()
    deadline = time.monotonic() + 60
    while len(renewed) < 3 and time.monotonic() < deadline:
        mine._over.wait(0.02)
    mine.release()
    assert len(renewed) >= 3
    count = len(renewed)
    assert mine._thread
    assert not mine._thread.is_alive()
    assert len(renewed) == count


def test_a_store_that_is_away_for_a_moment_ends_nothing(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    mine = Lease(store, store.path("study"))
    mine.acquire()
    answers = iter([OSError("away"), OSError("away")])
    write = mine._write

    def sometimes(document: dict) -> None:
        if error := next(answers, None):
            raise error
        write(document)

    monkeypatch.setattr(mine, "_write", sometimes)
    deadline = time.monotonic() + 60
    while caplog.text.count("was not renewed") < 2 and time.monotonic() < deadline:
        mine._over.wait(0.02)
    mine.check()
    mine.release()
    assert (holder := store.holder("study"))
    assert holder.is_released


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_racing_processes_own_it_one_after_the_other(store: RunStore, start: Start) -> None:
    """Each adds to a counter, reading and writing it apart: two owners at a time would lose a count."""
    racers = [start(RACE, "8") for _ in range(3)]
    for racer in racers:
        assert line(racer) == "ready"
    for racer in racers:
        print("go", file=racer.stdin, flush=True)
    assert [racer.wait() for racer in racers] == [0, 0, 0]
    assert int(store.fs.cat_file(f"{store.path('study')}/counter")) == 24
    assert len(list(Path(store.path("study"), lease.FOLDER).iterdir())) == 1, "former leases are cleared away"


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_racing_processes_on_object_storage(store: RunStore, start: Start) -> None:
    racers = [start(RACE, "3") for _ in range(2)]
    for racer in racers:
        assert line(racer) == "ready"
    for racer in racers:
        print("go", file=racer.stdin, flush=True)
    assert [racer.wait() for racer in racers] == [0, 0]
    assert int(store.fs.cat_file(f"{store.path('study')}/counter")) == 6


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"process": 3, "since": "x"}'])
def test_a_damaged_lease_blocks_until_it_is_old(
    store: RunStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fs.makedirs(f"{store.path('study')}/{lease.FOLDER}", exist_ok=True)
    store.fs.pipe_file(f"{store.path('study')}/{lease.FOLDER}/000007.json", content)
    with pytest.raises(LeaseHeldError):
        own(store)
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", -1.0)
    own(store).release()
    assert (holder := store.holder("study"))
    assert holder.number == 8


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    own_process = {"machine": lease._machine(), "pid": os.getpid(), "start": lease._start(os.getpid())}
    living = lease.Holder(number=1, document={"process": own_process}, silent_seconds=0)
    assert not living.is_gone
    assert lease.Holder(number=1, document={"process": own_process | {"start": "17"}}, silent_seconds=0).is_gone
    assert not lease.Holder(number=1, document={"process": own_process | {"machine": "x"}}, silent_seconds=0).is_gone
    assert json.dumps(own_process)


def test_an_owner_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    own(store).release(traceless=True)
    assert not Path(store.path("study")).exists()
    mine = own(store)
    (Path(store.path("study")) / "study.json").write_text("{}")
    mine.release(traceless=True)
    assert [path.name for path in Path(store.path("study")).iterdir()] == ["study.json"]
    own(store).release()


def test_a_notice_reaches_the_owner_and_is_gone_when_it_has_saved(store, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    folder = store.path("study", "run")
    owner = Lease(store, folder)
    owner.acquire()
    assert not owner.noticed
    lease.give_notice(store, folder)
    while not owner.noticed:
        time.sleep(0.01)
    assert lease.has_notice(store, folder)
    owner.heed()
    assert not lease.has_notice(store, folder)
    assert not owner.noticed
    lease.give_notice(store, folder)
    owner.release()
    heir = Lease(store, folder)
    heir.acquire()
    assert not lease.has_notice(store, folder), "it was for the owner before"
    assert not heir.noticed
    heir.release()

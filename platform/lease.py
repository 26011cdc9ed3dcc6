"""Who may write a folder of the run store: one owner at a time, whatever cluster or machine it runs on.

    <folder>/.lease/000003.json     the present owner; a new one takes the next number

A lease is taken by creating the next number, which only one process can (an exclusive create: a hard link on folders, a
conditional put on object stores), and kept by rewriting it from a thread. An owner that has released it, whose process
is gone from this machine, or that has not renewed it for :data:`EXPIRY_SECONDS` by the store's own clock, is succeeded.
An owner that comes back after that finds a higher number, and stops.

    <folder>/.lease/notice          its owner will soon be ended from outside, and should save what it has

Whoever knows that an owner's time is over (a scheduler's signal, a spot instance's warning) leaves a notice
(:func:`give_notice`). The owner finds it when it renews its lease, saves, and removes it, which tells that it has.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

log = logging.getLogger(__name__)

FOLDER = ".lease"
NOTICE = "notice"
RENEW_SECONDS = 5.0
EXPIRY_SECONDS = 60.0
"""Of silence, after which an owner counts as dead where its process cannot be looked at."""


class Files(Protocol):
    """What a lease needs of a run store."""

    fs: Any
    """Its fsspec filesystem."""

    @property
    def is_local(self) -> bool: ...


class LeaseHeldError(RuntimeError):
    """Somebody else owns the folder; ``holder`` says who."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        super().__init__(f"owned by {holder.description}")


class LeaseLostError(RuntimeError):
    """This process was silent for so long that another one took over: it must stop writing."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The present owner of a folder, as its lease says."""

    number: int
    document: Mapping[str, Any]
    silent_seconds: float
    """Since the lease was renewed last."""

    @property
    def description(self) -> str:
        """Who it is, since when, and when it was heard of last."""
        began, who = self.document.get("since"), self.document.get("who", "an unknown process")
        since = ""
        if isinstance(began, int | float):
            with contextlib.suppress(OverflowError, ValueError, OSError):
                since = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(began))
        return f"{who}{since}, last heartbeat {self.silent_seconds:.0f} s ago"

    @property
    def job(self) -> str:
        """Submission id of the Ray job that owns it; empty for other processes."""
        return str(self.document.get("job") or "")

    @property
    def is_released(self) -> bool:
        return bool(self.document.get("released"))

    @property
    def is_gone(self) -> bool:
        """Whether the owner was a process of this machine that no longer exists."""
        process = self.document.get("process")
        return isinstance(process, Mapping) and process.get("machine") == _machine() and not _lives(process)

    def is_dead(self) -> bool:
        """Whether its lease may be taken."""
        return self.is_released or self.is_gone or self.silent_seconds > EXPIRY_SECONDS


def holder_of(store: Files, folder: str, *, now: float | None = None) -> Holder | None:
    """The owner of a folder, or its last one; None where nobody has owned it.

    Args:
        folder: its path in the store (``RunStore.path``).
        now: seconds since the epoch, by the clock that the store stamps files with; this process's clock by default.
    """
    numbered = _numbered(store, folder)
    if not numbered:
        return None
    number, entry = max(numbered.items())
    try:
        document = json.loads(store.fs.cat_file(entry["name"]))
    except (OSError, ValueError):  # being written, or just succeeded
        document = {}
    silent = max(0.0, (time.time() if now is None else now) - modified(entry))
    return Holder(number=number, document=document if isinstance(document, dict) else {}, silent_seconds=silent)


def give_notice(store: Files, folder: str) -> None:
    """Ask the owner of a folder to save what it has; it sees that within :data:`RENEW_SECONDS`."""
    store.fs.makedirs(f"{folder}/{FOLDER}", exist_ok=True)
    store.fs.pipe_file(f"{folder}/{FOLDER}/{NOTICE}", b"{}")


def has_notice(store: Files, folder: str) -> bool:
    """Whether a notice waits for the owner of a folder: it has not saved yet."""
    return bool(store.fs.exists(f"{folder}/{FOLDER}/{NOTICE}"))


def modified(entry: Mapping[str, Any]) -> float:
    """When a listed file was written last, by the store's clock, in seconds since the epoch."""
    names = ("mtime", "LastModified", "last_modified", "updated", "created")
    stamp = next((entry[name] for name in names if entry.get(name)), 0.0)
    return float(stamp.timestamp() if hasattr(stamp, "timestamp") else stamp)


def _listed(store: Files, folder: str) -> dict[str, Mapping[str, Any]]:
    """What the lease's folder holds, by name without ending."""
    try:
        entries = store.fs.ls(f"{folder}/{FOLDER}", detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {entry["name"].rsplit("/", 1)[-1].removesuffix(".json"): entry for entry in entries}


def _numbered(store: Files, folder: str) -> dict[int, Mapping[str, Any]]:
    return {int(name): entry for name, entry in _listed(store, folder).items() if name.isdigit()}


class Lease:
    """Ownership of one folder of the store, from :meth:`acquire` to :meth:`release`."""

    def __init__(self, store: Files, folder: str, *, who: str = "", job: str = "") -> None:
        """
        Args:
            folder: its path in the store.
            who: names the owner to others; by default user, host and process.
            job: the Ray job that this process drives.
        """
        self._store, self._folder, self._number = store, folder, 0
        self._document = {
            "owner": uuid.uuid4().hex,
            "who": who or f"{_user()}@{socket.gethostname()}, process {os.getpid()}{job and f', Ray job {job}'}",
            "job": job,
            "process": {"machine": _machine(), "pid": os.getpid(), "start": _start(os.getpid())},
            "since": time.time(),
        }
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._writing = threading.Lock()
        self.lost = False
        self.noticed = False
        """Whether somebody has asked to save what there is, and :meth:`heed` was not called yet."""

    def acquire(self, *, wait_seconds: float = 0.0, on_lost: Callable[[], None] = lambda: None) -> None:
        """Become the owner, and stay it from a thread.

        Args:
            wait_seconds: for a living owner to end.
            on_lost: called from the thread if somebody else takes over after all.

        Raises:
            LeaseHeldError: a living process owns the folder.
        """
        deadline = time.monotonic() + wait_seconds
        while not self._try():
            holder = holder_of(self._store, self._folder, now=self._clock())
            if holder and not holder.is_dead() and time.monotonic() >= deadline:
                raise LeaseHeldError(holder)
            self._over.wait(0.2)
        self._thread = threading.Thread(target=self._renew, args=(on_lost,), daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Before a write.

        Raises:
            LeaseLostError: somebody else owns the folder by now.
        """
        if self.lost:
            raise LeaseLostError(f"{self._folder}: another process took over while this one was silent")

    def heed(self) -> None:
        """Say that what there is has been saved, as a notice asked."""
        self.noticed = False
        with contextlib.suppress(OSError):
            self._store.fs.rm_file(f"{self._folder}/{FOLDER}/{NOTICE}")

    def release(self, *, traceless: bool = False) -> None:
        """End the ownership; the next owner need not wait.

        Args:
            traceless: leave nothing behind: the folder was owned, and nothing was written to it.
        """
        self._over.set()
        if self._thread:
            self._thread.join()
        with self._writing, contextlib.suppress(OSError):
            if self._number and not self.lost and self._is_newest():
                if traceless:
                    self._remove(self._number)
                else:
                    self._write({**self._document, "released": True})
        if traceless and self._store.is_local:
            for folder in (f"{self._folder}/{FOLDER}", self._folder):  # those that are empty now
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        self._number = 0

    # ---- what happens in the store ----------------------------------------------------------------------------------

    def _try(self) -> bool:
        """Create the next number, if the present owner is dead; whether this process is the owner then."""
        holder = holder_of(self._store, self._folder, now=self._clock())
        if holder and not holder.is_dead():
            return False
        number = holder.number + 1 if holder else 1
        if not self._create(number):
            return False
        self._number = number
        if not self._is_newest():  # made from an outdated listing
            self._remove(number)
            self._number = 0
            return False
        listed = _listed(self._store, self._folder)
        for older in [int(name) for name in listed if name.isdigit() and int(name) < number]:
            self._remove(older)
        if NOTICE in listed:  # to an owner that has ended
            self.heed()
        return True

    def _path(self, number: int) -> str:
        return f"{self._folder}/{FOLDER}/{number:06d}.json"

    def _create(self, number: int) -> bool:
        path, content = self._path(number), json.dumps(self._document).encode()
        if not self._store.is_local:
            try:
                self._store.fs.pipe_file(path, content, mode="create")
            except OSError:  # FileExistsError, or the answer to a put whose condition fails
                if not self._store.fs.exists(path):
                    raise
                return False
            return True
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{uuid.uuid4().hex}"
        Path(partial).write_bytes(content)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        finally:
            os.unlink(partial)
        return True

    def _write(self, document: Mapping[str, Any]) -> None:
        path, content = self._path(self._number), json.dumps(document).encode()
        if not self._store.is_local:
            self._store.fs.pipe_file(path, content)
            return
        partial = f"{path}.{uuid.uuid4().hex}"
        Path(partial).write_bytes(content)
        os.replace(partial, path)

    def _remove(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._store.fs.rm_file(self._path(number))

    def _is_newest(self) -> bool:
        return max(_numbered(self._store, self._folder), default=0) == self._number

    def _renew(self, on_lost: Callable[[], None]) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                with self._writing:
                    if self._over.is_set():
                        return
                    listed = _listed(self._store, self._folder)
                    if max((int(name) for name in listed if name.isdigit()), default=0) != self._number:
                        self.lost = True
                        log.error("%s: another process took over while this one was silent", self._folder)
                        on_lost()
                        return
                    self.noticed = NOTICE in listed
                    self._write(self._document)
            except OSError as error:  # a store that is away for a moment
                log.warning("the lease of %s was not renewed: %s", self._folder, error)

    def _clock(self) -> float:
        """The present by the clock that the store stamps files with."""
        if self._store.is_local and not _numbered(self._store, self._folder):
            return time.time()
        path = f"{self._folder}/{FOLDER}/clock-{uuid.uuid4().hex}"
        if self._store.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        self._store.fs.pipe_file(path, b"")
        try:
            return modified(self._store.fs.info(path))
        finally:
            self._store.fs.rm_file(path)


# ---- processes of this machine --------------------------------------------------------------------------------------


@functools.cache
def _machine() -> str:
    """What tells the process numbers that we see from those that others see: this boot, and this namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def _start(pid: int) -> str:
    """When a process began, by the kernel's count: numbers are used again, such pairs are not. Empty if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return ""
        with contextlib.suppress(psutil.Error):
            return f"{psutil.Process(pid).create_time():.0f}"
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def _lives(process: Mapping[str, Any]) -> bool:
    return isinstance(pid := process.get("pid"), int) and _start(pid) == process.get("start") != ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"

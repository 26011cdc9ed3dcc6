"""Prepared corpora in object storage, for nodes that share no folder.

``HALTSCALE_CORPORA=s3://bucket/corpora`` (any fsspec URL) says where. The first node that needs a corpus owns its
folder there by a lease, prepares it on its own disk and uploads it: parts first, ``corpus.json`` last. Other nodes keep
a copy of all but the training rows in their ``HALTSCALE_HOME``, with the corpus's URL in ``origin.json``; rows they
read by ranges, through a cache of ``HALTSCALE_CACHE_BYTES`` (20 GB by default) that all processes of a node share.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from haltscale.platform.durable import write_durably, write_json
from haltscale.platform.store import haltscale_home

ORIGIN = "origin.json"
LAST = ("parts.json", "corpus.json")
"""Replaced as a streamed corpus grows, in this order: what the second says is there, the first names."""
BLOCK_BYTES = 1 << 18
"""What is fetched at a time: some tens of rows."""
CACHE_BYTES = 20_000_000_000


def shared_root() -> str:
    """Where nodes share prepared corpora; empty where they share ``HALTSCALE_HOME``."""
    return os.environ.get("HALTSCALE_CORPORA", "").rstrip("/")


def is_url(place: str | Path) -> bool:
    """Whether a corpus's place is a URL, and no folder of this machine."""
    return "://" in str(place)


class SharedFolder:
    """A corpus's folder in object storage, by its URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs: Any
        self.fs, self.path = fsspec.core.url_to_fs(url, use_listings_cache=False)  # other processes write too

    @property
    def is_local(self) -> bool:
        """Whether it is a folder after all, as ``file://`` names one."""
        return "file" in self.fs.protocol

    @property
    def local(self) -> Path:
        """Where this machine keeps it."""
        return haltscale_home() / "corpora" / self.url.rsplit("/", 1)[-1]

    def counts(self) -> dict[str, Any]:
        """Its ``corpus.json``; empty where it is not there yet."""
        try:
            counts = json.loads(self.fs.cat_file(f"{self.path}/corpus.json"))
        except (FileNotFoundError, ValueError):
            return {}
        return counts if isinstance(counts, dict) else {}

    def replace_counts(self, counts: dict[str, Any]) -> None:
        """Write ``corpus.json`` anew."""
        self.fs.pipe_file(f"{self.path}/corpus.json", json.dumps(counts).encode())

    def publish(self) -> None:
        """Upload what this machine has prepared, as far as it is not there. Others see it once ``corpus.json`` is, and
        never less of a streamed corpus than before."""
        fs, path, local = self.fs, self.path, self.local
        mine = json.loads((local / "corpus.json").read_text(encoding="utf-8"))
        theirs = self.counts()
        if theirs and _extent(theirs) > _extent(mine):
            return
        try:
            there = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in fs.ls(path, detail=True)}
        except FileNotFoundError:
            there = {}
        if theirs.get("revision") != mine.get("revision"):
            there = {}  # prepared anew: all is replaced
        fs.makedirs(path, exist_ok=True)
        files = [file for file in sorted(local.iterdir()) if file.suffix in (".json", ".npy", ".parquet")]
        for file in files:
            if file.name not in (*LAST, ORIGIN) and there.get(file.name) != file.stat().st_size:
                fs.put_file(str(file), f"{path}/{file.name}")
        for name in LAST:
            fs.pipe_file(f"{path}/{name}", (local / name).read_bytes())

    def fetch(self) -> Path:
        """The folder of this machine that holds it, but for rows that lie elsewhere, as far as it is prepared."""
        own = _read(self.local / "corpus.json")
        if own.get("complete", bool(own)):
            return self.local
        theirs = self.counts()
        if not theirs or (own and _extent(theirs) <= _extent(own)):
            return self.local
        self.local.mkdir(parents=True, exist_ok=True)
        write_json(self.local / ORIGIN, {"url": self.url})
        names = [entry["name"].rsplit("/", 1)[-1] for entry in self.fs.ls(self.path, detail=True)]
        small = [name for name in names if name.endswith((".json", ".npy")) or name == "validation.parquet"]
        for name in (*(name for name in small if name not in LAST), "parts.json"):
            if name in LAST or not (self.local / name).exists():
                write_durably(self.local / name, self.fs.cat_file(f"{self.path}/{name}"))
        write_json(self.local / "corpus.json", theirs)
        return self.local


def _extent(counts: dict[str, Any]) -> tuple[bool, int, bool]:
    """How much of a corpus its ``corpus.json`` says is there; of equal ones, a problem is news."""
    return bool(counts.get("complete", True)), int(counts.get("rows", 0)), "problem" in counts


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def origin_of(folder: Path) -> str:
    """The URL of the corpus of which a folder is a copy; empty where it was prepared here."""
    return str(_read(folder / ORIGIN).get("url", ""))


# ---- rows by ranges -------------------------------------------------------------------------------------------------


class BlockCache:
    """Blocks of remote files on this machine's disk, of all its processes together about ``limit`` bytes; what was not
    used for longest goes first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._written = limit  # by this process since it last looked: at first, others' may lie there
        self._lock = threading.Lock()

    def get(self, fs: Any, path: str, info: Mapping[str, Any], index: int) -> bytes:
        """Block ``index`` of a file, of which the filesystem says ``info``: its size, and what tells its versions."""
        size = int(info["size"])
        version = info.get("ETag") or info.get("mtime") or info.get("LastModified")
        name = hashlib.sha256(f"{path}\0{size}\0{version}".encode()).hexdigest()[:32]
        file = self._folder / name[:2] / f"{name}-{index:08d}"
        begin = index * BLOCK_BYTES
        length = min(BLOCK_BYTES, size - begin)
        try:
            content = file.read_bytes()
            if len(content) == length:
                os.utime(file)
                return content
        except OSError:
            pass
        fetched: bytes = fs.cat_file(path, start=begin, end=begin + length)
        with contextlib.suppress(OSError):  # a full disk only makes it slower
            self._put(file, fetched)
        return fetched

    def _put(self, file: Path, content: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")
        try:
            partial.write_bytes(content)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
        with self._lock:
            self._written += len(content)
            if self._written > self._limit // 16:
                self._written = 0
                self._evict()

    def _evict(self) -> None:
        with open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for file in self._folder.glob("??/*"):
                with contextlib.suppress(OSError):
                    stat = file.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, file))
            total = sum(size for _, size, _ in found)
            if total <= self._limit:
                return
            for _, size, file in sorted(found):
                file.unlink(missing_ok=True)
                total -= size
                if total <= self._limit - self._limit // 8:
                    return


def node_cache() -> BlockCache:
    """The cache of this machine."""
    limit = int(float(os.environ.get("HALTSCALE_CACHE_BYTES") or CACHE_BYTES))
    return BlockCache(haltscale_home() / "row-cache", limit)


class RangedFile(io.RawIOBase):
    """A remote file that is read by ranges, through a cache."""

    def __init__(self, url: str, cache: BlockCache) -> None:
        super().__init__()
        self._fs, self._path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self._info = self._fs.info(self._path)
        self._size, self._cache, self._at = int(self._info["size"]), cache, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._size - self._at))
        done = 0
        while done < length:
            index, skip = divmod(self._at + done, BLOCK_BYTES)
            piece = self._cache.get(self._fs, self._path, self._info, index)[skip : skip + length - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
        self._at += length
        return length

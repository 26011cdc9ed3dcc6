"""The run store as the dashboard reads it: each file again only when it has changed, and of a growing one the new part.

What was read is kept for the whole server, not per reader. The store is only ever read.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from haltscale.dashboard import data
from haltscale.dashboard.row_index import RowIndex
from haltscale.platform.documents import NOTHING, StoreError, parse_lines
from haltscale.platform.store import RunStore, default_root, is_name

MOST_DOCUMENTS = 20_000
MOST_LINES = 2_000
"""Metrics and evaluations kept; the longest unused go first."""


@dataclass(frozen=True)
class Seen:
    """A study as it was at the last look, and what it was made of."""

    rows: list[dict[str, Any]]
    document: Mapping[str, Any]
    runs: pd.DataFrame


@dataclass
class Kept:
    """What has been read, by path."""

    documents: OrderedDict[str, tuple[str, dict[str, Any] | StoreError]] = field(default_factory=OrderedDict)
    lines: OrderedDict[str, tuple[str, int, list[dict[str, Any]]]] = field(default_factory=OrderedDict)
    """Stamp, bytes read, rows."""
    indexes: dict[str, RowIndex] = field(default_factory=dict)
    studies: dict[str, Seen] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)


@st.cache_resource(max_entries=4, show_spinner=False)
def _kept(root: str) -> Kept:
    return Kept()


@st.cache_data(max_entries=64, show_spinner=False)
def _probe(root: str, study: str, key: str, step: int, stamp: str) -> pd.DataFrame:
    return data.probe(RunStore(root), study, key, step)


class Shelf(RunStore):
    """A run store that remembers.

    A stamp is taken before the read: a file that changes in between is read once more, never too seldom.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        super().__init__(root)
        self._local = "file" in self.fs.protocol
        self._kept = _kept(self.root)

    def stamp(self, path: str) -> str:
        """What changes when the file does: inode, time and size locally, the object's tag elsewhere; "" when absent."""
        try:
            if self._local:
                found = os.stat(path)
                return f"{found.st_ino}/{found.st_mtime_ns}/{found.st_size}"
            info = self.fs.info(path)
        except OSError:
            return ""
        return "/".join(str(info.get(name)) for name in ("LastModified", "ETag", "mtime", "size"))

    def read_json(self, path: str) -> dict[str, Any]:
        stamp = self.stamp(path)
        if not stamp:
            return NOTHING
        with self._kept.lock:
            known = self._kept.documents.get(path)
        if known is None or known[0] != stamp:
            try:
                known = (stamp, super().read_json(path))
            except StoreError as error:
                known = (stamp, error)
            with self._kept.lock:
                _keep(self._kept.documents, path, known, MOST_DOCUMENTS)
        if isinstance(known[1], StoreError):
            raise known[1]
        return known[1]

    def _read_documents(self, paths: Mapping[Any, str]) -> dict[Any, Mapping[str, Any] | StoreError]:
        if not self._local:  # an object store answers many requests at once: that is faster than asking what changed
            return super()._read_documents(paths)
        found: dict[Any, Mapping[str, Any] | StoreError] = {}
        for name, path in paths.items():
            try:
                found[name] = self.read_json(path)
            except StoreError as error:
                found[name] = error
        return found

    def read_lines(self, path: str) -> list[dict[str, Any]]:
        stamp = self.stamp(path)
        if not stamp:
            return []
        with self._kept.lock:
            known = self._kept.lines.get(path)
        if known is not None and known[0] == stamp:
            return known[2]
        if self._local:
            inode = stamp.split("/")[0]
            grown = known is not None and known[0].split("/")[0] == inode
            start, rows = (known[1], known[2]) if known is not None and grown else (0, [])
            read, new = _tail(path, start)
            if read < start:  # cut short in place: nothing that was read still holds
                rows, (read, new) = [], _tail(path, 0)
            known = (stamp, read, [*rows, *new])
        else:
            known = (stamp, 0, super().read_lines(path))
        with self._kept.lock:
            _keep(self._kept.lines, path, known, MOST_LINES)
        return known[2]

    def view(self, study: str) -> data.StudyView:
        """A study with all its runs. Only what is new or changed is read, and what is the same is not made again."""
        if not self._local:
            return data.load_study(self, study)
        problems, document = data.study_document(self, study)
        with self._kept.lock:
            index = self._kept.indexes.get(study) or self._kept.indexes.setdefault(study, RowIndex(self, study))
            seen = self._kept.studies.get(study)
        try:
            rows, more = data.study_rows(self, study, self.run_keys(study), index)
        except OSError as error:
            found = (data.Problem(where=study, what=str(error)),)
            return data.StudyView(name=study, runs=data.empty_runs(), problems=found)
        if seen is None or seen.document != document or not _same(seen.rows, rows):
            seen = Seen(rows=rows, document=document, runs=data.runs_frame(rows, document))
            with self._kept.lock:
                self._kept.studies[study] = seen
        return data.as_view(self, study, document, seen.runs, [*problems, *more])

    def present(self, study: str) -> list[str]:
        if not self._local:
            return super().present(study)
        try:
            with os.scandir(self.path(study)) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
        except OSError:
            return []
        return sorted(name for name in names if is_name(name))

    def _halting_steps(self, study: str, key: str, name: str) -> list[int]:
        if self._local and not os.path.isdir(self.path(study, key, "halting")):
            return []
        return super()._halting_steps(study, key, name)

    def events(self, study: str, key: str, step: int) -> pd.DataFrame:
        """The probe's events, checked; see :func:`haltscale.dashboard.data.probe`."""
        return _probe(self.root, study, key, step, self.stamp(self.probe_path(study, key, step)))


def _same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether two lists hold the very same rows."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _keep(kept: OrderedDict[str, Any], path: str, value: Any, most: int) -> None:
    kept[path] = value
    kept.move_to_end(path)
    while len(kept) > most:
        kept.popitem(last=False)


def _tail(path: str, start: int) -> tuple[int, list[dict[str, Any]]]:
    """The whole lines of a file from a byte on, and the byte after the last of them."""
    if os.path.isdir(path):
        return 0, []
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < start:
            return 0, []
        file.seek(start)
        content = file.read()
    end = content.rfind(b"\n") + 1
    return start + end, parse_lines(content[:end])


def store() -> Shelf:
    """The store that the dashboard was started with."""
    return Shelf(default_root())

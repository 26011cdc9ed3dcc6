"""Rows of runs that do not change any more, kept by the stamps of the files that they were made of.

A store of 10,000 runs has 30,000 documents. Asking whether they have changed takes a fraction of a second, reading them
many: only what is new or changed is read. The index is kept on disk beside the dashboard's other caches, never in the
store; it is a cache, and what cannot be read of it is made anew.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from haltscale.dashboard import data
from haltscale.platform import run_table
from haltscale.platform.documents import RUN
from haltscale.platform.durable import replacing
from haltscale.platform.store import RunState, RunStore, haltscale_home

FILES = (*(f"{name}.json" for name in RUN), "metrics.jsonl", "evaluations.jsonl")
"""What a run's row is made of; of a run with a record, its documents only."""
CHANGING = (RunState.RUNNING.value, RunState.STALLED.value)
"""States that a lease and the clock decide: such a row is made anew at each look."""
SAVE_SECONDS = 20.0
"""At least between two writes of an index."""
Row = dict[str, Any]
Stamps = tuple[tuple[int, int, int] | None, ...]


class RowIndex:
    """The rows of one study of a local store. Its methods may be called from several threads."""

    def __init__(self, store: RunStore, study: str) -> None:
        self._folder = store.path(study)
        root = hashlib.sha256(os.path.realpath(store.root).encode()).hexdigest()[:16]
        self.path = haltscale_home() / "cache" / "index" / root / f"{study}.pickle"
        self._lock = threading.Lock()
        self._rows: dict[str, tuple[Stamps, Row]] | None = None
        self._saved = 0.0
        self._dirty = False

    def known(self, keys: Iterable[str]) -> dict[str, Row]:
        """The rows, by key, of the runs whose files are as they were when their rows were made."""
        with self._lock:
            if self._rows is None:
                self._rows = _read(self.path)
            rows = self._rows
        found = {}
        for key in keys:
            kept = rows.get(key)
            if kept is not None and kept[0] == self.stamps(key, with_record=len(kept[0]) == len(RUN)):
                found[key] = kept[1]
        return found

    def stamps(self, key: str, *, with_record: bool) -> Stamps:
        """What changes when a run's files do: inode, time and size of each, None where there is none."""
        folder = f"{self._folder}/{key}/"
        return tuple(_stamp(folder + name) for name in (FILES[: len(RUN)] if with_record else FILES))

    def keep(self, made: Mapping[str, tuple[Stamps, Row]], keys: Sequence[str]) -> None:
        """Keep rows with the stamps that were taken before their files were read, and forget the runs that are gone."""
        with self._lock:
            rows = self._rows = {} if self._rows is None else self._rows
            settled = {key: one for key, one in made.items() if one[1]["state"] not in CHANGING}
            gone = rows.keys() - set(keys)
            self._dirty |= bool(settled or gone)
            rows.update(settled)
            for key in gone:
                del rows[key]
            if not self._dirty or time.monotonic() - self._saved < SAVE_SECONDS:
                return
            self._saved, self._dirty = time.monotonic(), False
            content = pickle.dumps((_code(), rows), protocol=pickle.HIGHEST_PROTOCOL)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(self.path) as partial:
                partial.write_bytes(content)
        except OSError:  # no room or no right to write: the next server reads the store again
            return


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> dict[str, tuple[Stamps, Row]]:
    """The rows of an index that the same code has written; none where it is damaged."""
    try:
        code, rows = pickle.loads(path.read_bytes())
    except Exception:  # pickle raises many kinds on damage
        return {}
    return rows if code == _code() and isinstance(rows, dict) else {}


@cache
def _code() -> str:
    """Of what makes a row."""
    found = hashlib.sha256()
    for module in (data, run_table):
        found.update(Path(str(module.__file__)).read_bytes())
    return found.hexdigest()

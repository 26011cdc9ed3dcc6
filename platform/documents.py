"""A document of the store, as its readers get it: whole, of this version, and with fields of the types they have.

There is one reader for all of them, since a store outlives the code that wrote it, and disks and people change files. A
document that cannot be read is named, with what to do about it; it never takes the others with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 1
NUMBER, TEXT, OBJECT = "a number", "text", "an object"
TEXTS, NUMBERS, OBJECTS = "a list of texts", "a list of numbers", "a list of objects"
RUN = ("spec", "status", "record")
"""A run's documents."""
NOTHING: dict[str, Any] = {}
"""One absent document for all."""
FIELDS: dict[str, dict[str, str]] = {
    "study": {
        "name": TEXT,
        "question": TEXT,
        "note": TEXT,
        "planned_at": NUMBER,
        "corpus": OBJECT,
        "runs": TEXTS,
        "controls": OBJECT,
        "tuning": TEXTS,
    },
    "spec": {
        **dict.fromkeys(("label", "study", "key", "role"), TEXT),
        **dict.fromkeys(("identity", "execution", "recipe"), OBJECT),
    },
    "status": {
        "state": TEXT,
        "error": TEXT,
        "events": OBJECTS,
        **dict.fromkeys(("step", "steps", "share", "seconds_left", "heartbeat", "loss", "mean_steps"), NUMBER),
        **dict.fromkeys(("tokens_per_second", "flops_per_second", "mfu"), NUMBER),
    },
    "record": {
        **dict.fromkeys(("label", "study", "key", "git_commit"), TEXT),
        **dict.fromkeys(("identity", "execution", "recipe", "halting", "parameters"), OBJECT),
        **dict.fromkeys(("inference_flops_per_token",), OBJECT),
        **dict.fromkeys(("tokens", "steps", "parameters_total", "loss", "loss_standard_error", "perplexity"), NUMBER),
        **dict.fromkeys(("bits_per_byte", "mean_steps", "expected_steps", "tokens_evaluated"), NUMBER),
        **dict.fromkeys(("passes_per_token", "flops_realised", "flops_executed", "flops_paper"), NUMBER),
        **dict.fromkeys(("wall_seconds", "tokens_per_second", "finished_at"), NUMBER),
        "steps_histogram": NUMBERS,
        "events": OBJECTS,
        "versions": OBJECT,
        "machine": OBJECT,
    },
}
"""Fields that readers look into, and what they are where they are not null."""
NESTED: dict[str, dict[str, str]] = {"identity": {"options": OBJECT, "method": TEXT, "size": TEXT}}
UNUSUAL = re.compile(rb"\d{300}|[eE]\+?\d{3}|NaN|Infinity|\\u[dD][89a-fA-F]")
"""Where a JSON text may hold numbers beyond a float, or halves of surrogate pairs."""


class StoreError(ValueError):
    """A store, study or run folder cannot be read or written; the message says what to do."""


def parse_document(path: str, content: bytes) -> dict[str, Any]:
    """A JSON document of the store.

    Raises:
        StoreError: it is damaged or of another schema version.
    """
    try:
        document = _loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({error}); {advice(path)}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA_VERSION:
        found = document.get("schema") if isinstance(document, dict) else None
        raise StoreError(
            f"{path} has schema {repr(found)[:40]}, this version reads {SCHEMA_VERSION}: use another store root"
            " (HALTSCALE_STORE) or the haltscale that wrote it"
        )
    return document


def parse_lines(content: bytes) -> list[dict[str, Any]]:
    """The objects of JSON lines, without anything that is not a whole line of one."""
    rows = []
    for line in content.split(b"\n"):
        try:
            row = _loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _loads(content: bytes) -> Any:
    """What JSON says, of numbers that fit a float and text that can be written: no document of ours holds others.

    Raises:
        ValueError: it is not JSON, or holds such a number.
        RecursionError: it is nested too deep.
    """
    if UNUSUAL.search(content) is None:
        return json.loads(content)
    read = json.loads(content, parse_float=_fitting, parse_int=_fitting_integer, parse_constant=_fitting)
    return _writable(read)


def _writable(value: Any) -> Any:
    """Without halves of surrogate pairs, which JSON can escape and nothing can print."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_writable(one) for one in value]
    if isinstance(value, dict):
        return {_writable(name): _writable(one) for name, one in value.items()}
    return value


def _fitting(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _fitting_integer(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"{text[:20]}... is not a finite number")
    return int(text)


def advice(path: str) -> str:
    """What to do about a document that cannot be read."""
    name = path.rsplit("/", 1)[-1]
    return {
        "study.json": "submit the study again, which rewrites it; its runs are kept",
        "spec.json": "remove the run's folder to train it again",
        "status.json": "the run rewrites it when it resumes; or remove the run's folder to train it again",
        "record.json": "remove it to resume from the last checkpoint, or remove the run's folder to train it again",
    }.get(name, "the next evaluation rewrites it")


def checked(name: str, document: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """A document without fields of another type than they should have, and what is odd about it, in words.

    So no reader of a store has to look twice: ``view.record.get("halting", {})`` is a mapping wherever it is. A null
    object or list is as good as none; a null number or text stays (a null loss is a result).
    """
    kept, odd = _kept(document, FIELDS.get(name, {}))
    for field, fields in NESTED.items():
        if field in kept:
            inner, more = _kept(kept[field], fields)
            odd += [f"{field}.{one}" for one in more]
            if inner is not kept[field]:
                kept = {**kept, field: inner}
    return kept, ", ".join(odd)


def _kept(document: Mapping[str, Any], fields: Mapping[str, str]) -> tuple[Mapping[str, Any], list[str]]:
    """The document as it should be, itself where it is; and what is not as it should be."""
    changed: dict[str, Any] = {}
    odd, dropped = [], set()
    for field, kind in fields.items():
        value = document.get(field)
        if field not in document or _is(value, kind):
            continue
        if kind == TEXTS and isinstance(value, list):  # one of them costs no other
            changed[field] = [one for one in value if isinstance(one, str)]
        else:
            dropped.add(field)
        if value is not None:
            odd.append(f"{field} is {_kind(value)}, needs {kind}")
    if not changed and not dropped:
        return document, odd
    return {field: changed.get(field, value) for field, value in document.items() if field not in dropped}, odd


def _is(value: object, kind: str) -> bool:
    match kind:
        case "a number":
            return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        case "text":
            return value is None or isinstance(value, str)
        case "an object":
            return isinstance(value, dict)
        case "a list of texts":
            return isinstance(value, list) and all(isinstance(one, str) for one in value)
        case "a list of numbers":
            return isinstance(value, list) and all(one is not None and _is(one, NUMBER) for one in value)
        case _:
            return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _kind(value: object) -> str:
    kinds = {dict: OBJECT, list: "a list", str: TEXT, bool: "true or false", int: NUMBER, float: NUMBER}
    return "null" if value is None else kinds[type(value)]

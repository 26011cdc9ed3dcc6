"""What a run is, as bytes: a canonical encoding and the key made from it.

Everything that changes a result goes into the key; nothing that does not. The encoder raises on whatever it cannot
encode deterministically, so that a key never depends on a memory address, an insertion order or a float's accident.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np

KEY_SCHEMA = 2
"""Of the identities that are written now. Schema 1 had the precision as it was requested, and one version of the code;
`config.current_identity` reads both."""

SEMANTICS = {"loop": 1, "order": 1, "evaluation": 1}
"""Versions of what the code computes, by part: training loop and optimizer; order of the training rows; held-out
evaluation. Raised by hand when a change alters results; every run is stale then. What one method computes has a version
of its own in the registry of methods."""


def encodable(value: Any, where: str = "value") -> Any:
    """The JSON-able form of a value; equal values have equal forms: ``1`` and ``1.0``, 0.3 and
    ``0.1 + 0.2`` (12 digits count), and the scalars of NumPy.

    Raises:
        TypeError: the value has no deterministic encoding; the message names where it stands.
        ValueError: a float is NaN or infinite.
    """
    if isinstance(value, Enum):
        return encodable(value.value, where)
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, np.generic):
        value = value.item()
        return encodable(value, where)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: only finite numbers can identify a run")
        rounded = float(f"{value:.12g}")
        return int(rounded) if rounded.is_integer() else rounded
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: encodable(getattr(value, field.name), f"{where}.{field.name}") for field in fields}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{where} has a key that is not a string")
        return {key: encodable(value[key], f"{where}.{key}") for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [encodable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}, which cannot identify a run")


def canonical_json(value: Any) -> str:
    """The one text of a value: sorted keys, no spaces, shortest floats."""
    return json.dumps(encodable(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any, *, length: int = 12) -> str:
    """The first ``length`` hex digits of the SHA-256 of :func:`canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]

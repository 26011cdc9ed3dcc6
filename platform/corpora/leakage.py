"""Do training documents hold passages of held-out ones? Exact overlaps of 50 tokens, found by 64-bit hashes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

WINDOW = 50
"""Tokens."""

Hashes = npt.NDArray[np.uint64]
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


def window_hash(tokens: npt.NDArray[Any]) -> Hashes:
    """A hash of each run of ``WINDOW`` tokens: ``(max(0, n - WINDOW + 1),)``.

    A polynomial in mixed tokens, modulo 2^64: the difference of two prefix sums, shifted to a common exponent.
    """
    if len(tokens) < WINDOW:
        return np.empty(0, np.uint64)
    x = tokens.astype(np.uint64)
    x = (x + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(32)
    powers = np.cumprod(np.concatenate([[np.uint64(1)], np.full(len(x) - 1, _BASE)]), dtype=np.uint64)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(x * powers, dtype=np.uint64)])
    count = len(x) - WINDOW + 1
    back = np.cumprod(np.concatenate([[np.uint64(1)], np.full(count - 1, _INVERSE)]), dtype=np.uint64)
    return np.asarray((sums[WINDOW:] - sums[:-WINDOW]) * back, dtype=np.uint64)


def window_hashes(documents: Sequence[npt.NDArray[Any]]) -> Hashes:
    """The sorted, distinct window hashes of some documents."""
    return np.unique(np.concatenate([np.empty(0, np.uint64), *map(window_hash, documents)]))


def found_in(tokens: npt.NDArray[Any], hashes: Hashes) -> npt.NDArray[np.int64]:
    """Which of the sorted ``hashes`` occur in a document: their places."""
    if not len(hashes):
        return np.empty(0, np.int64)
    own = window_hash(tokens)
    place = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
    return np.unique(place[hashes[place] == own])


def report(found: Hashes, held_out: Sequence[npt.NDArray[Any]]) -> dict[str, Any]:
    """What ``corpus.json`` says: windows of the held-out documents, and those that training documents hold too."""
    hits = [np.isin(window_hash(tokens), found) for tokens in held_out]
    return {
        "window_tokens": WINDOW,
        "validation_windows": sum(map(len, hits)),
        "overlapping_windows": int(sum(hit.sum() for hit in hits)),
        "overlapping_documents": int(sum(hit.any() for hit in hits)),
    }

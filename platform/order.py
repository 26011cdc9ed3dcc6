"""Which sequences each step trains on: a pure function of seed and step, the same for every run of a study.

The order knows nothing of workers: a step has a global batch, and a rank takes its contiguous share of it. So runs of
other worker counts, and resumed runs, see the same sequences in the same order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def permutation(seed: int, epoch: int, rows: int) -> Ids:
    """A permutation of ``range(rows)`` for one epoch.

    Rows are sorted by a SplitMix64 hash of (seed, epoch, row): unlike NumPy's generators, whose streams may change
    between versions (NEP 19), this stays the same for ever.
    """
    with np.errstate(over="ignore"):
        start = _splitmix64(np.array([seed], dtype=np.uint64)) + np.uint64(epoch)
        keys = _splitmix64(_splitmix64(start) + np.arange(rows, dtype=np.uint64))
    return np.argsort(keys, kind="stable").astype(np.int64)


def _splitmix64(x: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def global_batches(*, seed: int, rows: int, batch: int, first_step: int, steps: int) -> Ids:
    """Sequence ids of ``steps`` global batches from ``first_step`` on.

    Epochs follow each other without a gap: a batch may end one epoch and begin the next.

    Returns:
        ``(steps, batch)`` sequence ids.
    """
    position = np.arange(first_step * batch, (first_step + steps) * batch, dtype=np.int64)
    ids = np.empty_like(position)
    for epoch in np.unique(position // rows):
        inside = position // rows == epoch
        ids[inside] = permutation(seed, int(epoch), rows)[position[inside] % rows]
    return ids.reshape(steps, batch)


def rank_share(ids: Ids, *, rank: int, world: int) -> Ids:
    """The part of each global batch that a rank trains on: ``(steps, batch / world)``.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """
    batch = ids.shape[1]
    if batch % world:
        raise ValueError(f"a global batch of {batch} sequences cannot be shared by {world} workers evenly")
    share = batch // world
    return ids[:, rank * share : (rank + 1) * share]

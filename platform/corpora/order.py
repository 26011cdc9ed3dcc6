"""Which sequences each step trains on: a pure function of seed and step, the same for every run of a study.

The order does not depend on workers: a step has a global batch, and a rank takes its contiguous share of it. So runs of
other worker counts, and resumed runs, see the same sequences in the same order. Any part of the order is computed from
its position alone, at a cost that does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

ROUNDS = 8
BLOCK = 1024
"""Positions of a mixture over which every source has its share, to within one sequence; the heaviest has the rest."""


@dataclass(frozen=True)
class Mixture:
    """The rows of a corpus's sources, which lie one after another, and how often each source is drawn from."""

    rows: tuple[int, ...]
    """Of each source."""
    weights: tuple[Fraction, ...] = ()
    """Of each source, summing to 1. Empty: all rows are one pool, each drawn once per epoch."""
    segment: int = 0
    """Of a streamed corpus: rows of a segment. Segments are drawn from in turn, so that the order in the first ones is
    known before the number of rows is: ``rows`` may then be any number that holds them. 0: no segments."""

    @classmethod
    def of(cls, rows: Mapping[str, int], weights: Mapping[str, float | None], segment: int = 0) -> Mixture:
        """From rows and weights by source, in the order of the sources' names; without weights, one pool."""
        if any(weight is None for weight in weights.values()) or not weights:
            return cls((sum(rows.values()),), segment=segment)
        exact = [Fraction(str(weights[name])) for name in sorted(rows)]  # 0.1 is a tenth
        return cls(tuple(rows[name] for name in sorted(rows)), tuple(weight / sum(exact) for weight in exact))


def permutation(seed: int, epoch: int, rows: int, positions: npt.ArrayLike | None = None) -> Ids:
    """A permutation of ``range(rows)`` for one epoch, or its values at some positions.

    A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"), its round function a SplitMix64 hash. Unlike NumPy's generators, whose streams may
    change between versions (NEP 19), this stays the same for ever.
    """
    where = np.arange(rows) if positions is None else np.asarray(positions)
    half = np.uint64(max(1, ((rows - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    with np.errstate(over="ignore"):
        start = _splitmix64(_splitmix64(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
        keys = _splitmix64(start + np.arange(ROUNDS, dtype=np.uint64))
        ids = where.astype(np.uint64)
        outside = np.ones(ids.shape, dtype=bool)
        while outside.any():
            left, right = ids[outside] >> half, ids[outside] & mask
            for key in keys:
                left, right = right, left ^ (_splitmix64(right + key) & mask)
            ids[outside] = (left << half) | right
            outside[outside] = ids[outside] >= np.uint64(rows)
    return ids.astype(np.int64)


def _splitmix64(x: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def global_batches(*, seed: int, mixture: Mixture, batch: int, first_step: int, steps: int) -> Ids:
    """Sequence ids of ``steps`` global batches from ``first_step`` on.

    Each source is read in epochs of its own, which follow each other without a gap: a batch may end one and begin the
    next.

    Returns:
        ``(steps, batch)`` sequence ids.
    """
    position = np.arange(first_step * batch, (first_step + steps) * batch, dtype=np.int64)
    if not mixture.weights:
        return _rows_of_source(seed, mixture.rows[0], position, mixture.segment).reshape(steps, batch)
    source, index = _draws(seed, mixture, position)
    ids = np.empty_like(position)
    first_row = 0
    for number, rows in enumerate(mixture.rows):
        drawn = source == number
        # Each source has a seed of its own, or sources of the same size would be read in the same order.
        own_seed = int(_splitmix64(np.array([seed], dtype=np.uint64))[0]) ^ (number + 1)
        ids[drawn] = first_row + _rows_of_source(own_seed, rows, index[drawn])
        first_row += rows
    return ids.reshape(steps, batch)


def _rows_of_source(seed: int, rows: int, index: Ids, segment: int = 0) -> Ids:
    """The rows at these places of a source's endless order, epoch after epoch, in an epoch segment after segment."""
    ids = np.empty_like(index)
    epochs, places = np.divmod(index, rows)
    segments = places // (segment or rows)
    for epoch, number in sorted({*zip(epochs.tolist(), segments.tolist(), strict=True)}):
        inside = (epochs == epoch) & (segments == number)
        first = number * segment
        # Each segment has a seed of its own, as each source has; without segments, the seed itself is used.
        own_seed = int(_splitmix64(np.array([seed], dtype=np.uint64))[0]) ^ (number + 1) if segment else seed
        size = min(segment or rows, rows - first)
        ids[inside] = first + permutation(own_seed, epoch, size, places[inside] - first)
    return ids


def _draws(seed: int, mixture: Mixture, position: Ids) -> tuple[Ids, Ids]:
    """Which source each position draws from, and how often that source was drawn from before it."""
    source, index = np.empty_like(position), np.empty_like(position)
    for block in np.unique(position // BLOCK):
        inside = position // BLOCK == block
        sources, indices = _block(seed, mixture, int(block))
        source[inside], index[inside] = sources[position[inside] % BLOCK], indices[position[inside] % BLOCK]
    return source, index


@lru_cache(maxsize=64)
def _block(seed: int, mixture: Mixture, block: int) -> tuple[Ids, Ids]:
    """One block's draws, shuffled: every source's share of all positions so far, to within one."""
    before, after = _drawn(mixture, block * BLOCK), _drawn(mixture, (block + 1) * BLOCK)
    counts = [last - first for first, last in zip(before, after, strict=True)]
    sources = np.repeat(np.arange(len(counts)), counts)
    indices = np.concatenate([np.arange(first, last) for first, last in zip(before, after, strict=True)])
    shuffle = permutation(seed ^ 0x6D6978, block, BLOCK)
    sources = sources[shuffle]
    order = np.argsort(sources, kind="stable")  # each source is read in its own order wherever its draws fall
    in_order = np.empty_like(indices)
    in_order[order] = indices
    return sources.astype(np.int64), in_order.astype(np.int64)


def _drawn(mixture: Mixture, positions: int) -> list[int]:
    """How often each source is drawn from in so many positions: its share rounded down, the heaviest gets the rest."""
    drawn = [int(weight * positions) for weight in mixture.weights]
    heaviest = mixture.weights.index(max(mixture.weights))
    drawn[heaviest] += positions - sum(drawn)
    return drawn


def rank_share(ids: Ids, *, rank: int, world: int) -> Ids:
    """The part of each global batch that a rank trains on: ``(steps, batch / world)``.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """
    batch = ids.shape[1]
    if batch % world:
        raise ValueError(f"a global batch of {batch} sequences cannot be divided evenly among {world} workers")
    share = batch // world
    return ids[:, rank * share : (rank + 1) * share]

"""Sweeps: which points a study visits. A point is a mapping from a name (``size``, ``lam``, ...) to a value."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sweep:
    """An ordered set of points; ``+`` is the union."""

    points: tuple[dict[str, Any], ...]

    def __add__(self, other: Sweep) -> Sweep:
        return Sweep(self.points + other.points)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


def grid(**axes: Any) -> Sweep:
    """Every combination of the axes' values; a single value is an axis of one.

    >>> grid(size=["0.6m", "1.8m"], lam=0.3).points
    ({'size': '0.6m', 'lam': 0.3}, {'size': '1.8m', 'lam': 0.3})
    """
    values = [list(v) if isinstance(v, Iterable) and not isinstance(v, str | dict) else [v] for v in axes.values()]
    return Sweep(tuple(dict(zip(axes, combination, strict=True)) for combination in itertools.product(*values)))

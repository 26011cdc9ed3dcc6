"""Sweeps: which points a study visits. A point is a mapping from a name (``size``, ``lam``, ...) to a value.

Sweeps are built from small ones, and nothing is dropped or added silently:

    grid(size=ladder("0.6m", "4m"), seed=range(3))        every combination
    zip_(size=["0.6m", "1.8m"], learning_rate=[3e-3, 2e-3])   side by side
    sample(20, lam=log_uniform(0.01, 1.0), seed=1)        drawn at random, the same for ever
    one + other                                           union
    one * other                                           every point of one with every point of the other
    sweep.where(lambda point: ...)                        only some of the points
    sweep.with_options(lam=[0.1, 1.0])                    over those points whose method has the option
    isoflop(sizes=[...], flops=[1e12, 1e13])              tokens solved from the FLOPs ledger
    controls(of=sweep)                                    matched to the compute of finished runs

A name is a field of ``RunConfig``, an option of the point's method, or a budget (:class:`Budget`).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

from haltscale.model import METHODS, SIZES
from haltscale.model.config import did_you_mean

Point = dict[str, Any]


class Budget(StrEnum):
    """Names that a point may use instead of ``tokens``; the study turns them into tokens, in whole steps."""

    TOKENS_PER_PARAMETER = "tokens_per_parameter"
    """Tokens as a multiple of the size's parameters (embeddings included); 20 is Chinchilla's."""
    TRAINING_FLOPS = "training_flops"
    """Realised training FLOPs. Where the method's depth is given, the tokens are solved from the ledger; where a router
    decides it, they cannot be, and the run gets the budget itself (``RunConfig.flops``) and ends when it is spent."""


class ControlKind(StrEnum):
    """What a control shares with its subject, a run that takes latent steps."""

    DENSE = "dense"
    """Vanilla of the subject's shape with more tokens (or epochs): the subject's realised training FLOPs."""
    WIDER = "wider"
    """Vanilla of a wider or deeper shape with the subject's tokens: the subject's realised training FLOPs."""
    FIXED = "fixed"
    """The subject with its router's numbers of steps replaced by their recorded mean, at the same share of the budget:
    rounded down or up without looking at the token. All else is the subject's."""
    SHUFFLED = "shuffled"
    """The same with numbers of steps drawn from the subject's recorded histogram: as many of each, somewhere else."""

    @property
    def replays(self) -> bool:
        """Whether the control is the subject with another source of steps."""
        return self in (ControlKind.FIXED, ControlKind.SHUFFLED)


@dataclass(frozen=True)
class Control:
    """A point that is known when its subject has finished: until then the study shows it as waiting."""

    kind: ControlKind
    of: Point
    """The subject's point; it has to be in the study too."""
    learning_rate: float | None = None
    """Peak; None: the subject's."""


@dataclass(frozen=True)
class Sweep:
    """An ordered set of points: ``+`` is the union, ``*`` the product."""

    points: tuple[Point | Control, ...]

    def __add__(self, other: Sweep) -> Sweep:
        return Sweep(self.points + other.points)

    def __mul__(self, other: Sweep) -> Sweep:
        return Sweep(tuple(_joined(a, b) for a in self.points for b in other.points))

    def __iter__(self) -> Iterator[Point | Control]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def where(self, keep: Callable[[Point], bool]) -> Sweep:
        """The points for which ``keep`` holds; a control goes with its subject.

        >>> len(grid(size=["0.6m", "1.8m"], l_max=[1, 9]).where(lambda p: p["size"] == "0.6m" or p["l_max"] < 9))
        3
        """
        return Sweep(tuple(point for point in self.points if keep(_subject(point))))

    def with_options(self, **axes: Any) -> Sweep:
        """Each point with the grid over those of these options that its method has; the others stay as they are.

        >>> grid(method=["vanilla", "adaptive"]).with_options(lam=[0.1, 1.0]).points
        ({'method': 'vanilla'}, {'method': 'adaptive', 'lam': 0.1}, {'method': 'adaptive', 'lam': 1.0})

        Raises:
            ValueError: a point names no method, or no point's method has one of the options.
        """
        if any("method" not in _subject(point) for point in self.points):
            raise ValueError("with_options asks what each point's method has: give method=... in the sweep before it")
        has = {name: {f.name for f in fields(entry.options)} for name, entry in METHODS.items()}  # type: ignore[arg-type]
        known = set().union(*(has.get(_subject(point)["method"], set()) for point in self.points))
        if unknown := [name for name in axes if name not in known]:
            hints = ", ".join(f"{name!r}{did_you_mean(name, sorted(known))}" for name in unknown)
            raise ValueError(f"no method of this sweep has the option {hints}")
        made: list[Point | Control] = []
        for point in self.points:
            own = {name: value for name, value in axes.items() if name in has.get(_subject(point)["method"], ())}
            made += [_joined(point, more) for more in grid(**own).points]
        return Sweep(tuple(made))


def grid(**axes: Any) -> Sweep:
    """Every combination of the axes' values; a single value is an axis of one.

    >>> grid(size=["0.6m", "1.8m"], lam=0.3).points
    ({'size': '0.6m', 'lam': 0.3}, {'size': '1.8m', 'lam': 0.3})
    """
    values = [_values(value) for value in axes.values()]
    return Sweep(tuple(dict(zip(axes, combination, strict=True)) for combination in itertools.product(*values)))


def zip_(**axes: Any) -> Sweep:
    """The axes' first values together, then their second ones, and so on; a single value goes with all.

    >>> zip_(size=["0.6m", "1.8m"], learning_rate=[3e-3, 2e-3], seed=1).points[1]
    {'size': '1.8m', 'learning_rate': 0.002, 'seed': 1}

    Raises:
        ValueError: the axes have different lengths.
    """
    values = {name: _values(value) for name, value in axes.items()}
    lengths = {name: len(found) for name, found in values.items() if _is_axis(axes[name])}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"zip_ pairs values one by one, but {told}: give all axes the same length, or use grid")
    count = next(iter(lengths.values()), 1)
    return Sweep(tuple({n: v[i if n in lengths else 0] for n, v in values.items()} for i in range(count)))


def ladder(first: str, last: str) -> list[str]:
    """The sizes of the ladder from one to another, both included.

    >>> ladder("0.6m", "4m")
    ['0.6m', '1.8m', '4m']

    Raises:
        ValueError: a size is not on the ladder, or they are in the wrong order.
    """
    names = list(SIZES)
    for size in (first, last):
        if size not in names:
            raise ValueError(f"size {size!r} is not on the ladder{did_you_mean(size, names)}")
    if names.index(first) > names.index(last):
        raise ValueError(f"{first} is larger than {last}: give the smaller size first")
    return names[names.index(first) : names.index(last) + 1]


def isoflop(*, sizes: Sequence[str], flops: Sequence[float], **axes: Any) -> Sweep:
    """Sizes x budgets of realised training FLOPs (:attr:`Budget.TRAINING_FLOPS`); other axes join the product.

    >>> isoflop(sizes=["0.6m"], flops=[1e12], method="vanilla").points
    ({'training_flops': 1000000000000.0, 'size': '0.6m', 'method': 'vanilla'},)
    """
    return grid(training_flops=flops, size=sizes) * grid(**axes)


def controls(
    *, of: Sweep, kinds: Sequence[str | ControlKind] = tuple(ControlKind), learning_rate: float | None = None
) -> Sweep:
    """Controls for every run of ``of``, matched to what that run really spent.

    They are a second stage of the study: each waits for its subject, gets its tokens or steps from the subject's
    record, and is then a run like any other, with a key of its own. Add them to a sweep that has ``of`` in it:
    ``learned + controls(of=learned)``.

    Args:
        learning_rate: peak rate of these controls in place of their subject's, for ``dense`` and ``wider``: where a
            plain model is worse at its subject's rate, the rate may be the reason. The others keep their subject's.

    Raises:
        ValueError: a kind is unknown.
    """
    for kind in kinds:
        if kind not in list(ControlKind):
            raise ValueError(f"control {str(kind)!r} is none of {', '.join(ControlKind)}")
    subjects = [point for point in of.points if not isinstance(point, Control)]
    return Sweep(tuple(Control(ControlKind(kind), point, learning_rate) for point in subjects for kind in kinds))


# ---- drawn at random ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Values to draw from; also the axes of a tuning study."""

    low: float = 0.0
    high: float = 0.0
    logarithmic: bool = False
    whole: bool = False
    """Integers, both ends included."""
    choices: tuple[Any, ...] = ()
    """Equally likely values; the other fields do not matter then."""

    def at(self, share: float) -> Any:
        """The value below which a share (0 to 1) of the distribution lies; floats have four significant digits."""
        if self.choices:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        if self.whole:
            return int(self.low + min(int(share * (self.high - self.low + 1)), self.high - self.low))
        if self.logarithmic:
            return float(f"{math.exp(math.log(self.low) + share * math.log(self.high / self.low)):.4g}")
        return float(f"{self.low + share * (self.high - self.low):.4g}")


def uniform(low: float, high: float) -> Distribution:
    """Every value between two is equally likely."""
    return _checked(Distribution(low=low, high=high))


def log_uniform(low: float, high: float) -> Distribution:
    """Every order of magnitude between two positive values is equally likely: for rates and penalties."""
    if low <= 0:
        raise ValueError(f"log_uniform({low}, {high}): both ends must be above 0")
    return _checked(Distribution(low=low, high=high, logarithmic=True))


def integers(low: int, high: int) -> Distribution:
    """Every whole number from ``low`` to ``high``, both included."""
    return _checked(Distribution(low=low, high=high, whole=True))


def choice(*values: Any) -> Distribution:
    """Each value is equally likely."""
    if not values:
        raise ValueError("choice() needs at least one value")
    return Distribution(choices=values)


def sample(n: int, /, *, seed: int = 0, **axes: Any) -> Sweep:
    """``n`` points drawn at random; an axis that is no distribution has its one value in all of them.

    The draw of an axis depends on the seed, its name and the point's number alone: a larger ``n``, or one more axis,
    keeps the earlier draws. ``seed`` is the draw's own; runs get theirs from ``* grid(seed=...)``.

    Raises:
        ValueError: an axis has several values.
    """
    for name, axis in axes.items():
        if not isinstance(axis, Distribution) and _is_axis(axis):
            raise ValueError(f"sample draws {name} from a distribution: choice(...), uniform(...), or one value")

    def draw(name: str, number: int) -> Any:
        axis = axes[name]
        if not isinstance(axis, Distribution):
            return axis
        drawn = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()
        return axis.at(int.from_bytes(drawn[:6]) / 2**48)

    return Sweep(tuple({name: draw(name, number) for name in axes} for number in range(n)))


# ---- parts ----------------------------------------------------------------------------------------------------------


def _checked(distribution: Distribution) -> Distribution:
    if not distribution.low < distribution.high:
        raise ValueError(f"a distribution from {distribution.low} to {distribution.high}: the first must be smaller")
    return distribution


def _is_axis(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | dict)


def _values(value: Any) -> list[Any]:
    if isinstance(value, Distribution):
        raise ValueError("a grid has values, not a distribution: use sample(n, ...)")
    return list(value) if _is_axis(value) else [value]


def _subject(point: Point | Control) -> Point:
    return point.of if isinstance(point, Control) else point


def _joined(one: Point | Control, other: Point | Control) -> Point | Control:
    if isinstance(other, Control):
        if isinstance(one, Control):
            raise ValueError("controls of controls are not known: multiply controls by a grid")
        return replace(other, of=_merged(one, other.of))
    return replace(one, of=_merged(one.of, other)) if isinstance(one, Control) else _merged(one, other)


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> Point:
    if twice := [name for name in other if name in one]:
        raise ValueError(f"both sides of a product give {', '.join(map(repr, twice))}: give it on one side only")
    return {**one, **other}

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
    tuned(sweep, over={"learning_rate": [1e-3, 2e-3]})    each arm at its own best, found before it is compared

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
from haltscale.platform.sweeps.rules import Rule

Point = dict[str, Any]
TUNING_SEED = 100
"""Seed of tuning runs, which no compared run may have."""


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


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the recipe of an arm is found; :func:`tuned` says what the fields mean."""

    over: tuple[tuple[str, tuple[Any, ...]], ...]
    """Names with the values to try, ascending where they are numbers."""
    at: tuple[tuple[str, Any], ...] = ()
    share: float = 0.25
    rule: Rule | None = None
    seed: int = TUNING_SEED
    extensions: int = 2

    @property
    def names(self) -> list[str]:
        """What is tuned."""
        return [name for name, _ in self.over]

    def problems(self) -> list[str]:
        """What is wrong whatever the run."""
        found = []
        if not self.over and self.rule is None:
            found.append("tuned needs something to try, such as over={'learning_rate': [1e-3, 2e-3, 4e-3]}, or a rule")
        for name, values in self.over:
            if name in UNTUNED:
                found.append(f"over {name}: that is what is compared or what it may spend, leave it in the sweep")
            if len(values) < 2:
                found.append(f"over {name} has {len(values)} different values: give at least 2, or set it in the sweep")
        if not (_is_number(self.share) and 0 < self.share <= 1):
            found.append(f"share must be above 0 and at most 1 (got {self.share!r})")
        for name in ("seed", "extensions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                found.append(f"{name} of tuned must be a whole number from 0 on (got {value!r})")
        if self.rule is not None and not isinstance(self.rule, Rule):
            found.append(f"rule must be a Rule such as Constant() or StepLaw() (got {self.rule!r})")
        for name in dict(self.at):
            if name in ("method", "seed") or name in self.names:
                found.append(f"at must not set {name}, which the sweep or tuned sets")
        return found


UNTUNED = ("method", "size", "seed", "context", "tokens", "flops", "init_from", "precision", *Budget)
"""What no recipe consists of."""


@dataclass(frozen=True)
class Tuned:
    """A point whose recipe is known when its tuning runs have finished."""

    of: Point
    """All else."""
    how: Tuning


@dataclass(frozen=True)
class Control:
    """A point that is known when its subject has finished: until then the study shows it as waiting."""

    kind: ControlKind
    of: Point | Tuned
    """The subject's point; it has to be in the study too."""
    learning_rate: float | None = None
    """Peak; None: the subject's, or, for a plain control of a tuned subject, one that is tuned for it."""


AnyPoint = Point | Tuned | Control


@dataclass(frozen=True)
class Sweep:
    """An ordered set of points: ``+`` is the union, ``*`` the product."""

    points: tuple[AnyPoint, ...]

    def __add__(self, other: Sweep) -> Sweep:
        return Sweep(self.points + other.points)

    def __mul__(self, other: Sweep) -> Sweep:
        return Sweep(tuple(_joined(a, b) for a in self.points for b in other.points))

    def __iter__(self) -> Iterator[AnyPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def where(self, keep: Callable[[Point], bool]) -> Sweep:
        """The points for which ``keep`` holds; a control goes with its subject, a tuned point without its recipe.

        >>> len(grid(size=["0.6m", "1.8m"], l_max=[1, 9]).where(lambda p: p["size"] == "0.6m" or p["l_max"] < 9))
        3
        """
        return Sweep(tuple(point for point in self.points if keep(plain_point(point))))

    def with_options(self, **axes: Any) -> Sweep:
        """Each point with the grid over those of these options that its method has; the others stay as they are.

        >>> grid(method=["vanilla", "adaptive"]).with_options(lam=[0.1, 1.0]).points
        ({'method': 'vanilla'}, {'method': 'adaptive', 'lam': 0.1}, {'method': 'adaptive', 'lam': 1.0})

        Raises:
            ValueError: a point names no method or one that there is not, or no point's method has one of the options.
        """
        if any("method" not in plain_point(point) for point in self.points):
            raise ValueError("with_options asks what each point's method has: give method=... in the sweep before it")
        has: dict[Any, set[str]] = {}
        for method in {plain_point(point)["method"] for point in self.points}:
            options: Any = METHODS[METHODS.named(method)].options
            has[method] = {f.name for f in fields(options)}
        known = set().union(*has.values())
        if unknown := [name for name in axes if name not in known]:
            hints = ", ".join(f"{name!r}{did_you_mean(name, sorted(known))}" for name in unknown)
            raise ValueError(f"no method of this sweep has the option {hints}")
        made: list[AnyPoint] = []
        for point in self.points:
            own = {name: value for name, value in axes.items() if name in has[plain_point(point)["method"]]}
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
        counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"zip_ pairs values one by one, but {counts}: give all axes the same length, or use grid")
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
            raise ValueError(f"kinds must be one of {', '.join(ControlKind)} (got {str(kind)!r})")
    subjects = [point for point in of.points if not isinstance(point, Control)]
    return Sweep(tuple(Control(ControlKind(kind), point, learning_rate) for point in subjects for kind in kinds))


def tuned(
    sweep: Sweep,
    *,
    over: Mapping[str, Sequence[Any]] | None = None,
    at: str | Mapping[str, Any] | None = None,
    rule: Rule | None = None,
    share: float = 0.25,
    seed: int = TUNING_SEED,
    extensions: int = 2,
) -> Sweep:
    """The points of a sweep, each at the recipe that is best for it.

    For each point (but for its seed) the study first trains the grid over ``over``, with ``seed`` and a ``share`` of
    the point's budget, in the role ``tuning``. While the lowest held-out loss is at an end of an axis of numbers, the
    axis is extended by its own ratio, ``extensions`` values at most. Then the point is trained with the best values.
    Points that would tune with the same runs share them, and what the record of each compared run says of it is in its
    ``recipe``. ``controls(of=tuned(...))``: replays keep their subject's recipe, the plain ones get their own.

    Args:
        over: fields of the run, or options of its method, with the values to try.
        at: what differs in the tuning runs: a size, or a mapping such as ``{"size": "0.6m", "tokens": 50_000}``. With
            a budget in it, that is the tuning runs' budget and ``share`` does not matter.
        rule: how the best values change from the tuning runs' size and budget to the compared ones'
            (:mod:`haltscale.platform.sweeps.rules`). Needed where ``at`` is another size; without it the values found
            are those used. With nothing in ``over``, the rule alone gives the recipe.
        share: of the compared run's budget.
        seed: of the tuning runs; no compared run may have it.
        extensions: values by which an axis may grow beyond those given.

    Raises:
        ValueError: a point is a control, or tuned already. The study reports everything else, with its other errors.
    """
    if not all(isinstance(point, dict) for point in sweep.points):
        raise ValueError("tuned is of plain points: controls(of=tuned(...)), and tuned(...) once for each point")
    axes = tuple((str(name), _ascending(_values(values))) for name, values in (over or {}).items())
    place: Mapping[str, Any] = {"size": at} if isinstance(at, str) else at or {}
    how = Tuning(over=axes, at=tuple(place.items()), share=share, rule=rule, seed=seed, extensions=extensions)
    return Sweep(tuple(Tuned(dict(point), how) for point in sweep.points if isinstance(point, dict)))


def _ascending(values: list[Any]) -> tuple[Any, ...]:
    different = list(dict.fromkeys(values))
    return tuple(sorted(different) if all(map(_is_number, different)) else different)


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
    """``n`` points drawn at random; an axis that is not a distribution has its one value in all of them.

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


def plain_point(point: AnyPoint) -> Point:
    """What a point says itself: a control's subject, a tuned point without its recipe."""
    while isinstance(point, Control | Tuned):
        point = point.of
    return point


def _joined(one: AnyPoint, other: AnyPoint) -> AnyPoint:
    if not isinstance(one, dict) and not isinstance(other, dict):
        raise ValueError("a product of controls or tuned points with others of them: multiply them by a grid")
    merged = _merged(plain_point(one), plain_point(other))
    return _over(other if isinstance(one, dict) else one, merged)


def _over(point: AnyPoint, plain: Point) -> AnyPoint:
    """A point with another plain one in it."""
    if isinstance(point, Control):
        subject = point.of
        return replace(point, of=replace(subject, of=plain) if isinstance(subject, Tuned) else plain)
    return replace(point, of=plain) if isinstance(point, Tuned) else plain


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> Point:
    if twice := [name for name in other if name in one]:
        raise ValueError(f"both sides of a product give {', '.join(map(repr, twice))}: give it on one side only")
    return {**one, **other}

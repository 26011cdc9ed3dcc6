"""What a run will cost, before it runs: FLOPs from the ledger, tokens from a budget.

The methods are asked, not approximated: a tiny model of the same method, options and context counts its passes, and the
ledger prices those counts at the real shape. What a learned router will save is not known before it is trained, so it
is never guessed: such a run has a bound, and an estimate only from finished runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from haltscale.model import METHODS, LanguageModel, ModelConfig, PassCounts, Shape, ledger
from haltscale.model.config import rung
from haltscale.platform.config import ConfigError, RunConfig, current_identity
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.identity import digest
from haltscale.platform.store import RunView
from haltscale.platform.sweeps.sweep import Budget, Point

PROBE_SHAPE = Shape(layers=3, d=16, heads=1, kv_heads=1, ffn=16)
PROBE_CONTEXT = 256
"""Longer contexts are carried on from three shorter ones: rows are linear in the length, key pairs quadratic."""
GROWTH_SHARES = 1000
"""Shares of the budget at which a growing depth is asked for."""
NEAR = 0.02
"""Shapes whose FLOPs differ by less than this (relatively) are as good as equal."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Realised training FLOPs per token; see ``haltscale.model.ledger``."""

    bound: float
    """With every latent step taken."""
    expected: float | None
    """Where the method's depth does not hang on the data, what it will be; None for methods with a router."""


def cost(run: RunConfig, vocab_size: int) -> Cost:
    """What a run spends per token.

    Raises:
        ValueError: the run has errors (:meth:`RunConfig.problems`).
    """
    entry, options = METHODS[run.method], _priced(run.method, run.options)
    rank = run.embedding_rank
    bound = _training_flops(run.method, run.shape, options, run.context, vocab_size, rank)
    expected: float | None = bound
    if entry.drawn is not None:
        drawn: list[Any] = list(entry.drawn(options))
        depths = [_training_flops(run.method, run.shape, each, run.context, vocab_size, rank) for each in drawn]
        expected = float(np.mean(depths))
    elif run.document_mask or entry.routed:
        expected = None
    elif getattr(run.options, "depth_growth", 0.0):
        expected = _mean_while_growing(run, vocab_size) if hasattr(run.options, "steps") else None
    return Cost(bound=bound, expected=expected)


def _mean_while_growing(run: RunConfig, vocab_size: int) -> float:
    """Realised training FLOPs per token of a method without a router, on average over the growth of its depth."""
    options: Any = run.options  # of a method with `steps`: looped or fixed
    priced: Any = _priced(run.method, options)
    l_max = math.ceil(options.steps)
    depths = Counter(options.most_steps(n / GROWTH_SHARES, l_max) for n in range(GROWTH_SHARES))

    def at(depth: int) -> float:
        steps = min(options.steps, depth)
        known = replace(priced, steps=steps)
        return _training_flops(run.method, run.shape, known, run.context, vocab_size, run.embedding_rank)

    return sum(at(depth) * shares for depth, shares in depths.items()) / GROWTH_SHARES


def tokens_for(flops: float, run: RunConfig, vocab_size: int) -> int:
    """The tokens that realised training FLOPs pay for, in whole steps, rounded to the nearest."""
    priced = cost(run, vocab_size)
    steps = round(flops / (priced.expected or priced.bound) / run.batch_tokens)
    return steps * run.batch_tokens


def size_for(flops: float, run: RunConfig, vocab_size: int) -> str:
    """The size, LAYERSxWIDTH by the ladder's rule, at which a vanilla run spends realised training FLOPs on its tokens.

    Of the shapes that come within :data:`NEAR` of them, the one whose proportions are closest to the run's own; where
    none does, the nearest. The run's record says what it really spent.
    """
    wanted = flops / run.tokens
    own = run.shape
    found: list[tuple[bool, float, str]] = []
    for layers in range(own.layers, 8 * own.layers + 1):
        for d in range(own.d, 8 * own.d + 1, 32):
            if d >= 192 and d % 64:
                continue
            shape = rung(layers, d)
            rows = ledger.passes_flops(shape, [1], [0], [layers]) + 2 * run.embedding_rank * d
            rows += ledger.head_flops(shape, vocab_size, 1, rank=run.embedding_rank)
            pairs = layers * ledger.layer_pair_flops(shape) * (run.context + 1) / 2
            miss = abs(math.log(ledger.TRAINING_TO_FORWARD * (rows + pairs) / wanted))
            stretch = abs(math.log(d / layers * own.layers / own.d))
            near = miss <= NEAR
            found.append((not near, stretch if near else miss, f"{layers}x{d}"))
    return min(found)[2]


def split_budget(point: Point) -> tuple[Point, Point]:
    """A point without its budgets, and the budgets."""
    budgets = {name: value for name, value in point.items() if name in list(Budget)}
    return {name: value for name, value in point.items() if name not in budgets}, budgets


def with_budget(run: RunConfig, budgets: Point, vocab_size: int) -> RunConfig:
    """The run with its tokens solved from a budget; without a budget, the run itself.

    Raises:
        ConfigError: there are several budgets, or one is no positive number or less than one batch.
    """
    if not budgets:
        return run
    if len(budgets) > 1:
        raise ConfigError([f"{' and '.join(budgets)} are two budgets for one run: give one"], "run")
    ((name, value),) = budgets.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError([f"{name} is {value!r}, needs a number above 0"], "run")
    if name == Budget.TRAINING_FLOPS:
        if cost(run, vocab_size).expected is None:
            return replace(run, flops=float(value))
        tokens = tokens_for(value, run, vocab_size)
    else:
        parameters = run.parameters(vocab_size)
        tokens = round(value * parameters / run.batch_tokens) * run.batch_tokens
    if tokens < run.batch_tokens:
        raise ConfigError([f"{name} {value:g} is less than one batch of {run.batch_tokens} tokens"], "run")
    return replace(run, tokens=tokens)


class Measured:
    """What finished runs of a study tell about runs of the same kind that are still to come."""

    def __init__(self, views: Iterable[RunView], execution: ExecutionConfig) -> None:
        """
        Args:
            execution: how the runs to come are executed; the speed of runs executed otherwise says nothing about them.
        """
        self._flops: dict[Any, list[float]] = {}
        self._seconds: dict[Any, list[float]] = {}
        for view in views:
            record = view.record
            identity, tokens = current_identity(record), record.get("tokens")
            if not tokens or not identity:
                continue
            start = identity.get("init_from", {}).get("sha256")
            size = (identity["method"], identity["size"], start, identity["context"])
            if "flops_realised" in record:
                of = (*size, digest(identity["options"]))
                self._flops.setdefault(of, []).append(record["flops_realised"] / tokens)
            if "wall_seconds" in record and _hardware(record.get("execution", {})) == _hardware(asdict(execution)):
                self._seconds.setdefault(size, []).append(record["wall_seconds"] / tokens)

    def flops_per_token(self, run: RunConfig) -> float | None:
        """Realised training FLOPs per token: the median of finished runs with the same options at the same size."""
        found = self._flops.get((*_kind(run), digest(run.options))) if self._flops else None
        return float(np.median(found)) if found else None

    def seconds(self, run: RunConfig, tokens: int | None) -> float | None:
        """Training time: at the median speed of finished runs of the same method and size, executed alike."""
        found = self._seconds.get(_kind(run))
        return float(np.median(found)) * tokens if found and tokens else None


def _kind(run: RunConfig) -> tuple[Any, ...]:
    return run.method, run.size, run.init_from and run.init_from.sha256, run.context


def _hardware(execution: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(execution.get(name) for name in ("workers", "cpus_per_worker", "gpus_per_worker"))


# ---- asking the methods ---------------------------------------------------------------------------------------------


def _every_step(method: str, options: Any) -> tuple[str, Any]:
    """What takes all the steps which a router could ask for; a method without a router does so itself."""
    every_step = METHODS[method].every_step
    return every_step(options) if every_step else (method, options)


def _priced(method: str, options: Any) -> Any:
    defaults, costless = type(options)(), METHODS[method].costless
    return replace(options, **{f.name: getattr(defaults, f.name) for f in fields(options) if f.name in costless})


@cache
def _training_flops(
    method: str, shape: Shape, options: Any, context: int, vocab_size: int, embedding_rank: int
) -> float:
    model = _weightless(method, shape, options, vocab_size, embedding_rank)
    counts = _counts(*_every_step(method, options), context)
    return model.flops(counts).training.realised / counts.tokens


@cache
def _weightless(method: str, shape: Shape, options: Any, vocab_size: int, embedding_rank: int) -> LanguageModel:
    """A model that has shapes and no weights."""
    config = ModelConfig(
        method=method,
        shape=shape,
        vocab_size=vocab_size,
        context=8,
        options=options,
        embedding_rank=embedding_rank,
    )
    with torch.device("meta"), _Undrawn():
        return METHODS[method].model(config)


class _Undrawn(TorchFunctionMode):
    """Weights are not drawn at random: where there are none, that would load torch's compiler, for seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@cache
def _counts(method: str, options: Any, context: int) -> PassCounts:
    if context > PROBE_CONTEXT:
        lengths = [PROBE_CONTEXT // 4, PROBE_CONTEXT // 2, PROBE_CONTEXT]
        probed = [_counts(method, options, length) for length in lengths]

        def carried_on(counts: list[list[int]]) -> list[int]:
            return [round(float(np.polyval(np.polyfit(lengths, k, 2), context))) for k in zip(*counts, strict=True)]

        whole = PassCounts(
            rows=carried_on([counts.rows for counts in probed]),
            keys=carried_on([counts.keys for counts in probed]),
            executed_rows=[0] * len(probed[0].rows),
            executed_keys=[0] * len(probed[0].rows),
            tokens=context,
        )
        without_gradient = probed[0].forward_only
        whole.forward_only = whole.first(len(without_gradient.rows)) if without_gradient else None
        return whole
    config = ModelConfig(method=method, shape=PROBE_SHAPE, vocab_size=8, context=context, options=options)
    tokens_BT = torch.zeros(1, context, dtype=torch.long)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        counts: PassCounts = METHODS[method].model(config).eval()(tokens_BT, tokens_BT).trace.counts
    return counts

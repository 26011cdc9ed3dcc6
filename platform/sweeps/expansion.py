"""From a sweep's points to runs: which there are, which wait for another, and which stand in the store already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

from haltscale.model import METHODS, Method, RouterKind, SourceOptions, StepsFrom, VanillaOptions
from haltscale.platform.config import ConfigError, RunConfig, apply_point, current_identity, run_key
from haltscale.platform.store import RunState, RunView
from haltscale.platform.sweeps import planning
from haltscale.platform.sweeps.sweep import Budget, Control, ControlKind, Point, Sweep

PLAIN = {Method.VANILLA: "it is the plain model that the control would be"}
UNROUTED = {
    method: "it has no router: every token takes as many steps as every other"
    for method in Method
    if not issubclass(METHODS[method].options, SourceOptions)
} | {Method.SHUFFLED: "it is itself a control (an old one, with a router of its own)"}
NO_SUBJECTS = {kind: UNROUTED if kind.replays else PLAIN for kind in ControlKind}
"""Methods that each kind of control means nothing for, and why; it is known for all others."""


class PlanState(StrEnum):
    """States that only a plan knows; the others are :class:`RunState`'s."""

    STALE = "stale"
    """Not trained as it is now, but finished under another version of the code or of the corpus, which is kept apart
    and not mixed in."""
    WAITING = "waiting"
    """A control whose subject has not finished: what it is to be is not known yet."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a study, or a control that is yet to become one."""

    label: str
    run: RunConfig | None
    """None while it waits."""
    control: ControlKind | None = None
    subject: RunConfig | None = None
    """Of a control: the run that it belongs to."""


@dataclass(frozen=True)
class RunControl:
    """A control of a run."""

    kind: ControlKind
    subject: RunConfig
    learning_rate: float | None
    """Peak; None: the subject's."""


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """A sweep, point by point."""

    runs: list[RunConfig]
    """Those that are known from the sweep alone, in its order."""
    controls: list[RunControl]
    problems: list[str]


def expand(sweep: Sweep, base: RunConfig, vocab_size: int, *, on_gpu: bool = False) -> Expansion:
    """The runs and controls of a sweep, with everything that is wrong about its points.

    Args:
        on_gpu: whether the runs will train on GPUs, which decides what ``precision=auto`` stands for.
    """
    runs: list[RunConfig] = []
    controls: list[tuple[int, RunControl]] = []
    problems: list[str] = []
    for number, point in enumerate(sweep, start=1):
        plain = point.of if isinstance(point, Control) else point
        run, found = _run(base, plain, vocab_size)
        run = run.resolved(on_gpu=on_gpu)
        if isinstance(point, Control):
            found = found or _control_problems(point, run)
            if not found and point.learning_rate is not None:
                found = replace(run, learning_rate=point.learning_rate).problems(vocab_size)
            controls.append((number, RunControl(point.kind, run, point.learning_rate)))
            problems += [f"point {number}, the {point.kind} control of {plain}: {problem}" for problem in found]
        else:
            runs.append(run)
            problems += [f"point {number} {plain}: {problem}" for problem in found]
    if not problems:
        seen: dict[RunConfig, int] = {}
        for index, run in enumerate(runs):
            same = run.canonical()
            if same in seen:
                problems.append(f"point {index + 1} is the same run as point {seen[same] + 1}: {run.label}")
            seen.setdefault(same, index)
        for number, control in controls:
            if control.subject.canonical() not in seen:
                missing = f"the sweep has no such run to control ({control.subject.label})"
                problems.append(f"point {number}, a {control.kind} control: {missing}")
        if len({(control.kind, control.subject.canonical()) for _, control in controls}) < len(controls):
            problems.append("some controls are given twice: call controls(of=...) once for each run")
    return Expansion(runs=runs, controls=[control for _, control in controls], problems=problems)


def _run(base: RunConfig, point: Point, vocab_size: int) -> tuple[RunConfig, list[str]]:
    plain, budgets = planning.split_budget(point)
    if budgets and (also := [name for name in ("tokens", "flops") if name in plain]):
        return base, [f"{' and '.join([*also, *budgets])} are two budgets for one run: give one"]
    run, found = apply_point(base, plain, also=list(Budget))
    if not budgets:
        return run, found + run.problems(vocab_size)
    if found := found + replace(run, tokens=run.batch_tokens).problems(vocab_size):  # the tokens are to be solved
        return run, found
    try:
        return planning.with_budget(run, budgets, vocab_size), []
    except ConfigError as error:
        return run, error.problems


def _control_problems(control: Control, subject: RunConfig) -> list[str]:
    """Why a run can have no such control."""
    kind, advice = control.kind, "leave these runs out of it"
    if why := NO_SUBJECTS[kind].get(subject.method):
        return [f"the {kind} control is not for {subject.method}, since {why}: {advice}"]
    source = getattr(subject.options, "steps_from", StepsFrom.ROUTER)
    if kind.replays and source is not StepsFrom.ROUTER:
        return [
            f"the {kind} control is for a run with a router, and this one's steps are replayed ({source}): {advice}"
        ]
    if kind.replays and getattr(subject.options, "router", None) is RouterKind.NONE:
        return [f"the {kind} control is for a run with a router, not with router none: {advice}"]
    if kind.replays and control.learning_rate is not None:
        return [f"the {kind} control keeps its subject's learning rate: leave learning_rate out"]
    if kind is ControlKind.WIDER and subject.init_from is not None:
        return [f"no wider model can start from the weights of init_from: {advice}"]
    return []


def control_run(control: RunControl, record: Mapping[str, Any], vocab_size: int) -> RunConfig | None:
    """The run that a control is, or None where it has to wait for its subject's record (also for one that was written
    before records had a schedule of steps: that subject has to be trained again).

    Tokens are rounded to whole batches.
    """
    kind, rate = control.kind, control.learning_rate
    subject = control.subject if rate is None else replace(control.subject, learning_rate=rate)
    if not record or (kind.replays and not record.get("steps_schedule")):
        return None
    if kind.replays:
        options: Any = subject.options
        source = StepsFrom(kind)
        replay = replace(options, steps_from=source, steps_schedule=_schedule(record), steps_seed=subject.seed)
        return replace(subject, options=replay)
    plain = replace(subject, method=Method.VANILLA, options=VanillaOptions(), flops=None)
    if kind is ControlKind.DENSE:
        return replace(plain, tokens=planning.tokens_for(record["flops_realised"], plain, vocab_size))
    plain = replace(plain, tokens=record["tokens"] // plain.batch_tokens * plain.batch_tokens)
    return replace(plain, size=planning.size_for(record["flops_realised"], plain, vocab_size))


def _schedule(record: Mapping[str, Any]) -> tuple[tuple[float, ...], ...]:
    """What a replay control repeats: the subject's histograms over its training, and, where the budget is spent, the
    one of its held-out reading, so that the two are compared at equal steps there too."""
    held_out = tuple(round(share, 5) for share in record["steps_histogram"])
    return (*(tuple(row) for row in record["steps_schedule"]), (1.0, *held_out))


def labels(runs: list[RunConfig]) -> dict[RunConfig, str]:
    """A label for each run; where several share one, as few settings are added as tell them apart."""
    alike: dict[str, list[RunConfig]] = {}
    for run in runs:
        alike.setdefault(run.label, []).append(run)
    found = {}
    for label, group in alike.items():
        settings = {run: _settings(run) for run in group}
        names = _telling(list(settings.values()))
        for run in group:
            more = [f"{name} {_short(settings[run].get(name))}" for name in names]
            found[run] = " · ".join([label, *more])
    return found


def _telling(settings: list[dict[str, Any]]) -> list[str]:
    """Names of as few settings as tell these apart: each tells the most of what is left, choices before numbers."""
    chosen: list[str] = []

    def apart(names: list[str]) -> int:
        return len({str([one.get(name) for name in names]) for one in settings})

    def worth(name: str) -> tuple[int, bool]:
        return apart([*chosen, name]), isinstance(settings[0][name], StrEnum)

    while apart([*chosen, best := max(settings[0], key=worth)]) > apart(chosen):
        chosen.append(best)
    return sorted(chosen, key=list(settings[0]).index)


def _settings(run: RunConfig) -> dict[str, Any]:
    plain = {f.name: getattr(run, f.name) for f in fields(run) if f.name != "options"}
    options: Any = run.options
    return plain | {f.name: getattr(options, f.name) for f in fields(options) if f.name != "steps_schedule"}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def stale_keys(views: Mapping[str, RunView], wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Of the keys wanted, those that a finished run would have but for the version of the code or the corpus.

    Args:
        views: the runs in the store, by key.
        wanted: identities by key.

    Returns:
        The finished run's key for each such wanted key.
    """
    drifted = {
        _drift_free(identity): key
        for key, view in views.items()
        if key not in wanted and view.state is RunState.FINISHED and (identity := current_identity(view.record))
    }
    if not drifted:
        return {}
    return {key: drifted[found] for key, identity in wanted.items() if (found := _drift_free(identity)) in drifted}


def _drift_free(identity: Mapping[str, Any]) -> str:
    return run_key({**identity, "corpus_fingerprint": "", "semantics": {}})

"""From a sweep's points to runs: which there are, which wait for another, and which stand in the store already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

from haltscale.model import METHODS, Method, RouterKind, StepsFrom, VanillaOptions
from haltscale.platform.config import ConfigError, RunConfig, apply_point, current_identity, run_key
from haltscale.platform.store import RunState, RunView
from haltscale.platform.sweeps import planning
from haltscale.platform.sweeps.recipes import RunTuned, shortened, tuned_problems
from haltscale.platform.sweeps.spec import COMPARISON
from haltscale.platform.sweeps.sweep import Budget, Control, ControlKind, Point, Sweep, Tuned, plain_point


def no_subject(kind: ControlKind, method: str) -> str:
    """Why a kind of control means nothing for runs of a method; empty where it means something."""
    entry = METHODS[method]
    if not kind.replays:
        return "it is the plain model that the control would be" if method == Method.VANILLA else ""
    if entry.replays:
        return ""
    if entry.old_control and entry.routed:
        return "it is itself a control (an old one, with a router of its own)"
    if entry.routed:
        return "its steps cannot be replayed: its options do not inherit SourceOptions"
    return "it has no router: all tokens take the same number of steps"


class PlanState(StrEnum):
    """States that only a plan knows; the others are :class:`RunState`'s."""

    STALE = "stale"
    """Not trained as it is now, but finished under another version of the code or of the corpus, which is kept apart
    and not mixed in."""
    WAITING = "waiting"
    """A control whose subject, or a tuned run whose tuning, has not finished: what it is to be is not known yet."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a study, or what is yet to become one."""

    label: str
    run: RunConfig | None
    """None while it waits."""
    role: str = COMPARISON
    """``tuning`` for a run that only serves to find a recipe."""
    control: ControlKind | None = None
    subject: RunConfig | None = None
    """Of a control: the run that it belongs to, where that is known."""
    recipe: Mapping[str, Any] | None = None
    """Where its settings are from, for its record (:func:`~haltscale.platform.sweeps.recipes.recipe_of`)."""
    expected: RunConfig | None = None
    """Of a tuned run that waits: what it will be but for its recipe."""
    of: str = ""
    """Of one that waits: the label of what it waits for."""


@dataclass(frozen=True)
class RunControl:
    """A control of a run."""

    kind: ControlKind
    subject: RunConfig | RunTuned
    learning_rate: float | None
    """Peak; None: the subject's, or one that is tuned where the subject is."""

    def same(self) -> tuple[Any, ...]:
        """Equal for what is the same control."""
        return self.kind, _same(self.subject)


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """A sweep, point by point."""

    runs: list[RunConfig]
    """Those that are known from the sweep alone, in its order."""
    tuned: list[RunTuned]
    """Those that are known when their tuning runs have finished."""
    controls: list[RunControl]
    """Those that are known when their subjects have finished."""
    problems: list[str]

    @property
    def alike(self) -> list[RunConfig]:
        """All runs as far as they are known from the sweep, to check what execution and memory they need."""
        return [*self.runs, *(run for tuned in self.tuned for run in (tuned.run, tuned.trial))]


def _same(subject: RunConfig | RunTuned) -> Any:
    return subject.same() if isinstance(subject, RunTuned) else subject.canonical()


def expand(sweep: Sweep, base: RunConfig, vocab_size: int, *, on_gpu: bool = False) -> Expansion:
    """The runs and controls of a sweep, with everything that is wrong about its points.

    Args:
        on_gpu: whether the runs will train on GPUs, which decides what ``precision=auto`` stands for.
    """
    runs: list[tuple[int, RunConfig | RunTuned]] = []
    controls: list[tuple[int, RunControl]] = []
    problems: list[str] = []
    for number, point in enumerate(sweep, start=1):
        plain = plain_point(point)
        subject = point.of if isinstance(point, Control) else point
        run, found = _known(base, subject, vocab_size, on_gpu=on_gpu)
        if isinstance(point, Control):
            bare = run.run if isinstance(run, RunTuned) else run
            found = found or _control_problems(point, bare)
            if not found and point.learning_rate is not None:
                found = replace(bare, learning_rate=point.learning_rate).problems(vocab_size)
            controls.append((number, RunControl(point.kind, run, point.learning_rate)))
            problems += [f"point {number}, the {point.kind} control of {plain}: {problem}" for problem in found]
        else:
            runs.append((number, run))
            problems += [f"point {number} {plain}: {problem}" for problem in found]
    if not problems:
        seen: dict[Any, int] = {}
        for number, run in runs:
            same = _same(run)
            if same in seen:
                label = run.run.label if isinstance(run, RunTuned) else run.label
                problems.append(f"point {number} is the same run as point {seen[same]}: {label}")
            seen.setdefault(same, number)
        for number, control in controls:
            if _same(control.subject) not in seen:
                bare = control.subject.run if isinstance(control.subject, RunTuned) else control.subject
                missing = f"the sweep has no such run to control ({bare.label})"
                problems.append(f"point {number}, a {control.kind} control: {missing}")
        if len({control.same() for _, control in controls}) < len(controls):
            problems.append("some controls are given twice: call controls(of=...) once for each run")
    known = [run for _, run in runs if isinstance(run, RunConfig)]
    tuned = [run for _, run in runs if isinstance(run, RunTuned)]
    seeds = [run.seed for run in [*known, *(each.run for each in tuned)]]  # whatever a study gives, hashable or not
    if taken := {each.how.seed for each in tuned if each.how.seed in seeds}:
        problems.append(
            f"seed {min(taken)} is that of tuning runs and of a compared run, which would be the best of several draws:"
            " give tuned(..., seed=...) another one"
        )
    return Expansion(runs=known, tuned=tuned, controls=[control for _, control in controls], problems=problems)


def _known(
    base: RunConfig, point: Point | Tuned, vocab_size: int, *, on_gpu: bool
) -> tuple[RunConfig | RunTuned, list[str]]:
    """What a point says of its run, and what is wrong with it."""
    plain = plain_point(point)
    run, found = _run(base, plain, vocab_size)
    run = run.resolved(on_gpu=on_gpu)
    if not isinstance(point, Tuned):
        return run, found
    how = point.how
    found += [f"{name} is tuned and given: leave it out of one" for name in how.names if name in plain]
    place = dict(how.at)
    budgets = ("tokens", "flops", *Budget)
    own_budget = any(name in budgets for name in place)
    there = {name: value for name, value in plain.items() if not (own_budget and name in budgets)}
    trial, wrong = _run(base, {**there, **place, "seed": how.seed}, vocab_size)
    found += [f"at {place}: {problem}" for problem in wrong] if place else []
    tuned = RunTuned(run=run, trial=trial.resolved(on_gpu=on_gpu), how=how)
    if found:
        return tuned, [*found, *how.problems()]
    if not own_budget and not how.problems():
        tuned = replace(tuned, trial=shortened(tuned.trial, how.share))
    return tuned, tuned_problems(tuned, vocab_size)


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
    if why := no_subject(kind, subject.method):
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
    kind, rate, subject = control.kind, control.learning_rate, control.subject
    assert isinstance(subject, RunConfig)
    subject = subject if rate is None else replace(subject, learning_rate=rate)
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

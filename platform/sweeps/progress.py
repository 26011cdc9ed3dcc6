"""One line about a whole sweep, from what its runs write: no channel of its own, so nothing that can break a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from haltscale.platform.durations import clock
from haltscale.platform.store import RunState, RunStore, RunView

MOST_BARS = 16
"""Of runs that train; with more of them, the others are counted."""


class SweepProgress:
    """Watches the runs of one study in the store. A run that has finished is not read again."""

    def __init__(
        self, store: RunStore, study: str, planned_flops: Mapping[str, float], now: Callable[[], float]
    ) -> None:
        """
        Args:
            planned_flops: of each run to be trained, by key; cheap and expensive runs weigh accordingly.
            now: the clock, in seconds.
        """
        self._store, self._study, self._planned, self._now = store, study, dict(planned_flops), now
        self._began = now()
        self._reported: set[str] = set()
        self._finished: dict[str, RunView] = {}
        self._first_share = self._share_done(self._runs())

    def lines(self) -> list[str]:
        """What is new: a line for each run that ended since the last call, for each that trains, and for the sweep."""
        runs = self._runs()
        ended = [self._ended(run) for run in runs if run.key not in self._reported and _has_ended(run)]
        self._reported |= {run.key for run in runs if _has_ended(run)}
        bars = [_bar(run) for run in runs if run.state is RunState.RUNNING]
        more = [f"  ... and {len(bars) - MOST_BARS} more that train"] if len(bars) > MOST_BARS else []
        return [*ended, *bars[:MOST_BARS], *more, self._summary(runs)]

    def _runs(self) -> list[RunView]:
        views = self._store.views(self._study, [key for key in self._planned if key not in self._finished])
        self._finished |= {key: view for key, view in views.items() if view.state is RunState.FINISHED}
        return [views.get(key) or self._finished[key] for key in self._planned]

    def _share_done(self, runs: list[RunView]) -> float:
        return sum(self._planned[run.key] * _share(run) for run in runs) / sum(self._planned.values())

    def _ended(self, run: RunView) -> str:
        if run.state is RunState.FINISHED:
            record = run.record
            return (
                f"  finished {run.label}: loss {record['loss']:.3f} nats/token,"
                f" mean steps {record['mean_steps']:.2f}, {record['wall_seconds']:.0f} s of training"
            )
        return f"  failed {run.label}: {run.status.get('error')}"

    def _summary(self, runs: list[RunView]) -> str:
        ended = sum(_has_ended(run) for run in runs)
        done = self._share_done(runs)
        gained, elapsed = done - self._first_share, self._now() - self._began
        left = f"about {clock(elapsed / gained * (1 - done))} left" if gained > 0.01 else "time left: not known yet"
        return " | ".join([f"{ended}/{len(runs)} runs", f"{100 * done:3.0f} %", left])


def _has_ended(run: RunView) -> bool:
    return run.state in (RunState.FINISHED, RunState.FAILED)


def _share(run: RunView) -> float:
    if _has_ended(run):
        return 1.0
    return float(run.status.get("step") or 0) / float(run.status.get("steps") or 1)


def _bar(run: RunView) -> str:
    """A run that trains: how far it is, what it is like, how fast, how long still."""
    done, status = round(10 * _share(run)), run.status
    parts = [f"  {'█' * done}{'░' * (10 - done)} {describe(run)}"]
    for name, unit in (("tokens_per_second", " tokens/s"), ("flops_per_second", "FLOP/s")):
        if status.get(name):
            parts.append(f"{_short(status[name])}{unit}")
    if status.get("mfu"):
        parts.append(f"{status['mfu']:.0%} MFU")
    if status.get("seconds_left") is not None:
        parts.append(f"{clock(status['seconds_left'])} left")
    if status.get("events"):
        parts.append(f"! {status['events'][-1]['what']}")
    return " | ".join(parts)


def _short(value: float) -> str:
    """A number to three digits with its prefix: 12300 is ``12.3 k``."""
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {prefix}"
    return f"{value:.3g}"


def describe(run: RunView) -> str:
    """A run in half a line: its label, and its step, loss and mean latent steps where it has them."""
    status = run.status
    if run.problem or status.get("error"):
        return f"{run.label}: {run.problem or status['error']}"
    if not status.get("steps"):
        return run.label
    shown = f"{run.label}: {status.get('step')}/{status['steps']}"
    if status.get("loss") is not None:
        shown += f" loss {status['loss']:.2f}"
    if status.get("mean_steps"):
        shown += f" steps {status['mean_steps']:.2f}"
    return shown

"""One line about a whole sweep, from what its runs write: no channel of its own, so nothing that can break a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from haltscale.platform.store import RunState, RunStore, RunView


class SweepProgress:
    """Watches the runs of one study in the store."""

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
        self._told: set[str] = set()
        self._first_share = self._share_done(self._runs())

    def lines(self) -> list[str]:
        """What is new: a line for each run that ended since the last call, and one for the sweep."""
        runs = self._runs()
        told = [self._ended(run) for run in runs if run.key not in self._told and _has_ended(run)]
        self._told |= {run.key for run in runs if _has_ended(run)}
        return [*told, self._summary(runs)]

    def _runs(self) -> list[RunView]:
        return [self._store.run(self._study, key) for key in self._planned]

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
        active = [describe(run) for run in runs if run.state is RunState.RUNNING]
        return " | ".join([f"{ended}/{len(runs)} runs", f"{100 * done:3.0f} %", left, *active])


def _has_ended(run: RunView) -> bool:
    return run.state in (RunState.FINISHED, RunState.FAILED)


def _share(run: RunView) -> float:
    if _has_ended(run):
        return 1.0
    return float(run.status.get("step") or 0) / float(run.status.get("steps") or 1)


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


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

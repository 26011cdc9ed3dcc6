"""Writes one run into the run store while it trains."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from haltscale.platform.lease import EXPIRY_SECONDS, Lease
from haltscale.platform.store import Cause, RunState, RunStore


class RunRecorder:
    """The writing side of a run's folder. On ranks above 0 it is silent, so that callers need not ask."""

    def __init__(self, store: RunStore, study: str, key: str, *, steps: int | None, enabled: bool = True) -> None:
        """
        Args:
            steps: of the whole run; None where its budget is in FLOPs.
            enabled: false on ranks above 0.
        """
        self.store, self.study, self.key = store, study, key
        self._steps, self.enabled = steps, enabled
        self._began: tuple[float, float] | None = None
        self._lease: Lease | None = None

    def own(self) -> None:
        """Become the run's only writer, before anything of it is read: an earlier attempt that is still dying is waited
        for. From then on a thread gives signs of life until the run ends (:meth:`finish`, :meth:`fail`) or
        :meth:`close`.

        Raises:
            LeaseHeldError: another living process trains the run.
        """
        if self.enabled:
            self._lease = Lease(self.store, self.store.path(self.study, self.key))
            self._lease.acquire(wait_seconds=EXPIRY_SECONDS + 30)

    def close(self) -> None:
        """End the ownership, and with it the signs of life."""
        if self._lease:
            self._lease.release()
            self._lease = None

    @property
    def is_told_to_save(self) -> bool:
        """Whether the run will be ended from outside and has not saved since the notice (see ``lease.py``); only the
        rank that writes knows."""
        return self._lease is not None and self._lease.noticed

    def has_saved(self) -> None:
        """All ranks have saved, as they were told."""
        if self._lease and self._lease.noticed:
            self._lease.heed()

    def _path(self, name: str) -> str:
        return self.store.path(self.study, self.key, name)

    def begin(
        self, step: int, share: float, *, nodes: Sequence[str] = (), parent: Mapping[str, Any] | None = None
    ) -> None:
        """The run starts, or resumes after ``step``: what an interrupted attempt wrote after that step is dropped.

        Args:
            share: of the budget that is spent.
            nodes: where each rank runs.
            parent: the run in which this one begins: its ``key``, and ``tokens`` and ``flops`` (realised) up to there,
                which were trained once for both. Its metrics up to there are this run's too.
        """
        if not self.enabled:
            return
        self.store.truncate_lines(self._path("metrics.jsonl"), after_step=0 if parent else step)
        if parent:
            rows = self.store.read_lines(self.store.path(self.study, parent["key"], "metrics.jsonl"))
            self.store.append_lines(self._path("metrics.jsonl"), [row for row in rows if row["step"] <= step])
        # The evaluation of this very step may have been cut off: the loop makes it again.
        self.store.truncate_lines(self._path("evaluations.jsonl"), after_step=step - 1)
        self._began = (time.time(), share)
        attempt = {"step": step, "nodes": [*nodes], "time": time.time()} | ({"parent": dict(parent)} if parent else {})
        self.store.append_lines(self._path("attempts.jsonl"), [attempt])
        self._status(RunState.RUNNING, step=step, share=share)

    def log(self, row: Mapping[str, Any], share: float, *, events: Sequence[Mapping[str, Any]] = ()) -> None:
        """A row of training metrics, and how far the run is.

        Args:
            share: of the budget that is spent.
            events: what went wrong so far without ending the run.
        """
        if not self.enabled:
            return
        self._check()
        self.store.append_lines(self._path("metrics.jsonl"), [row])
        values = {name: row.get(name) for name in ("mean_steps", "tokens_per_second", "flops_per_second", "mfu")}
        values |= {"loss": row["cross_entropy"], "events": list(events)}
        self._status(RunState.RUNNING, step=row["step"], share=share, **values)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """A row of held-out evaluation."""
        if self.enabled:
            self._check()
            self.store.append_lines(self._path("evaluations.jsonl"), [row])

    def best_step(self, among: Collection[int]) -> int | None:
        """The step with the lowest held-out loss, of those in ``among`` that were evaluated."""
        rows = self.store.read_lines(self._path("evaluations.jsonl"))
        losses = {row["step"]: row["loss"] for row in rows if row["step"] in among and row["split"] == "validation"}
        return min(losses, key=lambda step: losses[step]) if losses else None

    def probe(self, step: int, table: pd.DataFrame) -> None:
        """The probe text's events at a step."""
        if self.enabled:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "probe.parquet"
                table.to_parquet(file, compression="zstd", index=False)
                self.store.put_file(file, self.store.probe_path(self.study, self.key, step))

    def telemetry(self, step: int, folder: Path, summary: Mapping[str, Any]) -> None:
        """The validation split's ``events.parquet`` and ``cube.parquet`` of a folder, and their summary, which comes
        last: where it stands, the others do."""
        if self.enabled:
            for name in ("events", "cube"):
                target = self.store.halting_path(self.study, self.key, name, step)
                self.store.put_file(folder / f"{name}.parquet", target)
            self.store.write_json(self.store.halting_path(self.study, self.key, "summary", step), summary)

    def finish(self, record: Mapping[str, Any]) -> None:
        """The result; the last thing that a run writes."""
        if self.enabled:
            self._check()
            self._status(RunState.FINISHED, step=record["steps"], share=1.0)
            attempts = self.store.read_lines(self._path("attempts.jsonl"))
            self.store.write_json(self._path("record.json"), {**record, "attempts": attempts})
            self.close()

    def fail(
        self, error: str, *, state: RunState = RunState.FAILED, cause: Cause = Cause.TRANSIENT, **more: Any
    ) -> None:
        """The run ended without a result.

        Args:
            state: one of :data:`~haltscale.platform.store.ENDED`.
            cause: whether trying again can help.
            more: for its status.
        """
        if self.enabled:
            self._check()
            status = self.store.read_json(self._path("status.json"))
            status.pop("schema", None)
            ended = {"state": state, "error": error, "cause": cause, "seconds_left": None, **more}
            self.store.write_json(self._path("status.json"), {**status, **ended})
            self.close()

    def _check(self) -> None:
        if self._lease:
            self._lease.check()

    def _status(self, state: RunState, *, step: int, share: float, **more: Any) -> None:
        left = None
        if self._began and share > self._began[1]:
            began, first = self._began
            left = (time.time() - began) / (share - first) * (1 - share)
        steps = self._steps if self._steps is not None else round(step / share) if share else None  # an estimate then
        status = {"state": state, "step": step, "steps": steps, "seconds_left": left}
        self.store.write_json(self._path("status.json"), {**status, "error": None, **more})

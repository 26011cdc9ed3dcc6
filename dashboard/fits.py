"""The fits as the pages use them: kept in memory and on disk, and made by a process apart while the page is on show.

A fit that is not there yet is *pending*: the page draws everything else, says what is being fitted, and is drawn again
when the result has arrived. Where there is no server (a report, a test) a fit is made at once.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pandas as pd
import streamlit as st

from haltscale.dashboard import fit_jobs
from haltscale.dashboard.cached_store import store
from haltscale.platform import analysis
from haltscale.platform.analysis import HeldOut, IsoFlop, LawFit, RecurrenceFit, Refusal, SeedNoise

LIVE = (
    *("label", "series", "rank", "shade", "note", "heartbeat", "seconds_left", "step", "steps", "straggling"),
    *("steps_histogram", "need", "finished_at", "git_commit", "nominal", "epochs", "by_document"),
)
"""What changes while other runs train, or is only drawn: it must not make an analysis fit again."""
MOST_KEPT = 256


class Pending:
    """In place of a result that is being made."""


class Fitter:
    """Results by digest, and the process that makes those that are missing."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._results: OrderedDict[str, Any] = OrderedDict()
        self._futures: dict[str, Future[Any]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self.apart = False
        """Whether missing results are made by another process; else at once."""

    def get(self, name: str, runs: pd.DataFrame, x: str) -> Any:
        """The result of one of :data:`fit_jobs.FITS` over runs, or :class:`Pending`."""
        digest = fit_jobs.digest(name, runs, x)
        with self._lock:
            if digest in self._results:
                self._results.move_to_end(digest)
                return self._results[digest]
            future = self._futures.get(digest)
            if future is None:
                there, result = fit_jobs.kept(digest)
                if there:
                    return self._put(digest, result)
                if self.apart:
                    future = self._futures[digest] = self._start(name, runs, x)
            if future is not None:
                if not future.done():
                    return Pending()
                del self._futures[digest]
        if future is None or future.cancelled() or isinstance(future.exception(), BrokenProcessPool):
            self._pool = None  # it was killed, for memory perhaps: this once the server does it itself
            return self._put(digest, fit_jobs.fit(name, runs, x))
        return self._put(digest, future.result())

    def left(self) -> int:
        """How many results are being made."""
        with self._lock:
            return sum(not future.done() for future in self._futures.values())

    def _put(self, digest: str, result: Any) -> Any:
        with self._lock:
            self._results[digest] = result
            while len(self._results) > MOST_KEPT:
                self._results.popitem(last=False)
        return result

    def _start(self, name: str, runs: pd.DataFrame, x: str) -> Future[Any]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn"), initializer=fit_jobs.lower_priority
            )
        try:
            return self._pool.submit(fit_jobs.fit, name, runs, x)
        except (BrokenProcessPool, RuntimeError) as error:
            broken: Future[Any] = Future()
            broken.set_exception(BrokenProcessPool(str(error)))
            return broken


fitter = Fitter()
"""One for the server: readers share its results."""


def settled(runs: pd.DataFrame) -> pd.DataFrame:
    """The part of the runs that a fit depends on: a live study fits again when a run ends, not at each step."""
    ended = runs["state"].isin(["finished", "diverged"])
    kept = runs.loc[ended, [name for name in runs if name not in LIVE]]
    return kept.reset_index(drop=True)


class Found:
    """The results of one fit for each method: ``found``, ``refused`` with the reason, and those ``pending``."""

    def __init__(self, name: str, runs: pd.DataFrame, x: str = "") -> None:
        self.found: dict[str, Any] = {}
        self.refused: dict[str, str] = {}
        self.pending: list[str] = []
        for method, part in runs.groupby("method", sort=False):
            answer = fitter.get(name, part.reset_index(drop=True), x)
            if isinstance(answer, Pending):
                self.pending.append(str(method))
            elif isinstance(answer, Refusal):
                self.refused[str(method)] = answer.reason
            else:
                self.found[str(method)] = answer


class Laws(Found):
    """Laws of which every parameter is determined by the runs; the others are refused."""

    found: dict[str, LawFit]

    def __init__(self, name: str, runs: pd.DataFrame, x: str = "") -> None:
        super().__init__(name, runs, x)
        self.found, self.refused = identified(self.found, self.refused)


def identified(laws: Mapping[str, LawFit], refused: Mapping[str, str]) -> tuple[dict[str, LawFit], dict[str, str]]:
    """The laws whose parameters are all determined; the others move to the refusals."""
    kept = {method: law for method, law in laws.items() if not law.problem}
    return kept, dict(refused) | {method: law.problem for method, law in laws.items() if law.problem}


def power_laws(runs: pd.DataFrame, x: str) -> Laws:
    """L(x) of every method through its best size at each budget."""
    return Laws("power law", runs, x)


def surfaces(runs: pd.DataFrame) -> Laws:
    """L(N, D) of every method."""
    return Laws("surface", runs)


class Predicted(Found):
    """Leave-one-budget-out of every method."""

    found: dict[str, HeldOut]


def held_out(runs: pd.DataFrame, x: str) -> Predicted:
    """Leave-one-budget-out of every method."""
    return Predicted("held-out budgets", runs, x)


def isoflop(runs: pd.DataFrame, x: str) -> IsoFlop | Refusal | Pending:
    """IsoFLOP profiles of one method."""
    found: IsoFlop | Refusal | Pending = fitter.get("isoFLOP profiles", runs.reset_index(drop=True), x)
    return found


def recurrence(runs: pd.DataFrame) -> RecurrenceFit | Refusal | Pending:
    """phi of every method."""
    found: RecurrenceFit | Refusal | Pending = fitter.get("value of a latent step", runs.reset_index(drop=True), "")
    return found


@st.cache_data(max_entries=64, show_spinner=False)
def seed_noise(runs: pd.DataFrame) -> SeedNoise | Refusal:
    """Seed noise of a study."""
    return analysis.seed_noise(runs)


def documents(study: str, runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Nats by held-out document of the finished runs that record them, by key."""
    keys = [str(key) for key in runs.loc[runs["state"].eq("finished") & runs["by_document"].eq(True), "key"]]
    found = {}
    for key, view in store().views(study, keys).items():
        frame = analysis.document_frame(view.record)
        if len(frame):
            found[key] = frame
    return found

"""The analysis as the pages use it: remembered while the runs behind it stay the same."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from haltscale.dashboard.cached_store import store
from haltscale.platform import analysis
from haltscale.platform.analysis import HeldOut, IsoFlop, LawFit, RecurrenceFit, Refusal, SeedNoise
from haltscale.platform.analysis.runs import budgets_of

BOOTSTRAPS = 200
"""On the pages; ``haltscale.platform.analysis`` defaults to 1,000."""
LIVE = (
    *("label", "series", "rank", "shade", "note", "heartbeat", "seconds_left", "step", "steps", "straggling"),
    *("steps_histogram", "need", "finished_at", "git_commit", "nominal", "epochs"),
)
"""What changes while other runs train, or is only drawn: it must not make an analysis fit again."""


def settled(runs: pd.DataFrame) -> pd.DataFrame:
    """The part of the runs that a fit depends on: a live study fits again when a run ends, not at each step."""
    ended = runs["state"].isin(["finished", "diverged"])
    kept = runs.loc[ended, [name for name in runs if name not in LIVE]]
    return kept.reset_index(drop=True)


@st.cache_data(max_entries=64, show_spinner="Fitting …")
def power_laws(runs: pd.DataFrame, x: str) -> tuple[dict[str, LawFit], dict[str, str]]:
    """L(x) of every method through its best size at each budget, and why some have none. A law with a parameter that
    the runs do not determine is none."""
    return identified(*_each(runs, lambda part: analysis.fit_power_law(best_sizes(part, x), x, bootstraps=BOOTSTRAPS)))


def identified(laws: dict[str, LawFit], refused: dict[str, str]) -> tuple[dict[str, LawFit], dict[str, str]]:
    """The laws whose parameters are all determined; the others move to the refusals."""
    kept = {method: law for method, law in laws.items() if not law.problem}
    return kept, refused | {method: law.problem for method, law in laws.items() if law.problem}


def best_sizes(runs: pd.DataFrame, x: str) -> pd.DataFrame:
    """Of the setting that is compared, the runs of the best size of each budget (by its mean loss over seeds): a law of
    compute is one of what compute can buy, and pooling sizes or settings would put it above every envelope."""
    runs = analysis.choose_setting(runs).runs
    if x == "parameters" or ("nominal" not in runs and "budget" not in runs):
        return runs
    known = analysis.usable(runs, [x]).runs
    if known.empty:
        return runs
    labels = budgets_of(known, x)
    means = known.groupby([labels, known["size"].to_numpy()])["loss"].transform("mean")
    best = means.groupby(labels).transform("min")
    return known[means == best].reset_index(drop=True)


@st.cache_data(max_entries=64, show_spinner="Fitting …")
def surfaces(runs: pd.DataFrame) -> tuple[dict[str, LawFit], dict[str, str]]:
    """L(N, D) of every method, and why some have none."""
    return _each(runs, lambda part: analysis.fit_surface(part, bootstraps=BOOTSTRAPS))


@st.cache_data(max_entries=64, show_spinner="Predicting held-out budgets …")
def held_out(runs: pd.DataFrame, x: str) -> tuple[dict[str, HeldOut], dict[str, str]]:
    """Leave-one-budget-out of every method."""
    return _each(runs, lambda part: analysis.leave_one_budget_out(part, x))


@st.cache_data(max_entries=64, show_spinner="Fitting …")
def isoflop(runs: pd.DataFrame, x: str) -> IsoFlop | Refusal:
    """IsoFLOP profiles of one method."""
    return analysis.isoflop(runs, x, bootstraps=BOOTSTRAPS)


@st.cache_data(max_entries=64, show_spinner="Fitting …")
def recurrence(runs: pd.DataFrame) -> RecurrenceFit | Refusal:
    """phi of every method."""
    return analysis.fit_recurrence(runs, bootstraps=BOOTSTRAPS)


@st.cache_data(max_entries=64, show_spinner=False)
def seed_noise(runs: pd.DataFrame) -> SeedNoise | Refusal:
    """Seed noise of a study."""
    return analysis.seed_noise(runs)


def documents(study: str, runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Nats by held-out document of the finished runs that record them, by key."""
    keys = [str(key) for key in runs.loc[runs["state"] == "finished", "key"]]
    found = {}
    for key, view in store().views(study, keys).items():
        frame = analysis.document_frame(view.record)
        if len(frame):
            found[key] = frame
    return found


def _each(runs, fit):  # type: ignore[no-untyped-def]
    found, refused = {}, {}
    for method, part in runs.groupby("method", sort=False):
        answer = fit(part)
        if isinstance(answer, Refusal):
            refused[str(method)] = answer.reason
        else:
            found[str(method)] = answer
    return found, refused

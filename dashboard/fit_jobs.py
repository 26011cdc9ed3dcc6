"""The fits that the pages ask for, each over the runs of one method, and the folder where their results are kept.

A result's name is a digest of the runs that it was fitted to (their keys and all that the fit sees of them), of the fit
and of the analysis' code: it is found again as long as none of these has changed, and never served for another.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from haltscale.platform import analysis
from haltscale.platform.analysis.runs import budgets_of
from haltscale.platform.durable import replacing
from haltscale.platform.store import haltscale_home

BOOTSTRAPS = 200
"""On the pages; ``haltscale.platform.analysis`` defaults to 1,000."""
MOST_FILES = 2_000
"""Results kept; the longest unused go first."""


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


def _power_law(runs: pd.DataFrame, x: str) -> Any:
    return analysis.fit_power_law(best_sizes(runs, x), x, bootstraps=BOOTSTRAPS)


def _surface(runs: pd.DataFrame, _x: str) -> Any:
    return analysis.fit_surface(runs, bootstraps=BOOTSTRAPS)


def _held_out(runs: pd.DataFrame, x: str) -> Any:
    return analysis.leave_one_budget_out(runs, x)


def _isoflop(runs: pd.DataFrame, x: str) -> Any:
    return analysis.isoflop(runs, x, bootstraps=BOOTSTRAPS)


def _recurrence(runs: pd.DataFrame, _x: str) -> Any:
    return analysis.fit_recurrence(runs, bootstraps=BOOTSTRAPS)


FITS: Mapping[str, Callable[[pd.DataFrame, str], Any]] = {
    "power law": _power_law,
    "surface": _surface,
    "held-out budgets": _held_out,
    "isoFLOP profiles": _isoflop,
    "value of a latent step": _recurrence,
}
"""By name; each takes runs and the column of its input (empty where it has one of its own)."""


def digest(name: str, runs: pd.DataFrame, x: str) -> str:
    """What a result is kept under."""
    columns = sorted(map(str, runs.columns))
    ordered = runs.sort_values("key", kind="stable") if "key" in runs else runs
    text = ordered[columns].to_csv(index=False, float_format="%.17g")
    return hashlib.sha256("\n".join([_code(), str(BOOTSTRAPS), name, x, text]).encode(errors="replace")).hexdigest()


@cache
def _code() -> str:
    """Of the analysis and of this module."""
    found = hashlib.sha256()
    for path in sorted([*Path(str(analysis.__file__)).parent.glob("*.py"), Path(__file__)]):
        found.update(path.read_bytes())
    return found.hexdigest()


def folder() -> Path:
    """Where results are kept: beside the dashboard's other caches, not in the store."""
    return haltscale_home() / "cache" / "fits"


def kept(name: str) -> tuple[bool, Any]:
    """Whether a result is kept under a digest, and the result. A damaged file is none."""
    path = folder() / f"{name}.pickle"
    try:
        result = pickle.loads(path.read_bytes())
        os.utime(path)
    except Exception:  # of an interrupted disk or another version: pickle raises many kinds
        return False, None
    return True, result


def keep(name: str, result: Any) -> None:
    """Keep a result under a digest; where the folder cannot be written it is fitted again next time."""
    try:
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(folder() / f"{name}.pickle") as partial:
            partial.write_bytes(pickle.dumps(result))
        files = sorted(folder().glob("*.pickle"), key=lambda path: path.stat().st_mtime)
        for path in files[: max(len(files) - MOST_FILES, 0)]:
            path.unlink(missing_ok=True)
    except OSError:
        return


def fit(fit_name: str, runs: pd.DataFrame, x: str) -> Any:
    """Fit, keep the result and return it."""
    result = FITS[fit_name](runs, x)
    keep(digest(fit_name, runs, x), result)
    return result


def lower_priority() -> None:
    """Of a process that fits: the pages come first."""
    os.nice(5)

"""Fits of 240 runs with 1,000 bootstraps: how long they take, how often their intervals hold the truth.

python benchmarks/scaling_laws.py [time] [coverage]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
from figures import Figure, show

from haltscale.platform.analysis import Refusal, fit_power_law, fit_recurrence, fit_surface, leave_one_budget_out

TRUTH = {"E": 1.81722, "A": 477.83, "B": 2143.4, "a": 0.34731, "b": 0.36717}
"""Epoch's replication of Chinchilla's law (arXiv 2404.10102)."""
PHI = {"adaptive": 0.6, "fixed": 0.4}


def surface(seed: int, count: int, noise: float) -> pd.DataFrame:
    """Runs of a known L(N, D) with log-normal noise."""
    random = np.random.default_rng(seed)
    flops = np.exp(random.uniform(np.log(6e18), np.log(3e21), count))
    parameters = np.exp(random.uniform(np.log(7e7), np.log(1.6e10), count))
    tokens = flops / 6 / parameters
    loss = TRUTH["E"] + TRUTH["A"] * parameters ** -TRUTH["a"] + TRUTH["B"] * tokens ** -TRUTH["b"]
    return finished(loss, random, noise, parameters=parameters, tokens=tokens, flops_realised=flops, method="vanilla")


def compute(seed: int, count: int, noise: float) -> pd.DataFrame:
    """Runs of a known L(C)."""
    random = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(1e17, 1e21, 10), count // 10)
    return finished(1.8 + 4 * (flops / 1e15) ** -0.15, random, noise, flops_realised=flops, method="vanilla")


def looped(seed: int, count: int, noise: float) -> pd.DataFrame:
    """Runs of a known phi per method."""
    random = np.random.default_rng(seed)
    method = random.choice(["vanilla", *PHI], count)
    passes = np.where(method == "vanilla", 1.0, random.uniform(1.5, 4, count))
    size = np.exp(random.uniform(np.log(1e7), np.log(1e10), count))
    tokens = np.exp(random.uniform(np.log(1e9), np.log(1e11), count))
    phi = np.array([PHI.get(name, 0.0) for name in method])
    effective = 0.2 * size + passes**phi * 0.8 * size
    loss = TRUTH["E"] + TRUTH["A"] * effective ** -TRUTH["a"] + TRUTH["B"] * tokens ** -TRUTH["b"]
    return finished(
        loss, random, noise, parameters=size, parameters_once=0.2 * size, parameters_recurrent=0.8 * size,
        tokens=tokens, passes_per_token=passes, method=method,
    )  # fmt: skip


def finished(loss: np.ndarray, random: np.random.Generator, noise: float, **columns: object) -> pd.DataFrame:
    noisy = loss * np.exp(random.normal(0, noise, len(loss)))
    return pd.DataFrame({"key": [str(i) for i in range(len(loss))], "state": "finished", "loss": noisy, **columns})


def timings(count: int, bootstraps: int) -> None:
    """Seconds per fit."""
    for name, fit, runs in (
        ("L(C)", fit_power_law, compute(0, count, 0.004)),
        ("L(N, D)", fit_surface, surface(0, count, 0.004)),
        ("L with phi of 2 methods", fit_recurrence, looped(0, count, 0.004)),
    ):
        began = time.perf_counter()
        found = fit(runs, bootstraps=bootstraps)
        seconds = time.perf_counter() - began
        assert not isinstance(found, Refusal), found.reason
        show(Figure(name=f"{name}: {count} runs, {bootstraps} bootstraps", values=[seconds], unit="s", at_most=30))
        law = getattr(found, "law", found)
        for parameter, value in law.estimates.items():
            known = TRUTH.get(parameter) if name != "L(C)" else {"E": 1.8, "alpha": 0.15}.get(parameter)
            known = PHI.get(parameter, known)
            notes = [f"truth {known:g}"] if known is not None else []
            notes += [value.problem] if value.problem else []
            shown = f"{value.value:.5g} [{value.low:.5g}, {value.high:.5g}]"
            print(f"  {parameter} = {', '.join([shown, *notes])}")
        print(f"  objective {law.objective:.6e}, {law.starts} starts, spread {law.spread:.1e}")
    began = time.perf_counter()
    left = leave_one_budget_out(compute(0, count, 0.004))
    assert not isinstance(left, Refusal)
    print(f"leave one budget out: {100 * left.error:.2f} % mean error, {time.perf_counter() - began:.2f} s")


def coverage(data_sets: int) -> None:
    """Share of data sets whose 95 % interval holds the truth."""
    cases = (
        ("L(C)", fit_power_law, compute, {"E": 1.8, "alpha": 0.15}),
        ("L(N, D)", fit_surface, surface, {name: TRUTH[name] for name in ("E", "a", "b")}),
        ("phi", fit_recurrence, looped, PHI),
    )
    for name, fit, make, truth in cases:
        for count in (20, 60, 240):
            inside, fitted = dict.fromkeys(truth, 0), 0
            for seed in range(data_sets):
                found = fit(make(seed, count, 0.004), bootstraps=200)
                estimates = {} if isinstance(found, Refusal) else getattr(found, "law", found).estimates
                if not truth.keys() <= estimates.keys():  # a method with too few runs has no phi
                    continue
                fitted += 1
                for parameter, value in truth.items():
                    inside[parameter] += estimates[parameter].low <= value <= estimates[parameter].high
            for parameter, hits in inside.items():
                covered = 100 * hits / max(fitted, 1)
                detail = f"of {fitted} fits, {data_sets - fitted} refused"
                name_of = f"{name}, {count} runs: 95 % interval of {parameter} holds the truth"
                show(Figure(name=name_of, values=[covered], unit="%", detail=detail))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["time"], choices=["time", "coverage"])
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--bootstraps", type=int, default=1_000)
    parser.add_argument("--data-sets", type=int, default=100)
    options = parser.parse_args()
    if "time" in options.what:
        timings(options.runs, options.bootstraps)
    if "coverage" in options.what:
        coverage(options.data_sets)


if __name__ == "__main__":
    main()

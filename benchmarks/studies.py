"""How long a researcher waits for a study of 1,000 runs: its plan, and finding that all of it is finished.

    python benchmarks/studies.py [--runs 1000] [--repeats 5]

Each repeat is a process of its own, so that nothing is remembered; what is printed is the time inside it, after
imports, and the time with them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from figures import Figure, show

from haltscale.platform.api import RunConfig, RunStore, Study, grid, log_uniform, sample
from haltscale.platform.corpora.corpus import sotu


def study(runs: int) -> Study:
    """Eight methods' worth of points, most of them adaptive, at several sizes."""
    thinking = sample(runs // 4, method="adaptive", lam=log_uniform(0.01, 1.0), beta=log_uniform(0.5, 2.0))
    return Study(
        name="benchmark",
        question="How long does a plan take?",
        corpus=sotu(),
        base=RunConfig(tokens=300_000, batch_tokens=2048),
        sweep=thinking * grid(size=["0.6m", "1.8m", "4m", "8m"]),
    )


def finish(planned: Study, store: RunStore) -> None:
    """Write what a finished study leaves behind, as far as it is read again."""
    for run in planned.runs:
        key, identity = planned.key(run), planned.identity(run)
        store.write_json(store.path(planned.name, key, "spec.json"), {"label": run.label, "identity": identity})
        store.write_json(store.path(planned.name, key, "status.json"), {"state": "finished", "step": 1})
        record = {"identity": identity, "tokens": run.tokens, "flops_realised": 1e12, "loss": 4.0, "wall_seconds": 9.0}
        store.write_json(store.path(planned.name, key, "record.json"), record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once", metavar="STORE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        asked = study(options.runs)
        began = time.perf_counter()
        plan = asked.plan(RunStore(options.once))
        planned = time.perf_counter() - began
        finished = (plan["state"] == "finished").all()
        began = time.perf_counter()
        if finished:
            asked.run(RunStore(options.once))  # trains nothing
        print(len(plan), planned, time.perf_counter() - began)
        return
    with tempfile.TemporaryDirectory() as folder:
        empty, full = Path(folder) / "empty", Path(folder) / "full"
        finish(study(options.runs), RunStore(full))
        for store, what in ((empty, "nothing finished"), (full, "all finished")):
            inside, whole = [], []
            for _ in range(options.repeats):
                began = time.perf_counter()
                command = [sys.executable, __file__, "--runs", str(options.runs), "--once", str(store)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                whole.append(time.perf_counter() - began)
                inside.append((float(output[1]), float(output[2])))
            (plan, again), count = zip(*inside, strict=True), output[0]
            first = Figure(name=f"plan of {count} runs, {what}", values=list(plan), unit="s", at_most=2)
            show(replace(first, detail=f"{statistics.median(whole):.2f} s with imports"))
            if store is full:
                show(Figure(name=f"{count} finished runs listed and skipped", values=list(again), unit="s", at_most=3))


if __name__ == "__main__":
    main()

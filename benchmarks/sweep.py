"""What a sweep costs beside its training: the wall time of a study of 12 runs over the sum of its training times.

    python benchmarks/sweep.py [--runs 12] [--tokens 100000] [--size 0.6m] [--at-once 1] [--repeats 2]
    python benchmarks/sweep.py --runs 2 --tokens 4096 --repeats 1    a toy

One head serves all repeats, as `haltscale up` would; each repeat has a store of its own. The clock runs from
`Study.run` to its return with the corpus prepared. Training times are the runs' own (`wall_seconds` of their records,
divided by how many train at once): what is left is scheduling, starting processes, checkpoints' and records' writing,
and the evaluations. Its share shrinks with longer runs, so the seconds for each run are shown too, and where they go,
by the times that the runs' own files hold: before the first run starts, from one run's record to the next one's start
(process, model, engine), from a run's start to its record without the training (evaluations, files), and after the
last one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from figures import Figure, machine, show

from haltscale.platform import cluster
from haltscale.platform.api import ExecutionConfig, RunConfig, RunStore, Study, grid, sotu


def study(options: argparse.Namespace, name: str) -> Study:
    """Half plain, half adaptive, so that both kinds of process are started."""
    return Study(
        name=name,
        question="What does a sweep cost beside its training?",
        corpus=sotu(),
        base=RunConfig(size=options.size, tokens=options.tokens, batch_tokens=2048),
        sweep=grid(method=["vanilla", "adaptive"], seed=range(options.runs // 2)),
        execution=ExecutionConfig(evaluations=1, checkpoints=1),
    )


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of one study."""

    wall: float
    training: float
    """Of all runs together, divided by how many train at once."""
    parts: dict[str, float]
    """Where the rest went, where one run trains at a time."""


def measure(options: argparse.Namespace, folder: Path, name: str) -> Spent:
    """Run a study."""
    asked, store = study(options, name), RunStore(folder / "runs")
    began, began_at = time.perf_counter(), time.time()
    results = asked.run(store)
    wall, ended_at = time.perf_counter() - began, time.time()
    if not (results["state"] == "finished").all():
        raise SystemExit(f"runs without a result: {results[['run', 'state', 'error']].to_string()}")
    records = [run.record for run in store.runs(name)]
    spans = sorted((record["attempts"][0]["time"], record["finished_at"], record["wall_seconds"]) for record in records)
    between = sum(later[0] - earlier[1] for earlier, later in pairwise(spans))
    parts = {
        "before the first run": spans[0][0] - began_at,
        "between runs": between,
        "evaluations and files": sum(finished - started - trained for started, finished, trained in spans),
        "after the last run": ended_at - spans[-1][1],
    }
    return Spent(wall=wall, training=float(results["wall_seconds"].sum()) / options.at_once, parts=parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--size", default="0.6m")
    parser.add_argument("--at-once", type=int, default=1, help="CPUs of the head, and so runs that train at once")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--at-most", type=float, default=1.35, help="the aim for wall over training time")
    options = parser.parse_args()
    if options.runs < 2 or options.runs % 2:
        parser.error(f"--runs {options.runs}: an even number, half of them plain and half adaptive")
    print(machine(options.at_once), flush=True)
    with tempfile.TemporaryDirectory() as name:
        os.environ["HALTSCALE_HOME"] = name
        cluster.up(cpus=options.at_once, temp_dir=f"{name}/ray")
        try:
            warm = argparse.Namespace(**{**vars(options), "runs": 2, "tokens": 4096})
            measure(warm, Path(name), "warm-up")  # prepares the corpus
            spent = [measure(options, Path(name), f"sweep-{repeat}") for repeat in range(options.repeats)]
        finally:
            import ray  # not before the study, which prepares the environment that Ray reads when it is imported

            ray.shutdown()  # a client of a head that has gone waits a minute for it
            cluster.down()
    setting = f"{options.runs} runs of {options.tokens:,} tokens at {options.size}, {options.at_once} at once"
    last = spent[-1]
    show(
        Figure(
            name=f"sweep, wall time over training time, {options.at_once} at once",
            values=[one.wall / one.training for one in spent],
            at_most=options.at_most,
            detail=f"{setting}; last: {last.wall:.0f} / {last.training:.0f} s",
        )
    )
    show(
        Figure(
            name=f"sweep, seconds beside training for each run, {options.at_once} at once",
            values=[(one.wall - one.training) * options.at_once / options.runs for one in spent],
            at_most=2.5,
            unit="s",
            detail="" if options.at_once > 1 else ", ".join(f"{name} {x:.1f} s" for name, x in last.parts.items()),
        )
    )


if __name__ == "__main__":
    main()

"""What a study of a thousand runs costs its driver, its scheduler and its store: on a simulated cluster, where a run is
a stub that writes what a run writes and waits.

    python benchmarks/large_study.py [--runs 1000] [--workers 64] [--seconds 20] [--store s3://bucket/runs]
    python benchmarks/large_study.py --runs 20 --workers 4 --seconds 2    a toy

The head has `--workers` logical CPUs, whatever the machine has; everything else is real: the plan, Ray, Ray Tune, the
leases, the documents in the store. `at once` is the stubs' time over the wall time times the workers: 1 means that no
worker ever waited. Operations are calls of the store's filesystem (requests, on object storage).
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from figures import Figure, machine, show

from haltscale.platform import cluster

OPERATIONS = ("cat_file", "cat_ranges", "pipe_file", "put_file", "ls", "info", "exists", "isdir", "rm_file", "_open")


@contextmanager
def counted(fs: Any) -> Iterator[Counter[str]]:
    """Counts calls of a filesystem's class from outside; of `cat_ranges` each file, since each is a request."""
    kind, counts, former = type(fs), Counter[str](), {}
    here = threading.local()

    def counting(name: str, function: Any) -> Any:
        def call(self: Any, *arguments: Any, **more: Any) -> Any:
            if getattr(here, "inside", False):
                return function(self, *arguments, **more)
            counts[name] += len(arguments[0]) if name == "cat_ranges" else 1
            here.inside = True
            try:
                return function(self, *arguments, **more)
            finally:
                here.inside = False

        return call

    for name in OPERATIONS:
        if hasattr(kind, name):
            former[name] = getattr(kind, name)
            setattr(kind, name, counting(name, former[name]))
    try:
        yield counts
    finally:
        for name, function in former.items():
            setattr(kind, name, function)


def stub(config: dict[str, Any]) -> None:
    """A run: begins, logs ten times over its seconds, and ends with a record."""
    from haltscale.platform.recorder import RunRecorder
    from haltscale.platform.store import RunStore

    spec = config["spec"]
    store = RunStore(spec["store"])
    seconds = random.Random(spec["key"]).uniform(0.5, 1.5) * float(os.environ["STUB_SECONDS"])
    with counted(store.fs) as counts:
        recorder = RunRecorder(store, spec["study"], spec["key"], steps=100)
        recorder.own()
        began = time.time()
        recorder.begin(0, 0.0)
        for log in range(1, 11):
            time.sleep(max(0.0, began + seconds * log / 10 - time.time()))
            recorder.log({"step": 10 * log, "cross_entropy": 4.0}, log / 10)
        recorder.evaluation({"step": 100, "loss": 4.0, "split": "validation"})
        told = {name: spec[name] for name in ("label", "study", "key", "role", "identity", "execution")}
        figures = {"loss": 4.0, "steps": 100, "mean_steps": 1.0, "wall_seconds": seconds, "tokens": 1}
        recorder.finish({**told, **figures, "operations": sum(counts.values())})


class Watched(threading.Thread):
    """The peak of this process's memory, and of Ray's control processes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over, self.driver, self.control = threading.Event(), 0, 0

    def run(self) -> None:
        while not self.over.wait(1.0):
            self.driver = max(self.driver, psutil.Process().memory_info().rss)
            for process in psutil.process_iter(["name", "memory_info"]):
                if process.info["name"] == "gcs_server" and process.info["memory_info"]:
                    self.control = max(self.control, process.info["memory_info"].rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--store", help="by default a temporary folder")
    options = parser.parse_args()
    print(machine(options.workers), flush=True)
    with tempfile.TemporaryDirectory(prefix="hs-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ.update(HALTSCALE_HOME=str(folder / "home"), STUB_SECONDS=str(options.seconds), DS_ACCELERATOR="cpu")
        cluster.up(cpus=options.workers, temp_dir=str(folder / "ray"))
        try:
            measure(options, folder)
        finally:
            import ray  # not before the study, which prepares the environment that Ray reads when it is imported

            ray.shutdown()  # a client of a head that has gone waits a minute for it
            cluster.down()


def measure(options: argparse.Namespace, folder: Path) -> None:
    from haltscale.platform.api import BytePairs, Corpus, ExecutionConfig, RunConfig, RunStore, Source, Study, grid
    from haltscale.platform.sweeps import ray_tune

    texts = folder / "texts"
    texts.mkdir()
    for index in range(20):
        (texts / f"{index:02d}.txt").write_text(" ".join(f"w{(index + n * n) % 89}" for n in range(400)))
    study = Study(
        name="large",
        question="What does a large study cost?",
        corpus=Corpus(
            name="large",
            sources={"texts": Source(path=str(texts))},
            tokenizer=BytePairs(vocab_size=300),
            validation_documents=2,
        ),
        base=RunConfig(tokens=8192, context=64, batch_tokens=512),
        sweep=grid(seed=range(options.runs)),
        execution=ExecutionConfig(),
    )
    ray_tune._trial_here = stub
    store = RunStore(options.store or folder / "runs")
    watched = Watched()
    watched.start()
    with counted(store.fs) as counts:
        began = time.time()
        results = study.run(store)
        wall = time.time() - began
    watched.over.set()
    views = list(store.runs("large"))
    if not (results["state"] == "finished").all():
        raise SystemExit(f"runs without a result: {results[['run', 'state', 'error']].to_string()}")
    attempts = sorted(view.record["attempts"][0]["time"] for view in views)
    busy = sum(view.record["wall_seconds"] for view in views)
    per_run = sum(view.record["operations"] for view in views) / len(views)
    tune = sum(file.stat().st_size for file in (folder / "home" / "tune").rglob("*") if file.is_file())
    full = attempts[min(options.workers, len(attempts)) - 1]
    print({"operations of the driver": dict(counts), "wall": wall})
    what = f"{options.runs} runs on {options.workers}"
    for name, unit, value in (
        ("workers busy", "of 1", busy / (wall * options.workers)),
        ("workers busy once all have work", "of 1", _steady(views, full, options.workers)),
        ("to the first run", "s", attempts[0] - began),
        ("until all workers have work", "s", full - began),
        ("driver's memory", "MB", watched.driver / 1e6),
        ("memory of Ray's GCS", "MB", watched.control / 1e6),
        ("store operations of the driver for a run", "", sum(counts.values()) / len(views)),
        ("store operations of a run", "", per_run),
        ("Tune's own files", "MB", tune / 1e6),
    ):
        show(Figure(name=f"large study, {what}: {name}", unit=unit, values=[value]))


def _steady(views: list[Any], full: float, workers: int) -> float:
    """Share of the workers that are busy between the moment when all have work and the last start of a run."""
    spans = [(begin := view.record["attempts"][0]["time"], begin + view.record["wall_seconds"]) for view in views]
    last = max(begin for begin, _ in spans)
    if last <= full:
        return 1.0
    return sum(max(0.0, min(end, last) - max(begin, full)) for begin, end in spans) / ((last - full) * workers)


if __name__ == "__main__":
    main()

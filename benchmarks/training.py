"""Tokens per second in the platform over a bare DeepSpeed loop (aims: 0.98, 0.95 on 2), and that over bare PyTorch.

    python benchmarks/training.py                                  stages 0 to 3, 1 and 2 workers, all three arms
    python benchmarks/training.py --stages 1 --workers 1           the main figure
    python benchmarks/training.py --stages 1 --workers 1 --method adaptive
    python benchmarks/training.py --where --stages 1 --workers 2   which of the platform's processes take the time
    python benchmarks/training.py --steps 12 --size 0.6m --batch-tokens 512 --repeats 1 --stages 1 --workers 1    a toy

The same model, sequences, order, AdamW, clipping and precision (float32) in all arms:

    platform    a study: Ray Tune, Ray Train, Ray Data, metrics, heartbeat, two checkpoints; by the clock of its rows
    deepspeed   engine(tokens), backward, step; sequences in memory, nothing logged
    pytorch     the model (in DistributedDataParallel with 2 workers), clipping, fused AdamW

Each arm starts processes of its own, one thread each; within a repeat they follow each other, for every number of
workers; two workers over one is shown too. The global batch is the same for any number of workers. The first quarter of
the steps warms up.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from figures import Figure, machine, show

from haltscale.model import build_model
from haltscale.platform.api import BytePairs, Source
from haltscale.platform.config import Precision, RunConfig, apply_point
from haltscale.platform.corpora.corpus import Corpus, PreparedCorpus, RowReader
from haltscale.platform.corpora.order import global_batches, rank_share
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps.study import Study
from haltscale.platform.sweeps.sweep import grid
from haltscale.platform.training.engine import build_engine


def texts(folder: Path) -> Corpus:
    """A corpus of random words: what the words are does not change what a step costs."""
    folder.mkdir()
    stream = random.Random(0)
    words = ["".join(stream.choices("abcdefghijklmnop", k=stream.randint(2, 9))) for _ in range(8000)]
    for index in range(200):
        (folder / f"{index:03d}.txt").write_text(" ".join(stream.choices(words, k=2000)), encoding="utf-8")
    sources = {"words": Source(path=str(folder))}
    return Corpus(name="benchmark", sources=sources, tokenizer=BytePairs(vocab_size=4096), validation_documents=2)


def in_the_platform(study: Study, store: RunStore) -> float:
    """Tokens per second of a study's one run, between its first and last row of metrics after the warm-up."""
    study.run(store)
    (key,) = store.run_keys(study.name)
    rows = store.read_lines(store.path(study.name, key, "metrics.jsonl"))
    rows = [row for row in rows if row["step"] >= (study.base.steps or 0) // 4]
    return float(rows[-1]["tokens"] - rows[0]["tokens"]) / float(rows[-1]["time"] - rows[0]["time"])


@contextmanager
def cpu_seconds(store: RunStore, steps: int) -> Iterator[Counter[str]]:
    """CPU seconds by kind of process, of this one and all below it, while the steps after the warm-up are taken;
    ``wall`` is how long that was."""
    spent: Counter[str] = Counter()
    done = threading.Event()

    def watch() -> None:
        last: dict[int, float] = {}
        before = time.perf_counter()
        while not done.wait(0.5):
            rows = [row for key in store.run_keys("overhead") for row in _metrics(store, key)]
            counts = bool(rows) and steps // 4 <= rows[-1]["step"] < steps
            now = time.perf_counter()
            spent["wall"] += (now - before) * counts
            before = now
            this = psutil.Process()
            for process in (this, *this.children(recursive=True)):
                try:
                    kind, times = "driver" if process == this else _kind(process.cmdline()), process.cpu_times()
                except psutil.Error:
                    continue
                used = times.user + times.system
                spent[kind] += (used - last.get(process.pid, 0.0)) * counts
                last[process.pid] = used

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield spent
    finally:
        done.set()
        thread.join()


def _metrics(store: RunStore, key: str) -> list[dict[str, Any]]:
    return list(store.read_lines(store.path("overhead", key, "metrics.jsonl")))


def _kind(command: list[str]) -> str:
    """What Ray calls a process of its own, or the script or program that it runs."""
    if command and command[0].startswith("ray::"):
        return command[0].split("(")[0].strip()
    scripts = [Path(word).name for word in command[1:] if word.endswith(".py")]
    return scripts[0] if scripts else Path(command[0]).name if command else "?"


def bare(arm: str, folder: Path, task: dict[str, Any], workers: int) -> float:
    """Tokens per second of a bare arm, in as many processes as there are workers."""
    (folder / "rendezvous").unlink(missing_ok=True)
    (folder / "task.json").write_text(json.dumps(task))
    commands = [[sys.executable, __file__, "--member", arm, str(folder), str(rank)] for rank in range(workers)]
    members = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    codes = [member.wait() for member in members]
    if any(codes):
        raise RuntimeError(f"the arm {arm} failed")
    return float((folder / "answer").read_text())


def member(arm: str, folder: Path, rank: int) -> None:
    """One process of a bare arm; rank 0 writes the rate down."""
    torch.set_num_threads(1)
    task = json.loads((folder / "task.json").read_text())
    run, execution = RunConfig.from_identity(task["identity"]), ExecutionConfig.from_dict(task["execution"])
    world, steps = execution.workers, run.steps or 0
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    corpus = PreparedCorpus.open(Path(task["corpus"]))
    assert corpus is not None
    reader = RowReader(corpus.folder)
    ids = global_batches(seed=run.seed, mixture=corpus.mixture, batch=run.batch_sequences, first_step=0, steps=steps)
    mine = [
        torch.as_tensor(np.asarray(reader.read(row), dtype=np.int64)) for row in rank_share(ids, rank=rank, world=world)
    ]
    model = build_model(corpus.model_config(run), seed=run.seed)
    _, pieces = execution.accumulation(run.batch_sequences)
    take_step = deepspeed_step(model, run, execution) if arm == "deepspeed" else pytorch_step(model, run, pieces, world)
    warm = steps // 4
    began = 0.0
    for index, tokens in enumerate(mine):
        if index == warm:
            began = time.perf_counter()
        take_step(tokens.chunk(pieces))
    rate = (steps - warm) * run.batch_tokens / (time.perf_counter() - began)
    if rank == 0:
        (folder / "answer").write_text(str(rate))
    dist.destroy_process_group()


def deepspeed_step(model: Any, run: RunConfig, execution: ExecutionConfig) -> Any:
    """DeepSpeed and nothing else."""
    engine = build_engine(model, run, execution)
    for group in engine.optimizer.param_groups:
        group["lr"] = run.learning_rate
    engine.module.train()

    def step(pieces: Any) -> None:
        for piece in pieces:
            engine.backward(engine(piece[:, :-1], piece[:, 1:]).loss)
            engine.step()

    return step


def pytorch_step(model: Any, run: RunConfig, pieces_per_step: int, world: int) -> Any:
    """PyTorch and nothing else."""
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, fused=True)
    wrapped.train()

    def step(pieces: Any) -> None:
        for piece in pieces:
            (wrapped(piece[:, :-1], piece[:, 1:]).loss / pieces_per_step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--method", default="vanilla")
    parser.add_argument("--size", default="1.8m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--where", action="store_true", help="the platform only: CPU seconds by process")
    parser.add_argument("--member", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member:
        arm, folder, rank = options.member
        member(arm, Path(folder), int(rank))
        return
    print(machine(1), flush=True)
    for stage in options.stages:
        compare(options, stage)


def compare(options: argparse.Namespace, stage: int) -> None:
    """All three arms at one stage, with each number of workers."""
    tokens = options.steps * options.batch_tokens
    base = RunConfig(size=options.size, tokens=tokens, batch_tokens=options.batch_tokens, precision=Precision.FP32)
    run, problems = apply_point(base, {"method": options.method})
    if problems:
        raise SystemExit("\n".join(problems))
    rates: dict[int, list[dict[str, float]]] = {workers: [] for workers in options.workers}
    with tempfile.TemporaryDirectory() as name:
        os.environ["HALTSCALE_HOME"] = name
        corpus = texts(Path(name) / "texts")
        for repeat in range(options.repeats):
            for workers, measured in rates.items():
                execution = ExecutionConfig(
                    zero_stage=stage, workers=workers, evaluations=1, checkpoints=2, log_every_seconds=1.0
                )
                folder = Path(name) / f"{repeat}-{workers}"
                if options.where:
                    where(corpus, run, execution, folder)
                else:
                    measured.append(arms(corpus, run, execution, folder))
    if options.where:
        return
    what = f"{options.method} {options.size}, ZeRO {stage}"
    for workers, measured in rates.items():
        setting = f"{what}, {workers} worker{'s' if workers > 1 else ''}"
        detail = "last: " + ", ".join(f"{arm} {rate:,.0f}" for arm, rate in measured[-1].items()) + " tokens/s"
        show(Figure(name=f"platform, {setting}", values=[each["platform"] for each in measured], unit="tokens/s"))
        for arm, over, aim in (
            ("platform", "deepspeed", 0.98 if workers == 1 else 0.95),
            ("deepspeed", "pytorch", None),
        ):
            values = [each[arm] / each[over] for each in measured]
            show(Figure(name=f"{arm} over {over}, {setting}", values=values, at_least=aim, detail=detail))
    first, last = options.workers[0], options.workers[-1]
    if first != last:
        for arm in ("platform", "pytorch"):
            values = [b[arm] / a[arm] for a, b in zip(rates[first], rates[last], strict=True)]
            show(Figure(name=f"{last} workers over {first}, {arm}, {what}", values=values))


def where(corpus: Corpus, run: RunConfig, execution: ExecutionConfig, folder: Path) -> None:
    """Print what each kind of process takes of a core while the platform trains."""
    study = Study(name="overhead", question="?", corpus=corpus, base=run, sweep=grid(seed=0), execution=execution)
    store = RunStore(folder)
    with cpu_seconds(store, run.steps or 0) as spent:
        rate = in_the_platform(study, store)
    wall = spent.pop("wall")
    print(f"{execution.workers} worker(s), ZeRO {execution.zero_stage}: {rate:,.0f} tokens/s; CPU over {wall:.0f} s:")
    for kind, seconds in spent.most_common(10):
        print(f"  {seconds / wall:6.1%} of a core  {kind}")


def arms(corpus: Corpus, run: RunConfig, execution: ExecutionConfig, folder: Path) -> dict[str, float]:
    """Tokens per second of each arm, one after the other, which leave what they write in a folder."""
    study = Study(name="overhead", question="?", corpus=corpus, base=run, sweep=grid(seed=0), execution=execution)
    rates = {"platform": in_the_platform(study, RunStore(folder))}
    document = json.loads(next(folder.rglob("spec.json")).read_text())
    task = {key: document[key] for key in ("identity", "execution")} | {"corpus": str(corpus.cache(run.context))}
    return rates | {arm: bare(arm, folder, task, execution.workers) for arm in ("deepspeed", "pytorch")}


if __name__ == "__main__":
    main()

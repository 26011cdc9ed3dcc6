"""What a run survives on a real cluster: the death of its worker, its driver, the whole head."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from haltscale.platform import cluster
from haltscale.platform.store import RunState, RunStore

from jobs import command_line, of_head, submit
from looping import CLOCK

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STUDY = """
from haltscale.platform.api import BytePairs, Corpus, ExecutionConfig, RunConfig, Source, Study, grid

Study(
    name="survivor",
    question="Does it live?",
    corpus=Corpus(
        name="toy",
        sources={{"texts": Source(path={folder!r})}},
        tokenizer=BytePairs(vocab_size=300),
        validation_documents=2,
        probe_characters=200,
    ),
    base=RunConfig(tokens=64 * 512, context=64, batch_tokens=512, learning_rate=1e-2),
    sweep=grid(method="adaptive", lam=1.0, tau=0.2),
    execution=ExecutionConfig(
        evaluations=2, checkpoints=16, log_every_seconds=0.0, max_failures=5, zero_stage={stage}, cpus_per_worker={cpus}
    ),
).main()
"""


@pytest.fixture
def own_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., cluster.Head]]:
    """Starts heads that a test may kill, in a haltscale home of their own."""
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "home"))
    with tempfile.TemporaryDirectory(prefix="hs-", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:
        yield lambda cpus=2: cluster.up(cpus=cpus, temp_dir=temp_dir)
        cluster.down()
        assert not of_head(temp_dir)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(30):
        words = [f"{['the', 'of', 'and', 'to'][n % 4]} w{(index + n * n) % 89}" for n in range(400)]
        (folder / f"{index:02d}.txt").write_text(" ".join(words), encoding="utf-8")

    def write(stage: int = 1, cpus: int = 1) -> str:
        path = tmp_path / "survivor.py"
        path.write_text(STUDY.format(folder=str(folder), stage=stage, cpus=cpus))
        return str(path)

    return write


def workers(temp_dir: str) -> list[psutil.Process]:
    return [process for process in of_head(temp_dir) if "RayTrainWorker" in command_line(process)]


def steps(store: RunStore) -> list[int]:
    keys = store.run_keys("survivor") if "survivor" in store.studies() else []
    return [row["step"] for key in keys for row in store.read_lines(store.path("survivor", key, "metrics.jsonl"))]


def reach(store: RunStore, step: int, job: Any) -> None:
    while max(steps(store), default=0) < step:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)


def timeless(store: RunStore) -> list[dict[str, Any]]:
    (key,) = store.run_keys("survivor")
    rows = store.read_lines(store.path("survivor", key, "metrics.jsonl"))
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def test_worker_driver_and_head_die_and_the_run_is_the_one_left_alone(own_head, script, tmp_path: Path) -> None:
    head, toy = own_head(), script()
    alone, killed = RunStore(tmp_path / "alone"), RunStore(tmp_path / "killed")
    job = submit(head, "python", toy, "--store", alone.root)
    output, _ = job.communicate()
    assert job.returncode == 0, output

    job = submit(head, "python", toy, "--store", killed.root)
    reach(killed, 10, job)
    for process in workers(head.temp_dir):
        process.send_signal(signal.SIGKILL)
    reach(killed, 24, job)

    drivers = [p for p in psutil.process_iter() if command_line(p).endswith(f"{toy} --store {killed.root}")]
    drivers = [p for p in drivers if "job submit" not in command_line(p)]
    assert drivers
    for process in drivers:
        process.send_signal(signal.SIGKILL)
    assert job.wait() != 0
    job.communicate()
    job = submit(head, "python", toy, "--store", killed.root)
    reach(killed, 40, job)

    doomed = of_head(head.temp_dir)
    assert doomed
    for process in doomed:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(doomed, timeout=60)
    assert not of_head(head.temp_dir), "no orphan is left"
    job.kill()
    job.communicate()
    job = submit(own_head(), "python", toy, "--store", killed.root)
    output, _ = job.communicate()
    assert job.returncode == 0, output

    assert timeless(killed) == timeless(alone), "to the last bit"
    (mine,), (theirs,) = list(killed.runs("survivor")), list(alone.runs("survivor"))
    assert mine.state is RunState.FINISHED
    for name in ("loss", "sequence_digest", "tokens", "flops_realised", "mean_steps"):
        assert mine.record[name] == theirs.record[name], name

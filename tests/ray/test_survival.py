"""What a run survives on a real cluster: the death of its worker, its driver, the whole head."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from toys import write_study, write_texts

from haltscale.platform import cluster
from haltscale.platform.store import RunState, RunStore

from jobs import drivers, of_head, submit, training_workers, wait_for
from looping import timeless

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def own_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., cluster.Head]]:
    """Starts heads that a test may kill, in a haltscale home of their own."""
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "home"))
    with tempfile.TemporaryDirectory(prefix="hs-", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:
        yield lambda cpus=2: cluster.up(cpus=cpus, temp_dir=temp_dir)
        cluster.down()
        assert not of_head(temp_dir)


def steps(store: RunStore) -> list[int]:
    keys = store.run_keys("survivor") if "survivor" in store.studies() else []
    return [row["step"] for key in keys for row in store.read_lines(store.path("survivor", key, "metrics.jsonl"))]


def reach(store: RunStore, step: int, job: Any) -> None:
    wait_for(lambda: max(steps(store), default=0) >= step, job)


def rows(store: RunStore) -> list[dict[str, Any]]:
    (key,) = store.run_keys("survivor")
    return timeless(store.read_lines(store.path("survivor", key, "metrics.jsonl")))


def test_worker_driver_and_head_die_and_the_run_is_the_one_left_alone(own_head, tmp_path: Path) -> None:
    head = own_head()
    toy = write_study(
        tmp_path / "survivor.py",
        write_texts(tmp_path / "texts"),
        name="survivor",
        base="tokens=64 * 512, context=64, batch_tokens=512, learning_rate=1e-2",
        execution="evaluations=2, checkpoints=16, log_every_seconds=0.0, max_failures=5",
    )
    alone, killed = RunStore(tmp_path / "alone"), RunStore(tmp_path / "killed")
    job = submit(head, "python", toy, "--store", alone.root)
    output, _ = job.communicate()
    assert job.returncode == 0, output

    job = submit(head, "python", toy, "--store", killed.root)
    reach(killed, 10, job)
    doomed = training_workers(head)
    assert doomed
    for process in doomed:
        process.send_signal(signal.SIGKILL)
    reach(killed, 24, job)

    doomed = drivers(toy)
    assert doomed
    for process in doomed:
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

    assert rows(killed) == rows(alone), "to the last bit"
    (mine,), (theirs,) = list(killed.runs("survivor")), list(alone.runs("survivor"))
    assert mine.state is RunState.FINISHED
    for name in ("loss", "sequence_digest", "tokens", "flops_realised", "mean_steps"):
        assert mine.record[name] == theirs.record[name], name

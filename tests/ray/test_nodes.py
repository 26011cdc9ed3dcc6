"""More nodes than one, on this machine: runs are placed on all of them, and outlive one that dies."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from toys import BATCH, write_study, write_texts

from haltscale.platform import cluster
from haltscale.platform.store import RunState, RunStore

from jobs import of_head, submit, wait_for
from looping import timeless

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NODE = str(Path(__file__).parents[1] / "another_node.py")


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


class Node:
    """A node beside the head, with a process tree of its own."""

    def __init__(self, head: cluster.Head, cpus: int) -> None:
        command = [sys.executable, NODE, head.gcs, str(cpus)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=cluster.head_environment()
        )
        assert self._process.stdout
        self.id = self._process.stdout.readline().strip()
        assert self.id, "the node did not start"

    def die(self) -> None:
        """SIGKILL for the raylet, its agents and all of its workers at once, as if its plug were pulled."""
        if self._process.poll() is not None:
            return
        top = psutil.Process(self._process.pid)
        doomed = [top, *top.children(recursive=True)]
        for kind in (signal.SIGSTOP, signal.SIGKILL):  # all are stopped first, so that none can tell the others
            for process in doomed:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(kind)
        self._process.communicate()
        while any(lives(process) for process in doomed):
            time.sleep(0.05)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], tuple[cluster.Head, Any]]]:
    """Starts a head with so many CPUs, and gives what adds nodes to it; at the end no process of theirs is left."""
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "home"))
    added: list[Node] = []
    with tempfile.TemporaryDirectory(prefix="hs-", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:

        def start(cpus: int) -> tuple[cluster.Head, Callable[[int], Node]]:
            head = cluster.up(cpus=cpus, temp_dir=temp_dir)

            def add(cpus: int) -> Node:
                added.append(Node(head, cpus))
                return added[-1]

            return head, add

        yield start
        for node in added:
            node.die()
        cluster.down()
        assert not of_head(temp_dir)


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., str]:
    texts = write_texts(tmp_path / "texts")

    def write(*, steps: int, seeds: list[int]) -> str:
        return write_study(
            tmp_path / "nodes.py",
            texts,
            name="nodes",
            base=f"tokens={steps * BATCH}, context=64, batch_tokens={BATCH}, learning_rate=1e-2",
            runs=f"sweep=grid(method='adaptive', lam=1.0, tau=0.2, seed={seeds})",
            execution=f"evaluations=1, checkpoints={steps // 4}, log_every_seconds=0.0",
        )

    return write


def rows(store: RunStore, key: str) -> list[dict[str, Any]]:
    return timeless(store.read_lines(store.path("nodes", key, "metrics.jsonl")))


def ended(job: subprocess.Popen[str]) -> None:
    output, _ = job.communicate()
    assert job.returncode == 0, output


def test_runs_are_placed_on_both_nodes(nodes, study, tmp_path: Path) -> None:
    head, add = nodes(1)
    other, store = add(1), RunStore(tmp_path / "runs")
    ended(submit(head, "python", study(steps=8, seeds=[0, 1, 2, 3]), "--store", store.root))
    views = list(store.runs("nodes"))
    assert [view.state for view in views] == [RunState.FINISHED] * 4
    used = {node for view in views for attempt in view.record["attempts"] for node in attempt["nodes"]}
    assert other.id in used
    assert len(used) == 2


def test_a_run_outlives_its_node(nodes, study, tmp_path: Path) -> None:
    """The head has no CPU, so that the run's worker, its controller and its driver are all on the node that dies."""
    head, add = nodes(0)
    first, script = add(1), study(steps=24, seeds=[0])
    alone, bereft = RunStore(tmp_path / "alone"), RunStore(tmp_path / "bereft")
    ended(submit(head, "python", script, "--store", alone.root))

    job = submit(head, "python", script, "--store", bereft.root)
    wait_for(lambda: any(len(rows(bereft, key)) >= 10 for key in bereft.present("nodes")), job)
    second = add(1)
    first.die()
    ended(job)

    (theirs,), (mine,) = list(alone.runs("nodes")), list(bereft.runs("nodes"))
    assert mine.state is RunState.FINISHED
    begun, resumed = mine.record["attempts"]
    assert (begun["nodes"], resumed["nodes"]) == ([first.id], [second.id])
    assert resumed["step"] >= 4, "from the last checkpoint that was on disk"
    assert rows(bereft, mine.key) == rows(alone, theirs.key), "to the last bit"
    for name in ("loss", "sequence_digest", "tokens", "steps", "flops_realised", "mean_steps"):
        assert mine.record[name] == theirs.record[name], name

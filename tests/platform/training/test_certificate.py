"""The resume certificate: runs that are killed at random steps give the losses and sequences of runs left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from killed import STEPS

SCRIPT = str(Path(__file__).parents[2] / "killed.py")
STAGES = ["0", "1", "2", "3"]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Every step that was taken, of all stages."""
    found = []
    for stage in STAGES:
        path = folder / f"stage-{stage}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append({"stage": stage, **json.loads(line)})
            except ValueError:  # cut off by a kill
                continue
    return found


def started(folder: Path) -> subprocess.Popen[bytes]:
    """A process that trains; one that was killed while DeepSpeed compiled has left its lock."""
    lock = folder / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    return subprocess.Popen([sys.executable, SCRIPT, str(folder), *STAGES], stdout=subprocess.DEVNULL, env=environment)


def certify(tmp_path: Path, *, kills: int, seed: int) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert started(alone).wait() == 0
    whole = {(row["stage"], row["step"]): row for row in lines(alone)}
    assert len(whole) == len(STAGES) * STEPS

    total = len(whole)
    chosen = random.Random(seed)
    for kill in range(kills):
        process = started(killed)
        left = total - len({(row["stage"], row["step"]) for row in lines(killed)})
        # Some way towards the end, so that all kills find something to kill.
        target = len(lines(killed)) + chosen.randint(1, max(1, left // (kills - kill + 1)))
        while len(lines(killed)) < target:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive, f"orphans: {alive}"
    assert started(killed).wait() == 0

    taken = lines(killed)
    assert {(row["stage"], row["step"]) for row in taken} == set(whole), "nothing is lost"
    for row in taken:  # steps that were taken twice too, to the last bit
        assert row == whole[row["stage"], row["step"]]


@pytest.mark.timeout(300)
def test_a_run_that_is_killed_is_the_run_left_alone(tmp_path: Path) -> None:
    """Stages 0 to 3, float32 and bfloat16: losses, sequences, latent steps and FLOPs are equal bit for bit."""
    certify(tmp_path, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_in_a_row(tmp_path: Path) -> None:
    certify(tmp_path, kills=20, seed=2)

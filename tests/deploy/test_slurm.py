"""deploy/slurm.sh on a real Slurm: slurmctld, two slurmd and munge on this machine, in a folder of their own.

`make slurm` installs them where it may. A node is a slurmd; each has a Ray node of its own, at this machine's address.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from toys import BATCH, write_study, write_texts

from haltscale.platform.cluster import free_ports
from haltscale.platform.store import RunState, RunStore

from jobs import BIN, ROOT, command_line

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
SCRIPT = ROOT / "deploy" / "slurm.sh"

CONF = """
ClusterName=haltscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
KillWait=30
NodeName=node-1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """A cluster of two nodes."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home
        ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # all is on loopback
        self._environment = {**ours, "PATH": SBIN, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "node-1", "node-2"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        fields = {"folder": folder, "host": socket.gethostname(), "user": psutil.Process().username()}
        (folder / "slurm.conf").write_text(CONF.format(ports=free_ports(3), **fields))
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.call("munged", "--force", *(f"--{option}={folder}/munge.{name}" for option, name in munge.items()))
        self.call("slurmctld", "-c", "-f", str(folder / "slurm.conf"))
        for node in ("node-1", "node-2"):
            self.call("slurmd", "-N", node, "-f", str(folder / "slurm.conf"))
        self.wait(lambda: self.call("sinfo", "--noheader", "--format=%t %D", check=False).split() == ["idle", "2"])

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, nodes: int) -> str:
        """The job's id. One CPU a node, no GPU; told of its end a minute before its time limit."""
        variables = {
            "HALTSCALE_HOME": str(self.home),
            "HALTSCALE_VENV": str(BIN.parent),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        command = [
            *("sbatch", "--parsable", f"--nodes={nodes}", "--cpus-per-task=1", "--gpus-per-node=0", "--time=60"),
            *("--signal=B:USR1@60", f"--output={self.folder}/job-%j.log", f"--chdir={self.folder}"),
            "--export=" + ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())]),
        ]
        return self.call(*command, *arguments).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))

    def log(self) -> str:
        return "\n".join(f"{path}:\n{path.read_text()[-6000:]}" for path in sorted(self.folder.glob("job-*.log")))

    def wait(self, condition: Callable[[], bool], *, job: str = "", seconds: float = 1500) -> None:
        """Until something has happened, as long as the job that is to make it happen has not failed."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log()
            assert not job or self.job(job)["JobState"] not in ("FAILED", "COMPLETED", "TIMEOUT"), self.log()
            time.sleep(0.5)

    def wait_for_end(self, job: str, state: str) -> None:
        self.wait(lambda: self.job(job)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"))
        assert self.job(job)["JobState"] == state, self.log()

    def stop(self) -> None:
        self.call("scancel", f"--user={psutil.Process().username()}", check=False)
        self.wait(lambda: not self.call("squeue", "--noheader", check=False).strip(), seconds=120)
        for name in ("node-1", "node-2", "slurmctld", "munge"):
            pid = int((self.folder / f"{name}.pid").read_text())
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            self.wait(lambda pid=pid: not psutil.pid_exists(pid), seconds=60)  # type: ignore[misc]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing := [name for name in NEEDED if not shutil.which(name, path=SBIN)]:
        pytest.skip(f"no {', '.join(missing)}: `make slurm` installs Debian's, with the right to do so")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Slurm(Path(folder), tmp_path_factory.mktemp("slurm-home"))
        yield cluster
        cluster.stop()
        left = [command_line(process) for process in psutil.process_iter() if folder in command_line(process)]
        assert not left


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("slurm-study") / "texts")


def study(texts: Path, name: str, *, steps: int, seeds: int = 1) -> str:
    return write_study(
        texts.parent / f"{name}.py",
        texts,
        name=name,
        base=f"tokens={steps * BATCH}, context=64, batch_tokens={BATCH}, learning_rate=1e-2",
        runs=f"sweep=grid(method='adaptive', lam=1.0, tau=0.2, seed={list(range(seeds))})",
        execution="evaluations=1, checkpoints=1, log_every_seconds=0.0",
    )


def steps_of(store: RunStore, name: str) -> list[list[int]]:
    keys = store.run_keys(name) if name in store.studies() else []
    return [[row["step"] for row in store.read_lines(store.path(name, key, "metrics.jsonl"))] for key in keys]


def test_the_time_limit_saves_queues_again_and_resumes(slurm: Slurm, texts: Path) -> None:
    """Two runs, one on each node, that take no checkpoint but the one that they are told to take."""
    script, store = study(texts, "limited", steps=1_000_000, seeds=2), RunStore(slurm.home / "runs")
    job = slurm.submit(str(SCRIPT), script, nodes=2)
    slurm.wait(lambda: sum(len(rows) >= 10 for rows in steps_of(store, "limited")) == 2, job=job)
    minutes = int(re.findall(r"\d+", slurm.job(job)["RunTime"])[-2]) + 2
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", job=job)
    assert "2 of 2 runs have saved" in slurm.log()
    slurm.wait(lambda: slurm.job(job)["JobState"] == "PENDING", job=job)
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60")

    keys = store.run_keys("limited")

    def attempts() -> list[list[dict[str, Any]]]:
        return [store.read_lines(store.path("limited", key, "attempts.jsonl")) for key in keys]

    slurm.wait(lambda: all(len(each) == 2 for each in attempts()), job=job)
    resumed = [each[1]["step"] for each in attempts()]
    assert [each[0]["step"] for each in attempts()] == [0, 0]
    assert min(resumed) >= 10, "from what it saved when it was told"
    assert len({node for each in attempts() for node in each[0]["nodes"]}) == 2
    slurm.wait(lambda: all(rows[-1] > step for rows, step in zip(steps_of(store, "limited"), resumed, strict=True)))
    assert all(rows == list(range(1, len(rows) + 1)) for rows in steps_of(store, "limited"))
    slurm.call("scancel", job)
    slurm.wait_for_end(job, "CANCELLED")


def test_an_array_runs_a_study_in_each_task_and_a_cancelled_one_goes_on(slurm: Slurm, texts: Path) -> None:
    scripts = [study(texts, name, steps=steps) for name, steps in (("short", 8), ("long", 1_000_000))]
    store = RunStore(slurm.home / "runs")
    job = slurm.submit("--array=0-1", str(SCRIPT), ",".join(scripts), nodes=1)
    slurm.wait(lambda: any(len(rows) >= 5 for rows in steps_of(store, "long")), job=f"{job}_1")
    slurm.call("scancel", f"{job}_1")
    slurm.wait_for_end(f"{job}_1", "CANCELLED")
    slurm.wait_for_end(f"{job}_0", "COMPLETED")
    assert [view.state for view in store.runs("short")] == [RunState.FINISHED]
    (view,) = store.runs("long")
    assert view.state in (RunState.RUNNING, RunState.STALLED), "it did not end by itself"
    assert not store.holder("long") or store.holder("long").is_dead()  # type: ignore[union-attr]
    again: Any = slurm.submit(str(SCRIPT), scripts[1], "--set", "tokens=4096", nodes=1)
    slurm.wait_for_end(again, "COMPLETED")
    assert RunState.FINISHED in [view.state for view in store.runs("long")]

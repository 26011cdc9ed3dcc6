"""Submitting jobs as a user does, with this session's haltscale home."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil

from haltscale.platform import cluster

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TOY_LENGTH = ["--set", "tokens=8192", "--set", "evaluations=1", "--set", "checkpoints=1"]


def submit(
    head: cluster.Head,
    *entrypoint: str,
    working_dir: str | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
    home: bool = True,
) -> subprocess.Popen[str]:
    """`ray job submit` with this session's haltscale home, and more variables for the job and its workers.

    Args:
        home: false where each node has a home of its own.
    """
    shared = {"HALTSCALE_HOME": os.environ["HALTSCALE_HOME"]} if home else {}
    environment = json.dumps({"env_vars": {**shared, **variables}})
    command = [str(BIN / "ray"), "job", "submit", "--address", head.dashboard, "--runtime-env-json", environment]
    command += ["--working-dir", working_dir] if working_dir else []
    return subprocess.Popen(
        [*command, "--", *entrypoint],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "token", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(head: cluster.Head, *entrypoint: str, working_dir: str | None = None) -> tuple[int, str]:
    job = submit(head, *entrypoint, working_dir=working_dir)
    output, _ = job.communicate()
    return job.returncode, output


def environment(process: psutil.Process) -> str:
    """The values of a process's environment; empty where it has gone or is not ours to read."""
    try:
        return " ".join(process.environ().values())
    except psutil.Error:
        return ""


def of_head(temp_dir: str) -> list[psutil.Process]:
    """The processes of a head, and all that they started."""
    mine = [p for p in psutil.process_iter() if temp_dir in command_line(p) or temp_dir in environment(p)]
    return [p for p in mine if p.status() != psutil.STATUS_ZOMBIE and "pytest" not in command_line(p)]


def command_line(process: psutil.Process) -> str:
    """A process's command line; empty where it has gone or is not ours to read."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def drivers(script: str) -> list[psutil.Process]:
    """The processes that run a study's script: what the job server started, not the `ray job submit` that asked."""
    pattern = rf"\S*python\S* {re.escape(script)}( .*)?"
    return [process for process in psutil.process_iter() if re.fullmatch(pattern, command_line(process))]


def training_workers(head: cluster.Head) -> list[psutil.Process]:
    """The processes of a head in which a model is trained: Ray Train's, or a trial's own (as Ray calls them)."""
    titles = ("RayTrainWorker", "ray::_trial_here", "ray::ImplicitFunc")
    found = [process for process in psutil.process_iter() if any(title in command_line(process) for title in titles)]
    return [process for process in found if any(head.temp_dir in command_line(parent) for parent in parents(process))]


def parents(process: psutil.Process) -> list[psutil.Process]:
    """What started a process: of Ray's workers, whose titles lie over their environments, the raylet of their head."""
    try:
        return process.parents()
    except psutil.Error:
        return []


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    """Poll until something has happened, as long as the job that is to make it happen lives."""
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)

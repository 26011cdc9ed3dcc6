"""Where a result came from: package versions, git commit, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform  # the standard library's: this folder is imported as haltscale.platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("haltscale", "torch", "deepspeed", "ray", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """The commit of the code that runs, with ``-dirty`` where it was changed since; empty where there is no git.

    ``HALTSCALE_GIT_COMMIT`` overrides it: a job on another machine has the files but not the repository.
    """
    if named := os.environ.get("HALTSCALE_GIT_COMMIT"):
        return named
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict[str, Any]:
    """What the run ran on, in general terms."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    cpu = torch.cpu.get_capabilities().get("cpu_name", "") or platform.machine()
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu}

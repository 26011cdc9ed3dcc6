"""The cluster files, as far as a machine without a cluster can tell: Ray's schema, structure, ShellCheck."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

from haltscale.platform.api import Study
from haltscale.platform.store import RunStore

from jobs import BIN, ROOT

DEPLOY = ROOT / "deploy"


@pytest.fixture
def ray_up() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "ray-up.yaml").read_text())
    return loaded


@pytest.fixture
def ray_job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    return loaded


def test_ray_up_follows_rays_schema(ray_up: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(ray_up, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**ray_up, "max_wrokers": 3}, schema)


def test_ray_up_passes_rays_own_validation(ray_up: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(ray_up)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    gpu = prepared["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] == 8
    assert gpu["max_workers"] <= prepared["max_workers"]
    for start in (ray_up["head_start_ray_commands"], ray_up["worker_start_ray_commands"]):
        assert all(f"{name}=" in start[-1] for name in ("HALTSCALE_HOME", "HALTSCALE_STORE"))


def pods(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        yield group["template"]["spec"]


def test_the_rayjob_hangs_together(ray_job: dict[str, Any]) -> None:
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(ray_job["spec"]) <= {
        *("entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
        *("rayClusterSpec", "runtimeEnvYAML", "suspend", "metadata", "jobId", "activeDeadlineSeconds"),
    }
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", ray_job["metadata"]["name"])
    for pod in pods(ray_job):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts on the limits"
            environment = {variable["name"]: variable["value"] for variable in container["env"]}
            assert environment["HALTSCALE_HOME"].startswith("/shared")
            assert all(isinstance(value, str) for value in environment.values())
            assert RunStore(f"memory://{environment['HALTSCALE_STORE']}").path("study")
    worker = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


def test_the_rayjob_runs_a_study_that_its_workers_can_hold(ray_job: dict[str, Any]) -> None:
    python, flag, module, *arguments = shlex.split(ray_job["spec"]["entrypoint"])
    assert (python, flag) == ("python", "-m")
    study: Study = importlib.import_module(module).study()
    assignments = [argument for argument in arguments if argument != "--set"]
    limits = list(pods(ray_job))[1]["containers"][0]["resources"]["limits"]
    held = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
    assert study.overridden(assignments).problems(held) == []


def test_the_slurm_script_is_sound() -> None:
    script = str(DEPLOY / "slurm.sh")
    subprocess.run(["bash", "-n", script], check=True)
    checked = subprocess.run([str(BIN / "shellcheck"), "--external-sources", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


SLURM = {
    "scontrol": "case $1 in show) printf 'node-1\\nnode-2\\n';; *) echo \"scontrol $*\" >> $CALLS;; esac",
    "srun": 'echo "srun $*" >> "$CALLS"; shift 4; exec "$@"',
    "hostname": "echo 10.0.0.1 fd00::1",
    "python": """case "$2" in
*secrets*) echo token;;
*) echo >> "$CALLS.asked"; [ "$(wc -l < "$CALLS.asked")" -ge 2 ];;
esac""",
    "ray": 'echo "ray $*" >> "$CALLS"; exec sleep 60',
    "haltscale": 'echo "haltscale $*" >> "$CALLS"',
}


def test_the_slurm_script_starts_a_head_workers_and_the_study(tmp_path: Path) -> None:
    """Run for real, with stand-ins for Slurm's and Ray's commands that write down how they were called."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    for name, body in SLURM.items():
        command = tmp_path / name
        command.write_text(f"#!/bin/bash\n{body}\n")
        command.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "USER": "me",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "40007",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_ARRAY_TASK_ID": "1",
        "HALTSCALE_HOME": str(tmp_path),
        "HALTSCALE_VENV": str(tmp_path / "venv"),
    }
    command = ["bash", str(DEPLOY / "slurm.sh"), "ladder,quickstart", "--set", "tokens=5"]
    with subprocess.Popen(command, env=environment, start_new_session=True) as script:
        assert script.wait(timeout=60) == 0
        os.killpg(script.pid, signal.SIGKILL)  # what Slurm does with a job's steps when its script has ended
    calls = (tmp_path / "calls").read_text().splitlines()
    starts = [call for call in calls if call.startswith("ray start")]
    assert sum("--head --node-ip-address=10.0.0.1 --port=20021" in call for call in starts) == 1
    assert sum("--node-ip-address=10.0.0.1 --address=10.0.0.1:20021" in call for call in starts) == 1
    assert all("--num-cpus=64 --num-gpus=8" in call for call in starts)
    assert sum(call.startswith("srun") and "--nodelist=node-2" in call for call in calls) == 1
    assert len((tmp_path / "calls.asked").read_text().splitlines()) == 2, "it waits until all nodes are there"
    assert calls[-1] == "haltscale run quickstart -- --set tokens=5", "the array's second study"
    assert not any("requeue" in call for call in calls)
    missing = subprocess.run(["bash", str(DEPLOY / "slurm.sh")], capture_output=True, text=True, check=False)
    assert missing.returncode != 0
    assert "usage: sbatch" in missing.stderr


def test_what_has_to_be_changed_is_marked() -> None:
    for name in ("ray-up.yaml", "rayjob.yaml", "slurm.sh"):
        text = (DEPLOY / name).read_text()
        assert "CHANGE" in text
        assert f"[{name}]({name})" in (DEPLOY / "README.md").read_text()

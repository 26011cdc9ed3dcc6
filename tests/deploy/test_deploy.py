"""The cluster files, as far as a machine without a cluster can tell: Ray's schema, structure, ShellCheck."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
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
def manifests() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())}


@pytest.fixture
def ray_job(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return manifests["RayJob"]


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
        assert all(f"{name}=" in start[-1] for name in ("HALTSCALE_HOME", "HALTSCALE_STORE", "HALTSCALE_CORPORA"))


def pods(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        yield group["template"]["spec"]


def closed(required: Iterable[str] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


TEXT, WHOLE, YES_OR_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
PARAMETERS = {"type": "object", "additionalProperties": TEXT}
GROUP = {"rayStartParams": PARAMETERS, "template": {"type": "object"}}
RAY_JOB = closed(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=WHOLE,
    activeDeadlineSeconds=WHOLE,
    shutdownAfterJobFinishes=YES_OR_NO,
    ttlSecondsAfterFinished=WHOLE,
    runtimeEnvYAML=TEXT,
    suspend=YES_OR_NO,
    rayClusterSpec=closed(
        ("headGroupSpec",),
        rayVersion=TEXT,
        authOptions=closed(("mode",), mode={"enum": ["disabled", "token"]}, secretName=TEXT),
        enableInTreeAutoscaling=YES_OR_NO,
        headGroupSpec=closed(("template",), **GROUP),
        workerGroupSpecs={
            "type": "array",
            "items": closed(
                ("groupName", "template"), groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, **GROUP
            ),
        },
    ),
)
"""What KubeRay's documentation of its API (1.6) says of the fields that are of use here; pods are Kubernetes' own."""


def test_the_rayjob_follows_kuberays_and_kubernetes_schemas(manifests: dict[str, dict[str, Any]]) -> None:
    job = manifests["RayJob"]
    assert (job["apiVersion"], set(job)) == ("ray.io/v1", {"apiVersion", "kind", "metadata", "spec"})
    jsonschema.validate(job["spec"], RAY_JOB)
    for odd in ({"backoffLimits": 2}, {"backoffLimit": "2"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**job["spec"], **odd}, RAY_JOB)
    version = kubernetes_validate.latest_version()
    for pod in pods(job):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(whole, version, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**whole, "spec": {**pod, "volume": []}}, version, strict=True)
    kubernetes_validate.validate(manifests["NetworkPolicy"], version, strict=True)


def test_the_rayjob_hangs_together(ray_job: dict[str, Any]) -> None:
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", ray_job["metadata"]["name"])
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    for pod in pods(ray_job):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts on the limits"
            environment = {variable["name"]: variable["value"] for variable in container["env"]}
            assert any(
                environment["HALTSCALE_HOME"].startswith(each["mountPath"]) for each in container["volumeMounts"]
            )
            assert all(isinstance(value, str) for value in environment.values())
            for name in ("HALTSCALE_STORE", "HALTSCALE_CORPORA"):
                assert RunStore(f"memory://{environment[name]}").path("study")
    worker = cluster["workerGroupSpecs"][0]
    assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


def test_only_the_cluster_itself_its_operator_and_its_submitter_reach_its_pods(
    manifests: dict[str, dict[str, Any]],
) -> None:
    job, policy = manifests["RayJob"], manifests["NetworkPolicy"]["spec"]
    (label,) = policy["podSelector"]["matchLabels"].items()
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert label in group["template"]["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    within, outside = policy["ingress"]
    assert within == {"from": [{"podSelector": policy["podSelector"]}]}
    assert [port["port"] for port in outside["ports"]] == [8265]
    names = [selector["podSelector"]["matchLabels"] for selector in outside["from"]]
    assert {"batch.kubernetes.io/job-name": job["metadata"]["name"]} in names
    assert {"podSelector": policy["podSelector"]} in policy["egress"][0]["to"]


SECRET = re.compile(r"[0-9a-f]{32}|AKIA[0-9A-Z]{16}|RAY_AUTH_TOKEN[\"' ]*[:=](?!\$\()")


def test_every_cluster_asks_for_a_token_which_is_in_no_file(ray_up: dict[str, Any], ray_job: dict[str, Any]) -> None:
    assert ray_job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for start in (ray_up["head_start_ray_commands"], ray_up["worker_start_ray_commands"]):
        assert start[-1].startswith("RAY_AUTH_MODE=token ")
    assert ray_up["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "export RAY_AUTH_TOKEN RAY_AUTH_MODE=token" in (DEPLOY / "slurm.sh").read_text()
    assert "RAY_AUTH_MODE=token" in (DEPLOY / "Dockerfile").read_text()
    for file in DEPLOY.iterdir():
        assert not SECRET.search(file.read_text()), file


def test_the_image_is_linted_and_its_user_is_not_root() -> None:
    checked = subprocess.run([str(BIN / "hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert all("--constraint constraints.txt" in line for line in lines if "pip install" in line)
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert {"model", "platform", "studies", "dashboard", "constraints.txt", "pyproject.toml"} <= kept
    assert all((ROOT / name).exists() for name in kept)


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
    asked = len((tmp_path / "calls.asked").read_text().splitlines())
    assert asked == 3, "it waits until the head is there, which takes two looks, and then for all nodes"
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

"""Every command and every program of the README is run, at toy length where it would train."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from haltscale.platform import cluster
from haltscale.platform.store import RunState, RunStore

from jobs import BIN, ROOT, TOY_LENGTH

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines() if line
]
SERVES = "make dashboard"


def environment(**more: str) -> dict[str, str]:
    """A newcomer's: nothing of Ray's is set, and what the README exports comes from the README."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**clean, "PATH": os.pathsep.join([str(BIN), clean["PATH"]]), "NO_COLOR": "1", **more}


def exported(head: cluster.Head) -> str:
    """The README's line for plain `ray job submit`, with the port that this session's head got."""
    (line,) = [line for line in COMMANDS if line.startswith("export RAY_")]
    return line.replace("http://127.0.0.1:8265", head.dashboard)


def shell(line: str, env: dict[str, str]) -> str:
    done = subprocess.run(line, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def table(output: str) -> list[str]:
    """The rows of the table of results."""
    return re.findall(r"^\s*(?:vanilla|adaptive)\S* · .*\d.*$", output.split("nats/token")[-1], flags=re.MULTILINE)


def make(line: str) -> str:
    """The README's make line, with the environment that runs the tests instead of a new one."""
    return f"{line} VENV={shlex.quote(sys.prefix)} --assume-old={shlex.quote(sys.prefix)}/.installed"


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("line", [line for line in COMMANDS if line != SERVES and not line.startswith("export ")])
def test_command(line: str, head: cluster.Head, quickstart: str, tmp_path: Path) -> None:
    toy = shlex.join(TOY_LENGTH)
    if line == "make study":
        output = shell(f"{make(line)} STUDY_ARGS={shlex.quote(toy)}", environment())
        assert "nothing to train" in output
        assert "haltscale dashboard" in output
    elif line == "haltscale down":  # in a home of its own: the session's head is still needed
        assert "no local Ray head" in shell(line, environment(HALTSCALE_HOME=str(tmp_path)))
    elif line.endswith("--dry-run"):
        assert "planned" in shell(line, environment())
    elif "ray job submit" in line:
        runtime = f"--runtime-env-json={shlex.quote(_runtime_environment())}"
        line = line.replace("job submit", f"job submit {runtime}")
        output = shell(f"{exported(head)}; {line} {toy}", environment())
        assert "all 5 runs are finished, nothing to train" in output
        assert len(table(output)) == 5
        assert table(output) == table(quickstart)
    elif "submit" in line:
        assert "nothing to train" in shell(f"{line} -- {toy}", environment())
    elif line.startswith("haltscale "):
        assert shell(line, environment()).strip()
    else:
        pytest.fail(f"the README shows a command that no test runs: {line}")


def _runtime_environment() -> str:
    return json.dumps({"env_vars": {"HALTSCALE_HOME": os.environ["HALTSCALE_HOME"]}})


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/_stcore/health", timeout=60) as answer:
            return bool(answer.read() == b"ok")
    except OSError:  # it does not listen yet
        return False


@pytest.mark.ray
def test_the_dashboard_starts(head: cluster.Head, quickstart: str) -> None:
    assert SERVES in COMMANDS
    server = subprocess.Popen(
        make(SERVES), shell=True, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, process_group=0
    )
    try:
        assert server.stdout is not None
        url = next(m.group() for line in server.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
        while not healthy(url):
            assert server.poll() is None, "the dashboard ended by itself"
            time.sleep(0.1)
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # a server that has just started may miss a SIGTERM
        server.wait()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_sweep_of_the_readme(head: cluster.Head, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(program.splitlines()) <= 11, "ten lines and a blank one"
    script = tmp_path / "my_sweep.py"
    script.write_text(program)
    (line,) = re.findall(r"`(ray job submit -- python [^`]*my_sweep.py)`", README)
    line = line.replace("/path/to/my_sweep.py", str(script))
    line = line.replace("job submit", f"job submit --runtime-env-json={shlex.quote(_runtime_environment())}")
    shell(f"{exported(head)}; {line} --set tokens=4096 --set evaluations=1 --set checkpoints=1", environment())
    assert [view.state for view in RunStore().runs("halting-penalty")] == [RunState.FINISHED] * 5


def test_make_knows_every_target_of_the_readme() -> None:
    for target in sorted(set(re.findall(r"(?:^|`)make ([a-z-]+)(?:$|`)", README, flags=re.MULTILINE))):
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_file_tree_is_true() -> None:
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert tree
    for name in re.findall(r"\b([a-z_]+\.py)\b", tree.group(1)):
        assert (ROOT / "platform" / name).exists(), name
    for folder in re.findall(r"^([a-z]+)/", tree.group(1), flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder

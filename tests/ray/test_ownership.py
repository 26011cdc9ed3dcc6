"""One owner for each study, whatever cluster it is started from; and one way to run a study, whoever wrote it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from toys import write_study, write_texts

from haltscale.platform import cluster
from haltscale.platform.store import RunState, RunStore

from jobs import BIN, ROOT, drivers, environment, submit, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("owned") / "toy")


def haltscale(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "haltscale.platform.cli", *arguments]
    return subprocess.run(
        command, env={**os.environ, "NO_COLOR": "1", **variables}, capture_output=True, text=True, check=False
    )


def test_two_terminals_with_rays_of_their_own_train_each_run_once(texts: Path, tmp_path: Path) -> None:
    """No head is up: each process would start its own cluster. The second is told who has the study; when the first is
    killed, the next one takes over at once and resumes it."""
    home, store = tmp_path / "home", RunStore(tmp_path / "runs")
    steps = f"tokens={500 * 512}, context=64, batch_tokens=512"  # long enough for the second to find it at work
    script = write_study(tmp_path / "twice.py", texts, name="twice", base=steps)
    variables = {**os.environ, "HALTSCALE_HOME": str(home), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "haltscale.platform.cli", "run", script, "--", "--store", store.root]
    first = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: any(store.run("twice", key).status.get("step") for key in store.present("twice")), first)
        refused = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert f"process {first.pid} since" in refused.stderr
        assert "haltscale status twice" in refused.stderr
        assert f"process {first.pid} since" in haltscale("status", "--store", store.root).stdout
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    began = time.monotonic()
    last = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stdout + last.stderr
    assert time.monotonic() - began < 200
    (view,) = store.runs("twice")
    assert view.state is RunState.FINISHED
    steps = store.metrics("twice", view.key)["step"].tolist()
    assert steps == sorted(set(steps)), "no step is written twice"
    assert view.record["attempts"][0]["step"] == 0
    for process in psutil.process_iter():
        if str(home) in environment(process):
            process.kill()


def test_a_plainly_submitted_study_is_known_by_its_name(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    """`ray job submit` gives the job a name of its own: the driver writes it into the store."""
    steps = "tokens=4_000_000, context=64, batch_tokens=512"
    script = write_study(tmp_path / "plain.py", texts, name="plain", runs="sweep=grid(seed=[0])", base=steps)
    store = RunStore()
    job = submit(head, "python", script)
    wait_for(lambda: bool((owner := store.holder("plain")) and owner.job), job)
    assert (owner := store.holder("plain"))
    wait_for(lambda: any(store.run("plain", key).status.get("step") for key in store.present("plain")), job)
    assert haltscale("cancel", "nobody").returncode == 1
    stopped = haltscale("cancel", "plain")
    assert stopped.returncode == 0, stopped.stderr
    assert owner.job in stopped.stdout
    job.communicate()
    assert "1 to train" in haltscale("logs", "plain").stdout
    wait_for_end(store)


def wait_for_end(store: RunStore) -> None:
    """Until the stopped study's run is shown as what it is."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if {view.state for view in store.runs("plain")} <= {RunState.STALLED, RunState.PLANNED, RunState.FAILED}:
            return
        time.sleep(0.1)
    pytest.fail("a run whose process is gone is still shown as running")


def test_a_file_and_the_module_beside_it_are_submitted(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweeps"
    script = Path(write_study(folder / "mine.py", texts, name="mine", runs="sweep=grid(seed=SEEDS)"))
    script.write_text("from shared_seeds import SEEDS\n" + script.read_text())
    (folder / "shared_seeds.py").write_text("SEEDS = [3, 4]\n")
    variables = {"PYTHONPATH": str(folder)}
    done = haltscale("submit", str(script), "--", "--dry-run", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted mine as mine-" in done.stdout
    assert "2 runs: 2 planned" in done.stdout
    assert done.stdout.count("seed 4") == 1
    alone = haltscale("run", str(script), "--", "--dry-run", "--json", **variables)
    assert [row["state"] for row in json.loads(alone.stdout)["runs"]] == ["planned"] * 2


def test_sigterm_ends_a_study_like_ctrl_c(texts: Path, tmp_path: Path) -> None:
    """A job server, a container and a batch system stop a process so: what trained is kept, and the lease is free."""
    home, store = tmp_path / "home", RunStore(tmp_path / "runs")
    script = write_study(
        tmp_path / "ended.py", texts, name="ended", base="tokens=4_000_000, context=64, batch_tokens=512"
    )
    study = subprocess.Popen(
        [sys.executable, script, "--store", store.root],
        env={**os.environ, "HALTSCALE_HOME": str(home)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: any(store.run("ended", key).status.get("step") for key in store.present("ended")), study)
    study.terminate()
    output, _ = study.communicate()
    assert study.returncode == 143, output
    assert "interrupted" in output
    assert "Traceback" not in output
    assert (owner := store.holder("ended"))
    assert owner.is_released
    left = [process for process in psutil.process_iter() if str(home) in environment(process)]
    psutil.wait_procs(left, timeout=60)
    assert not [process.pid for process in psutil.process_iter() if str(home) in environment(process)]
    assert not drivers(script)
    assert BIN.is_dir()

"""Sweeps on a real cluster: killed again and again, interrupted, shipped to it, in two stages."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from toys import write_study, write_texts

from haltscale.platform import cluster
from haltscale.platform.arms import arm
from haltscale.platform.store import RunState, RunStore

from jobs import ROOT, drivers, environment, run, submit, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

BASE = "tokens=1024, context=32, batch_tokens=128, learning_rate=1e-2, precision='fp32'"
EXECUTION = "evaluations=1, checkpoints=2, log_every_seconds=0.0"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("sweep") / "sweep", documents=12, words=120)


def script(folder: Path, texts: Path, sweep: str, *, base: str = BASE, execution: str = EXECUTION) -> str:
    runs = f"sweep={sweep}"
    return write_study(folder / "sweep.py", texts, name="sweep", base=base, execution=execution, runs=runs)


def finished(store: RunStore) -> dict[str, float]:
    """When each finished run wrote its record."""
    views = store.views("sweep", store.present("sweep")).values()
    return {view.key: view.record["finished_at"] for view in views if view.state is RunState.FINISHED}


def table(store: RunStore) -> dict[str, list[object]]:
    """What the records of a sweep say, without times."""
    names = ("label", "loss", "tokens", "steps", "flops_realised", "flops_executed", "sequence_digest", "mean_steps")
    return {view.key: [view.record[name] for name in names] for view in store.runs("sweep")}


@pytest.mark.slow
def test_a_driver_killed_three_times_leaves_the_table_of_one_left_alone(
    head: cluster.Head, texts: Path, tmp_path: Path
) -> None:
    sweep = "grid(seed=range(12))"
    alone, killed = RunStore(tmp_path / "alone"), RunStore(tmp_path / "killed")
    path = script(tmp_path / "killed-script", texts, sweep)
    seen: dict[str, float] = {}
    for enough in (2, 5, 8):
        job = submit(head, "python", path, "--store", killed.root)
        wait_for(lambda enough=enough: len(finished(killed)) >= enough, job)
        for process in drivers(path):
            process.send_signal(signal.SIGKILL)
        assert job.wait() != 0
        job.communicate()
        now = finished(killed)
        assert len(now) < 12
        assert {key: now[key] for key in seen} == seen, "a finished run is not run again"
        seen = now
    code, output = run(head, "python", path, "--store", killed.root)
    assert code == 0, output
    last = finished(killed)
    assert {key: last[key] for key in seen} == seen
    for view in killed.runs("sweep"):
        steps = killed.metrics("sweep", view.key)["step"].tolist()
        assert steps == list(range(1, 9)), "every step once"
    code, output = run(head, "python", script(tmp_path / "alone-script", texts, sweep), "--store", alone.root)
    assert code == 0, output
    assert len(table(alone)) == 12
    assert table(killed) == table(alone)


@pytest.mark.slow
def test_an_interrupted_study_can_go_on_and_leaves_no_process(texts: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal, where the study had started a Ray of its own: everything of its group is signalled."""
    store, home = RunStore(tmp_path / "runs"), tmp_path / "home"
    path = script(tmp_path / "script", texts, "grid(seed=range(3), tokens=40960)")
    variables = {**os.environ, "HALTSCALE_HOME": str(home), "RAY_AUTH_MODE": "token"}
    study = subprocess.Popen(
        [sys.executable, path, "--store", store.root],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    while not any(view.state is RunState.RUNNING for view in store.views("sweep", store.present("sweep")).values()):
        assert study.poll() is None, study.communicate()[0]
        time.sleep(0.05)
    os.killpg(study.pid, signal.SIGINT)
    output, _ = study.communicate()
    assert study.returncode == 130, output.decode()
    assert b"interrupted" in output
    left = [p for p in psutil.process_iter() if str(home) in environment(p)]
    psutil.wait_procs(left, timeout=60)  # workers see that their Ray has gone
    assert not [p.pid for p in psutil.process_iter() if str(home) in environment(p)]


SHIPPED = '''"""Shipped: is this the code that I have here?"""
from haltscale.platform.api import RunConfig, Study, grid, sotu

def study():
    return Study(
        name="shipped", question="Is it?", corpus=sotu(), base=RunConfig(), sweep=grid(method="vanilla", seed=[7])
    )

if __name__ == "__main__":
    study().main()
'''


def test_submit_ships_the_code_that_is_here(head: cluster.Head, tmp_path: Path) -> None:
    """A study that only this copy of the code has is planned on the cluster."""
    for room in ("model", "platform", "studies", "dashboard"):
        shutil.copytree(ROOT / room, tmp_path / "haltscale" / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "haltscale" / "studies" / "shipped.py").write_text(SHIPPED)
    command = [sys.executable, "-m", "haltscale.platform.cli", "submit", "shipped", "--", "--dry-run"]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "NO_COLOR": "1"}
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shipped: the plan" in done.stdout
    assert "vanilla · 0.6m · seed 7" in done.stdout


def test_controls_are_trained_after_their_subject(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    learned = 'grid(method="adaptive", lam=1.0, tau=0.2)'
    sweep = f'{learned} + controls(of={learned}, kinds=["dense", "fixed"])'
    code, output = run(head, "python", script(tmp_path / "script", texts, sweep), "--store", store.root)
    assert code == 0, output
    assert "0 of 1 runs are finished, 1 to train, 2 controls wait for them" in output
    assert "1 of 3 runs are finished, 2 to train" in output
    records = {arm(view.record["identity"]): view.record for view in store.runs("sweep")}
    subject, control = records["adaptive"], records["adaptive/fixed"]
    assert control["tokens"] == subject["tokens"]
    assert control["sequence_digest"] == subject["sequence_digest"]
    assert control["passes_per_token"] == pytest.approx(subject["passes_per_token"], rel=0.02)
    assert control["mean_steps"] == pytest.approx(subject["mean_steps"], rel=0.05)
    spent = records["vanilla"]["flops_realised"]
    batch = spent / records["vanilla"]["steps"]
    assert abs(spent - subject["flops_realised"]) <= batch / 2 * 1.001, "the nearest number of whole batches"
    controls = store.study("sweep")["controls"]
    kinds = {arm(store.run("sweep", key).record["identity"]): control["kind"] for key, control in controls.items()}
    assert kinds == {"vanilla": "dense", "adaptive/fixed": "fixed"}


def test_arms_are_tuned_then_compared_then_controlled(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    base = "tokens=1024, context=32, batch_tokens=128, precision='fp32'"
    arms = "tuned(grid(method=['vanilla', 'adaptive']), over={'learning_rate': [1e-3, 2e-3]}, share=0.5, extensions=1)"
    sweep = f"{arms} + controls(of={arms}.where(lambda p: p['method'] == 'adaptive'), kinds=['dense', 'shuffled'])"
    path = script(tmp_path / "script", texts, sweep, base=base)
    code, output = run(head, "python", path, "--store", store.root)
    assert code == 0, output
    assert "0 of 4 runs are finished, 4 to train, 4 runs wait for them" in output
    tuning, compared = [], {}
    for view in store.runs("sweep"):
        assert view.state is RunState.FINISHED
        assert view.spec["role"] == view.record["role"]
        if view.record["role"] == "tuning":
            tuning.append(view)
        else:
            compared[arm(view.record["identity"])] = view.record
    assert {(view.record["tokens"], view.record["identity"]["seed"]) for view in tuning} == {(512, 100)}
    assert store.study("sweep")["tuning"] == [view.key for view in tuning]
    losses = {(v.record["identity"]["method"], v.record["identity"]["learning_rate"]): v.record["loss"] for v in tuning}
    assert len(losses) == 6, "this little training wants a higher rate: each axis grew by one"
    for name, source in {"vanilla": "tuned", "adaptive": "tuned", "adaptive/shuffled": "subject"}.items():
        method, recipe = name.partition("/")[0], compared[name]["recipe"]
        best = min((loss, rate) for (of, rate), loss in losses.items() if of == method)[1]
        assert compared[name]["identity"]["learning_rate"] == recipe["values"]["learning_rate"] == best
        assert recipe["source"] == source
        assert {row["learning_rate"]: row["loss"] for row in recipe["tried"]} == {
            rate: loss for (of, rate), loss in losses.items() if of == method
        }
    code, output = run(head, "python", path, "--store", store.root)
    assert code == 0, output
    assert "nothing to train" in output


@pytest.mark.slow
def test_bad_runs_of_a_tuning_study_are_ended_early(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    path = write_study(
        tmp_path / "tuning.py",
        texts,
        name="sweep",
        kind="TuningStudy",
        base="tokens=4096, context=32, batch_tokens=128, precision='fp32'",
        runs="space={'learning_rate': log_uniform(1e-6, 1e-2)}, samples=4, halving=Halving(first=0.25)",
        execution="evaluations=4, checkpoints=1, log_every_seconds=0.0",
    )
    code, output = run(head, "python", path, "--store", store.root)
    assert code == 0, output
    views = list(store.runs("sweep"))
    states = {view.key: view.state for view in views}
    assert set(states.values()) == {RunState.FINISHED, RunState.STOPPED}
    assert {view.spec["role"] for view in views} == {"tuning"}
    assert {view.record["role"] for view in views if view.record} == {"tuning"}
    for view in views:
        if view.state is RunState.STOPPED:
            assert 8 <= view.status["step"] < 32, "after a quarter of its steps, and before the end"
    code, output = run(head, "python", path, "--store", store.root)
    assert code == 0, output
    assert "nothing to train" in output
    assert {view.key: view.state for view in store.runs("sweep")} == states


@pytest.mark.slow
def test_a_sweep_on_object_storage(
    head: cluster.Head, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics, checkpoints, weights and records all go to a real S3 server, and nothing to a folder."""
    pytest.importorskip("s3fs", reason="needs haltscale[s3]")
    pytest.importorskip("moto.server")
    (port,) = cluster.free_ports(1)
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _answers(port):
            assert server.poll() is None
            time.sleep(0.1)
        store = RunStore("s3://bucket/runs")
        store.fs.mkdir("bucket")
        path = script(tmp_path / "script", texts, "grid(seed=range(2))")
        for expected in ("0 of 2 runs are finished, 2 to train", "all 2 runs are finished, nothing to train"):
            job = submit(head, "python", path, "--store", store.root, variables=variables)
            output, _ = job.communicate()
            assert job.returncode == 0, output
            assert expected in output
        for view in store.runs("sweep"):
            assert store.metrics("sweep", view.key)["step"].tolist() == list(range(1, 9))
            assert store.fs.exists(store.path("sweep", view.key, "model", "model.safetensors"))
            assert store.fs.ls(store.path("sweep", view.key, "checkpoints"))
    finally:
        server.terminate()
        server.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_three_budgets_from_one_run(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    tables = {}
    base = f"{BASE}, schedule='wsd', warmup_tokens=256, decay_fraction=0.5"
    for branch in (True, False):
        store = RunStore(tmp_path / f"branch-{branch}")
        sweep, execution = "grid(tokens=[1024, 1536, 2048])", f"{EXECUTION}, branch={branch}"
        path = script(tmp_path / "sweep", texts, sweep, base=base, execution=execution)
        code, output = run(head, "python", path, "--store", store.root)
        assert code == 0, output
        tables[branch] = table(store)
        runs = sorted(store.runs("sweep"), key=lambda view: view.record["tokens"])
        starts = [view.record["attempts"][0] for view in runs]
        assert [start["step"] for start in starts] == ([0, 5, 7] if branch else [0, 0, 0])
        parents = [(start.get("parent") or {}).get("key") for start in starts]
        assert parents == ([None, runs[0].key, runs[1].key] if branch else [None] * 3)
    assert tables[True] == tables[False], "to the last bit"

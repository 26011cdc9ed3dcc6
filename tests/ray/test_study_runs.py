"""Studies on a real cluster, submitted as a user submits them: run, run again, extend, kill, refuse."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from toys import write_study, write_texts

from haltscale.platform import cluster
from haltscale.platform.corpora.corpus import PreparedCorpus
from haltscale.platform.corpora.order import global_batches
from haltscale.platform.store import RunState, RunStore
from haltscale.platform.training.progress import Progress
from haltscale.studies import known_need

from jobs import command_line, drivers, run, submit, training_workers, wait_for
from looping import timeless

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("study") / "toy")


def toy(texts: Path, tmp_path: Path, *, seeds: list[int]) -> str:
    runs = f"sweep=grid(method='vanilla') + grid(method='adaptive', lam=1.0, tau=0.2, seed={seeds})"
    return write_study(tmp_path / "toy_study.py", texts, runs=runs)


def test_kill_resume_and_extend(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    store, script = RunStore(), toy(texts, tmp_path, seeds=[0, 1])

    def states() -> dict[str, RunState]:
        return {view.key: view.state for view in store.runs("toy")} if "toy" in store.studies() else {}

    # Half way: at least one run has its record, and another has begun.
    job = submit(head, "python", script)
    wait_for(lambda: {RunState.FINISHED, RunState.RUNNING} <= set(states().values()), job)
    for process in drivers(script):
        process.send_signal(signal.SIGKILL)
    assert job.wait() != 0
    job.communicate()
    before = {
        key: store.run("toy", key).record["finished_at"] for key, state in states().items() if state == "finished"
    }
    assert 1 <= len(before) < 3

    # Again: the missing ones only.
    code, output = run(head, "python", script)
    assert code == 0, output
    assert f"{len(before)} of 3 runs are finished, {3 - len(before)} to train" in output
    assert set(states().values()) == {RunState.FINISHED}
    for key, finished_at in before.items():
        assert store.run("toy", key).record["finished_at"] == finished_at
    for view in store.runs("toy"):
        steps = store.metrics("toy", view.key)["step"].tolist()
        assert steps == sorted(set(steps)), "a resumed run writes no step twice"
        assert steps[-1] == view.record["steps"] == 48
        assert view.record["tokens"] == 24576
        if view.record["identity"]["method"] == "adaptive":
            halting = view.record["halting"]
            assert halting["well_predicted_mean_steps"] < halting["badly_predicted_mean_steps"], halting
            assert halting["well_predicted_expected_steps"] < halting["badly_predicted_expected_steps"]
    digests: dict[int, set[str]] = {}
    for view in store.runs("toy"):
        digests.setdefault(view.record["identity"]["seed"], set()).add(view.record["sequence_digest"])
    assert all(len(seen) == 1 for seen in digests.values()), "a resumed run went on at the very next sequence"

    # One more value: only the new run.
    code, output = run(head, "python", toy(texts, tmp_path, seeds=[0, 1, 2]))
    assert code == 0, output
    assert "3 of 4 runs are finished, 1 to train" in output


def test_a_ray_of_its_own_is_set_like_a_head(tmp_path: Path) -> None:
    """`haltscale run` where no head is running: its workers must not poll every 2 s."""
    script = f"""
import os, ray
from haltscale.platform.ray_connection import connected
with connected():
    print(ray.get(ray.remote(lambda: {{name: os.environ.get(name) for name in {sorted(cluster.OWN_RAY)}}}).remote()))
"""
    variables = {**os.environ, "HALTSCALE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == cluster.OWN_RAY


@pytest.mark.slow
def test_a_run_survives_its_workers_death(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    script, store = write_study(tmp_path / "toy_worker.py", texts, name="toy-worker"), RunStore()

    def checkpointed() -> bool:
        views = list(store.runs("toy-worker")) if "toy-worker" in store.studies() else []
        return any((views[0].status.get("step") or 0) > 12 for _ in views)

    job = submit(head, "python", script)
    wait_for(checkpointed, job)
    killed = training_workers(head)
    assert killed, "no training worker was found"
    for process in killed:
        process.send_signal(signal.SIGKILL)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    (view,) = store.runs("toy-worker")
    steps = store.metrics("toy-worker", view.key)["step"].tolist()
    assert view.state is RunState.FINISHED
    assert steps == sorted(set(steps))
    assert steps[-1] == 48


def test_a_process_that_trains_run_after_run_is_killed(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    """The run that it was in goes on from its last checkpoint in another process; those before it stay as they are, and
    those after it are trained."""
    script = write_study(
        tmp_path / "toy_lane.py",
        texts,
        name="toy-lane",
        runs="sweep=grid(method='vanilla', seed=[0, 1, 2])",
        execution="evaluations=1, checkpoints=48, log_every_seconds=0.0, cpus_per_worker=2",  # one run at a time
    )
    store = RunStore()

    def states() -> list[RunState]:
        return [view.state for view in store.runs("toy-lane")] if "toy-lane" in store.studies() else []

    def is_in_its_second_run() -> bool:
        running = [view for view in store.runs("toy-lane") if view.state is RunState.RUNNING] if states() else []
        return RunState.FINISHED in states() and any((view.status.get("step") or 0) >= 12 for view in running)

    job = submit(head, "python", script)
    wait_for(lambda: RunState.RUNNING in states() and bool(training_workers(head)), job)
    (first,) = training_workers(head)
    wait_for(is_in_its_second_run, job)
    (killed,) = training_workers(head)
    assert killed.pid == first.pid, "one process trains run after run"
    before = {view.key: view.record["finished_at"] for view in store.runs("toy-lane") if view.state == "finished"}
    killed.send_signal(signal.SIGKILL)
    output, _ = job.communicate()
    assert job.returncode == 0, output

    assert states() == [RunState.FINISHED] * 3
    attempts = {view.key: [attempt["step"] for attempt in view.record["attempts"]] for view in store.runs("toy-lane")}
    assert sorted(map(len, attempts.values())) == [1, 1, 2]
    for key, steps in attempts.items():
        assert steps[0] == 0
        assert len(steps) == 1 or 11 <= steps[1] < 48, "it goes on from the newest of a checkpoint for every step"
        assert store.metrics("toy-lane", key)["step"].tolist()[-1] == 48
        assert store.metrics("toy-lane", key)["step"].is_unique
    for key, finished_at in before.items():
        assert store.run("toy-lane", key).record["finished_at"] == finished_at


@pytest.mark.slow
def test_a_budget_in_flops_ends_a_run(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    """How many steps it buys is open when the run is submitted; a worker that dies meanwhile changes nothing."""
    budget, rows, records = 1.5e11, [], []
    script = write_study(tmp_path / "toy_flops.py", texts, name="toy-flops")
    for name in ("alone", "killed"):
        store = RunStore(tmp_path / name)

        def logged(store: RunStore = store) -> list[dict[str, Any]]:
            keys = store.present("toy-flops") if "toy-flops" in store.studies() else []
            return [row for key in keys for row in store.read_lines(store.path("toy-flops", key, "metrics.jsonl"))]

        options = ["--store", store.root, "--set", f"flops={budget}", "--set", "precision=fp32"]
        job = submit(head, "python", script, *options)
        if name == "killed":
            wait_for(lambda logged=logged: any(row["flops_realised"] > budget / 2 for row in logged()), job)
            for process in training_workers(head):
                process.send_signal(signal.SIGKILL)
        output, _ = job.communicate()
        assert job.returncode == 0, output
        (view,) = store.runs("toy-flops")
        rows.append(timeless(logged()))
        records.append(view.record)
    alone, killed = records
    assert rows[0] == rows[1], "to the last bit"
    assert [row["flops_realised"] >= budget for row in rows[0]] == [False] * (len(rows[0]) - 1) + [True]
    for record in records:
        assert record["flops_overshoot"] == record["flops_realised"] - budget >= 0
        assert record["steps"] == rows[0][-1]["step"]
    assert (len(alone["attempts"]), len(killed["attempts"])) == (1, 2)


def test_all_errors_at_once_and_nothing_starts(head: cluster.Head, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    script = write_study(
        tmp_path / "bad.py",
        tmp_path / "empty",
        name="bad",
        runs="sweep=grid(method='adaptive', lam=-1.0, l_max=-2, size='0.7m')",
        execution="workers=64",
    )
    code, output = run(head, "python", script)
    assert code != 0
    for complaint in ("lam", "l_max", "'0.7m'", "did you mean", "no *.txt", "64 workers"):
        assert complaint in output, output
    assert not Path(RunStore().path("bad")).exists()


def test_quickstart_leaves_what_it_promises(quickstart: str) -> None:
    store = RunStore()
    views = list(store.runs("quickstart"))
    assert [view.state for view in views] == [RunState.FINISHED] * 5
    assert "one or two latent steps by construction" in quickstart
    assert "rank" in quickstart
    assert "haltscale dashboard" in quickstart
    promised = {
        *("tokens", "passes_per_token", "flops_realised", "flops_paper", "wall_seconds", "tokens_per_second"),
        *("versions", "git_commit", "loss", "perplexity", "bits_per_byte", "mean_steps", "steps_histogram", "need"),
    }
    for view in views:
        assert promised <= set(view.record)
        steps = view.record["steps"]
        assert view.record["tokens"] == steps * known_need.BASE.batch_tokens
        assert view.record["versions"]["torch"]
        assert sum(view.record["steps_histogram"]) == pytest.approx(1)
        assert Path(store.path("quickstart", view.key, "model", "model.safetensors")).exists()
        assert list(Path(store.path("quickstart", view.key, "checkpoints")).glob("step-*"))
        evaluations = store.evaluations("quickstart", view.key)
        assert evaluations["step"].tolist() == [steps] == store.probe_steps("quickstart", view.key)
        assert store.halting_steps("quickstart", view.key) == [steps]
        assert store.halting_cube("quickstart", view.key, steps)["tokens"].sum() == view.record["tokens_evaluated"]
        probe = store.probe("quickstart", view.key, steps)
        assert (probe["exit"].map(sum) - 1).abs().max() < 1e-3
        assert {row["need"] for row in view.record["need"]["by_need"]} == {None, 0, 1, 2}
        adaptive = view.record["identity"]["method"] == "adaptive"
        assert (view.record["passes_per_token"] > 1) is adaptive


def test_every_run_saw_the_same_sequences_in_the_same_order(quickstart: str) -> None:
    store = RunStore()
    records = [view.record for view in store.runs("quickstart")]
    corpus = PreparedCorpus.open(known_need.study().corpus.cache(known_need.LOOKUPS.length))
    assert corpus is not None
    for steps in {record["steps"] for record in records}:
        expected = Progress()
        for ids in global_batches(seed=0, mixture=corpus.mixture, batch=known_need.BATCH, first_step=0, steps=steps):
            expected.saw(ids)
        assert {r["sequence_digest"] for r in records if r["steps"] == steps} == {expected.sequence_digest}


def test_no_process_outlives_its_job(head: cluster.Head, quickstart: str) -> None:
    client = cluster.client(head)
    submitted = [job.submission_id for job in client.list_jobs() if job.submission_id]  # not this process itself
    assert submitted
    while not all(client.get_job_status(job).is_terminal() for job in submitted):  # a status follows the output
        time.sleep(0.1)
    assert not [process.pid for process in training_workers(head)]


@pytest.mark.slow
def test_two_workers_see_the_sequences_of_one(head: cluster.Head, texts: Path, tmp_path: Path) -> None:
    runs = "sweep=grid(method='adaptive', lam=1.0, tau=0.3)"
    script = write_study(tmp_path / "toy_workers.py", texts, name="toy-two", runs=runs)
    records = []
    for workers in (1, 2):
        store = RunStore(tmp_path / f"{workers}-workers")
        options = ["--store", store.root, "--set", f"workers={workers}", "--set", "tokens=8192"]
        code, output = run(head, "python", script, *options)
        assert code == 0, output
        (view,) = store.runs("toy-two")
        records.append(view.record)
    one, two = records
    for same in ("key", "sequence_digest", "tokens", "steps"):
        assert one[same] == two[same]
    assert one["loss"] == pytest.approx(two["loss"], rel=0.02)  # bf16, summed in another order
    assert one["flops_realised"] == pytest.approx(two["flops_realised"], rel=0.1)


def listening(head: cluster.Head) -> set[tuple[str, str]]:
    """The addresses on which the head's processes and all their children listen, with what is on their command line."""
    mine = [p for p in psutil.process_iter() if head.temp_dir in command_line(p) or head.gcs in command_line(p)]
    family = {process.pid: process for parent in mine for process in [parent, *parent.children(recursive=True)]}
    return {
        (c.laddr.ip.removeprefix("::ffff:"), command_line(process)[:60])
        for process in family.values()
        for c in connections(process)
        if c.status == psutil.CONN_LISTEN
    }


def connections(process: psutil.Process) -> list[Any]:
    try:
        return list(process.net_connections("inet"))
    except psutil.NoSuchProcess:
        return []


def test_everything_listens_on_loopback_only(head: cluster.Head) -> None:
    found = listening(head)
    assert len(found) >= 3
    assert {address for address, _ in found} <= {"127.0.0.1", "::1"}


def test_workers_that_train_together_listen_on_loopback_only(head: cluster.Head, tmp_path: Path) -> None:
    """PyTorch's rendezvous among them, which has no password."""
    toy = write_study(
        tmp_path / "pair.py",
        write_texts(tmp_path / "texts"),
        name="pair",
        execution="workers=2, evaluations=1, checkpoints=1, log_every_seconds=0.0",
    )
    store = RunStore(tmp_path / "runs")
    job = submit(head, "python", toy, "--store", store.root)
    seen: set[tuple[str, str]] = set()

    def trains() -> bool:
        seen.update(listening(head))
        keys = store.run_keys("pair") if "pair" in store.studies() else []
        return any(store.read_lines(store.path("pair", key, "metrics.jsonl")) for key in keys)

    wait_for(trains, job)
    seen.update(listening(head))
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert any("RayTrainWorker" in command for _, command in seen)
    assert {address for address, _ in seen} <= {"127.0.0.1", "::1"}

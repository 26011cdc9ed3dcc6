"""The command ``haltscale``: what it prints, and its exit codes. No cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from haltscale.platform import cli, cluster
from haltscale.platform.load_study import load_study
from haltscale.platform.sweeps.study import Study


def run(*arguments: str) -> int:
    """The exit code; a sentence for the user counts as 1, as Python does."""
    try:
        cli.main(arguments)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)  # noqa: T201
            return 1
        return stop.code or 0
    return 0


@pytest.fixture
def states(author) -> list[str]:
    return author.every_state()


def test_help_names_every_verb(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    for verb in cli.EXAMPLES:
        assert f"\n    {verb} " in out.replace("\n", " \n")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["run"], ["results"], ["status", "--nonsense"]])
def test_a_command_that_is_none_is_refused(arguments, capsys):
    assert run(*arguments) == 2
    assert "usage: haltscale" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["run", "submit"])
@pytest.mark.parametrize("name", ["no-such-study", "../quickstart", "quickstart.py", "__init__", ""])
def test_an_unknown_study_is_refused_with_those_there_are(verb, name, capsys):
    assert run(verb, name) == 1
    err = capsys.readouterr().err
    assert f"error: no study {name!r}" in err
    assert "quickstart" in err


def test_status_as_json(store, states, capsys):
    assert run("status", "--json", "--store", store.root) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == 1
    rows = printed["runs"]
    assert [row["key"] for row in rows] == states
    assert [row["state"] for row in rows] == states  # stalled, where the run itself still says running
    assert {row["study"] for row in rows} == {"quick"}
    assert rows[1]["step"] == 5
    assert rows[3]["error"] == "TrainingDivergedError: the loss is nan at step 1"


def test_status_for_the_eye(store, states, capsys):
    assert run("status", "quick", "--store", store.root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "quick"
    assert [line.split()[0] for line in lines[1:]] == states
    assert "5/10 loss 4.50 steps 2.00" in lines[2]
    assert "the loss is nan" in lines[4]


def test_status_of_an_empty_store(store, capsys):
    assert run("status", "--store", store.root) == 0
    assert "haltscale submit quickstart" in capsys.readouterr().out
    assert run("status", "--json", "--store", store.root) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "runs": []}


def test_the_store_of_the_environment(store, states, monkeypatch, capsys):
    monkeypatch.setenv("HALTSCALE_STORE", store.root)
    assert run("status") == 0
    assert "adaptive running" in capsys.readouterr().out


def test_results_as_json(store, states, capsys):
    assert run("results", "quick", "--json", "--store", store.root) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == 1
    rows = printed["runs"]
    assert [row["key"] for row in rows] == states
    assert [row["loss"] for row in rows] == [4.25, None, None, None, None]
    assert rows[3]["error"] == "TrainingDivergedError: the loss is nan at step 1"


def test_results_for_the_eye(store, states, capsys):
    assert run("results", "quick", "--store", store.root) == 0
    out = capsys.readouterr().out
    assert "4.25" in out
    assert "adaptive failed: TrainingDivergedError" in out


@pytest.mark.parametrize("verb", ["status", "results"])
def test_a_study_that_is_not_in_the_store(verb, store, states, capsys):
    assert run(verb, "slow", "--store", store.root) == 1
    err = capsys.readouterr().err
    assert "no study 'slow'" in err
    assert "quick" in err


@pytest.mark.parametrize("verb", ["status", "results"])
def test_a_damaged_study_ends_with_a_sentence(verb, store, states, capsys):
    Path(store.path("quick", None, "study.json")).write_text("{")
    assert run(verb, "quick", "--store", store.root) == 1
    assert "study.json is damaged" in capsys.readouterr().err


def test_a_study_gets_its_own_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr(Study, "plan", lambda self, store: seen.append((self.name, self.base.tokens)))
    monkeypatch.setattr("haltscale.platform.sweeps.report.show_plan", lambda plan, **how: seen.append(how["as_json"]))
    assert run("run", "quickstart", "--", "--dry-run", "--json", "--set", "tokens=5") == 0
    assert seen == [("quickstart", 5), True]


SCRIPT = """
from haltscale.platform.api import RunConfig, Study, grid
from {corpus} import corpus
Study(name="mine", question="Is it?", corpus=corpus(), base=RunConfig(), sweep=grid(seed=[1, 2])).main()
raise SystemExit("a captured script ends where it would begin to run")
"""


def test_a_file_and_a_module_are_as_good_as_what_ships(tmp_path, monkeypatch):
    (tmp_path / "texts.py").write_text("from haltscale.platform.api import sotu as corpus\n")
    (tmp_path / "mine.py").write_text(SCRIPT.format(corpus="texts"))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "sweeps.py").write_text(SCRIPT.format(corpus="texts"))
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_study(str(tmp_path / "mine.py"))
    assert (loaded.study.name, loaded.study.source) == ("mine", "mine.py")
    assert loaded.entrypoint == ("python", "mine.py")
    assert [file.name for file in loaded.files] == ["mine.py", "texts.py"]
    loaded = load_study("package.sweeps")
    assert (loaded.study.name, loaded.study.source) == ("mine", "package.sweeps")
    assert loaded.entrypoint == ("python", "-m", "package.sweeps")
    assert loaded.files == (tmp_path / "package",)
    loaded = load_study("haltscale.studies.quickstart")
    assert loaded.study.name == "quickstart"
    assert loaded.files == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [("x = 1\n", "defines no study"), ("raise ValueError('no text here')\n", "no text here")],
)
def test_a_file_without_a_study_is_refused(tmp_path, capsys, content, message):
    (tmp_path / "mine.py").write_text(content)
    assert run("submit", str(tmp_path / "mine.py")) == 1
    assert message in capsys.readouterr().err


def test_submitting_without_a_head_says_how_to_start_one(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "prepare_client", lambda: None)
    monkeypatch.setattr(cluster, "find_head", lambda: None)
    assert run("submit", "quickstart") == 1
    assert "haltscale up" in capsys.readouterr().err


@pytest.fixture
def head(monkeypatch):
    """A head that takes jobs and a job that ends with the code the test says; both in this process."""
    submitted: list[tuple[str, list[str], tuple[Path, ...]]] = []
    monkeypatch.setattr(cluster, "prepare_client", lambda: None)
    monkeypatch.setattr(cluster, "find_head", lambda: cluster.Head(dashboard="http://127.0.0.1:1"))
    monkeypatch.setattr(cluster, "client", lambda head: None)
    monkeypatch.setattr(cluster, "running_job", lambda client, study, owner: None)

    def submit(client, entrypoint, study, files):
        submitted.append((study, entrypoint, files))
        return "job-1"

    monkeypatch.setattr(cluster, "submit_study", submit)
    monkeypatch.setattr(cluster, "follow", lambda client, job: {"job-1": 1, "job-0": 0}[job])
    return submitted


def test_the_exit_code_of_a_submission_is_the_jobs(head, capsys):
    assert run("submit", "quickstart", "--", "--dry-run") == 1
    assert head == [("quickstart", ["python", "-m", "haltscale.studies.quickstart", "--dry-run"], ())]
    assert "job-1" in capsys.readouterr().out
    assert run("submit", "quickstart", "--no-follow") == 0


def test_a_study_that_is_running_is_followed_and_not_started_again(head, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "running_job", lambda client, study, owner: "job-0")
    assert run("submit", "quickstart") == 0
    assert head == []
    assert "is already running as job-0" in capsys.readouterr().out


def test_an_interrupted_follower_leaves_the_job_alone(head, monkeypatch, capsys):
    def interrupted(client, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "follow", interrupted)
    assert run("submit", "quickstart") == 130
    assert "haltscale cancel quickstart" in capsys.readouterr().out


HANDED_ON = ("dashboard", "report", "figures")
"""Verbs that become another program, help and all; their help: tests/dashboard/test_launch.py."""


@pytest.mark.parametrize("verb", [verb for verb in cli.EXAMPLES if verb not in HANDED_ON])
def test_every_verb_has_help_with_an_example_that_parses(verb, capsys, monkeypatch):
    assert run(verb, "--help") == 0
    assert f"example: {cli.EXAMPLES[verb]}" in " ".join(capsys.readouterr().out.split())
    seen = []
    monkeypatch.setattr(cli, "_dispatch", lambda options: seen.append(options.verb))
    assert run(*cli.EXAMPLES[verb].split()[1:]) == 0
    assert seen == [verb]


def test_a_submission_as_json(head, capsys):
    assert run("submit", "quickstart", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"study": "quickstart", "job": "job-1", "address": "http://127.0.0.1:1", "was_running": False}


def test_logs_are_those_of_the_last_job(head, monkeypatch, capsys):
    class Client:
        def get_job_logs(self, job):
            return f"what {job} said\n"

    monkeypatch.setattr(cluster, "client", lambda head: Client())
    monkeypatch.setattr(cluster, "latest_job", lambda client, study, owner: "job-1" if study == "quickstart" else None)
    assert run("logs", "quickstart") == 0
    assert capsys.readouterr().out == "what job-1 said\n"
    assert run("logs", "quickstart", "--follow") == 1, "as the job ended"
    assert run("logs", "other") == 1
    assert "no job of study 'other'" in capsys.readouterr().err


def test_only_a_running_study_is_cancelled(head, monkeypatch, capsys):
    stopped = []
    monkeypatch.setattr(cluster, "cancel", lambda client, job: stopped.append(job))
    assert run("cancel", "quickstart") == 1
    assert "no job at http://127.0.0.1:1 is running" in capsys.readouterr().err
    monkeypatch.setattr(cluster, "running_job", lambda client, study, owner: "job-0")
    assert run("cancel", "quickstart") == 0
    assert stopped == ["job-0"]


def test_a_plan_as_json_leaves_stdout_to_it(study, store, capsys):
    study().main(["--dry-run", "--json", "--store", store.root])
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [row["state"] for row in rows] == ["planned"] * 3
    assert {"run", "key", "state", "tokens", "flops_expected", "flops_bound", "memory_bytes", "seconds"} <= set(rows[0])


def test_the_code_is_staged_as_it_stands():
    with cluster.staged_code() as code:
        assert code.name == "haltscale"
        assert (code / "platform" / "store.py").read_text() == Path(cluster.__file__).with_name("store.py").read_text()
        assert {path.name for path in code.iterdir()} == {"model", "platform", "studies", "dashboard"}
        assert not list(code.rglob("__pycache__"))
        command = [sys.executable, "-c", "import haltscale.studies.quickstart as q; print(q.__file__)"]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(code.parent)}, capture_output=True, text=True
        )
        assert done.stdout.strip() == str(code / "studies" / "quickstart.py"), done.stderr
    assert not code.exists()


def test_down_with_nothing_to_stop(capsys):
    assert run("down") == 0
    assert "no local Ray head" in capsys.readouterr().out


def test_the_installed_command_exits_with_1_on_an_error(home):
    command = [str(Path(sys.executable).with_name("haltscale")), "results", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no study 'nothing'")
    assert "Traceback" not in done.stderr

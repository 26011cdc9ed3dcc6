"""Each weight's own rate: what DeepSpeed steps at any stage is what PyTorch's AdamW would, and follows the schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from haltscale.model import Parametrisation, build_model, parameter_scales
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.schedule import learning_rate
from haltscale.platform.training.engine import full_weights
from haltscale.platform.training.parameter_groups import RATE_SCALE, parameter_groups, set_rate
from haltscale.platform.training.progress import Progress

from looping import RUN, RUNS, VOCABULARY, batches, engine_of, go

WIDE = replace(RUNS["adaptive"], size="3x128", parametrisation=Parametrisation.COMPLETEP, weight_decay=0.3, clip=1e9)


def plainly_trained(run: RunConfig) -> dict[str, torch.Tensor]:
    """By PyTorch alone, one group a weight, by the table of parametrisation.py."""
    model = build_model(run.model_config(VOCABULARY), seed=run.seed)
    scales = parameter_scales(model)
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "eps": 1e-8 * scales[n].epsilon} for n, p in model.named_parameters()],
        betas=(run.adam_beta1, run.adam_beta2),
    )
    progress = Progress()
    for batch in batches(run):
        rate = learning_rate(run, progress.spent, progress.expected(run, model))
        for name, group in zip(names, optimizer.param_groups, strict=True):
            group["lr"] = rate * scales[name].rate
            decays = model.get_parameter(name).ndim >= 2
            group["weight_decay"] = run.weight_decay / scales[name].rate if decays else 0.0
        tokens = torch.as_tensor(batch.tokens)
        optimizer.zero_grad()
        model.set_budget_share(progress.step / run.steps)
        output = model(tokens[:, :-1], tokens[:, 1:])
        output.loss.backward()
        optimizer.step()
        progress.step += 1
        progress.spend(model.flops(output.trace.counts).training, sum(output.trace.counts.rows), run.batch_tokens)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    return plainly_trained(WIDE)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_stage_trains_each_weight_at_its_own_rate(zero_stage, plain):
    engine = engine_of(WIDE, zero_stage=zero_stage)
    go(engine, WIDE, batches(WIDE), zero_stage=zero_stage)
    found = full_weights(engine)
    for name, expected in plain.items():
        assert torch.allclose(found[name], expected, atol=1e-6), name
    standard = engine_of(replace(WIDE, parametrisation=Parametrisation.STANDARD), zero_stage=zero_stage)
    assert {group["lr"] for group in standard.optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_rates_keep_their_ratios_in_half_precision_too(zero_stage):
    run = replace(WIDE, precision=Precision.BF16, tokens=2 * WIDE.batch_tokens)
    engine = engine_of(run, zero_stage=zero_stage)
    _, listener = go(engine, run, batches(run), zero_stage=zero_stage)
    rate = listener.rows[-1]["learning_rate"]
    assert rate > 0
    for groups in (engine.optimizer.param_groups, engine.basic_optimizer.param_groups):
        assert [group["lr"] for group in groups] == [rate * group[RATE_SCALE] for group in groups]
    assert len({group["lr"] for group in engine.optimizer.param_groups}) > 3


def test_the_standard_parametrisation_has_the_two_groups_it_always_had():
    model = build_model(RUN.model_config(VOCABULARY), seed=0)
    decayed, others = parameter_groups(model, RUN)
    assert [id(p) for p in decayed["params"]] == [id(p) for p in model.parameters() if p.ndim >= 2]
    assert [id(p) for p in others["params"]] == [id(p) for p in model.parameters() if p.ndim < 2]
    assert (decayed["weight_decay"], others["weight_decay"]) == (RUN.weight_decay, 0.0)
    assert {group["eps"] for group in (decayed, others)} == {1e-8}, "PyTorch's own default"
    set_rate([decayed, others], 0.5)
    assert decayed["lr"] == others["lr"] == 0.5


def test_the_parametrisation_is_in_the_key_where_it_is_not_standard():
    keys = {str(p): replace(RUN, parametrisation=p).key("a", "b") for p in Parametrisation}
    assert len(set(keys.values())) == 3
    identity = RUN.identity("a", "b")
    older = {name: value for name, value in identity.items() if name != "parametrisation"}
    from haltscale.platform.config import run_key

    assert run_key(older) == keys["standard"], "runs from before there was a choice keep their keys"
    assert RunConfig.from_identity(older).parametrisation is Parametrisation.STANDARD

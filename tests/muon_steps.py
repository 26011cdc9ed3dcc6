"""Where Muon's steps lead, through DeepSpeed, against full matrices in one plain process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradients
import torch

from haltscale.model.language_model import IGNORE_INDEX
from haltscale.platform.config import Optimizer, Precision, RunConfig
from haltscale.platform.training import engine as engines
from haltscale.platform.training.loop import step_seed

BOUND = 2e-3
"""Of the relative distance of two movements: the iteration multiplies what is rounded in the smallest directions."""


def run_of(case: str) -> RunConfig:
    return replace(
        gradients.run_of(case, Precision.FP32),
        optimizer=Optimizer.MUON,
        learning_rate=1e-2,
        warmup_fraction=0.0,
        weight_decay=0.3,
        muon_rate=1.7,
        muon_momentum=0.8,
    )


def polar(x: Any) -> Any:
    """Muon's published iteration, as it is written."""
    wide = x / x.norm()
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide


def parts(name: str, weight: Any, *, heads: int, kv_heads: int) -> list[Any]:
    """The matrices in one weight, views; none where AdamW steps it."""
    if ".blocks." not in f".{name}" or weight.ndim < 2:
        return []
    if "qkv" in name:
        unit = weight.shape[0] // (heads + 2 * kv_heads)
        return list(weight.split([heads * unit, kv_heads * unit, kv_heads * unit]))
    return list(weight.chunk(2)) if "gate_up" in name else [weight]


def plain(case: str, rates: list[float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights before and after the two steps, in one process and in one piece."""
    run, model = run_of(case), gradients.model_of(case).train()
    weights = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    sizes = {"heads": model.config.shape.heads, "kv_heads": model.config.shape.kv_heads}
    by_adam = {name: weight for name, weight in weights.items() if not parts(name, weight, **sizes)}
    decays = [weight for weight in by_adam.values() if weight.ndim >= 2]
    rest = [weight for weight in by_adam.values() if weight.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": decays, "weight_decay": run.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        betas=(run.adam_beta1, run.adam_beta2),
    )
    momenta = {name: torch.zeros_like(weight) for name, weight in weights.items() if name not in by_adam}
    for step, rate in enumerate(rates):
        model.begin_step(step_seed(run.seed, step))
        rows = torch.as_tensor(gradients.rows_of(step))
        lengths_B = (rows[:, 1:] != IGNORE_INDEX).sum(1)
        model.zero_grad()
        model(rows[:, :-1].clamp(min=0), rows[:, 1:], lengths_B=lengths_B).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        with torch.no_grad():
            for name, momentum in momenta.items():
                beta, gradient = run.muon_momentum, weights[name].grad
                momentum.mul_(beta).add_((1 - beta) * gradient)
                looked_ahead = beta * momentum + (1 - beta) * gradient
                weights[name].mul_(1 - rate * run.muon_rate * run.weight_decay)
                for weight, update in zip(
                    parts(name, weights[name], **sizes), parts(name, looked_ahead, **sizes), strict=True
                ):
                    size = 0.2 * max(weight.shape) ** 0.5
                    weight.sub_(rate * run.muon_rate * size * polar(update))
    return before, {name: weight.detach() for name, weight in weights.items()}


def through_deepspeed(case: str, *, pieces: int, zero_stage: int, rank: int = 0, world: int = 1) -> dict[str, float]:
    """By fragment of this rank: how far its movement in both steps is from the plain one."""
    engine, listener = gradients.trained(
        gradients.model_of(case), run_of(case), pieces=pieces, zero_stage=zero_stage, rank=rank, world=world
    )
    before, after = plain(case, [row["learning_rate"] for row in listener.rows])
    errors = {}
    for fragment in engines.fragments(engine):
        here = slice(fragment.start, fragment.start + fragment.numel)
        old, right = (weights[fragment.parameter].flatten()[here] for weights in (before, after))
        found = fragment.of(fragment.stepped) - old
        errors[f"{fragment.parameter} from {fragment.start}"] = gradients.unlike(found, right - old)
    return errors


def check(errors: dict[str, float]) -> None:
    assert len(errors) > 3
    assert not {name: error for name, error in errors.items() if not error < BOUND}

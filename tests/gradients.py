"""Gradients that the optimizer was given, through DeepSpeed, against plain PyTorch in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from haltscale.model import LanguageModel, Method, ModelConfig, Shape, build_model
from haltscale.model.language_model import IGNORE_INDEX
from haltscale.model.mor import MorOptions, Routing
from haltscale.model.registry import METHODS
from haltscale.platform.config import Optimizer, Precision, RunConfig
from haltscale.platform.corpora.order import rank_share
from haltscale.platform.training import engine as engines
from haltscale.platform.training.loop import step_seed, train
from haltscale.platform.training.progress import Progress

from looping import Batch, Listener, execution_of

ROWS, CONTEXT, VOCABULARY = 32, 12, 61
TWO_STEPS = 2
CASES: dict[str, tuple[Method, Any]] = {str(method): (method, entry.options()) for method, entry in METHODS.items()}
CASES["mor, token choice"] = (Method.MOR, MorOptions(routing=Routing.TOKEN_CHOICE, balance_weight=0.3))
PIECES = (1, 4, 16)
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


def run_of(case: str, precision: Precision) -> RunConfig:
    """Two steps that leave the weights as they are, so that the moments hold the gradients of both."""
    method, options = CASES[case]
    batch = ROWS * CONTEXT
    run = RunConfig(method=method, options=options, tokens=TWO_STEPS * batch, context=CONTEXT, batch_tokens=batch)
    return replace(run, precision=precision, learning_rate=0.0, clip=0.5)


def model_of(case: str) -> LanguageModel:
    """Its routers have random weights: with those it starts with, all tokens would think alike."""
    method, options = CASES[case]
    shape = Shape(layers=3, d=16, heads=2, kv_heads=2, ffn=24)
    config = ModelConfig(method=method, shape=shape, vocab_size=VOCABULARY, context=CONTEXT, options=options)
    model = build_model(config, seed=0)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name and name.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=stream))
    return model


def rows_of(step: int) -> Any:
    """A batch whose rows end at different places."""
    stream = np.random.default_rng(step)
    rows = stream.integers(0, VOCABULARY, (ROWS, CONTEXT + 1))
    for row, length in zip(rows, stream.integers(1, CONTEXT + 1, ROWS), strict=True):
        row[length + 1 :] = IGNORE_INDEX
    return rows


def share_of(rows: Any, rank: int, world: int) -> Any:
    return rows[rank_share(np.arange(len(rows))[None], rank=rank, world=world)[0]]


def plain(
    case: str, precision: Precision, *, pieces: int = 1, world: int = 1, device: torch.device | str = "cpu"
) -> tuple[dict[str, torch.Tensor], float]:
    """Means of the gradients as AdamW keeps them after both steps, and the norm of the last gradient: all pieces of all
    ranks one after the other, added up in float32."""
    run, model = run_of(case, precision), model_of(case).to(device, DTYPES[precision]).train()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    first: dict[str, torch.Tensor] = {}
    norm = 0.0
    for step in range(TWO_STEPS):
        model.begin_step(step_seed(run.seed, step))
        rows = torch.as_tensor(rows_of(step)).to(device)
        scored = int((rows[:, 1:] != IGNORE_INDEX).sum())
        sums = {name: torch.zeros(parameter.shape, device=device) for name, parameter in model.named_parameters()}
        for rank in range(world):
            for piece in torch.as_tensor(share_of(rows.cpu().numpy(), rank, world)).to(device).chunk(pieces):
                lengths_B = (piece[:, 1:] != IGNORE_INDEX).sum(1)
                output = model(piece[:, :-1].clamp(min=0), piece[:, 1:], lengths_B=lengths_B)
                (output.loss * (int(lengths_B.sum()) / scored)).backward()
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        sums[name] += parameter.grad.float()
                model.zero_grad()
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in sums.values()))
        scale = min(1.0, run.clip / norm)
        for name, gradient in sums.items():
            fresh = (1 - run.adam_beta1) * scale * gradient
            first[name] = run.adam_beta1 * first[name] + fresh if step else fresh
    return first, norm


def unlike(found: torch.Tensor, right: torch.Tensor) -> float:
    """The distance of two tensors, relative to the right one."""
    return float((found - right).norm() / right.norm()) if right.any() else float(found.norm())


def through_deepspeed(
    case: str,
    precision: Precision,
    *,
    pieces: int,
    zero_stage: int,
    optimizer: Optimizer = Optimizer.ADAMW,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """How far what this rank's optimizer was given is from :func:`plain`: by parameter, and of the norm."""
    run = run_of(case, precision)
    run = replace(run, optimizer=optimizer, muon_momentum=run.adam_beta1)  # then both keep the same mean
    engine, listener = trained(model_of(case), run, pieces=pieces, zero_stage=zero_stage, rank=rank, world=world)
    right, norm = plain(case, precision, pieces=pieces, world=world, device=device)
    told = listener.rows[-1]["grad_norm"]
    errors = {} if told is None else {"norm": abs(told / norm - 1)}
    kinds = set()
    for fragment in engines.fragments(engine):
        state = engine.basic_optimizer.state[fragment.stepped]
        (kind,) = {"exp_avg", "momentum_buffer"} & set(state)
        kinds.add(kind)
        wanted = right[fragment.parameter].flatten()[fragment.start : fragment.start + fragment.numel]
        errors[f"{fragment.parameter} from {fragment.start}"] = unlike(fragment.of(state[kind]), wanted)
    assert optimizer is Optimizer.MUON or kinds == {"exp_avg"}
    return errors


def trained(
    model: LanguageModel, run: RunConfig, *, pieces: int, zero_stage: int, rank: int = 0, world: int = 1
) -> tuple[Any, Listener]:
    """The engine after the two steps. At stage 3 every parameter is cut, however small."""
    micro_batch = ROWS // world // pieces
    execution = execution_of(run, zero_stage=zero_stage, workers=world, micro_batch_sequences=micro_batch)
    zero = engines._zero

    def sharded(*arguments: Any) -> dict[str, Any]:
        return zero(*arguments) | {"stage3_param_persistence_threshold": 0}  # or DeepSpeed keeps small ones whole

    engines._zero = sharded
    try:
        engine = engines.build_engine(model, run, execution)
    finally:
        engines._zero = zero

    def batches() -> Iterator[Batch]:
        for step in range(TWO_STEPS):
            yield Batch(step, np.arange(ROWS), share_of(rows_of(step), rank, world))

    listener = Listener()
    train(engine, batches(), run, Progress(), listener.hooks(), execution=execution, rank=rank, world=world)
    return engine, listener


def diagonal() -> list[tuple[str, Precision, int, int]]:
    """Every case once, with a precision, a number of pieces and a ZeRO stage: all of them come up, and all their pairs
    of a precision and a stage."""
    return [(case, list(DTYPES)[(n + n // 4) % 2], PIECES[1 + n % 2], n % 4) for n, case in enumerate(CASES)]


def check(errors: dict[str, float], precision: Precision, zero_stage: int, device: torch.device | str = "cpu") -> None:
    """The order of float32 sums apart, the gradients are equal, in both precisions. At stage 0, DeepSpeed rounds half
    precision's gradients before it takes their norm, by which they are clipped. A GPU's sums are in no fixed order."""
    bound = 1e-3 if precision is Precision.BF16 and zero_stage == 0 else 1e-5
    if str(device) != "cpu":
        bound = 2e-2 if precision is Precision.BF16 else 1e-4
    assert len(errors) > 3
    assert not {name: error for name, error in errors.items() if not error < bound}

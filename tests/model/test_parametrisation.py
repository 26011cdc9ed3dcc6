"""muP and CompleteP: a coordinate check, by the optimizer's own groups as training makes them."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from haltscale.model import (
    METHODS,
    Method,
    ModelConfig,
    Parametrisation,
    build_model,
    config_problems,
    parameter_scales,
)
from haltscale.model.config import named_shape

STEPS, VOCABULARY, CONTEXT = 5, 64, 32
WIDTHS = ["2x64", "2x128", "2x256", "2x512"]
DEPTHS = ["2x64", "4x64", "8x64", "16x64"]


def config_of(parametrisation, size="2x64", method=Method.VANILLA, **options) -> ModelConfig:
    return ModelConfig(
        method=method,
        shape=named_shape(size),
        vocab_size=VOCABULARY,
        context=CONTEXT,
        options=METHODS[method].options(**options),
        parametrisation=parametrisation,
    )


@cache
def change(parametrisation: str, size: str, loops: int = 0) -> tuple[float, float]:
    """Root mean square by which a few steps of AdamW change the last block's output and the logits, on one batch."""
    method = {"method": Method.LOOPED, "steps": loops} if loops else {}
    states, logits = [], []
    for seed in range(2):
        model = build_model(config_of(Parametrisation(parametrisation), size, **method), seed=seed)
        scales = parameter_scales(model)
        optimizer = torch.optim.AdamW(
            [
                {"params": [p], "lr": 2e-3 * scales[name].rate, "eps": 1e-8 * scales[name].epsilon}
                for name, p in model.named_parameters()
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        seen: list[torch.Tensor] = []
        (norm,) = (module for name, module in model.named_modules() if name.endswith("final_norm"))
        norm.register_forward_hook(lambda module, given, out, seen=seen: seen.append(given[0].detach()))
        tokens = torch.randint(0, VOCABULARY, (4, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))
        read = (tokens[:, :-1], tokens[:, 1:])
        before = model(*read, return_logits=True).logits_BTV.detach()
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(*read).loss.backward()
            optimizer.step()
        after = model(*read, return_logits=True).logits_BTV.detach()
        states.append((seen[-1] - seen[0]).square().mean().sqrt())
        logits.append((after - before).square().mean().sqrt())
    return float(torch.stack(states).mean()), float(torch.stack(logits).mean())


def growth(changes: list[tuple[float, float]]) -> list[float]:
    """How much larger the change is at the last size than at the first, of states and of logits."""
    return [last / first for first, last in zip(changes[0], changes[-1], strict=True)]


def test_the_change_grows_with_the_width_under_the_standard_parametrisation_only():
    states, logits = growth([change("standard", size) for size in WIDTHS])
    assert states > 3
    assert logits > 3
    for parametrisation in ("mup", "completep"):
        changes = [change(parametrisation, size) for size in WIDTHS]
        assert [state for state, _ in changes] == pytest.approx([changes[0][0]] * 4, rel=0.1)
        # A little less with the width: what is left of the random initial head, n^-1/2, falls away.
        assert [logit for _, logit in changes] == pytest.approx([changes[-1][1]] * 4, rel=0.35)


def test_it_grows_with_the_depth_except_under_completep():
    for parametrisation in ("standard", "mup"):
        states, logits = growth([change(parametrisation, size) for size in DEPTHS])
        assert states > 2
        assert logits > 1.7
    changes = [change("completep", size) for size in DEPTHS]
    for each in zip(*changes, strict=True):
        assert list(each) == pytest.approx([each[0]] * 4, rel=0.15)


def test_a_loop_is_as_deep_as_its_passes():
    loops = (0, 1, 3, 7)
    states, logits = growth([change("mup", "2x64", count) for count in loops])
    assert states > 3
    assert logits > 1.5
    changes = [change("completep", "2x64", count) for count in loops]
    for each in zip(*changes, strict=True):
        assert list(each) == pytest.approx([each[0]] * 4, rel=0.15)


@pytest.mark.parametrize("parametrisation", ["mup", "completep"])
def test_at_the_base_shape_it_is_the_standard_one(parametrisation):
    plain, other = (build_model(config_of(Parametrisation(p)), seed=3) for p in ("standard", parametrisation))
    for (name, one), (_, two) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert {(s.start, s.rate, s.epsilon) for s in parameter_scales(other).values()} == {(1.0, 1.0, 1.0)}


@pytest.mark.parametrize("method", list(Method))
def test_every_weight_of_every_method_has_its_place(method):
    """Matrices over the width train at its inverse, and the latent steps of a method count as depth."""
    size = "4x256"
    model = build_model(config_of(Parametrisation.COMPLETEP, size, method), seed=0)
    entry = METHODS[method]
    passes = 1 if method is Method.PAUSE else math.ceil(entry.max_passes(entry.options()))
    depth = 4 * passes if method is not Method.MOR else 2 + 2 * passes
    for name, scale in parameter_scales(model).items():
        shape = model.get_parameter(name).shape
        if "embedding" in name:
            assert (scale.start, scale.rate) == (1.0, 0.5)
        elif ".out." in name or ".down." in name:
            assert scale.rate == pytest.approx(1 / (4 * depth / 2)), name
            assert scale.start == pytest.approx(math.sqrt(4 / 2) / (depth / 2))
        elif len(shape) == 2:
            assert scale.rate == 0.25, name
            assert shape[1] % 256 == 0, "reads the width"
        else:
            assert scale.rate == 1.0, name


def test_the_standard_parametrisation_scales_nothing():
    model = build_model(config_of(Parametrisation.STANDARD, "4x256", Method.ADAPTIVE), seed=0)
    assert {(s.start, s.rate, s.epsilon) for s in parameter_scales(model).values()} == {(1.0, 1.0, 1.0)}


def test_a_bad_parametrisation_is_refused():
    assert "did you mean 'mup'" in " ".join(config_problems(config_of("mupp")))
    tied = {**config_of("mup").__dict__, "tie_embeddings": True}
    assert "a head of their own" in " ".join(config_problems(ModelConfig(**tied)))

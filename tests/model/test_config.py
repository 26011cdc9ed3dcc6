"""Configurations: refused with all their errors at once, round-tripped, and built the same from the same seed."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from haltscale.model import (
    METHODS,
    SIZES,
    AdaptiveOptions,
    Method,
    ModelConfig,
    RouterKind,
    Shape,
    VanillaOptions,
    build_model,
    config_from_dict,
    config_problems,
)
from haltscale.model.language_model import canonical_name

GOOD = ModelConfig(
    method=Method.ADAPTIVE, shape=SIZES["0.6m"], vocab_size=64, context=32, options=AdaptiveOptions(lam=0.3)
)


@pytest.mark.parametrize("method", list(Method))
def test_every_method_is_registered_and_its_defaults_build(method: Method) -> None:
    entry = METHODS[method]
    config = replace(GOOD, shape=SIZES["1.8m"], method=method, options=entry.options())
    assert config_problems(config) == []
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert isinstance(build_model(config, seed=0), entry.model)


def test_all_errors_at_once() -> None:
    bad = replace(
        GOOD,
        shape=Shape(layers=0, d=64, heads=2, kv_heads=2, ffn=-3),
        vocab_size=0,
        options=AdaptiveOptions(lam=-1, tau=2.0, l_max=True, beta=float("nan")),
        rope_theta=0.5,
        tie_embeddings=1,  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match="lam") as caught:
        build_model(bad, seed=0)
    lines = str(caught.value).splitlines()
    fields = ["lam", "tau", "l_max", "beta"]
    for field in [f"options.{name}" for name in fields] + [
        "shape.layers",
        "shape.ffn",
        "vocab_size",
        "rope_theta",
        "tie_embeddings",
    ]:
        assert sum(line.startswith(f"{field} = ") and "must be" in line for line in lines) == 1, field
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"heads": 3, "kv_heads": 3}, "shape.heads = 3: must divide shape.d = 64"),
        ({"heads": 64, "kv_heads": 64}, "shape.heads = 64: the head dimension 1 must be even (rotary pairs)"),
        ({"heads": 4, "kv_heads": 3}, "shape.kv_heads = 3: must divide shape.heads = 4"),
    ],
)
def test_impossible_shapes(changes: dict[str, int], problem: str) -> None:
    assert config_problems(replace(GOOD, shape=replace(GOOD.shape, **changes))) == [problem]


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, field.name) for method in Method for field in fields(METHODS[method].options)],
)
def test_every_option_of_every_method_is_checked(method: Method, name: str) -> None:
    for wrong in ("nonsense", -1000, None):
        options = replace(METHODS[method].options(), **{name: wrong})
        problems = options.problems()
        assert any(line.startswith(f"{name} = {wrong!r}: must be ") for line in problems), (wrong, problems)


@pytest.mark.parametrize("method", [m for m in Method if hasattr(METHODS[m].options(), "tau")])
def test_the_halting_options_have_their_range(method: Method) -> None:
    kind = METHODS[method].options
    for name, wrong in (("l_max", -1), ("l_max", 1.5), ("tau", -0.1), ("tau", 1.1)):
        (problem,) = replace(kind(), **{name: wrong}).problems()
        assert problem.startswith(f"{name} = {wrong}: must be "), problem
        assert "at most" in problem, "the allowed values"


def test_a_text_that_does_not_fit() -> None:
    assert config_problems(GOOD, tokenizer_size=64, longest=32) == []
    assert config_problems(GOOD, tokenizer_size=65, longest=33) == [
        "vocab_size = 64: must be at least 65, the tokenizer's size",
        "context = 32: must be at least 33, the longest sequence",
    ]


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    model = build_model(GOOD, seed=0)
    good, bad = torch.tensor([[1, 63]]), torch.tensor([[1, 64]])
    for tokens, targets in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="token 64: the model's vocab_size is 64"):
            model(tokens, targets)
    with pytest.raises(ValueError, match="token 64: the model's vocab_size is 64"):
        model.decode_step(torch.tensor([64]), model.start_decoding(1))


def test_options_of_another_method() -> None:
    assert config_problems(replace(GOOD, options=VanillaOptions())) == [
        "options = VanillaOptions: method adaptive takes AdaptiveOptions"
    ]


def test_unknown_keys_are_errors_with_a_suggestion() -> None:
    data = GOOD.to_dict()
    data["vocabsize"] = data.pop("vocab_size")
    data["options"]["lmax"] = 3
    with pytest.raises(ValueError, match="unknown") as caught:
        config_from_dict(data)
    assert str(caught.value).splitlines() == [
        "vocabsize: unknown; did you mean 'vocab_size'?",
        "vocab_size: missing",
        "options.lmax: unknown; did you mean 'l_max'?",
    ]
    with pytest.raises(ValueError, match="did you mean 'adaptive'"):
        config_from_dict(GOOD.to_dict() | {"method": "adaptve"})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {canonical_name(name): value for name, value in model.named_parameters()}


def test_the_seed_alone_decides_the_initial_weights() -> None:
    torch.manual_seed(1)
    one = weights(build_model(GOOD, seed=5))
    torch.manual_seed(2)
    two, other = weights(build_model(GOOD, seed=5)), weights(build_model(GOOD, seed=6))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["stack.blocks.0.qkv.weight"], other["stack.blocks.0.qkv.weight"])


@pytest.mark.parametrize("method", list(Method))
def test_the_seed_decides_the_weights_of_every_method(method: Method) -> None:
    entry = METHODS[method]
    options = entry.options() if method is not Method.ADAPTIVE else AdaptiveOptions(router=RouterKind.MLP)
    config = replace(GOOD, shape=replace(GOOD.shape, layers=3), method=method, options=options)
    torch.manual_seed(1)
    one = weights(build_model(config, seed=5))
    torch.manual_seed(2)
    two = weights(build_model(config, seed=5))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_methods_share_their_initial_weights() -> None:
    plain = weights(build_model(replace(GOOD, method=Method.VANILLA, options=VanillaOptions()), seed=5))
    adaptive = weights(build_model(GOOD, seed=5))
    assert set(plain) <= set(adaptive)
    assert all(torch.equal(plain[name], adaptive[name]) for name in plain)


def test_inputs_have_unit_scale(tiny: Callable) -> None:
    model = build_model(GOOD, seed=0)
    vectors = model.embed(torch.arange(64))
    assert vectors.pow(2).mean().sqrt().item() == pytest.approx(1.0, abs=0.05)
    assert model.embedding.weight.std().item() == pytest.approx((2 / (5 * 64)) ** 0.5, rel=0.05)

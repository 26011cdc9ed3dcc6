"""Small models for the tests of haltscale.model."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from haltscale.model import IGNORE_INDEX, AdaptiveOptions, LanguageModel, Method, ModelConfig, Shape, build_model

torch.set_num_threads(1)

TINY = Shape(layers=2, d=16, heads=4, kv_heads=2, ffn=24)


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The module oracle.py beside this file."""
    spec = importlib.util.spec_from_file_location("oracle", Path(__file__).with_name("oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny() -> Callable[..., LanguageModel]:
    """Builds a tiny model; a router, where there is one, gets random weights, so that halting is ragged."""

    def build(
        method: Method = Method.ADAPTIVE,
        options: Any = None,
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        spread: float = 1.0,
        **changes: Any,
    ) -> LanguageModel:
        options = AdaptiveOptions(tau=0.25, router_bias=0.5) if options is None else options
        config = ModelConfig(method=method, shape=TINY, vocab_size=31, context=64, options=options)
        model = build_model(replace(config, **changes), seed=seed).to(dtype)
        stream = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "router" in name and name.endswith("weight"):
                    values = torch.randn(parameter.shape, generator=stream, dtype=torch.float64)
                    parameter.copy_(values * spread / parameter.shape[-1] ** 0.5)
                elif name.endswith(("norm.weight",)):  # gains of 1 would hide a forgotten gain
                    parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=stream, dtype=torch.float64))
        return model

    return build


@pytest.fixture
def batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Random tokens and targets, some targets ignored."""

    def draw(B: int, T: int, seed: int = 0, vocabulary: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.Generator().manual_seed(seed)
        tokens = torch.randint(vocabulary, (B, T), generator=stream)
        targets = torch.randint(vocabulary, (B, T), generator=stream)
        return tokens, targets.masked_fill(torch.rand(B, T, generator=stream) < 0.2, IGNORE_INDEX)

    return draw

"""The methods by name, and the one way to build a model."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from haltscale.model.adaponder import AdaponderModel, AdaponderOptions
from haltscale.model.adaptive import AdaptiveModel, AdaptiveOptions
from haltscale.model.config import (
    Method,
    ModelConfig,
    Parametrisation,
    Shape,
    build_options,
    did_you_mean,
    in_range,
    is_int,
    is_number,
    key_problems,
    model_choice_problems,
)
from haltscale.model.fixed import FixedModel, FixedOptions
from haltscale.model.language_model import LanguageModel, canonical_name, initialise
from haltscale.model.looped import LoopedModel, LoopedOptions
from haltscale.model.methods import MethodEntry, Methods
from haltscale.model.mor import MorModel, MorOptions
from haltscale.model.parametrisation import Scale, scale_of
from haltscale.model.pause import PauseModel, PauseOptions
from haltscale.model.ponder import PonderModel, PonderOptions
from haltscale.model.ponder2 import Ponder2Model, Ponder2Options
from haltscale.model.ponder3 import Ponder3Model, Ponder3Options
from haltscale.model.shuffled import ShuffledModel, ShuffledOptions
from haltscale.model.vanilla import VanillaModel, VanillaOptions

ROUTED = frozenset(
    (
        *("lam", "beta", "tau", "router_bias", "router_rate", "router_detached", "gate_warmup", "lam_ramp", "explore"),
        *("gain_margin", "prior_steps", "steps_from", "steps_schedule", "steps_seed"),
    )
)
"""Options of a router, none of which changes what a pass costs."""
LOOPS = frozenset(("injection", "loop_norm", "zero_outputs", "scaled_residuals", "depth_growth", "depth_curve"))
"""Switches of loops that do not change what a pass costs. Where no router decides, the cost of a depth that grows is
the mean over the budget."""


def _l_max_more(options: Any) -> float:
    return 1 + float(options.l_max)


def _steps_more(options: Any) -> float:
    return 1 + float(options.steps)


def _all_l_max(options: Any) -> tuple[Method, FixedOptions]:
    gradient_passes = getattr(options, "gradient_passes", 0)
    return Method.FIXED, FixedOptions(steps=float(options.l_max), gradient_passes=gradient_passes)


def _each_jacobi(options: Ponder2Options) -> list[Ponder2Options]:
    return [replace(options, jacobi_low=n, jacobi_high=n) for n in range(options.jacobi_low, options.jacobi_high + 1)]


METHODS = Methods(
    {
        Method.VANILLA: MethodEntry(VanillaOptions, VanillaModel, lambda _: 1, "the plain Llama: one pass per token"),
        Method.ADAPTIVE: MethodEntry(
            AdaptiveOptions,
            AdaptiveModel,
            _l_max_more,
            "latent steps per token, as many as its router asks for",
            costless=ROUTED | LOOPS,
            every_step=_all_l_max,
        ),
        Method.FIXED: MethodEntry(
            FixedOptions,
            FixedModel,
            _steps_more,
            "control: equally many latent steps everywhere",
            costless=LOOPS,
            old_control=True,
        ),
        Method.SHUFFLED: MethodEntry(
            ShuffledOptions,
            ShuffledModel,
            _l_max_more,
            "control: adaptive, its steps dealt to other tokens",
            costless=ROUTED | LOOPS,
            every_step=_all_l_max,
            old_control=True,
        ),
        Method.LOOPED: MethodEntry(
            LoopedOptions, LoopedModel, _steps_more, "the whole stack applied several times over", costless=LOOPS
        ),
        Method.PAUSE: MethodEntry(
            PauseOptions, PauseModel, _steps_more, "learned pause tokens after every token", sequential=False
        ),
        Method.PONDER: MethodEntry(
            PonderOptions, PonderModel, _steps_more, "PonderLM: feeds back the expected embedding of its guess"
        ),
        Method.PONDER2: MethodEntry(
            Ponder2Options,
            Ponder2Model,
            lambda o: (o.thoughts + 1) * (o.jacobi_high + 1) + 1,
            "PonderLM-2: latent thoughts after every token, by Jacobi",
            semantics=2,  # 1 drew its number of passes in every forward piece
            drawn=_each_jacobi,
        ),
        Method.MOR: MethodEntry(
            MorOptions,
            MorModel,
            lambda o: o.recursions,
            "Mixture-of-Recursions: a middle repeated where a router picks",
            costless=ROUTED,
            every_step=lambda o: (Method.LOOPED, LoopedOptions(steps=o.recursions - 1)),
        ),
        Method.PONDER3: MethodEntry(
            Ponder3Options,
            Ponder3Model,
            _l_max_more,
            "PonderLM-3: plans its steps after the first, keys fade",
            costless=ROUTED,
            every_step=_all_l_max,
        ),
        Method.ADAPONDER: MethodEntry(
            AdaponderOptions,
            AdaponderModel,
            _l_max_more,
            "AdaPonderLM: PonderLM with a gate after every iteration",
            costless=ROUTED,
            every_step=lambda o: (Method.PONDER, PonderOptions(steps=o.l_max)),
        ),
    }
)


def build_model(config: ModelConfig, *, seed: int) -> LanguageModel:
    """The model of a configuration, its initial weights fixed by the seed alone.

    Raises ValueError with all errors of the configuration, one per line.
    """
    problems = config_problems(config)
    if problems:
        raise ValueError("\n".join(problems))
    model = METHODS[config.method].model(config)
    initialise(model, seed)
    scales = parameter_scales(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (start := scales[name].start) != 1.0:
                parameter.mul_(start)
    return model


def parameter_scales(model: LanguageModel) -> dict[str, Scale]:
    """What the model's parametrisation makes of each parameter's initial value, rate and epsilon, by name."""
    config, entry = model.config, METHODS[model.config.method]
    passes = entry.max_passes(config.options) if entry.sequential else 1
    depth = sum(model.layers_per_pass(math.ceil(passes)))
    return {name: scale_of(canonical_name(name), config, depth) for name, _ in model.named_parameters()}


def config_problems(config: ModelConfig, *, tokenizer_size: int | None = None, longest: int | None = None) -> list[str]:
    """All errors of the configuration at once; empty if a model can be built from it.

    tokenizer_size, longest: number of distinct tokens and length of the longest sequence of the text that the model
    is meant for, where they are known.
    """
    found = []
    try:
        entry = METHODS[METHODS.named(config.method)]
    except ValueError as error:
        entry = None
        found.append(str(error))
    if entry is not None and isinstance(config.options, entry.options):
        found += [f"options.{problem}" for problem in config.options.problems()]
    elif entry is not None:
        takes = entry.options.__name__
        found.append(f"options = {type(config.options).__name__}: method {config.method} takes {takes}")
    found += config.shape.problems()
    if entry is not None:
        found += entry.model.shape_problems(config.shape)
    for name in ("vocab_size", "context"):
        if not is_int(getattr(config, name)) or getattr(config, name) < 1:
            found.append(f"{name} = {getattr(config, name)!r}: must be a positive integer")
    for name, needed, whose in (
        ("vocab_size", tokenizer_size, "the tokenizer's size"),
        ("context", longest, "the longest sequence"),
    ):
        value = getattr(config, name)
        if needed is not None and is_int(value) and 1 <= value < needed:
            found.append(f"{name} = {value}: must be at least {needed}, {whose}")
    if config.document_start is not None and is_int(config.vocab_size):
        found += in_range("document_start", config.document_start, 0, config.vocab_size - 1, integer=True)
    if not is_number(config.rope_theta) or not config.rope_theta > 1:
        found.append(f"rope_theta = {config.rope_theta!r}: must be a number above 1")
    if config.parametrisation not in list(Parametrisation):
        told = did_you_mean(config.parametrisation, Parametrisation)
        found.append(f"parametrisation = {config.parametrisation!r}{told}")
    elif config.parametrisation is not Parametrisation.STANDARD and (config.tie_embeddings or config.embedding_rank):
        found.append(
            f"parametrisation = {str(config.parametrisation)!r}: needs an embedding and a head of their own, and"
            f" {'tie_embeddings' if config.tie_embeddings else 'embedding_rank'} is set; take 'standard'"
        )
    return found + model_choice_problems(config)


def config_from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """The configuration that `ModelConfig.to_dict` wrote.

    Raises ValueError with all unknown or missing keys at once, each with the nearest known name.
    """
    found = key_problems(ModelConfig, data, "")
    method = data.get("method")
    if "method" in data:
        try:
            method = METHODS.known(method)
        except ValueError as error:
            found.append(str(error))
            method = None
    parts: dict[str, type] = {"shape": Shape}
    if method is not None:
        parts["options"] = METHODS[method].options
    for name, kind in parts.items():
        if isinstance(data.get(name), Mapping):
            found += key_problems(kind, data[name], f"{name}.")
        elif name in data:
            found.append(f"{name} = {data[name]!r}: must be an object with {kind.__name__}'s fields")
    if found:
        raise ValueError("\n".join(found))
    built = {name: build_options(kind, data[name]) for name, kind in parts.items()}
    return ModelConfig(**(dict(data) | built | {"method": method}))

"""The methods by name, and the one way to build a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from haltscale.model.adaponder import AdaponderModel, AdaponderOptions
from haltscale.model.adaptive import AdaptiveModel, AdaptiveOptions
from haltscale.model.config import (
    Method,
    MethodOptions,
    ModelConfig,
    Shape,
    build_options,
    did_you_mean,
    in_range,
    is_int,
    is_number,
    key_problems,
)
from haltscale.model.fixed import FixedModel, FixedOptions
from haltscale.model.language_model import LanguageModel, initialise
from haltscale.model.looped import LoopedModel, LoopedOptions
from haltscale.model.mor import MorModel, MorOptions
from haltscale.model.pause import PauseModel, PauseOptions
from haltscale.model.ponder import PonderModel, PonderOptions
from haltscale.model.ponder2 import Ponder2Model, Ponder2Options
from haltscale.model.ponder3 import Ponder3Model, Ponder3Options
from haltscale.model.shuffled import ShuffledModel, ShuffledOptions
from haltscale.model.vanilla import VanillaModel, VanillaOptions


@dataclass(frozen=True)
class MethodEntry:
    """What the platform knows about a method."""

    options: type[MethodOptions]
    """Dataclass of its options."""
    model: type[LanguageModel]
    """Its module."""
    max_passes: Callable[[Any], float]
    """Most passes of the stack per token, from the method's options: an upper bound to plan with."""
    summary: str
    """One line for tables and help texts."""
    semantics: int = 1
    """Raised by hand when a change of the code changes what this method computes from given options and weights: runs
    of the method become stale, and no others."""


def _l_max_more(options: Any) -> float:
    return 1 + float(options.l_max)


def _steps_more(options: Any) -> float:
    return 1 + float(options.steps)


METHODS: dict[str, MethodEntry] = {
    Method.VANILLA: MethodEntry(VanillaOptions, VanillaModel, lambda _: 1, "the plain Llama: one pass per token"),
    Method.ADAPTIVE: MethodEntry(
        AdaptiveOptions, AdaptiveModel, _l_max_more, "latent steps per token, as many as its router asks for"
    ),
    Method.FIXED: MethodEntry(FixedOptions, FixedModel, _steps_more, "control: equally many latent steps everywhere"),
    Method.SHUFFLED: MethodEntry(
        ShuffledOptions, ShuffledModel, _l_max_more, "control: adaptive, its steps dealt to other tokens"
    ),
    Method.LOOPED: MethodEntry(LoopedOptions, LoopedModel, _steps_more, "the whole stack applied several times over"),
    Method.PAUSE: MethodEntry(PauseOptions, PauseModel, _steps_more, "learned pause tokens after every token"),
    Method.PONDER: MethodEntry(
        PonderOptions, PonderModel, _steps_more, "PonderLM: feeds back the expected embedding of its guess"
    ),
    Method.PONDER2: MethodEntry(
        Ponder2Options,
        Ponder2Model,
        lambda o: 2 * o.jacobi_high + 3,
        "PonderLM-2: one latent thought per token, by Jacobi",
        semantics=2,  # 1 drew its number of passes in every forward piece
    ),
    Method.MOR: MethodEntry(
        MorOptions, MorModel, lambda o: o.recursions, "Mixture-of-Recursions: a middle repeated where a router picks"
    ),
    Method.PONDER3: MethodEntry(
        Ponder3Options, Ponder3Model, _l_max_more, "PonderLM-3: plans its steps after the first, keys fade"
    ),
    Method.ADAPONDER: MethodEntry(
        AdaponderOptions, AdaponderModel, _l_max_more, "AdaPonderLM: PonderLM with a gate after every iteration"
    ),
}


def build_model(config: ModelConfig, *, seed: int) -> LanguageModel:
    """The model of a configuration, its initial weights fixed by the seed alone.

    Raises ValueError with all errors of the configuration, one per line.
    """
    problems = config_problems(config)
    if problems:
        raise ValueError("\n".join(problems))
    model = METHODS[config.method].model(config)
    initialise(model, seed)
    return model


def config_problems(config: ModelConfig, *, tokenizer_size: int | None = None, longest: int | None = None) -> list[str]:
    """All errors of the configuration at once; empty if a model can be built from it.

    tokenizer_size, longest: number of distinct tokens and length of the longest sequence of the text that the model
    is meant for, where they are known.
    """
    found = []
    if config.method not in METHODS:
        found.append(f"method = {config.method!r}: must be one of {', '.join(METHODS)}")
    else:
        expected = METHODS[config.method].options
        if isinstance(config.options, expected):
            found += [f"options.{problem}" for problem in config.options.problems()]
        else:
            found.append(f"options = {type(config.options).__name__}: method {config.method} takes {expected.__name__}")
    found += config.shape.problems()
    if config.method in METHODS:
        found += METHODS[config.method].model.shape_problems(config.shape)
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
    if not is_number(config.norm_eps) or not 0 < config.norm_eps < 1:
        found.append(f"norm_eps = {config.norm_eps!r}: must be a number between 0 and 1")
    for name in ("tie_embeddings", "embedding_scale"):
        if not isinstance(getattr(config, name), bool):
            found.append(f"{name} = {getattr(config, name)!r}: must be true or false")
    return found


def config_from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """The configuration that `ModelConfig.to_dict` wrote.

    Raises ValueError with all unknown or missing keys at once, each with the nearest known name.
    """
    found = key_problems(ModelConfig, data, "")
    method = data.get("method")
    if "method" in data and method not in METHODS:
        found.append(f"method = {method!r}{did_you_mean(method, METHODS)}")
    parts: dict[str, type] = {"shape": Shape}
    if method in METHODS:
        parts["options"] = METHODS[Method(method)].options
    for name, kind in parts.items():
        if isinstance(data.get(name), Mapping):
            found += key_problems(kind, data[name], f"{name}.")
        elif name in data:
            found.append(f"{name} = {data[name]!r}: must be an object with {kind.__name__}'s fields")
    if found:
        raise ValueError("\n".join(found))
    built = {name: build_options(kind, data[name]) for name, kind in parts.items()}
    return ModelConfig(**(dict(data) | built | {"method": Method(data["method"])}))

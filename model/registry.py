"""The methods by name, and the one way to build a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from haltscale.model.adaponder import AdaponderModel, AdaponderOptions
from haltscale.model.adaptive import AdaptiveModel, AdaptiveOptions
from haltscale.model.config import Method, MethodOptions, ModelConfig
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
    problems = config.problems()
    if problems:
        raise ValueError("\n".join(problems))
    model = METHODS[config.method].model(config)
    initialise(model, seed)
    return model

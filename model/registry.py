"""The methods by name, and the one way to build a model."""

from dataclasses import dataclass

from haltscale.model.adaptive import AdaptiveModel, AdaptiveOptions
from haltscale.model.config import Method, MethodOptions, ModelConfig
from haltscale.model.language_model import LanguageModel, initialise
from haltscale.model.vanilla import VanillaModel, VanillaOptions


@dataclass(frozen=True)
class MethodEntry:
    """What the platform knows about a method."""

    options: type[MethodOptions]
    """Dataclass of its options."""
    model: type[LanguageModel]
    """Its module."""
    summary: str
    """One line for tables and help texts."""


METHODS: dict[str, MethodEntry] = {
    Method.VANILLA: MethodEntry(VanillaOptions, VanillaModel, "the plain Llama: one pass per token"),
    Method.ADAPTIVE: MethodEntry(
        AdaptiveOptions, AdaptiveModel, "latent steps per token, as many as its router asks for"
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

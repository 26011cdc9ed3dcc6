"""Models: what a method computes, what it costs, how it decodes. PyTorch only."""

from haltscale.model.adaptive import AdaptiveModel, AdaptiveOptions
from haltscale.model.config import SIZES, Method, MethodOptions, ModelConfig, Shape
from haltscale.model.halting import HaltingTrace
from haltscale.model.language_model import IGNORE_INDEX, LanguageModel, Output
from haltscale.model.ledger import Flops, PassCounts, paper_inference_flops, paper_passes, paper_training_flops
from haltscale.model.registry import METHODS, MethodEntry, build_model
from haltscale.model.vanilla import VanillaModel, VanillaOptions

__all__ = [
    "IGNORE_INDEX",
    "METHODS",
    "SIZES",
    "AdaptiveModel",
    "AdaptiveOptions",
    "Flops",
    "HaltingTrace",
    "LanguageModel",
    "Method",
    "MethodEntry",
    "MethodOptions",
    "ModelConfig",
    "Output",
    "PassCounts",
    "Shape",
    "VanillaModel",
    "VanillaOptions",
    "build_model",
    "paper_inference_flops",
    "paper_passes",
    "paper_training_flops",
]

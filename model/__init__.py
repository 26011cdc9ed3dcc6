"""Models: what a method computes, what it costs, how it decodes. PyTorch only.

config.py          what a model is: method, shape, options; the two size ladders
methods.py         what a method declares of itself, and where those of other packages are found
registry.py        the methods of this package; build_model
parametrisation.py how initial weights and rates change with width and depth: standard, muP, CompleteP
language_model.py  what all methods share: embedding, head, loss, accounting, initialisation, decode_step
backbone.py        the Llama stack, and attention plans: who sees whom in a pass
kernels.py         hand-written gradients where autograd moved too much memory
halting.py         from gates to exit masses; HaltingTrace
ledger.py          counted passes, and FLOPs of three kinds
decoding.py        keys and values from token to token
probing.py         what each step was worth, and the same weights under other halting
posthoc.py         halting by thresholds that need no training
generation.py      several prompts continued together
loop_options.py    switches that make loops train, for all methods that loop
step_source.py     how many latent steps a token takes: by the router, or replayed from a recorded schedule
latent_loop.py     the latent chain, and repeated.py, plain repeated passes: what the methods are made of
vanilla, adaptive, fixed, shuffled, looped, pause, ponder, ponder2, ponder3, adaponder, mor   the methods, one file each
"""

from haltscale.model.adaponder import AdaponderOptions
from haltscale.model.adaptive import AdaptiveModel, AdaptiveOptions, GateTarget, Mixture, PenaltyProbability, WarmupLoss
from haltscale.model.config import (
    MODEL_CHOICES,
    SIZES,
    EmbeddingScale,
    Method,
    MethodOptions,
    ModelConfig,
    Parametrisation,
    Shape,
)
from haltscale.model.decoding import DecodingState
from haltscale.model.fixed import FixedOptions
from haltscale.model.halting import HaltingTrace
from haltscale.model.language_model import IGNORE_INDEX, LanguageModel, Output
from haltscale.model.latent_loop import HaltingRule, RouterInput, RouterKind
from haltscale.model.ledger import Flops, PassCounts, paper_inference_flops, paper_passes, paper_training_flops
from haltscale.model.loop_options import DepthCurve, Injection, LoopOptions
from haltscale.model.looped import LoopedOptions
from haltscale.model.methods import MethodEntry, MethodError
from haltscale.model.mor import MorOptions, Routing
from haltscale.model.pause import PauseOptions
from haltscale.model.ponder import PonderOptions
from haltscale.model.ponder2 import Ponder2Options
from haltscale.model.ponder3 import Ponder3Options
from haltscale.model.registry import (
    METHODS,
    build_model,
    config_from_dict,
    config_problems,
    parameter_scales,
)
from haltscale.model.shuffled import ShuffledOptions
from haltscale.model.step_source import SourceOptions, StepsFrom
from haltscale.model.vanilla import VanillaModel, VanillaOptions

__all__ = [
    "IGNORE_INDEX",
    "METHODS",
    "MODEL_CHOICES",
    "SIZES",
    "AdaponderOptions",
    "AdaptiveModel",
    "AdaptiveOptions",
    "DecodingState",
    "DepthCurve",
    "EmbeddingScale",
    "FixedOptions",
    "Flops",
    "GateTarget",
    "HaltingRule",
    "HaltingTrace",
    "Injection",
    "LanguageModel",
    "LoopOptions",
    "LoopedOptions",
    "Method",
    "MethodEntry",
    "MethodError",
    "MethodOptions",
    "Mixture",
    "ModelConfig",
    "MorOptions",
    "Output",
    "Parametrisation",
    "PassCounts",
    "PauseOptions",
    "PenaltyProbability",
    "Ponder2Options",
    "Ponder3Options",
    "PonderOptions",
    "RouterInput",
    "RouterKind",
    "Routing",
    "Shape",
    "ShuffledOptions",
    "SourceOptions",
    "StepsFrom",
    "VanillaModel",
    "VanillaOptions",
    "WarmupLoss",
    "build_model",
    "config_from_dict",
    "config_problems",
    "paper_inference_flops",
    "paper_passes",
    "paper_training_flops",
    "parameter_scales",
]

"""The names that a study is written with, in one place."""

from haltscale.model import METHODS, SIZES, AdaptiveOptions, Method, Parametrisation
from haltscale.platform.analysis.targets import Target
from haltscale.platform.config import ConfigError, Optimizer, Precision, RunConfig, Schedule
from haltscale.platform.corpora.corpus import Corpus, sotu
from haltscale.platform.corpora.formats import Format, InvalidUtf8
from haltscale.platform.corpora.known_need import ChainedLookups, known_need
from haltscale.platform.corpora.sources import RECIPES, Source, hugging_face
from haltscale.platform.corpora.tokenization import BytePairs, Pretrained
from haltscale.platform.execution import ExecutionConfig, FailurePolicy, Offload, Sink
from haltscale.platform.llama import llama
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps.rules import Constant, DeepSeekLaw, Rule, StepLaw, Timescale, Transfer, UntunedWarmup
from haltscale.platform.sweeps.spec import Halving
from haltscale.platform.sweeps.study import Study
from haltscale.platform.sweeps.sweep import (
    Budget,
    ControlKind,
    Sweep,
    choice,
    controls,
    grid,
    integers,
    isoflop,
    ladder,
    log_uniform,
    sample,
    tuned,
    uniform,
    zip_,
)
from haltscale.platform.sweeps.tuning import Search, TuningStudy

__all__ = [
    "METHODS",
    "RECIPES",
    "SIZES",
    "AdaptiveOptions",
    "Budget",
    "BytePairs",
    "ChainedLookups",
    "ConfigError",
    "Constant",
    "ControlKind",
    "Corpus",
    "DeepSeekLaw",
    "ExecutionConfig",
    "FailurePolicy",
    "Format",
    "Halving",
    "InvalidUtf8",
    "Method",
    "Offload",
    "Optimizer",
    "Parametrisation",
    "Precision",
    "Pretrained",
    "Rule",
    "RunConfig",
    "RunStore",
    "Schedule",
    "Search",
    "Sink",
    "Source",
    "StepLaw",
    "Study",
    "Sweep",
    "Target",
    "Timescale",
    "Transfer",
    "TuningStudy",
    "UntunedWarmup",
    "choice",
    "controls",
    "grid",
    "hugging_face",
    "integers",
    "isoflop",
    "known_need",
    "ladder",
    "llama",
    "log_uniform",
    "sample",
    "sotu",
    "tuned",
    "uniform",
    "zip_",
]

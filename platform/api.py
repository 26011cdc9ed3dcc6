"""The names that a study is written with, in one place."""

from haltscale.model import METHODS, SIZES, AdaptiveOptions, Method
from haltscale.platform.config import ConfigError, Precision, RunConfig, Schedule
from haltscale.platform.corpus import Corpus, sotu
from haltscale.platform.execution import ExecutionConfig, Offload, OnTrouble, Optimizer, Sink
from haltscale.platform.store import RunStore
from haltscale.platform.study import Study
from haltscale.platform.sweep import Sweep, grid

__all__ = [
    "METHODS",
    "SIZES",
    "AdaptiveOptions",
    "ConfigError",
    "Corpus",
    "ExecutionConfig",
    "Method",
    "Offload",
    "OnTrouble",
    "Optimizer",
    "Precision",
    "RunConfig",
    "RunStore",
    "Schedule",
    "Sink",
    "Study",
    "Sweep",
    "grid",
    "sotu",
]

"""The names that a study is written with, in one place."""

from haltscale.model import METHODS, SIZES, AdaptiveOptions, Method
from haltscale.platform.config import ConfigError, Precision, RunConfig, Schedule
from haltscale.platform.corpus import Corpus, sotu
from haltscale.platform.execution import ExecutionConfig, Offload, OnTrouble, Optimizer, Sink
from haltscale.platform.store import RunStore
from haltscale.platform.study import Study
from haltscale.platform.sweep import (
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
    uniform,
    zip_,
)

__all__ = [
    "METHODS",
    "SIZES",
    "AdaptiveOptions",
    "Budget",
    "ConfigError",
    "ControlKind",
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
    "choice",
    "controls",
    "grid",
    "integers",
    "isoflop",
    "ladder",
    "log_uniform",
    "sample",
    "sotu",
    "uniform",
    "zip_",
]

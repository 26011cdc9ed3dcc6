"""What a run is (identity) and how it is executed; both frozen, both checked before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, get_type_hints

from haltscale.model import METHODS, SIZES, Method, MethodOptions, ModelConfig, VanillaOptions
from haltscale.platform.identity import SEMANTICS_VERSION, encodable, run_key


class Precision(StrEnum):
    """Number format of weights and activations; optimizer state and master weights are always float32."""

    AUTO = "auto"
    """bf16 where the machine multiplies matrices faster in it (GPUs; CPUs with AVX512-BF16 or AMX), else fp32."""
    BF16 = "bf16"
    FP32 = "fp32"


class ConfigError(ValueError):
    """A configuration is refused; ``problems`` lists everything wrong with it at once."""

    def __init__(self, problems: list[str], subject: str = "study") -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"this {subject} cannot run, nothing was started:\n{lines}")


LABELLED_OPTIONS = {"lam": "λ", "beta": "β", "l_max": "l_max"}
"""Options that a run's label shows: λ always, the others where they differ from the method's default."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that changes what a run computes; the corpus joins it in :meth:`identity`."""

    method: Method = Method.VANILLA
    """How the model thinks; see ``haltscale.model.METHODS``."""
    size: str = "0.6m"
    """A step of the ladder; see ``haltscale.model.SIZES``."""
    options: MethodOptions = field(default_factory=VanillaOptions)
    """The method's own options (lam, beta, l_max, tau, ...)."""
    tokens: int = 1_000_000
    """Training budget in tokens; rounded down to whole steps."""
    context: int = 256
    """Sequence length in tokens."""
    batch_tokens: int = 4096
    """Tokens per optimizer step, over all workers; a multiple of ``context``."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    final_learning_rate_fraction: float = 0.1
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip: float = 1.0
    """Greatest gradient norm."""
    precision: Precision = Precision.AUTO
    seed: int = 0
    """Of the initial weights and of the order of the sequences."""

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.batch_tokens

    @property
    def label(self) -> str:
        """What tables and figures call the run."""
        defaults = type(self.options)()
        shown = [str(self.method), self.size]
        for name, symbol in LABELLED_OPTIONS.items():
            value = getattr(self.options, name, None)
            if value is not None and (name == "lam" or value != getattr(defaults, name)):
                shown.append(f"{symbol} {value:g}")
        return " · ".join([*shown, *([f"seed {self.seed}"] if self.seed else [])])

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model of this run."""
        return ModelConfig(
            method=self.method,
            shape=SIZES[self.size],
            vocab_size=vocab_size,
            context=self.context,
            options=self.options,
        )

    def problems(self, vocab_size: int = 4096) -> list[str]:
        """Everything wrong with this run, each naming its field and the allowed values."""
        found = []
        if self.size not in SIZES:
            found.append(f"size {self.size!r} is not on the ladder{_did_you_mean(self.size, SIZES)}")
            sized = replace(self, size=next(iter(SIZES)))
        else:
            sized = self
        found += sized.model_config(vocab_size).problems()
        for name in ("tokens", "context", "batch_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                found.append(f"{name} is {value!r}, needs a whole number above 0")
        if not found or all(isinstance(getattr(self, n), int) for n in ("tokens", "context", "batch_tokens")):
            if self.context > 0 and self.batch_tokens % self.context:
                found.append(f"batch_tokens {self.batch_tokens} is not a multiple of context {self.context}")
            if 0 < self.tokens < self.batch_tokens:
                found.append(f"tokens {self.tokens} is less than one batch of {self.batch_tokens}")
        ranges = {
            "learning_rate": (0.0, 10.0),
            "warmup_fraction": (-1e-12, 1.0),
            "final_learning_rate_fraction": (-1e-12, 1.0),
            "weight_decay": (-1e-12, 10.0),
            "adam_beta1": (0.0, 0.99999),
            "adam_beta2": (0.0, 0.99999),
            "clip": (0.0, 1e9),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low < value <= high:
                found.append(f"{name} is {value!r}, needs a number above {max(low, 0):g} and up to {high:g}")
        if self.precision not in list(Precision):
            found.append(f"precision {self.precision!r} is none of {', '.join(Precision)}")
        if not isinstance(self.seed, int) or self.seed < 0:
            found.append(f"seed is {self.seed!r}, needs a whole number from 0 on")
        return found

    def identity(self, corpus_name: str, corpus_fingerprint: str) -> dict[str, Any]:
        """What makes the run's key, JSON-able: every field, the corpus, and the version of what the code computes."""
        return {
            **encodable(self, "run"),
            "corpus": corpus_name,
            "corpus_fingerprint": corpus_fingerprint,
            "semantics": SEMANTICS_VERSION,
        }

    def key(self, corpus_name: str, corpus_fingerprint: str) -> str:
        """The run's key in the store."""
        return run_key(self.identity(corpus_name, corpus_fingerprint))

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> RunConfig:
        """The inverse of :meth:`identity`, for a run read back from the store."""
        method = Method(identity["method"])
        values = {f.name: identity[f.name] for f in fields(cls) if f.name not in ("method", "options", "precision")}
        options = _with_options(METHODS[method].options, identity["options"])
        return cls(method=method, options=options, precision=Precision(identity["precision"]), **values)


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a run is executed: nothing here changes its result, so nothing here is in its key."""

    workers: int = 1
    """Training processes per run."""
    cpus_per_worker: int = 1
    """CPU threads of each worker; a quarter of one CPU stays with the data tasks."""
    gpus_per_worker: float = 0
    """GPUs of each worker (0 or 1)."""
    micro_batch_sequences: int = 16
    """Sequences of one forward pass per worker; the rest of its share of a batch is accumulated."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 to 3."""
    evaluations: int = 5
    """Evaluations per run, spread evenly; the last is at the end."""
    checkpoints: int = 2
    """Checkpoints per run, spread evenly; the last is at the end."""
    log_every_seconds: float = 2.0
    """How often a run writes metrics and its heartbeat."""
    max_failures: int = 1
    """How often a failed run is started again (from its last checkpoint) before it is recorded as failed."""

    def problems(self, runs: list[RunConfig], cluster: Mapping[str, float] | None = None) -> list[str]:
        """Everything wrong, given the runs and what the cluster has (``CPU``, ``GPU``)."""
        found = []
        for name in ("workers", "cpus_per_worker", "micro_batch_sequences", "evaluations", "checkpoints"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)!r}, needs a whole number from 1 on")
        for name, low in (("gpus_per_worker", 0), ("log_every_seconds", 0), ("max_failures", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < low:
                found.append(f"{name} is {value!r}, needs a number from {low} on")
        if self.zero_stage not in (0, 1, 2, 3):
            found.append(f"zero_stage is {self.zero_stage!r}, needs 0, 1, 2 or 3")
        if found:
            return found
        for batch in sorted({run.batch_sequences for run in runs}):
            if batch % self.workers:
                found.append(f"a batch of {batch} sequences cannot be shared by {self.workers} workers evenly")
        if cluster is not None:
            for resource, each in (("CPU", self.cpus_per_worker), ("GPU", self.gpus_per_worker)):
                needed, there = self.workers * each, cluster.get(resource, 0)
                if needed > there:
                    found.append(
                        f"{self.workers} workers x {each:g} {resource} need {needed:g} {resource}s,"
                        f" the cluster has {there:g}: lower workers or {resource.lower()}s_per_worker"
                    )
        return found

    def accumulation(self, batch_sequences: int) -> tuple[int, int]:
        """(sequences per forward pass, forward passes per step) of each worker."""
        share = batch_sequences // self.workers
        micro = min(self.micro_batch_sequences, share)
        while share % micro:
            micro -= 1
        return micro, share // micro


def apply_point(base: RunConfig, point: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """A run from a base and a sweep's point, with what is wrong about the point's names.

    A name is a field of :class:`RunConfig` or an option of the point's method; anything else is an error.
    """
    found: list[str] = []
    method = point.get("method", base.method)
    if method not in METHODS:
        return base, [f"method {method!r} is none of {', '.join(METHODS)}{_did_you_mean(method, METHODS)}"]
    method = Method(method)
    option_type: Any = METHODS[method].options
    option_names = [f.name for f in fields(option_type)]
    run_names = [f.name for f in fields(base) if f.name not in ("method", "options")]
    options: dict[str, Any] = {}
    if isinstance(base.options, option_type):
        options = {name: getattr(base.options, name) for name in option_names}
    values: dict[str, Any] = {}
    for name, value in point.items():
        if name == "method":
            continue
        if name in run_names:
            values[name] = value
        elif name in option_names:
            options[name] = value
        else:
            known = [*run_names, *option_names]
            owners = [str(m) for m, entry in METHODS.items() if name in _names(entry.options)]
            hint = f"; {', '.join(owners)} has it" if owners else _did_you_mean(name, known)
            found.append(f"{method} has no {name!r}{hint}")
    if found:
        return base, found
    return replace(base, method=method, options=_with_options(option_type, options), **values), []


def _with_options(kind: Any, values: Mapping[str, Any]) -> Any:
    """A method's options; a string that names a member of an enum becomes that member: models compare with ``is``."""
    typed = dict(values)
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and issubclass(hint, StrEnum) and typed.get(name) in list(hint):
            typed[name] = hint(typed[name])
    return kind(**typed)


def _names(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _did_you_mean(word: object, known: Any) -> str:
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(map(str, known))}"

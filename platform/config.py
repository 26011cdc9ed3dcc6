"""What a run is: its identity, frozen, and checked before anything starts. How it is executed: `execution.py`."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cache
from typing import Any, get_args, get_type_hints

from haltscale.model import (
    METHODS,
    SIZES,
    Method,
    MethodOptions,
    ModelConfig,
    Shape,
    VanillaOptions,
    config_problems,
)
from haltscale.platform.identity import SEMANTICS_VERSION, encodable, run_key
from haltscale.platform.initial_model import IMPORTED, InitialModel


class Precision(StrEnum):
    """Number format of weights and activations; optimizer state and master weights are always float32."""

    AUTO = "auto"
    """bf16 where the machine multiplies matrices faster in it (GPUs; CPUs with AVX512-BF16 or AMX), else fp32."""
    BF16 = "bf16"
    FP16 = "fp16"
    """With dynamic loss scaling: a step whose gradient overflows is counted, and leaves the weights as they are."""
    FP32 = "fp32"


class Schedule(StrEnum):
    """The learning rate after the warm-up, as a function of the share of the budget (tokens or FLOPs) that is spent."""

    COSINE = "cosine"
    """Half a cosine from the peak to ``final_learning_rate_fraction`` of it."""
    LINEAR = "linear"
    """A straight line between the same ends."""
    WSD = "wsd"
    """Warm-up, stable, decay: the peak, then a straight line over the last ``decay_fraction`` of the budget."""
    CONSTANT = "constant"
    """The peak to the end."""


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
    """A step of the ladder (``haltscale.model.SIZES``); or ``imported``, the shape of ``init_from``."""
    options: MethodOptions = field(default_factory=VanillaOptions)
    """The method's own options (lam, beta, l_max, tau, ...)."""
    tokens: int = 1_000_000
    """Training budget in tokens; rounded down to whole steps. Without meaning where ``flops`` is given."""
    flops: float | None = None
    """Training budget in realised FLOPs, instead of tokens: the run ends with the step that spends the last of it, and
    its record says by how much that was too many."""
    context: int = 256
    """Sequence length in tokens."""
    batch_tokens: int = 4096
    """Tokens per optimizer step, over all workers; a multiple of ``context``."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    schedule: Schedule = Schedule.COSINE
    """Of the learning rate after the warm-up; tied to the same quantity as the budget."""
    warmup_fraction: float = 0.05
    """Share of the budget over which the learning rate rises linearly."""
    warmup_tokens: int | None = None
    """The same in tokens, instead: then WSD runs of several budgets share their stable phase."""
    decay_fraction: float = 0.2
    """Share of the budget over which WSD decays, at its end."""
    final_learning_rate_fraction: float = 0.1
    """Where the schedule ends, as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip: float = 1.0
    """Greatest gradient norm."""
    precision: Precision = Precision.AUTO
    seed: int = 0
    """Of the initial weights and of the order of the sequences."""
    init_from: InitialModel | None = None
    """A Llama whose weights the run starts from (``llama("/models/smol")``, or ``--set init_from=/models/smol``): its
    training is continued, with any method. None starts from random weights."""

    @property
    def shape(self) -> Shape:
        """Size of the stack."""
        return self.init_from.shape if self.init_from else SIZES[self.size]

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None where the budget is in FLOPs, since what a step costs depends on the halting."""
        return self.tokens // self.batch_tokens if self.flops is None else None

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
        config = ModelConfig(
            method=self.method, shape=self.shape, vocab_size=vocab_size, context=self.context, options=self.options
        )
        if (start := self.init_from) is None:
            return config
        return replace(
            config,
            vocab_size=start.vocab_size,  # often some more than its tokenizer has
            rope_theta=start.rope_theta,
            norm_eps=start.norm_eps,
            tie_embeddings=start.tie_embeddings,
            embedding_scale=False,  # as the Llama has it
        )

    def parameters(self, vocab_size: int) -> int:
        """Parameters of the plain model of this run's shape; what its method adds is left out."""
        config = self.model_config(vocab_size)
        return config.shape.parameters(config.vocab_size, tie_embeddings=config.tie_embeddings)

    def problems(self, vocab_size: int = 4096) -> list[str]:
        """Everything wrong with this run, each naming its field and the allowed values."""
        found = []
        sized = self
        if self.size not in SIZES and not (self.init_from and self.size == IMPORTED):
            found.append(f"size {self.size!r} is not on the ladder{did_you_mean(self.size, SIZES)}")
            sized = replace(self, size=next(iter(SIZES)))
        elif self.init_from:
            found += self._start_problems(self.init_from, vocab_size)
        found += config_problems(sized.model_config(vocab_size))
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
            "decay_fraction": (-1e-12, 1.0),
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
        for name, members in (("precision", Precision), ("schedule", Schedule)):
            if getattr(self, name) not in list(members):
                found.append(f"{name} {getattr(self, name)!r} is none of {', '.join(members)}")
        if self.flops is not None and not (is_number(self.flops) and 0 < self.flops < math.inf):
            found.append(f"flops is {self.flops!r}, needs a number above 0, or None for a budget in tokens")
        if self.warmup_tokens is not None and not (isinstance(self.warmup_tokens, int) and self.warmup_tokens >= 0):
            found.append(f"warmup_tokens is {self.warmup_tokens!r}, needs a whole number from 0 on, or None")
        if not isinstance(self.seed, int) or self.seed < 0:
            found.append(f"seed is {self.seed!r}, needs a whole number from 0 on")
        return found

    def _start_problems(self, start: InitialModel, vocab_size: int) -> list[str]:
        """What keeps the run from starting from that model."""
        found = []
        if self.size != IMPORTED and SIZES[self.size] != start.shape:
            found.append(
                f"size {self.size!r} is {SIZES[self.size]}, init_from has {start.shape}: give size {IMPORTED!r}"
            )
        if vocab_size > start.vocab_size:
            found.append(
                f"the corpus has {vocab_size} token ids, init_from knows {start.vocab_size}: take its tokenizer"
            )
        if is_number(self.context) and self.context > start.context:
            found.append(f"context {self.context} is longer than that of init_from, {start.context}")
        return found

    def identity(self, corpus_name: str, corpus_fingerprint: str) -> dict[str, Any]:
        """What makes the run's key, JSON-able: every field, the corpus, and the version of what the code computes.

        A run that starts from random weights has no ``init_from`` there.
        """
        own = encodable(self if self.flops is None else replace(self, tokens=0), "run")
        if self.init_from is None:
            del own["init_from"]
        return {
            **own,
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
        unread = {"method", "options", "init_from"} | ({"tokens"} if identity["flops"] is not None else set())
        values = {f.name: identity[f.name] for f in fields(cls) if f.name not in unread}
        options = typed(METHODS[method].options, identity["options"])
        start = InitialModel.from_identity(identity["init_from"]) if "init_from" in identity else None
        run: RunConfig = typed(cls, {**values, "method": method, "options": options, "init_from": start})
        return run


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def apply_point(base: RunConfig, point: Mapping[str, Any], *, also: Iterable[str] = ()) -> tuple[RunConfig, list[str]]:
    """A run from a base and the known names of a sweep's point, with what is wrong about the other names.

    A name is a field of :class:`RunConfig` or an option of the point's method; anything else is an error. ``also`` are
    names that the caller knows besides, to suggest where one is misspelt.
    """
    found: list[str] = []
    method = point.get("method", base.method)
    if method not in METHODS:
        return base, [f"method {method!r} is none of {', '.join(METHODS)}{did_you_mean(method, METHODS)}"]
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
        if name == "init_from" and isinstance(value, str):
            from haltscale.platform.llama import llama  # reads tokenizers and weights, which few runs need

            try:
                values[name] = llama(value)
            except ValueError as error:
                found.append(f"init_from: {error}")
        elif name in run_names:
            values[name] = value
        elif name in option_names:
            options[name] = value
        else:
            known = [*run_names, *option_names, *also]
            owners = [str(m) for m, entry in METHODS.items() if name in _names(entry.options)]
            hint = f"; {', '.join(owners)} has it" if owners else did_you_mean(name, known)
            found.append(f"{method} has no {name!r}{hint}")
    run = replace(base, method=method, options=typed(option_type, options), **as_members(type(base), values))
    return run, found


def typed(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from values that may have been read from JSON; see :func:`as_members`."""
    return kind(**as_members(kind, values))


def as_members(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with every string that names a member of its field's enum as that member: code compares with ``is``.

    A list becomes a tuple, so that a frozen dataclass stays hashable.
    """
    members = dict(values)
    for name, hint in _hints(kind).items():
        enum = next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and issubclass(t, StrEnum)), None)
        if name not in members:
            continue
        value = members[name]
        if isinstance(value, list | tuple):
            members[name] = tuple(enum(v) if enum and v in list(enum) else v for v in value)
        elif enum and value in list(enum):
            members[name] = enum(value)
    return members


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _names(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def did_you_mean(word: object, known: Any) -> str:
    """The end of an error about an unknown name: the known one that is closest, or all of them."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(map(str, known))}"

"""What a run is: its identity, frozen, and checked before anything starts. How it is executed: `execution.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from haltscale.model import (
    METHODS,
    MODEL_CHOICES,
    SIZES,
    EmbeddingScale,
    Method,
    MethodOptions,
    ModelConfig,
    Parametrisation,
    Shape,
    VanillaOptions,
    config_problems,
)
from haltscale.model.config import (
    build_options,
    did_you_mean,
    in_range,
    is_number,
    is_size,
    named_shape,
    normalised,
    normalised_options,
    require,
    set_normalised,
)
from haltscale.model.loop_options import LOOP_FIELDS
from haltscale.platform.arms import arm
from haltscale.platform.identity import KEY_SCHEMA, SEMANTICS, digest, encodable
from haltscale.platform.initial_model import IMPORTED, InitialModel
from haltscale.platform.precision import Precision as Precision  # handed on
from haltscale.platform.precision import fast_precision


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


class Optimizer(StrEnum):
    """What turns gradients into steps."""

    ADAMW = "adamw"
    """AdamW for every weight."""
    MUON = "muon"
    """Muon for the matrices of the blocks, AdamW for embeddings, heads, norms, routers and vectors."""


class ConfigError(ValueError):
    """A configuration is refused; ``problems`` lists everything wrong with it at once."""

    def __init__(self, problems: list[str], subject: str = "study") -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"this {subject} cannot run, nothing was started:\n{lines}")


LABELLED_OPTIONS = {"lam": "λ", "beta": "β", "l_max": "l_max"}
"""Options that a run's label shows: λ always, the others where they differ from the method's default."""


LABELLED_SWITCHES = tuple(name for name in LOOP_FIELDS if name != "depth_growth")
"""Switches that it shows where they are on; depth_growth has a say in published studies, whose labels stay."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that changes what a run computes; the corpus joins it in :meth:`identity`."""

    method: Method | str = Method.VANILLA
    """What the model computes; see ``haltscale.model.METHODS``."""
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
    tie_embeddings: bool = False
    """Whether the head uses the embedding's matrix. The authors do not tie."""
    embedding_rank: int = 0
    """Above 0: embedding and head are products of two matrices, vocabulary x rank and rank x d."""
    embedding_scale: EmbeddingScale = EmbeddingScale.UNIT
    """What embeddings are multiplied by on the way in: unit for sqrt(2.5 d), sqrt_d, or none."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm; the authors' pause, PonderLM and PonderLM-2 have 0.1."""
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
    """The optimizer's, on matrices only."""
    optimizer: Optimizer = Optimizer.ADAMW
    muon_rate: float = 1.0
    """Multiple of the learning rate at which Muon's matrices train. Its updates have the root mean square of AdamW's:
    begin with 1."""
    muon_momentum: float = 0.95
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip: float = 1.0
    """Greatest gradient norm."""
    parametrisation: Parametrisation = Parametrisation.STANDARD
    """How initial weights and each parameter's rate, epsilon and decay depend on the shape
    (``haltscale/model/parametrisation.py``): under ``mup`` and ``completep`` a rate that was tuned on a small model is
    one for a large model."""
    document_mask: bool = False
    """Attention stops at the borders of documents. False is the paper's way: the documents of a packed row see those
    before them."""
    precision: Precision = Precision.AUTO
    seed: int = 0
    """Of the initial weights and of the order of the sequences."""
    init_from: InitialModel | None = None
    """A Llama whose weights the run starts from (``llama("/models/smol")``, or ``--set init_from=/models/smol``): its
    training is continued, with any method. None starts from random weights."""

    def __post_init__(self) -> None:
        set_normalised(self)
        object.__setattr__(self, "options", normalised_options(self.options))

    @property
    def shape(self) -> Shape:
        """Size of the stack."""
        return self.init_from.shape if self.init_from else named_shape(self.size)

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
        own = {name: getattr(self.options, name, None) for name in ("steps_from", "injection")}
        shown = [arm({"method": self.method, "options": own}), self.size]
        for name in LABELLED_SWITCHES:
            value = getattr(self.options, name, None)
            if value is not None and value != getattr(defaults, name):
                shown.append(name if value is True else f"{name} {value}")
        for name, symbol in LABELLED_OPTIONS.items():
            value = getattr(self.options, name, None)
            if value is not None and (name == "lam" or value != getattr(defaults, name)):
                shown.append(f"{symbol} {value:g}")
        return " · ".join([*shown, *([f"seed {self.seed}"] if self.seed else [])])

    def model_config(self, vocab_size: int, end_of_text: int | None = None) -> ModelConfig:
        """The model of this run.

        Args:
            end_of_text: the token before every document of the corpus; needed for a run with ``document_mask``.

        Raises:
            ValueError: the run has a ``document_mask``, and no ``end_of_text`` was given.
        """
        if self.document_mask and end_of_text is None:
            raise ValueError("document_mask requires end_of_text, the token before every document of the corpus")
        config = ModelConfig(
            method=self.method,
            shape=self.shape,
            vocab_size=vocab_size,
            context=self.context,
            options=self.options,
            parametrisation=self.parametrisation,
            document_start=end_of_text if self.document_mask else None,
            **{name: getattr(self, name) for name in MODEL_CHOICES},
        )
        if (start := self.init_from) is None:
            return config
        return replace(
            config,
            vocab_size=start.vocab_size,  # often some more than its tokenizer has
            rope_theta=start.rope_theta,
            norm_eps=start.norm_eps,
            tie_embeddings=start.tie_embeddings,
            embedding_rank=0,
            embedding_scale=EmbeddingScale.NONE,  # as the Llama has it
        )

    def parameters(self, vocab_size: int) -> int:
        """Parameters of the plain model of this run's shape; what its method adds is left out."""
        config = self.model_config(vocab_size, end_of_text=0)
        return config.shape.parameters(
            config.vocab_size, tie_embeddings=config.tie_embeddings, embedding_rank=config.embedding_rank
        )

    def problems(self, vocab_size: int = 4096) -> list[str]:
        """Everything wrong with this run, each naming its field and the allowed values."""
        found = []
        sized = self
        if not is_size(self.size) and not (self.init_from and self.size == IMPORTED):
            found.append(f"size {self.size!r} is not on the ladder{did_you_mean(self.size, SIZES)}")
            sized = replace(self, size=next(iter(SIZES)))
        elif self.init_from:
            found += self._start_problems(self.init_from, vocab_size)
        found += config_problems(sized.model_config(vocab_size, end_of_text=0))
        whole = {name: getattr(self, name) for name in ("tokens", "context", "batch_tokens")}
        wrong = [problem for name, value in whole.items() for problem in in_range(name, value, 1, integer=True)]
        found += wrong
        if not wrong:
            if self.batch_tokens % self.context:
                found.append(f"batch_tokens must be a multiple of context {self.context} (got {self.batch_tokens})")
            if self.tokens < self.batch_tokens:
                found.append(f"tokens must be at least one batch, {self.batch_tokens} (got {self.tokens})")
        found += in_range("learning_rate", self.learning_rate, 0, 10, above=True)
        for name in ("warmup_fraction", "decay_fraction", "final_learning_rate_fraction"):
            found += in_range(name, getattr(self, name), 0, 1)
        found += in_range("weight_decay", self.weight_decay, 0, 10)
        found += in_range("muon_rate", self.muon_rate, 0, 1000, above=True)
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            found += in_range(name, getattr(self, name), 0, 0.99999)
        found += in_range("clip", self.clip, 0, 1e9, above=True)
        for name, members in (("precision", Precision), ("schedule", Schedule), ("optimizer", Optimizer)):
            value = getattr(self, name)
            found += require(value in list(members), name, value, f"one of {', '.join(members)}")
        found += require(isinstance(self.document_mask, bool), "document_mask", self.document_mask, "true or false")
        if self.optimizer is Optimizer.MUON and self.parametrisation is not Parametrisation.STANDARD:
            found.append(f"parametrisation {self.parametrisation} scales AdamW's rates: use standard with muon")
        if self.flops is not None:
            found += in_range("flops", self.flops, 0, above=True)
        if self.warmup_tokens is not None:
            found += in_range("warmup_tokens", self.warmup_tokens, 0, integer=True)
        return found + in_range("seed", self.seed, 0, integer=True)

    def _start_problems(self, start: InitialModel, vocab_size: int) -> list[str]:
        """What keeps the run from starting from that model."""
        defaults = {f.name: f.default for f in fields(RunConfig)}
        found = [
            f"{name} {getattr(self, name)} cannot be set with init_from, which has its own: leave it out"
            for name in MODEL_CHOICES
            if getattr(self, name) != defaults[name]
        ]
        if getattr(self.options, "zero_outputs", False):
            found.append("zero_outputs cannot be set with init_from, whose weights are not zero: leave it out")
        if self.size != IMPORTED and named_shape(self.size) != start.shape:
            found.append(
                f"size {self.size!r} is {named_shape(self.size)}, init_from has {start.shape}: give size {IMPORTED!r}"
            )
        if self.parametrisation is not Parametrisation.STANDARD:
            found.append(
                f"parametrisation {self.parametrisation} applies to random initial weights, not to"
                " those of init_from: use standard"
            )
        if vocab_size > start.vocab_size:
            found.append(f"the corpus has {vocab_size} token ids, init_from has {start.vocab_size}: use its tokenizer")
        if is_number(self.context) and self.context > start.context:
            found.append(f"context {self.context} is longer than that of init_from, {start.context}")
        return found

    def canonical(self) -> RunConfig:
        """The run with every field that changes nothing at its default: runs that compute the same are equal.

        Tokens are those of whole steps; tokens under a budget in FLOPs, the shape of a decay that the schedule does not
        have, a share of warm-up where it is given in tokens, and options that another option makes idle (a method's
        ``canonical``) have no effect.
        """
        idle: set[str] = set()
        if self.flops is not None:
            idle.add("tokens")
        if self.schedule is not Schedule.WSD:
            idle.add("decay_fraction")
        if self.schedule is Schedule.CONSTANT:
            idle.add("final_learning_rate_fraction")
        if self.warmup_tokens is not None:
            idle.add("warmup_fraction")
        if self.optimizer is not Optimizer.MUON:
            idle |= {"muon_rate", "muon_momentum"}
        defaults: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in idle}
        if self.flops is None and self.steps:
            defaults["tokens"] = self.steps * self.batch_tokens
        if self.init_from is not None:
            defaults["size"] = IMPORTED
        options: Any = self.options
        if hasattr(options, "canonical"):
            options = options.canonical()
        canonical: RunConfig = replace(_rounded(self), **{**defaults, "options": _rounded(options)})
        return canonical

    def resolved(self, *, on_gpu: bool = False) -> RunConfig:
        """The run with the number format that ``precision=auto`` stands for.

        Args:
            on_gpu: whether it will train on GPUs, which this machine may lack.
        """
        if self.precision is not Precision.AUTO:
            return self
        return replace(self, precision=fast_precision(on_gpu=on_gpu))

    def identity(self, corpus_name: str, corpus_fingerprint: str) -> dict[str, Any]:
        """What the run computes, JSON-able: every field of :meth:`canonical`, the shape behind the size's name, the
        corpus, and the versions of the code. A run that starts from random weights has no ``init_from`` there.

        Raises:
            ValueError: the precision is not resolved yet (:meth:`resolved`).
        """
        if self.precision is Precision.AUTO:
            raise ValueError("precision auto does not identify a run: resolve it first (RunConfig.resolved)")
        canonical = self.canonical()
        own = encodable(canonical, "run")
        if self.init_from is None:
            del own["init_from"]
        if self.flops is not None:
            del own["tokens"]  # whatever the FLOPs buy
        return {
            "schema": KEY_SCHEMA,
            **own,
            "shape": encodable(self.shape, "shape"),
            "corpus": corpus_name,
            "corpus_fingerprint": corpus_fingerprint,
            "semantics": {**SEMANTICS, "method": METHODS[self.method].semantics},
        }

    def key(self, corpus_name: str, corpus_fingerprint: str) -> str:
        """The run's key in the store."""
        return run_key(self.identity(corpus_name, corpus_fingerprint))

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> RunConfig:
        """The inverse of :meth:`identity`, for a run read back from the store, of this schema or an earlier one.

        A field that the identity lacks was added since: it has the value that means what the code did before.
        """
        method = METHODS.known(identity["method"])
        unread = {"method", "options", "init_from"}
        if identity.get("flops") is not None:
            unread.add("tokens")
        values = {f.name: identity[f.name] for f in fields(cls) if f.name in identity and f.name not in unread}
        values = {**{name: value for name, value in KEY_DEFAULTS.items() if name in RUN_FIELDS}, **values}
        former = {n.partition(".")[2]: value for n, value in KEY_DEFAULTS.items() if n.startswith(f"{method}.")}
        options = build_options(METHODS[method].options, {**former, **identity["options"]})
        start = InitialModel.from_identity(identity["init_from"]) if "init_from" in identity else None
        run: RunConfig = build_options(cls, {**values, "method": method, "options": options, "init_from": start})
        return run


def _rounded(values: Any) -> Any:
    """A dataclass with its floats to the 12 digits that count: 0.1 + 0.2 is 0.3."""
    floats = {f.name: value for f in fields(values) if isinstance(value := getattr(values, f.name), float)}
    return replace(values, **{name: float(f"{value:.12g}") for name, value in floats.items()})


RUN_FIELDS = tuple(f.name for f in fields(RunConfig))
KEY_DEFAULTS: dict[str, Any] = {}
"""Where a default of :class:`RunConfig` or of a method's options (``"adaptive.tau"``) has changed since key schema 2:
the value that it had. What equals it stays out of the key, so that changing a default re-keys nothing."""


def run_key(identity: Mapping[str, Any]) -> str:
    """The run's folder name: method and size for the eye, a digest of what is computed for the machine.

    Only what differs from the defaults enters (:data:`KEY_DEFAULTS`, else the field's own), so that a new field with a
    default keeps every key. Names alone, of the size and of the corpus, do not enter: the shape and the fingerprint do.
    """
    if "schema" not in identity:  # schema 1: all fields, as they were given
        return f"{identity['method']}-{identity['size']}-{digest(identity)}"
    method = identity["method"]
    own = {f.name: f.default for f in fields(RunConfig)} | KEY_DEFAULTS
    options: Any = METHODS[method].options() if method in METHODS else None
    usual = {f.name: getattr(options, f.name) for f in fields(options)} if options is not None else {}
    usual |= {name.partition(".")[2]: value for name, value in KEY_DEFAULTS.items() if name.startswith(f"{method}.")}
    fixed = {"schema", "method", "size", "options", "corpus", "semantics", "precision"}
    short = {
        "schema": identity["schema"],
        "method": method,
        "precision": identity["precision"],
        **{name: value for name, value in identity.items() if name not in fixed and _differs(value, own, name)},
        "options": {name: value for name, value in identity["options"].items() if _differs(value, usual, name)},
        "semantics": {part: version for part, version in identity["semantics"].items() if version != 1},
    }
    return f"{method.rpartition(':')[2]}-{identity['size']}-{digest(short)}"  # of an importable path, what it names


def _differs(value: Any, defaults: Mapping[str, Any], name: str) -> bool:
    return name not in defaults or encodable(defaults[name]) != encodable(value)


def current_identity(document: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a ``record.json`` or ``spec.json``, in the present schema, whichever it was written in.

    Schema 1 had the precision as it was requested; its records say which one it was. Empty where the document has no
    identity, or lacks what the present schema needs: an unfinished run of schema 1 whose precision nobody wrote down.
    """
    identity = document.get("identity") or {}
    if not identity or "schema" in identity:
        return dict(identity)
    precision = document.get("precision") if identity.get("precision") == Precision.AUTO else identity.get("precision")
    if precision not in list(Precision) or precision == Precision.AUTO or identity.get("semantics") != 1:
        return {}
    try:
        run = replace(RunConfig.from_identity(identity), precision=Precision(precision))
        known = run.identity(identity["corpus"], identity["corpus_fingerprint"])
    except (KeyError, ValueError, TypeError):
        return {}
    return {**known, "semantics": dict.fromkeys(known["semantics"], 1)}


def apply_point(base: RunConfig, point: Mapping[str, Any], *, also: Iterable[str] = ()) -> tuple[RunConfig, list[str]]:
    """A run from a base and the known names of a sweep's point, with what is wrong about the other names.

    A name is a field of :class:`RunConfig` or an option of the point's method; anything else is an error. ``also`` are
    names that the caller knows besides, to suggest where one is misspelt.
    """
    found: list[str] = []
    try:
        method = METHODS.named(point.get("method", base.method))
    except ValueError as error:
        return base, [str(error)]
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
        if name == "init_from" and not isinstance(value, str | InitialModel | None):
            found.append(f"init_from = {value!r}: must be a folder, a name on the Hub, or llama(...)")
        elif name == "init_from" and isinstance(value, str):
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
            owners = METHODS.with_option(name)
            hint = f"; {', '.join(owners)} has it" if owners else did_you_mean(name, known)
            found.append(f"{method} has no {name!r}{hint}")
    run = replace(base, method=method, options=build_options(option_type, options), **normalised(type(base), values))
    return run, found

"""What a model is: the method, the size of its stack, and the options of the method.

A configuration says everything that decides what a model computes, and nothing about where or how fast it runs (worker
counts, precision, activation checkpointing are the trainer's business). `registry.config_problems` lists every error at
once, each naming its field and what is allowed; `to_dict` and `registry.config_from_dict` round-trip through JSON.
"""

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class Method(StrEnum):
    """The methods of this package. Each has one file here and one entry in registry.py. Those of other packages have
    plain strings for names (methods.py)."""

    VANILLA = "vanilla"
    ADAPTIVE = "adaptive"
    FIXED = "fixed"
    SHUFFLED = "shuffled"
    LOOPED = "looped"
    PAUSE = "pause"
    PONDER = "ponder"
    PONDER2 = "ponder2"
    MOR = "mor"
    PONDER3 = "ponder3"
    ADAPONDER = "adaponder"


class EmbeddingScale(StrEnum):
    """What embeddings are multiplied by on the way in."""

    NONE = "none"
    """Nothing: the plain Llama, and the authors' vanilla model."""
    SQRT_D = "sqrt_d"
    """sqrt(d), as the authors' pause and PonderLM have it."""
    UNIT = "unit"
    """sqrt(2.5 d), as their looped model and PonderLM-2: with the initial std of sqrt(2/(5d)), a token and a fed-back
    hidden state have the same size."""

    def factor(self, d: int) -> float:
        """The number, for hidden size d."""
        return {EmbeddingScale.NONE: 1.0, EmbeddingScale.SQRT_D: math.sqrt(d)}.get(self, math.sqrt(2.5 * d))


class MethodOptions(Protocol):
    """What every method's options dataclass offers besides its fields."""

    def problems(self) -> list[str]:
        """All errors of the options, each naming the field and the allowed values; empty if they are sound."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a Llama stack."""

    layers: int
    """Transformer blocks in one pass."""
    d: int
    """Hidden size."""
    heads: int
    """Query heads; the head dimension is d / heads."""
    kv_heads: int
    """Key/value heads; equal to `heads` for plain multi-head attention, a divisor of it for grouped queries (GQA)."""
    ffn: int
    """Inner size of the SwiGLU MLP."""

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.d // self.heads

    def parameters(self, vocab_size: int, *, tie_embeddings: bool = False, embedding_rank: int = 0) -> int:
        """Parameters of the plain Llama of this shape: embedding, blocks, final norm and (untied) head."""
        attention = 2 * self.d * self.d + 2 * self.d * self.kv_heads * self.head_dim
        block = attention + 3 * self.d * self.ffn + 2 * self.d
        vocabularies = 1 if tie_embeddings else 2
        rank = embedding_rank
        vocabulary = rank * (vocab_size + self.d) if rank else vocab_size * self.d
        return vocabularies * vocabulary + self.layers * block + self.d

    def problems(self) -> list[str]:
        """All errors of the shape."""
        found = [
            f"shape.{field.name} = {getattr(self, field.name)!r}: must be a positive integer"
            for field in dataclasses.fields(self)
            if not is_int(getattr(self, field.name)) or getattr(self, field.name) < 1
        ]
        if found:
            return found
        if self.d % self.heads:
            found.append(f"shape.heads = {self.heads}: must divide shape.d = {self.d}")
        elif self.head_dim % 2:
            found.append(f"shape.heads = {self.heads}: the head dimension {self.head_dim} must be even (rotary pairs)")
        if self.heads % self.kv_heads:
            found.append(f"shape.kv_heads = {self.kv_heads}: must divide shape.heads = {self.heads}")
        return found


def rung(layers: int, d: int) -> Shape:
    """A step of the ladder. Its rule, which is that of the authors' table carried on to small models:

    - d is a multiple of 64, and kv_heads = heads (plain multi-head attention).
    - The head dimension is 64; below d = 192, where that would leave one or two heads, it is 32.
    - ffn = 43/16 d (2.6875 d, so that 3 x d x ffn is about the 8 d^2 of an MLP of inner size 4 d).
    - Depth: our sizes are named for a parameter count, at vocabulary 4,096 and untied, and have the fewest layers that
      reach 99 % of it. The authors' depths are their own.
    """
    heads = d // (64 if d >= 192 else 32)
    return Shape(layers=layers, d=d, heads=heads, kv_heads=heads, ffn=43 * d // 16)


SIZES: dict[str, Shape] = {
    # Ours.
    "0.6m": rung(2, 64),
    "1.8m": rung(4, 128),
    "4m": rung(6, 192),
    "8m": rung(8, 256),
    "17m": rung(8, 384),
    "35m": rung(13, 448),
    "70m": rung(13, 640),
    # The authors', with their names: 162.7M, 406.6M, 837.6M, 1420.4M, 2634.7M at vocabulary 50,304.
    "125m": rung(12, 768),
    "410m": rung(24, 1024),
    "834m": rung(24, 1536),
    "1.4b": rung(24, 2048),
    "2.8b": rung(48, 2048),
}


def named_shape(size: str) -> Shape:
    """The shape of a size: a step of the ladder; LAYERSxWIDTH by the ladder's rule, such as 3x96; or LAYERSxWIDTHxFFN.

    Raises:
        KeyError: there is no such size.
    """
    if size in SIZES or not is_size(size):
        return SIZES[size]
    layers, d, *ffn = map(int, size.split("x"))
    shape = rung(layers, d)
    return dataclasses.replace(shape, ffn=ffn[0]) if ffn else shape


def is_size(size: object) -> bool:
    """Whether there is a shape of this name."""
    if not isinstance(size, str):
        return False
    if size in SIZES:
        return True
    parts = size.split("x")
    numbers = len(parts) in (2, 3) and all(part.isdecimal() and int(part) >= 1 for part in parts)
    return numbers and int(parts[1]) >= 32


class Parametrisation(StrEnum):
    """How initial weights and learning rates depend on the shape; see parametrisation.py."""

    STANDARD = "standard"
    """One learning rate for all weights; the best one falls with width and depth."""
    MUP = "mup"
    """muP: the best learning rate does not depend on the width."""
    COMPLETEP = "completep"
    """CompleteP: nor on the depth, loops included."""


MODEL_CHOICES = ("tie_embeddings", "embedding_rank", "embedding_scale", "norm_eps")
"""Choices of the model that a run makes for any method: its fields of the same names."""


def model_choice_problems(values: Any) -> list[str]:
    """All errors of the `MODEL_CHOICES` of a model or a run."""
    eps, scale = values.norm_eps, values.embedding_scale
    tied = values.tie_embeddings
    return [
        *require(is_number(eps) and 0 < eps < 1, "norm_eps", eps, "a number between 0 and 1"),
        *require(isinstance(tied, bool), "tie_embeddings", tied, "true or false"),
        *in_range("embedding_rank", values.embedding_rank, 0, 65_536, integer=True),
        *require(scale in list(EmbeddingScale), "embedding_scale", scale, f"one of {', '.join(EmbeddingScale)}"),
    ]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model, complete: same config and seed, same initial weights and same results."""

    method: Method | str
    """What the model computes before it emits a token."""
    shape: Shape
    """Size of the stack; see SIZES."""
    vocab_size: int
    """Rows of the embedding and of the head."""
    context: int
    """Longest sequence, in tokens, that the model reads."""
    options: MethodOptions
    """The method's own options; its type is fixed by `method` (see registry.METHODS)."""
    rope_theta: float = 10_000.0
    """Base of the rotary position wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding's matrix. The authors do not tie."""
    embedding_rank: int = 0
    """Above 0: embedding and head are products of two matrices, vocab_size x rank and rank x d (ALBERT, 1909.11942)."""
    embedding_scale: EmbeddingScale = EmbeddingScale.UNIT
    """What embeddings are multiplied by on the way in. The authors' vanilla model goes without, and their pause and
    PonderLM take sqrt(d); here every arm has unit scale by default, so that a comparison is about methods and not
    about scale. True and False, in files of former versions, are unit and none."""
    parametrisation: Parametrisation = Parametrisation.STANDARD
    """Of the initial weights; training takes its rates from it too. What a forward pass computes from given weights is
    the same in all."""

    document_start: int | None = None
    """The token that begins a document (end-of-text): attention stops there. None: a row's documents see each other,
    as in the paper. Decoding reads one document."""

    def __post_init__(self) -> None:
        if isinstance(self.embedding_scale, bool):
            scale = EmbeddingScale.UNIT if self.embedding_scale else EmbeddingScale.NONE
            object.__setattr__(self, "embedding_scale", scale)
        set_normalised(self)
        object.__setattr__(self, "options", normalised_options(self.options))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-able data."""
        return dataclasses.asdict(self) | {"method": str(self.method)}


def key_problems(kind: Any, data: Mapping[str, Any], prefix: str) -> list[str]:
    """Keys of `data` that the dataclass `kind` does not have, and required ones that are missing."""
    fields = dataclasses.fields(kind)
    names = [field.name for field in fields]
    found = [f"{prefix}{key}: unknown{did_you_mean(key, names)}" for key in data if key not in names]
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    return found + [f"{prefix}{name}: missing" for name in required if name not in data]


def build_options(kind: Any, data: Mapping[str, Any]) -> Any:
    """The dataclass `kind` from data that may have been typed, or read from JSON; see `normalised`."""
    return kind(**normalised(kind, data))


def normalised(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the fields of the dataclass `kind`, so that what computes the same is the same: the text of an enum's
    member becomes the member (code compares with `is`), a list a tuple, a NumPy scalar a Python number, and a whole
    float in an integer field an integer."""
    found = dict(values)
    for name, hint in _hints(kind).items():
        if name in found:
            found[name] = _normalised(found[name], (hint, *typing.get_args(hint)))
    return found


def _normalised(value: Any, kinds: tuple[Any, ...]) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_normalised(item, kinds) for item in value)
    if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, str):
        enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, StrEnum)]
        return next((enum(value) for enum in enums if value in list(enum)), value)
    whole = isinstance(value, float) and math.isfinite(value) and value.is_integer()
    return int(value) if whole and int in kinds and float not in kinds else value


def set_normalised(instance: Any) -> None:
    """For `__post_init__` of a frozen dataclass: `normalised`, in place."""
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    for name, value in normalised(type(instance), values).items():
        if value is not values[name]:
            object.__setattr__(instance, name, value)


def normalised_options(options: Any) -> Any:
    """A method's options with `normalised` values; anything else as it is."""
    if not dataclasses.is_dataclass(options) or isinstance(options, type):
        return options
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return build_options(type(options), values)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def did_you_mean(word: object, known: typing.Iterable[object]) -> str:
    """The end of an error about an unknown name: the known one that is closest, or all of them."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f": must be one of {', '.join(names)}"


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def require(holds: bool, field: str, value: object, allowed: str) -> list[str]:
    """One problem line if `holds` is false: for the options dataclasses, so that all errors have one form."""
    return [] if holds else [f"{field} = {value!r}: must be {allowed}"]


def in_range(
    field: str, value: object, low: float, high: float = float("inf"), *, integer: bool = False, above: bool = False
) -> list[str]:
    """A problem line unless `value` is a number (an integer) from `low` (exclusive if `above`) to `high`."""
    kind = "an integer" if integer else "a finite number"
    right_type = is_int(value) if integer else is_number(value)
    bounds = f"{'above' if above else 'of at least'} {low:g}" + (
        f" and at most {high:g}" if high < float("inf") else ""
    )
    holds = right_type and (value > low if above else value >= low) and value <= high  # type: ignore[operator]
    return require(holds and value != float("inf"), field, value, f"{kind} {bounds}")

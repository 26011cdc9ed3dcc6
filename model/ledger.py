"""What a forward pass cost: passes counted while it ran, and the FLOPs that follow.

Three kinds of FLOPs, never to be mixed on one axis:

- realised: model FLOPs, as in MFU: what the active positions needed. Every row that was computed, every key that it
  could see; no padding, no masked pairs. This is the cost of the method.
- executed: hardware FLOPs, as in HFU: what was computed. Padding, masked query-key pairs and head rows without a target
  included. It equals torch's FlopCounterMode, which counts each matrix product it sees as a full rectangle (a causal
  kernel may skip half of one; neither that counter nor this one credits it).
- paper: 2 * N * passes, with N all parameters: the convention behind the paper's figures, which leaves out attention's
  growing key length, the head and the router (and counts the embedding table as if it were multiplied).

A multiply-add is 2 FLOPs. Norms, rotary, softmax and other elementwise work are left out, as everywhere.

Training costs 3 x forward: the backward pass does two products of the forward's size for each of the forward's (one for
the gradient of the input, one for that of the weight; for attention, one for each of its two operands). Passes that run
without a gradient cost their forward alone. Recomputation under activation checkpointing adds up to one more forward,
which is execution, not method, and is not in here.
"""

from dataclasses import astuple, dataclass, field, replace
from itertools import zip_longest

from haltscale.model.config import Shape

TRAINING_TO_FORWARD = 3
"""Training FLOPs = this x forward FLOPs; the reason stands at the top of this file."""


@dataclass
class PassCounts:
    """What was counted while a model ran, per pass k: plain integers, so that counts of batches add up exactly."""

    rows: list[int] = field(default_factory=list)
    """Positions that needed pass k."""
    keys: list[int] = field(default_factory=list)
    """Query-key pairs that they needed: the sum over those positions of the keys visible to each."""
    executed_rows: list[int] = field(default_factory=list)
    """Rows that went through the linear layers in pass k, padding included."""
    executed_keys: list[int] = field(default_factory=list)
    """Query-key pairs that attention was handed in pass k, padding and masked pairs included."""
    tokens: int = 0
    """Real (not padded) positions."""
    head_rows: int = 0
    """Rows that went through the LM head."""
    gradless: "PassCounts | None" = None
    """What was executed without a gradient on top of the rest, so that no backward pass follows; nothing realised."""
    forward_only: "PassCounts | None" = None
    """The part of these passes that ran without a gradient (`LoopOptions.gradient_passes`): the first ones."""

    def __add__(self, other: "PassCounts") -> "PassCounts":
        def add(mine: list[int], theirs: list[int]) -> list[int]:
            return [a + b for a, b in zip_longest(mine, theirs, fillvalue=0)]

        return PassCounts(
            rows=add(self.rows, other.rows),
            keys=add(self.keys, other.keys),
            executed_rows=add(self.executed_rows, other.executed_rows),
            executed_keys=add(self.executed_keys, other.executed_keys),
            tokens=self.tokens + other.tokens,
            head_rows=self.head_rows + other.head_rows,
            gradless=_both(self.gradless, other.gradless),
            forward_only=_both(self.forward_only, other.forward_only),
        )

    def executed_only(self) -> "PassCounts":
        """These counts with nothing realised: work that the hardware did and the method does not ask for."""
        return replace(self, rows=[0] * len(self.rows), keys=[0] * len(self.keys), tokens=0, forward_only=None)

    def first(self, passes: int) -> "PassCounts | None":
        """The counts of the first passes alone, without head; None for none."""
        if not passes:
            return None
        return PassCounts(
            rows=self.rows[:passes],
            keys=self.keys[:passes],
            executed_rows=self.executed_rows[:passes],
            executed_keys=self.executed_keys[:passes],
        )

    def record(self, *, rows: int, keys: int, executed_rows: int, executed_keys: int) -> None:
        """Append one pass."""
        self.rows.append(rows)
        self.keys.append(keys)
        self.executed_rows.append(executed_rows)
        self.executed_keys.append(executed_keys)

    @property
    def mean_passes(self) -> float:
        """Passes per real token."""
        return sum(self.rows) / max(self.tokens, 1)


def _both(mine: PassCounts | None, theirs: PassCounts | None) -> PassCounts | None:
    return mine + theirs if mine and theirs else mine or theirs


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, by kind (see the top of this file)."""

    realised: float = 0.0
    executed: float = 0.0
    paper: float = 0.0
    executed_gradless: float = 0.0
    """The part of `executed` that no backward pass follows."""
    realised_gradless: float = 0.0
    """The same of `realised`."""
    paper_gradless: float = 0.0
    """The same of `paper`."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> "Flops":
        return Flops(*(mine * factor for mine in astuple(self)))

    __rmul__ = __mul__

    @property
    def training(self) -> "Flops":
        """Forward and backward, given that self is the forward."""

        def both(all_: float, once: float) -> float:
            return TRAINING_TO_FORWARD * (all_ - once) + once

        return replace(
            self,
            realised=both(self.realised, self.realised_gradless),
            executed=both(self.executed, self.executed_gradless),
            paper=both(self.paper, self.paper_gradless),
        )


def layer_row_flops(shape: Shape) -> float:
    """Linear-layer FLOPs of one row in one block: q, k, v and output projections and the three SwiGLU matrices."""
    attention = 2 * shape.d * shape.d + 2 * shape.d * shape.kv_heads * shape.head_dim
    return 2.0 * (attention + 3 * shape.d * shape.ffn)


def layer_pair_flops(shape: Shape) -> float:
    """Attention FLOPs of one query-key pair in one block: a score and a weighted value, d multiply-adds each."""
    return 4.0 * shape.d


def passes_flops(shape: Shape, rows: list[int], pairs: list[int], layers: list[int]) -> float:
    """FLOPs of several passes: rows[k] rows, each through layers[k] blocks, with pairs[k] query-key pairs per block."""
    return sum(
        depth * (n * layer_row_flops(shape) + m * layer_pair_flops(shape))
        for n, m, depth in zip(rows, pairs, layers, strict=True)
    )


def head_flops(shape: Shape, vocab_size: int, rows: int, *, rank: int = 0) -> float:
    """FLOPs of the LM head on `rows`; rank: of a factorised one, 0 for a whole one."""
    return 2.0 * rows * (rank * (shape.d + vocab_size) if rank else shape.d * vocab_size)


def paper_training_flops(parameters: float, tokens: float, passes: float) -> float:
    """C = 6 N D passes. The paper's figures follow with N the nominal size (1.4e9) and D = 26e9 training tokens."""
    return 6.0 * parameters * tokens * passes


def paper_inference_flops(parameters: float, tokens: float, passes: float) -> float:
    """C = 2 N D passes."""
    return 2.0 * parameters * tokens * passes


def paper_passes(training_flops: float, parameters: float, tokens: float) -> float:
    """Mean passes per token behind a figure that the paper gives as training FLOPs."""
    return training_flops / (6.0 * parameters * tokens)

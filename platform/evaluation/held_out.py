"""Held-out evaluation: loss, perplexity, bits per byte, and latent steps. PyTorch only.

Texts are read in batches of windows, and what happened at every token comes as a stream of events, so that a long
evaluation needs no more memory than a short one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from haltscale.model import Flops, LanguageModel, probing
from haltscale.model.posthoc import GoesOn
from haltscale.model.probing import Reading
from haltscale.platform.corpora.corpus import HeldOutDocument

STATES_READ = 1 << 14
"""So many tokens of a validation split are read after every step: enough for a standard error of about 0.01 nats, and
a small part of a long split's head rows."""


BATCHES_PER_GATHER = 8
"""So many batches each of several ranks reads before rank 0 takes what they found: seldom enough that ranks hardly wait
for each other, often enough that memory does not grow with the text."""


@dataclass(frozen=True, kw_only=True)
class TokenEvents:
    """What happened at every emitted token of some text, in reading order."""

    document: npt.NDArray[np.int64]
    """``(n,)`` which document."""
    position: npt.NDArray[np.int64]
    """``(n,)`` place of the token in its document."""
    token_id: npt.NDArray[np.int64]
    """``(n,)`` the token that was to be predicted."""
    nll: npt.NDArray[np.float32]
    """``(n,)`` nats of each token given what stands before it."""
    entropy: npt.NDArray[np.float32]
    """``(n,)`` nats, of the distribution over the token."""
    confidence: npt.NDArray[np.float32]
    """``(n,)`` the greatest probability in that distribution."""
    correct: npt.NDArray[np.bool_]
    """``(n,)`` whether the token had it."""
    steps: npt.NDArray[np.uint8]
    """``(n,)`` latent steps executed before it was emitted."""
    exit: npt.NDArray[np.float32]
    """``(n, l_max + 1)`` share of each state in what the head read."""
    sampled: npt.NDArray[np.int64]
    """``(s,)`` indices of the tokens that were read after every step."""
    nll_by_step: npt.NDArray[np.float32]
    """``(s, l_max + 1)`` nats had the position stopped after step k; NaN where that was not executed."""
    entropy_by_step: npt.NDArray[np.float32]
    """``(s, l_max + 1)`` likewise the entropy."""
    flops: Flops
    """Forward FLOPs of the reading."""

    @property
    def expected_steps(self) -> npt.NDArray[np.float32]:
        """``(n,)`` latent steps under the exit masses."""
        weights = np.arange(self.exit.shape[1], dtype=np.float32)
        return (self.exit @ weights).astype(np.float32)

    @property
    def reach(self) -> npt.NDArray[np.float32]:
        """``(n, l_max + 1)`` mass that reached each state: what leaves there or later."""
        return np.ascontiguousarray(self.exit[:, ::-1].cumsum(1)[:, ::-1])

    @classmethod
    def concatenate(cls, parts: Sequence[TokenEvents]) -> TokenEvents:
        """Several events after one another."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *[len(part.nll) for part in parts]])
        arrays: dict[str, Any] = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(cls)
            if field.name not in ("flops", "sampled")
        }
        sampled = np.concatenate([part.sampled + start for part, start in zip(parts, starts, strict=False)])
        return cls(**arrays, sampled=sampled, flops=sum((part.flops for part in parts), start=Flops()))


def read_events(
    model: LanguageModel,
    documents: Iterable[HeldOutDocument],
    *,
    context: int,
    batch_rows: int = 16,
    by_step: float = 0.0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[TokenEvents]:
    """Read documents and record every token, batch by batch.

    Several ranks share the batches of one: each reads every ``world``-th, and rank 0 gets the events of all, in their
    order and equal to the last bit. The other ranks get none.

    A document longer than the context is read in consecutive windows, each starting afresh; windows of unequal length
    are padded, and padding is neither scored nor counted.

    Args:
        model: put into evaluation mode.
        documents: each ``(n + 1,)`` tokens, the first of them end-of-text.
        context: window length in tokens.
        batch_rows: windows per forward pass.
        by_step: share of the tokens to read after every step, spread evenly; methods without a latent chain ignore it.
        rank: this process, in the group of ``world`` that read together; all have the same documents.
    """
    model.eval()
    seen = 0
    every = batches(documents, context, batch_rows)
    while group := list(itertools.islice(every, world * BATCHES_PER_GATHER if world > 1 else 1)):
        mine = []
        for turn, batch in enumerate(group):
            if turn % world == rank:
                mine.append(read_batch(model, batch, first=seen, by_step=by_step)[1])
            seen += int(batch.lengths.sum())
        if world == 1:
            yield from mine
            continue
        found: list[list[TokenEvents]] | None = [[]] * world if rank == 0 else None
        torch.distributed.gather_object(mine, found, dst=0)
        if found is not None:
            yield from (found[turn % world][turn // world] for turn in range(len(group)))


def read_batch(
    model: LanguageModel,
    batch: Batch,
    *,
    first: int = 0,
    by_step: float = 0.0,
    steps_BT: torch.Tensor | None = None,
    goes_on: GoesOn | None = None,
) -> tuple[Reading, TokenEvents]:
    """Read one batch.

    Args:
        first: its first token's place in the whole text, by which the share ``by_step`` is spread.
        steps_BT: latent steps by order, in place of the router's.
        goes_on: a halting rule, in place of the router's.
    """
    device = next(model.parameters()).device
    tokens, targets, lengths = (torch.as_tensor(x, device=device) for x in batch[:3])
    sampled_S, chosen_N = batch.spread(first, by_step)
    where = None if sampled_S is None else sampled_S.to(device)
    reading = probing.read(
        model, tokens, targets, lengths_B=lengths, sampled_S=where, steps_BT=steps_BT, goes_on=goes_on
    )
    return reading, _events(model, reading, batch, chosen_N)


def _events(model: LanguageModel, reading: Reading, batch: Batch, chosen_N: npt.NDArray[np.int64]) -> TokenEvents:
    real = reading.trace.valid_BT
    at = real.cpu().numpy()
    states = reading.trace.exit_BTK.shape[2]
    every_step = len(reading.nll_by_step_SK) > 0
    none = np.zeros((0, states), dtype=np.float32)
    return TokenEvents(
        document=np.broadcast_to(batch.document[:, None], at.shape)[at],
        position=(batch.start[:, None] + np.arange(at.shape[1]))[at],
        token_id=batch.targets[at],
        nll=reading.nll_BT[real].cpu().numpy(),
        entropy=reading.entropy_BT[real].cpu().numpy(),
        confidence=reading.confidence_BT[real].cpu().numpy(),
        correct=reading.correct_BT[real].cpu().numpy(),
        steps=reading.trace.steps_BT[real].cpu().numpy(),
        exit=reading.trace.exit_BTK[real].cpu().numpy(),
        sampled=chosen_N if every_step else np.zeros(0, dtype=np.int64),
        nll_by_step=reading.nll_by_step_SK.cpu().numpy() if every_step else none,
        entropy_by_step=reading.entropy_by_step_SK.cpu().numpy() if every_step else none,
        flops=model.flops(reading.trace.counts),
    )


def read_documents(
    model: LanguageModel,
    documents: Sequence[HeldOutDocument],
    *,
    context: int,
    batch_rows: int = 16,
    by_step: float = 0.0,
) -> TokenEvents:
    """All events of :func:`read_events` at once, for texts that are not long."""
    parts = read_events(model, documents, context=context, batch_rows=batch_rows, by_step=by_step)
    return TokenEvents.concatenate(list(parts))


class Batch(NamedTuple):
    """Some windows of some documents, padded with zeros to the longest of them."""

    tokens: npt.NDArray[np.int64]  # (rows, width)
    targets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]  # (rows,)
    document: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]  # place of each window in its document

    def spread(self, first: int, share: float) -> tuple[torch.Tensor | None, npt.NDArray[np.int64]]:
        """A share of the real tokens, the first of which is token ``first`` of the text: their indices into the batch
        flattened (None where there are none), and among its real tokens. Spread by the golden ratio (Weyl)."""
        real_N = np.flatnonzero(np.arange(self.tokens.shape[1]) < self.lengths[:, None])
        chosen_N = np.flatnonzero((np.arange(first, first + len(real_N)) + 1) * 0.6180339887498949 % 1.0 < share)
        return (torch.as_tensor(real_N[chosen_N]) if len(chosen_N) else None), chosen_N


def batches(documents: Iterable[HeldOutDocument], context: int, batch_rows: int) -> Iterator[Batch]:
    """Documents in windows of the context's length, so many at a time."""
    windows = (
        (index, start, document.tokens[start : start + context + 1])
        for index, document in enumerate(documents)
        for start in range(0, len(document.tokens) - 1, context)
    )
    while rows := list(itertools.islice(windows, batch_rows)):
        lengths = np.array([len(window) - 1 for _, _, window in rows], dtype=np.int64)
        tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
        targets = np.zeros_like(tokens)
        for row, (_, _, window) in enumerate(rows):
            tokens[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        places = np.array([(document, start) for document, start, _ in rows], dtype=np.int64)
        yield Batch(tokens, targets, lengths, places[:, 0], places[:, 1])


class Tally:
    """Sums over a stream of events, from which the evaluation row of the run store follows."""

    def __init__(self) -> None:
        self.tokens = 0
        self.flops = Flops()
        self._nll = self._nll2 = self._expected = 0.0
        self._histogram = np.zeros(0, dtype=np.int64)

    def add(self, events: TokenEvents) -> None:
        """Take some events in."""
        nll = events.nll.astype(np.float64)
        histogram = np.bincount(events.steps, minlength=events.exit.shape[1])
        self.tokens += len(nll)
        self.flops += events.flops
        self._nll += float(nll.sum())
        self._nll2 += float((nll * nll).sum())
        self._expected += float(events.expected_steps.sum(dtype=np.float64))
        self._histogram = histogram + (self._histogram if len(self._histogram) else 0)

    def row(self, *, text_bytes: int) -> dict[str, Any]:
        """Loss and halting of everything that was taken in.

        Args:
            text_bytes: UTF-8 length of the text: the denominator of bits per byte.

        Raises:
            ValueError: nothing was taken in.
        """
        if not self.tokens:
            raise ValueError("the held-out text has no tokens")
        loss = self._nll / self.tokens
        variance = max(self._nll2 - self._nll * loss, 0.0) / max(self.tokens - 1, 1)
        histogram = self._histogram / self.tokens
        return {
            "loss": loss,
            "loss_standard_error": math.sqrt(variance / self.tokens),
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self._nll / math.log(2) / text_bytes,
            "mean_steps": float(histogram @ np.arange(len(histogram))),
            "expected_steps": self._expected / self.tokens,
            "steps_histogram": histogram.tolist(),
            "tokens_evaluated": self.tokens,
        }

"""Score a task by log-likelihood: which continuation does the model find most likely?

A pair is tokenised as one text after end-of-text, and the continuation is what the context's own tokens leave over, as
in lm-evaluation-harness. A pair that exceeds the context loses its beginning; the score says how many did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from haltscale.model import Flops, PassCounts, probing
from haltscale.platform.evaluation.tasks import Task, TaskError
from haltscale.platform.inference.models import LoadedModel, TextError, encode

BATCH_TOKENS = 4096


class Pair(NamedTuple):
    """One continuation to be scored."""

    context: list[int]
    """Tokens before it, end-of-text first."""
    continuation: list[int]


class Scored(NamedTuple):
    """What the model made of a continuation."""

    log_likelihood: float
    """Nats."""
    greedy: bool
    """Whether every token of it was the most likely one."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What scoring cost."""

    tokens: int
    seconds: float
    mean_steps: float
    """Latent steps per token read."""
    flops: Flops
    truncated: int
    """Pairs that lost their beginning."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of a task."""

    task: str
    items: int
    accuracy: float
    """Share of items whose gold continuation is the most likely; of a single choice: is what greedy decoding writes."""
    accuracy_standard_error: float
    accuracy_normalised: float | None
    """The same with log-likelihoods divided by the choices' length in characters; None for a single choice."""
    chance: float | None
    """Accuracy of guessing; None for a single choice."""
    gold_nats: float
    """Mean negative log-likelihood of the gold continuations, nats per item."""
    gold_bits_per_byte: float
    """Mean over items of the gold continuation's bits per byte of its text."""
    gold_bits_per_byte_standard_error: float
    mean_steps: float
    """Latent steps per token read."""
    flops_realised: float
    """Per token read."""
    seconds: float
    """Per token read; as measured."""
    truncated: int
    """Pairs too long for the model's context, which lost their beginning."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def encode_pair(tokenizer: Tokenizer, end_of_text: int, context: str, continuation: str) -> Pair:
    """The tokens of both, cut where the context's own tokens end; white space at its end goes with the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = encode(tokenizer, context + continuation, end_of_text)
    cut = len(encode(tokenizer, context, end_of_text)) if context else 0
    return Pair([end_of_text, *whole[:cut]], whole[cut:])


def pair_problem(loaded: LoadedModel, pair: Pair) -> str:
    """Why a pair cannot be scored; empty where it can."""
    room = loaded.model.config.context
    if 0 < len(pair.continuation) <= room:
        return ""
    return f"its continuation has {len(pair.continuation)} tokens, the model reads 1 to {room}"


def log_likelihoods(loaded: LoadedModel, pairs: Sequence[Pair]) -> tuple[list[Scored], Effort]:
    """Score pairs, in batches of similar length.

    Raises:
        TaskError: a continuation is empty, or alone longer than the model's context.
    """
    room = loaded.model.config.context
    rows, truncated = [], 0
    for index, pair in enumerate(pairs):
        if problem := pair_problem(loaded, pair):
            raise TaskError(f"pair {index}: {problem}")
        text = [*pair.context, *pair.continuation]
        truncated += len(text) > room + 1
        rows.append(text[-(room + 1) :])
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    scored: list[Scored | None] = [None] * len(rows)
    counts, steps, began = PassCounts(), 0, time.perf_counter()
    while order:
        width = len(rows[order[0]]) - 1
        batch, order = order[: max(1, BATCH_TOKENS // width)], order[max(1, BATCH_TOKENS // width) :]
        reading = _read(loaded, [rows[index] for index in batch])
        counts += reading.trace.counts
        steps += int(reading.trace.steps_BT.sum())
        nll, correct = reading.nll_BT.double().cpu().numpy(), reading.correct_BT.cpu().numpy()
        for row, index in enumerate(batch):
            end = len(rows[index]) - 1
            span = slice(end - len(pairs[index].continuation), end)
            scored[index] = Scored(-float(nll[row, span].sum()), bool(correct[row, span].all()))
    tokens = counts.tokens
    effort = Effort(
        tokens=tokens,
        seconds=time.perf_counter() - began,
        mean_steps=steps / max(tokens, 1),
        flops=loaded.model.flops(counts),
        truncated=truncated,
    )
    return [one for one in scored if one is not None], effort


def _read(loaded: LoadedModel, rows: list[list[int]]) -> probing.Reading:
    device = next(loaded.model.parameters()).device
    lengths = torch.tensor([len(row) - 1 for row in rows], device=device)
    padded = np.zeros((len(rows), int(lengths.max()) + 1), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    text = torch.as_tensor(padded, device=device)
    return probing.read(loaded.model, text[:, :-1], text[:, 1:], lengths_B=lengths)


def score(loaded: LoadedModel, task: Task, *, limit: int | None = None) -> Score:
    """Score a task.

    Args:
        limit: only the first items.

    Raises:
        TaskError: the task has no items, or one of them cannot be scored.
    """
    items = task.items[:limit]
    if not items:
        raise TaskError(f"task {task.name} has no items")
    pairs = []
    for number, item in enumerate(items):
        for choice, (context, text) in enumerate(zip(item.contexts, item.choices, strict=True)):
            where = f"task {task.name}, item {number}, choice {choice}"
            try:
                pairs.append(encode_pair(loaded.tokenizer, loaded.end_of_text, context, text))
            except TextError as error:
                raise TaskError(f"{where}: {error}") from error
            if problem := pair_problem(loaded, pairs[-1]):
                raise TaskError(f"{where}: {problem}")
    scored, effort = log_likelihoods(loaded, pairs)
    right, right_normalised, nats, bits = [], [], [], []
    first = 0
    for item in items:
        own = scored[first : first + len(item.choices)]
        first += len(item.choices)
        likelihood = np.array([one.log_likelihood for one in own])
        characters = np.array([len(choice.lstrip()) for choice in item.choices])
        gold = item.choices[item.gold]
        if len(own) == 1:
            right.append(float(own[0].greedy))
        else:
            right.append(float(likelihood.argmax() == item.gold))
            right_normalised.append(float((likelihood / characters).argmax() == item.gold))
        nats.append(-own[item.gold].log_likelihood)
        bits.append(nats[-1] / math.log(2) / len(gold.encode()))
    chosen_from = [len(item.choices) for item in items]
    single = max(chosen_from) == 1
    return Score(
        task=task.name,
        items=len(items),
        accuracy=float(np.mean(right)),
        accuracy_standard_error=_standard_error(right),
        accuracy_normalised=None if single else float(np.mean(right_normalised)),
        chance=None if single else float(np.mean([1 / count for count in chosen_from])),
        gold_nats=float(np.mean(nats)),
        gold_bits_per_byte=float(np.mean(bits)),
        gold_bits_per_byte_standard_error=_standard_error(bits),
        mean_steps=effort.mean_steps,
        flops_realised=effort.flops.realised / effort.tokens,
        seconds=effort.seconds / effort.tokens,
        truncated=effort.truncated,
    )


def _standard_error(values: Sequence[float]) -> float:
    array: npt.NDArray[np.float64] = np.asarray(values)
    return float(array.std(ddof=min(1, len(array) - 1)) / math.sqrt(len(array)))

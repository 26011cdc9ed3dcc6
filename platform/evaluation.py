"""Held-out evaluation: loss, perplexity, bits per byte, and where the model thought. PyTorch only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from haltscale.model import IGNORE_INDEX, Flops, LanguageModel, PassCounts
from haltscale.platform.corpus import HeldOutDocument


@dataclass(frozen=True, kw_only=True)
class TokenEvents:
    """What happened at every emitted token of some documents, in reading order."""

    nll: npt.NDArray[np.float32]
    """``(n,)`` nats of each token given what stands before it."""
    steps: npt.NDArray[np.uint8]
    """``(n,)`` latent steps executed before it was emitted."""
    reach: npt.NDArray[np.float32]
    """``(n, l_max + 1)``."""
    exit: npt.NDArray[np.float32]
    """``(n, l_max + 1)``."""
    flops: Flops
    """Forward FLOPs of reading the documents."""

    @property
    def expected_steps(self) -> npt.NDArray[np.float32]:
        """``(n,)`` latent steps under the exit masses."""
        weights = np.arange(self.exit.shape[1], dtype=np.float32)
        return (self.exit @ weights).astype(np.float32)


@torch.no_grad()
def read_documents(
    model: LanguageModel, documents: list[HeldOutDocument], *, context: int, batch_rows: int = 16
) -> TokenEvents:
    """Read documents and record every token.

    A document longer than the context is read in consecutive windows, each starting afresh; windows of unequal length
    are padded, and padding is neither scored nor counted.

    Args:
        model: put into evaluation mode.
        documents: each ``(n + 1,)`` tokens, the first of them end-of-text.
        context: window length in tokens.
        batch_rows: windows per forward pass.
    """
    model.eval()
    device = next(model.parameters()).device
    nll, steps, reach, exits = [], [], [], []
    counts = PassCounts()
    for tokens, targets, lengths in _windows(documents, context, batch_rows):
        output = model(
            torch.as_tensor(tokens, device=device),
            torch.as_tensor(targets, device=device),
            lengths_B=torch.as_tensor(lengths, device=device),
        )
        real = output.trace.valid_BT
        nll.append(output.nll_BT[real].float().cpu().numpy())
        steps.append(output.trace.steps_BT[real].cpu().numpy())
        reach.append(output.trace.reach_BTK[real].float().cpu().numpy())
        exits.append(output.trace.exit_BTK[real].float().cpu().numpy())
        counts += output.trace.counts
    return TokenEvents(
        nll=np.concatenate(nll),
        steps=np.concatenate(steps).astype(np.uint8),
        reach=np.concatenate(reach),
        exit=np.concatenate(exits),
        flops=model.flops(counts),
    )


def _windows(
    documents: list[HeldOutDocument], context: int, batch_rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Batches of (tokens, targets, lengths): ``(rows, width)``, ``(rows, width)``, ``(rows,)``."""
    windows = [
        document.tokens[start : start + context + 1]
        for document in documents
        for start in range(0, len(document.tokens) - 1, context)
    ]
    for first in range(0, len(windows), batch_rows):
        rows = windows[first : first + batch_rows]
        lengths = np.array([len(row) - 1 for row in rows], dtype=np.int64)
        tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
        targets = np.full_like(tokens, IGNORE_INDEX)
        for index, row in enumerate(rows):
            tokens[index, : len(row) - 1] = row[:-1]
            targets[index, : len(row) - 1] = row[1:]
        yield tokens, targets, lengths


def summarise(events: TokenEvents, *, text_bytes: int) -> dict[str, Any]:
    """The evaluation row of the run store, without its place in the run.

    Args:
        text_bytes: UTF-8 length of the documents: the denominator of bits per byte.
    """
    total = float(events.nll.sum(dtype=np.float64))
    loss = total / len(events.nll)
    histogram = np.bincount(events.steps, minlength=events.exit.shape[1]) / len(events.steps)
    return {
        "loss": loss,
        "loss_standard_error": float(events.nll.std(ddof=min(1, len(events.nll) - 1)) / math.sqrt(len(events.nll))),
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / text_bytes,
        "mean_steps": float(events.steps.mean()),
        "expected_steps": float(events.expected_steps.mean()),
        "steps_histogram": histogram.tolist(),
        "tokens_evaluated": len(events.nll),
    }


def halting_by_difficulty(events: TokenEvents) -> dict[str, Any]:
    """Whether the router spends its steps where they are needed: mean steps of the easiest and the hardest quarter.

    "Easy" is a token that the model predicts well: its negative log-likelihood (nats) is in the lowest quarter.
    """
    low, high = np.quantile(events.nll, [0.25, 0.75])
    easy, hard = events.nll <= low, events.nll >= high
    return {
        "well_predicted_mean_steps": float(events.steps[easy].mean()),
        "badly_predicted_mean_steps": float(events.steps[hard].mean()),
        "well_predicted_expected_steps": float(events.expected_steps[easy].mean()),
        "badly_predicted_expected_steps": float(events.expected_steps[hard].mean()),
        "well_predicted_nll_below": float(low),
        "badly_predicted_nll_above": float(high),
    }


def probe_table(events: TokenEvents, probe: HeldOutDocument) -> pd.DataFrame:
    """The probe's events as the run store keeps them (see ``RunStore.probe``)."""
    return pd.DataFrame(
        {
            "position": np.arange(len(events.nll), dtype=np.int32),
            "token_id": probe.tokens[1:].astype(np.int32),
            "text": probe.pieces,
            "steps": events.steps,
            "expected_steps": events.expected_steps,
            "reach": list(events.reach),
            "exit": list(events.exit),
            "nll": events.nll,
        }
    )

"""Paired differences: two arms on the same documents, at the same seeds and data orders.

What a document costs in nats varies far more between documents than between two arms on one document, and what an arm
reaches varies between seeds. So differences are taken within each document and seed, and their interval comes from a
bootstrap that draws documents and seeds together, with replacement. Runs of other budgets or sizes are other questions:
they never enter one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from haltscale.platform.analysis.estimates import BOOTSTRAPS, Estimate, Floats, Refusal, estimate

LEAST_DOCUMENTS = 2


def document_sums(documents: npt.ArrayLike, nll: npt.ArrayLike) -> pd.DataFrame:
    """``tokens`` and ``nats`` of each document (the index), from its tokens.

    Args:
        documents: ``(n,)`` which document each token belongs to.
        nll: ``(n,)`` nats.
    """
    frame = pd.DataFrame({"document": np.asarray(documents), "nats": np.asarray(nll, dtype=np.float64)})
    grouped = frame.groupby("document")["nats"]
    return pd.DataFrame({"tokens": grouped.size(), "nats": grouped.sum()})


def paired_difference(
    arm: Sequence[pd.DataFrame],
    reference: Sequence[pd.DataFrame],
    *,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> Estimate | Refusal:
    """Nats per token of an arm minus those of a reference: the mean over seeds, with a bootstrap interval.

    Args:
        arm, reference: of each seed, in the same order, its :func:`document_sums`.
        bootstraps: replicates.
        seed: of the bootstrap.

    Returns:
        A refusal where there is nothing to pair, or where one document is all there is.
    """
    if not arm or len(arm) != len(reference):
        return Refusal(reason=f"{len(arm)} runs cannot be paired with {len(reference)}: each seed needs both")
    every = pd.concat([*arm, *reference], axis=1)["tokens"]
    counted = every.to_numpy(dtype=np.float64)
    if np.isnan(counted).any() or (counted != counted[:, :1]).any():
        return Refusal(reason="the runs were not read on the same documents")
    if len(every) < LEAST_DOCUMENTS:
        return Refusal(reason=f"{len(every)} document: an interval over documents needs {LEAST_DOCUMENTS}")
    index = every.index
    tokens: Floats = counted[:, 0]
    gaps: Floats = np.stack(
        [
            (one["nats"].reindex(index) - other["nats"].reindex(index)).to_numpy(dtype=np.float64)
            for one, other in zip(arm, reference, strict=True)
        ]
    )
    random = np.random.default_rng(seed)
    documents = _drawn(random, bootstraps, len(tokens))
    seeds = _drawn(random, bootstraps, len(gaps))
    replicates = ((seeds @ gaps) * documents).sum(1) / (documents @ tokens) / len(gaps)
    return estimate(float(gaps.sum() / tokens.sum() / len(gaps)), replicates)


def _drawn(random: np.random.Generator, count: int, rows: int) -> Floats:
    """``(count, rows)``: how often each row is drawn in each replicate."""
    return random.multinomial(rows, np.full(rows, 1.0 / rows), size=count).astype(np.float64)

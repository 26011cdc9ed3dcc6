"""Read the held-out text of a corpus with a model, and write down what happened at every token.

The in-run evaluation and `haltscale evaluate` are this function; they differ in where the files go.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from haltscale.model import Flops, LanguageModel
from haltscale.platform.analysis.paired import document_sums
from haltscale.platform.corpora.corpus import HeldOutDocument, PreparedCorpus
from haltscale.platform.evaluation.halting_summary import summarise_halting
from haltscale.platform.evaluation.held_out import STATES_READ, Tally, TokenEvents, read_documents, read_events
from haltscale.platform.evaluation.need import NeedOfCorpus, NeedTally
from haltscale.platform.evaluation.telemetry import DECILES, EventsFile, EventsWriter, Quantiles, build_cube, write_cube
from haltscale.platform.evaluation.token_kinds import TokenClass, TokenKinds
from haltscale.platform.recorder import RunRecorder

MOST_DOCUMENTS = 5_000
"""Whose sums a record keeps."""


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """What reading the validation split gave."""

    row: Mapping[str, Any]
    """Loss and halting of the split (see ``Tally.row``); ``need`` where the text's need is known (``NeedTally``)."""
    summary: Mapping[str, Any]
    """What the telemetry says (see ``summarise_halting``)."""
    flops: Flops
    """Forward FLOPs of the reading."""
    by_document: Mapping[str, Any]
    """``tokens`` and ``nats`` of each document in order, for paired comparisons; empty for a split of very many."""


def read_split(
    model: LanguageModel,
    corpus: PreparedCorpus,
    *,
    context: int,
    step: int,
    recorder: RunRecorder,
    rank: int = 0,
    world: int = 1,
) -> SplitResult:
    """Read the validation split and the probe text; the recorder gets their telemetry.

    Memory does not grow with the split: events go to a file as they come. Several ranks share the reading, and rank 0
    alone keeps, counts and records; the result is the same on all, and the same as one rank's.

    Args:
        step: the training step that the files are named for.
        rank: this process, in the group of ``world`` that read together; all of them call.
    """
    if rank > 0:
        events = read_events(
            model, corpus.stream_validation(), context=context, by_step=_by_step(corpus), rank=rank, world=world
        )
        assert not list(events)
        result: list[Any] = [None]
    else:
        result = [_read_and_record(model, corpus, context=context, step=step, recorder=recorder, world=world)]
    if world > 1:
        torch.distributed.broadcast_object_list(result, src=0)
    found: SplitResult = result[0]
    return found


def _by_step(corpus: PreparedCorpus) -> float:
    return share_by_step(int(corpus.counts["validation_tokens"]))


def _read_and_record(
    model: LanguageModel, corpus: PreparedCorpus, *, context: int, step: int, recorder: RunRecorder, world: int
) -> SplitResult:
    kinds = TokenKinds.of_corpus(corpus)
    tally, quantiles = Tally(), Quantiles()
    need = NeedOfCorpus.of(corpus)
    needed = NeedTally(need, corpus.stream_validation()) if need else None
    l_max = 0
    documents: list[pd.DataFrame] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.parquet"
        writer = EventsWriter(path, kinds, step=step, context=context, documents=corpus.validation_names())
        for events in read_events(
            model, corpus.stream_validation(), context=context, by_step=_by_step(corpus), world=world
        ):
            tally.add(events)
            if needed:
                needed.add(events)
            quantiles.add(events.nll)
            writer.add(events)
            documents.append(document_sums(events.document, events.nll))
            l_max = events.exit.shape[1] - 1
        writer.close()
        file = EventsFile(path=path)
        edges = quantiles.at([decile / DECILES for decile in range(1, DECILES)])
        cube = build_cube(file, edges)
        write_cube(cube, edges, file.metadata, Path(folder) / "cube.parquet")
        summary = summarise_halting(file, cube, quarters=quantiles.at([0.25, 0.75]), l_max=l_max)
        found = {"need": needed.result()} if needed else {}
        summary |= found
        recorder.telemetry(step, Path(folder), summary)
    probe = corpus.probe()
    table = probe_table(read_documents(model, [probe], context=context, by_step=1.0), probe, kinds)
    if need:
        table["need"] = need(probe)
    recorder.probe(step, table)
    row = {**tally.row(text_bytes=int(corpus.counts["validation_bytes"])), **found}
    return SplitResult(row=row, summary=summary, flops=tally.flops, by_document=_by_document(documents))


def _by_document(parts: list[pd.DataFrame]) -> dict[str, Any]:
    sums = pd.concat(parts).groupby(level=0).sum()
    if len(sums) > MOST_DOCUMENTS:
        return {}
    return {"tokens": sums["tokens"].tolist(), "nats": [round(nats, 4) for nats in sums["nats"].tolist()]}


def share_by_step(tokens: int) -> float:
    """The share of a split's tokens that is read after every step: an eighth at most, ``STATES_READ`` of a long one."""
    return min(1 / 8, STATES_READ / max(tokens, 1))


def probe_table(events: TokenEvents, probe: HeldOutDocument, kinds: TokenKinds) -> pd.DataFrame:
    """The probe's events as the run store keeps them (see ``RunStore.probe``)."""
    states = np.arange(events.exit.shape[1])
    by_step: dict[str, list[Any]] = {name: [None] * len(events.nll) for name in ("nll_by_step", "entropy_by_step")}
    for name, cells in by_step.items():
        for index, values in zip(events.sampled, getattr(events, name), strict=True):
            cells[index] = values[states <= events.steps[index]]
    looks = list(TokenClass)
    return pd.DataFrame(
        {
            "position": np.arange(len(events.nll), dtype=np.int32),
            "token_id": events.token_id.astype(np.int32),
            "text": probe.pieces,
            "steps": events.steps,
            "expected_steps": events.expected_steps,
            "reach": list(events.reach),
            "exit": list(events.exit),
            "nll": events.nll,
            "entropy": events.entropy,
            "confidence": events.confidence,
            "correct": events.correct,
            "frequency": kinds.frequency[events.token_id],
            "token_class": [str(looks[index]) for index in kinds.look[events.token_id]],
            **by_step,
        }
    )

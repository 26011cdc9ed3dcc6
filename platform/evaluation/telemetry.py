"""Halting telemetry: every token that was read, as files of the run store, and cubes made from them.

    halting/events-<step>.parquet    one row per token of the validation split (`EVENT_COLUMNS`)
    halting/probe-<step>.parquet     the same of the probe text, with its pieces and every step read
    halting/cube-<step>.parquet      events counted by steps, surprisal decile, position, frequency and look
    halting/summary-<step>.json      what the cube and the events say (halting_summary.py)

Events are written as they come, so memory does not grow with the text. Surprisal is the token's own negative
log-likelihood. A position's reach masses are not stored: reach[k] is the sum of exit[i] over i >= k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from haltscale.platform.evaluation.held_out import TokenEvents
from haltscale.platform.evaluation.token_kinds import FREQUENCY_CLASSES, TokenClass, TokenKinds

ROW_GROUP = 1 << 17
METADATA = b"haltscale"
DECILES = 10

EVENT_COLUMNS = {
    "document": "index into `documents` of the file's metadata",
    "position": "of the token in its document, from 0",
    "token_id": "the token that was to be predicted",
    "steps": "latent steps executed before it",
    "expected_steps": "latent steps under the exit masses",
    "exit": "list of l_max + 1: the share of each state in the mixture that the head read",
    "nll": "nats of the token given what stands before it: its surprisal",
    "entropy": "nats, of the distribution over the token",
    "confidence": "the greatest probability in that distribution",
    "correct": "whether the token had that probability",
    "frequency": "0 (the most frequent tokens, a tenth of the running text) to 9 (the rarest)",
    "token_class": "what the token looks like (`TokenClass`)",
    "nll_by_step": "list of steps + 1, for a sample of tokens: nats had the position stopped after step k; else null",
    "entropy_by_step": "likewise the entropy",
}
"""Columns of the events, in small types: masses, expected steps, entropy and confidence in half precision."""

CUBE_DIMENSIONS = ("steps", "surprisal", "position_from", "frequency", "token_class")
"""``steps``; ``surprisal``: decile of the events' nll, 0 the best predicted; ``position_from``: first place in the
context window of a bin that ends where the next power of two begins (0, 1, 2, 4, 8, ...); ``frequency``;
``token_class``."""
CUBE_MEASURES = ("nll", "entropy", "expected_steps", "router_entropy", "confidence", "correct")
"""For each, ``<name>_sum`` and ``<name>_sum2`` (sum of squares), beside ``tokens``. ``router_entropy``: of the exit
masses, nats."""


class EventsWriter:
    """Writes events to a parquet file as they come, a row group at a time."""

    def __init__(self, path: Path, kinds: TokenKinds, *, step: int, context: int, documents: Sequence[str]) -> None:
        self._path, self._kinds = path, kinds
        self._metadata = {"step": step, "context": context, "documents": list(documents)}
        self._waiting: list[TokenEvents] = []
        self._rows = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, events: TokenEvents) -> None:
        """Take some events in."""
        self._waiting.append(events)
        self._rows += len(events.nll)
        if self._rows >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        table = events_table(TokenEvents.concatenate(self._waiting), self._kinds)
        self._waiting, self._rows = [], 0
        if self._writer is None:
            metadata = {METADATA: json.dumps(self._metadata).encode()}
            schema = table.schema.with_metadata(metadata)
            self._writer = pq.ParquetWriter(self._path, schema, compression="zstd")
        self._writer.write_table(table, row_group_size=ROW_GROUP)

    def close(self) -> None:
        """Write what is left.

        Raises:
            ValueError: there were no events at all.
        """
        if self._waiting:
            self._flush()
        if self._writer is None:
            raise ValueError("the validation split has no tokens")
        self._writer.close()


def events_table(events: TokenEvents, kinds: TokenKinds) -> pa.Table:
    """Events as the run store keeps them (`EVENT_COLUMNS`)."""
    n, states = events.exit.shape
    every = np.arange(0, n * states + 1, states, dtype=np.int32)
    looks = pa.array([str(look) for look in TokenClass])
    look = pa.DictionaryArray.from_arrays(pa.array(kinds.look[events.token_id]), looks)
    return pa.table(
        {
            "document": events.document.astype(np.uint32),
            "position": events.position.astype(np.uint32),
            "token_id": events.token_id.astype(np.int32),
            "steps": events.steps,
            "expected_steps": events.expected_steps.astype(np.float16),
            "exit": pa.ListArray.from_arrays(every, events.exit.astype(np.float16).ravel()),
            "nll": events.nll,
            "entropy": events.entropy.astype(np.float16),
            "confidence": events.confidence.astype(np.float16),
            "correct": events.correct,
            "frequency": kinds.frequency[events.token_id],
            "token_class": look,
            "nll_by_step": _sampled_lists(n, events.sampled, events.nll_by_step),
            "entropy_by_step": _sampled_lists(n, events.sampled, events.entropy_by_step),
        }
    )


def _sampled_lists(n: int, at: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> pa.Array:
    """A list column of n rows, null but at some; a list ends where its NaNs begin."""
    executed = ~np.isnan(values)
    lengths = np.zeros(n, dtype=np.int32)
    lengths[at] = executed.sum(1)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    absent = np.ones(n, dtype=bool)
    absent[at] = False
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values[executed]), mask=pa.array(absent))


@dataclass(frozen=True, kw_only=True)
class EventsFile:
    """A file of events, read in pieces."""

    path: Path

    @property
    def metadata(self) -> dict[str, Any]:
        """``step``, ``context`` (window length), ``documents`` (names)."""
        return dict(json.loads(pq.read_schema(self.path).metadata[METADATA]))

    def pieces(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, a row group at a time."""
        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(batch_size=ROW_GROUP, columns=list(columns))


class Quantiles:
    """Quantiles of non-negative float32 numbers, from a histogram of their leading bits: within 0.2 % of the number,
    in 1 MB whatever their count."""

    SHIFT = 14  # keeps sign, exponent and 9 bits of the mantissa, which sort like the numbers themselves

    def __init__(self) -> None:
        self._counts = np.zeros(1 << (32 - self.SHIFT - 1), dtype=np.int64)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count some numbers; those below zero count as zero."""
        bits = np.maximum(values, np.float32(0)).view(np.uint32) >> self.SHIFT
        self._counts += np.bincount(bits, minlength=len(self._counts))

    def at(self, shares: Sequence[float]) -> npt.NDArray[np.float32]:
        """For each share, a number such that about that share of all lie below it."""
        upto = np.cumsum(self._counts)
        bins = np.searchsorted(upto, np.asarray(shares) * upto[-1], side="left")
        return np.asarray(((bins.astype(np.uint32) + 1) << self.SHIFT).view(np.float32))


def position_bins(position: npt.NDArray[Any], context: int) -> npt.NDArray[np.int64]:
    """Bin of each document position by its place in the context window: 0, 1, 2-3, 4-7, ..."""
    return np.frexp((position % context).astype(np.float64))[1].astype(np.int64)


def build_cube(events: EventsFile, edges: npt.NDArray[np.float32]) -> pd.DataFrame:
    """Count events by `CUBE_DIMENSIONS`.

    Args:
        edges: the nine inner edges of the surprisal deciles; a token with nll equal to an edge is above it.

    Returns:
        One row per cell that holds tokens: the dimensions, ``tokens``, and two sums for each of `CUBE_MEASURES`.
    """
    context = events.metadata["context"]
    looks = [str(look) for look in TokenClass]
    sizes: list[int] = []
    sums: npt.NDArray[np.float64] | None = None
    needed = ("steps", "position", "nll", "entropy", "expected_steps", "exit", "confidence", "correct", "frequency")
    for piece in events.pieces((*needed, "token_class")):
        column = {name: piece[name].to_numpy(zero_copy_only=False) for name in needed if name != "exit"}
        exits = piece["exit"].flatten().to_numpy(zero_copy_only=False).reshape(len(piece), -1)
        if sums is None:
            sizes = [exits.shape[1], DECILES, int(context).bit_length() + 1, FREQUENCY_CLASSES, len(looks)]
            sums = np.zeros((1 + 2 * len(CUBE_MEASURES), int(np.prod(sizes))))
        column["router_entropy"] = router_entropy(exits)
        cell = np.ravel_multi_index(
            (
                column["steps"].astype(np.int64),
                np.searchsorted(edges, column["nll"], side="right"),
                position_bins(column["position"], context),
                column["frequency"].astype(np.int64),
                piece["token_class"].indices.to_numpy().astype(np.int64),
            ),
            sizes,
        )
        sums[0] += np.bincount(cell, minlength=sums.shape[1])
        for index, name in enumerate(CUBE_MEASURES):
            values = column[name].astype(np.float64)
            sums[1 + 2 * index] += np.bincount(cell, values, minlength=sums.shape[1])
            sums[2 + 2 * index] += np.bincount(cell, values * values, minlength=sums.shape[1])
    assert sums is not None, "a file of events holds at least one"
    held = np.flatnonzero(sums[0])
    steps, surprisal, position, frequency, look = np.unravel_index(held, sizes)
    frame = pd.DataFrame(
        {
            "steps": steps.astype(np.uint8),
            "surprisal": surprisal.astype(np.uint8),
            "position_from": np.where(position == 0, 0, 1 << np.maximum(position - 1, 0)).astype(np.int32),
            "frequency": frequency.astype(np.uint8),
            "token_class": np.asarray(looks)[look],
            "tokens": sums[0, held].astype(np.int64),
        }
    )
    for index, name in enumerate(CUBE_MEASURES):
        frame[f"{name}_sum"], frame[f"{name}_sum2"] = sums[1 + 2 * index, held], sums[2 + 2 * index, held]
    return frame


def router_entropy(exits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Nats, of each row of exit masses: 0 where the router is certain when to stop."""
    masses = exits.astype(np.float64)
    return np.asarray(-(masses * np.log(np.where(masses > 0, masses, 1.0))).sum(1))


def write_cube(cube: pd.DataFrame, edges: npt.NDArray[np.float32], metadata: Mapping[str, Any], path: Path) -> None:
    """Write a cube, with ``surprisal_edges`` and its events' ``step`` and ``context`` in the file's metadata."""
    about = {"surprisal_edges": edges.tolist(), "step": metadata["step"], "context": metadata["context"]}
    table = pa.Table.from_pandas(cube, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA: json.dumps(about).encode()})
    pq.write_table(table, path, compression="zstd")

"""Ray Data: prepare a corpus once, stream its rows to the trainers in a given order.

One of the few modules that import Ray. Preparing (:mod:`.prepare`) maps over shards, which Ray Data's tasks do in
parallel. Streaming follows a pure order (:mod:`.order`): a dataset's items are windows of steps, and Ray Data's tasks
read those rows while the trainer computes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from haltscale.platform.corpora import prepare as plain
from haltscale.platform.corpora.corpus import Corpus, PreparedCorpus, RowReader, Tokens
from haltscale.platform.corpora.order import Mixture, global_batches, rank_share
from haltscale.platform.corpora.shared import shared_root
from haltscale.platform.ray_connection import quiet_ray_data

DATA_CPUS = 0.2
"""CPU that one streaming task asks of Ray."""
RESERVED_CPUS = 0.25
"""CPU that a run's workers leave to its streaming tasks and its drivers, or all of them would wait for ever."""
WINDOW_TOKENS = 1 << 20
"""What one streaming task reads, at least a step."""
PIECE_STEPS = 64
"""Of the first window, what is read ahead at once."""
BESIDE_SHARE = 4
"""Beside training, a streamed corpus is prepared by one process for so many CPUs of the cluster, and at least one."""


# ---- preparing ------------------------------------------------------------------------------------------------------


def prepare(corpus: Corpus, context: int, *, batch: int = 1) -> PreparedCorpus:
    """:func:`haltscale.platform.corpora.prepare.prepare`, its shards spread over the cluster; where nodes share no
    folder (``HALTSCALE_CORPORA``), over this node's CPUs."""
    return plain.prepare(corpus, context, batch=batch, run=spread)


def begin(
    corpus: Corpus, context: int, *, batch: int = 1, rows: int | None = None
) -> contextlib.AbstractContextManager[PreparedCorpus]:
    """:func:`haltscale.platform.corpora.prepare.begin`, its shards spread over the cluster.

    What is prepared while others train asks Ray for no CPU: it would wait for ever for one that the workers hold, and
    they for its rows. Few processes do it instead.
    """
    beside = None if corpus.segment_tokens is None else max(1, int(ray.cluster_resources()["CPU"]) // BESIDE_SHARE)
    return plain.begin(corpus, context, batch=batch, rows=rows, run=partial(spread, beside=beside))


def spread(
    function: Callable[[Any], dict[str, Any]], jobs: list[Any], *, beside: int | None = None
) -> Iterator[dict[str, Any]]:
    """Map a function over jobs with Ray Data; each result in the order of the jobs, as soon as it is there.

    Args:
        function: from a job to a small result.
        jobs: one task each.
        beside: at most so many at once, which ask for no CPU; None: as many as there are CPUs free.
    """
    if not jobs:
        return
    quiet_ray_data()
    items = [{"job": pickle.dumps(job)} for job in jobs]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    resources: dict[str, Any] = {}
    if beside is not None:
        resources = {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=beside)}
    if shared_root():  # what they write is on the disk of the node that uploads it, whose CPUs Ray may not have
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        pool = ray.data.TaskPoolStrategy(size=beside or len(os.sched_getaffinity(0)))
        resources = {"num_cpus": 0, "compute": pool, "scheduling_strategy": here}
    dataset = dataset.map(_run_job, fn_kwargs={"function": function}, **resources)
    dataset.context.execution_options.preserve_order = True
    for results in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
        yield from map(json.loads, results["result"].to_pylist())


def _run_job(row: dict[str, Any], function: Callable[[Any], dict[str, Any]]) -> dict[str, str]:
    return {"result": json.dumps(function(pickle.loads(row["job"])))}


# ---- streaming ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one rank trains on in one step."""

    step: int
    seq_ids: npt.NDArray[np.int64]
    """``(batch,)`` sequence ids of the whole step, all ranks' shares together."""
    tokens: Tokens
    """``(batch / world, context + 1)``: this rank's share."""


def stream(
    place: str | Path, *, seed: int, mixture: Mixture, batch: int, first_step: int, steps: int, rank: int, world: int
) -> Iterator[Batch]:
    """Stream one rank's batches of the steps ``first_step .. steps - 1``, in order, reading ahead.

    Of a streamed corpus that is not complete, those that are there are streamed, then those that have come meanwhile.
    It is this process that waits for more, not a task: tasks that wait would keep the CPUs of others.

    Args:
        place: a prepared corpus's (:attr:`PreparedCorpus.place`).
        seed: of the order.
        mixture: the rows of its sources, and their weights.
        batch: sequences of a global batch.
        first_step: where to begin: 0, or the step at which a checkpoint was taken.
        steps: the run's last step + 1.
        rank: this worker.
        world: how many workers share a batch.

    Raises:
        CorpusError: a streamed corpus could not be prepared further.
    """
    rank_of: dict[str, Any] = {"place": str(place), "seed": seed, "batch": batch, "rank": rank, "world": world}
    if not mixture.segment:
        yield from _windows(first_step, steps, mixture=mixture, **rank_of)
        return
    corpus = PreparedCorpus.open(place)
    assert corpus is not None, "the caller has opened it"
    while first_step < steps:
        corpus = corpus.wait_for((first_step + 1) * batch)
        there = steps if corpus.is_complete else min(steps, corpus.drawable // batch)
        yield from _windows(first_step, there, mixture=corpus.mixture, **rank_of)
        first_step = there


def _windows(
    first_step: int, steps: int, *, place: str, seed: int, mixture: Mixture, batch: int, rank: int, world: int
) -> Iterator[Batch]:
    """:func:`stream` of rows that are all there.

    The first window is read here, in pieces. Meanwhile Ray starts a process for the others, which takes seconds: longer
    than many a small run trains, and again and again where Ray ends idle processes between two windows.
    """
    row_tokens = _reader(place).read(np.array([0])).shape[1]
    windows = _split(first_step, steps, max(1, WINDOW_TOKENS * world // (batch * row_tokens)))
    if not windows:
        return
    pieces = _split(first_step, first_step + windows[0]["steps"], PIECE_STEPS)
    read: dict[str, Any] = {
        "place": place,
        "seed": seed,
        "mixture": mixture,
        "batch": batch,
        "rank": rank,
        "world": world,
    }
    others = _read_by_ray(windows[1:], read) if len(windows) > 1 else iter(())
    beside = ThreadPoolExecutor(2, thread_name_prefix="stream")
    try:
        second = beside.submit(next, others, None)
        here = (_read_window({name: np.array([n]) for name, n in piece.items()}, **read) for piece in pieces)
        ahead = beside.submit(next, here, None)
        while (window := ahead.result()) is not None:
            ahead = beside.submit(next, here, None)
            yield from _batches(window, batch=batch, world=world)
        if (window := second.result()) is not None:
            yield from _batches(window, batch=batch, world=world)
        for window in others:
            yield from _batches(window, batch=batch, world=world)
    finally:
        beside.shutdown(wait=False)  # a budget of FLOPs may end a run before its second window is there


def _split(first_step: int, steps: int, each: int) -> list[dict[str, int]]:
    """The steps ``first_step .. steps - 1`` in parts of so many."""
    return [{"first": first, "steps": min(each, steps - first)} for first in range(first_step, steps, each)]


def _read_by_ray(windows: list[dict[str, int]], read: dict[str, Any]) -> Iterator[pa.Table]:
    quiet_ray_data()
    dataset = ray.data.from_items(windows, override_num_blocks=len(windows))
    dataset = dataset.map_batches(_read_window, batch_size=None, fn_kwargs=read, num_cpus=DATA_CPUS)
    dataset.context.execution_options.preserve_order = True
    return iter(dataset.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow"))


def _batches(window: pa.Table, *, batch: int, world: int) -> Iterator[Batch]:
    seq_ids = np.stack(window["seq_ids"].to_numpy(zero_copy_only=False))
    tokens = np.stack(window["tokens"].to_numpy(zero_copy_only=False))
    for index, step in enumerate(window["step"].to_pylist()):
        share = tokens[index].reshape(batch // world, -1).astype(np.int64)
        yield Batch(step=step, seq_ids=seq_ids[index], tokens=share)


@lru_cache(maxsize=2)
def _reader(place: str) -> RowReader:
    return RowReader(place)


def _read_window(
    window: dict[str, Any], *, place: str, seed: int, mixture: Mixture, batch: int, rank: int, world: int
) -> pa.Table:
    steps: list[int] = []
    ids: list[npt.NDArray[np.int64]] = []
    for first, count in zip(window["first"].tolist(), window["steps"].tolist(), strict=True):
        whole = global_batches(seed=seed, mixture=mixture, batch=batch, first_step=first, steps=count)
        steps += range(first, first + count)
        ids += list(whole)
    reader = _reader(place)
    tokens = [reader.read(row).ravel() for row in rank_share(np.stack(ids), rank=rank, world=world)]
    return pa.table({"step": steps, "seq_ids": [row.tolist() for row in ids], "tokens": pa.array(tokens)})

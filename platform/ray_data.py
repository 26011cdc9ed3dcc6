"""Ray Data: prepare a corpus once, stream its rows to the trainers in a given order.

One of the few modules that import Ray. Preparing is a Ray Data job (read, tokenise in parallel, pack in order), cached
by the corpus's fingerprint and published by one rename. Streaming follows a pure order (:mod:`.order`): a dataset's
items are windows of steps, and Ray Data's tasks read those rows while the trainer computes.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from haltscale.platform.corpus import END_OF_TEXT, Corpus, PreparedCorpus, RowReader, Tokens
from haltscale.platform.order import global_batches, rank_share

log = logging.getLogger(__name__)

DATA_CPUS = 0.2
"""CPU that one streaming task asks of Ray."""
RESERVED_CPUS = 0.25
"""CPU that a run's workers leave to its streaming tasks and its drivers, or all of them would wait for ever."""
ROWS_PER_PART = 4096
STEPS_PER_WINDOW = 16


def quiet_ray_data() -> None:
    """Ray Data's progress bars and warnings drown a job's log; progress is shown by haltscale itself."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


# ---- preparing ------------------------------------------------------------------------------------------------------


def prepare(corpus: Corpus, context: int) -> PreparedCorpus:
    """Tokenise and pack a corpus, or open it where that was done before.

    Args:
        corpus: checked before (:meth:`Corpus.problems`).
        context: tokens that a row predicts.

    Raises:
        ValueError: the training documents do not fill one row.
    """
    folder = corpus.cache(context)
    if prepared := PreparedCorpus.open(folder):
        return prepared
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        _write_corpus(corpus, context, partial)
        try:
            partial.rename(folder)  # a reader sees all of it or nothing
        except OSError:
            if not folder.exists():  # somebody else may have published the same content first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    prepared = PreparedCorpus.open(folder)
    assert prepared is not None, "just published"
    return prepared


def train_tokenizer(paths: list[Path], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on these files; id 0 is end-of-text. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8") for path in paths), trainer)
    return tokenizer


def _write_corpus(corpus: Corpus, context: int, folder: Path) -> None:
    training, held_out, probe = corpus.split
    log.info("corpus %s: training a tokenizer of %d on %d documents", corpus.name, corpus.vocab_size, len(training))
    tokenizer = train_tokenizer(training, corpus.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))

    log.info("corpus %s: tokenising and packing rows of %d tokens", corpus.name, context)
    packer = RowPacker(folder, context)
    for tokens in _tokenised(training, tokenizer):
        packer.add(tokens)
    rows = packer.close()
    if rows == 0:
        raise ValueError(
            f"corpus {corpus.name}: {packer.tokens} training tokens do not fill one row of {context + 1};"
            " use a larger corpus or a shorter context"
        )

    held_out_tokens = list(_tokenised(held_out, tokenizer))
    columns: dict[str, list[Any]] = {
        "document": [corpus.document_name(path) for path in held_out],
        "bytes": [path.stat().st_size for path in held_out],
        "tokens": held_out_tokens,
    }
    pq.write_table(pa.table(columns), folder / "validation.parquet", compression="zstd")
    probe_document = _probe(corpus, probe, tokenizer)
    (folder / "probe.json").write_text(json.dumps(probe_document, ensure_ascii=False))

    counts = {
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "context": context,
        "vocab_size": tokenizer.get_vocab_size(),
        "rows": rows,
        "train_documents": len(training),
        "train_bytes": sum(path.stat().st_size for path in training),
        "train_tokens": packer.tokens,
        "validation_documents": len(held_out),
        "validation_bytes": sum(columns["bytes"]),
        "validation_tokens": sum(len(tokens) - 1 for tokens in held_out_tokens),
        "probe": probe_document["document"],
    }
    (folder / "corpus.json").write_text(json.dumps(counts, indent=1))


def _probe(corpus: Corpus, path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if len(text) > corpus.probe_characters:
        cut = text[: corpus.probe_characters]
        text = cut[: max(cut.rfind(" "), cut.rfind("\n"))] if " " in cut or "\n" in cut else cut
    encoding = tokenizer.encode(text, add_special_tokens=False)
    offsets = encoding.offsets
    starts = [*(start for start, _ in offsets[1:]), len(text)]
    return {
        "document": corpus.document_name(path),
        "text": text,
        "tokens": [tokenizer.token_to_id(END_OF_TEXT), *encoding.ids],
        # Where a character is several tokens, the one that completes it adds it to the text.
        "pieces": [
            text[start : min(stop, following)] for (start, stop), following in zip(offsets, starts, strict=True)
        ],
    }


def _tokenised(paths: list[Path], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Each document's tokens behind one end-of-text, in the order of ``paths``; a Ray Data job."""
    dataset = ray.data.read_binary_files([str(path) for path in paths], include_paths=True)
    dataset = dataset.map_batches(_tokenise, fn_kwargs={"tokenizer_json": tokenizer.to_str()}, batch_size=16)
    dataset.context.execution_options.preserve_order = True
    expected = iter(paths)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for path, tokens in zip(batch["path"].to_pylist(), batch["tokens"], strict=True):
            if Path(path) != next(expected):
                raise RuntimeError(f"Ray Data delivered {path} out of order")
            yield np.asarray(tokens.values.to_numpy(zero_copy_only=False), dtype=np.int64)


@lru_cache(maxsize=2)
def _tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json)


def _tokenise(batch: dict[str, Any], tokenizer_json: str) -> pa.Table:
    tokenizer = _tokenizer(tokenizer_json)
    end = tokenizer.token_to_id(END_OF_TEXT)
    texts = [bytes(content).decode("utf-8") for content in batch["bytes"]]
    tokens = [[end, *encoding.ids] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return pa.table({"path": list(batch["path"]), "tokens": pa.array(tokens, type=pa.list_(pa.uint32()))})


class RowPacker:
    """Cuts a stream of documents into rows of context+1 tokens and writes them in parts.

    Consecutive rows overlap by one token; a last row that is not full is dropped.
    """

    def __init__(self, folder: Path, context: int) -> None:
        self.tokens = 0
        """Tokens seen, end-of-text included."""
        self._folder, self._context = folder, context
        self._pending: list[Tokens] = []
        self._pending_tokens = 0
        self._rows = 0
        self._parts = 0

    def add(self, tokens: Tokens) -> None:
        """Append a document."""
        self.tokens += len(tokens)
        self._pending.append(tokens)
        self._pending_tokens += len(tokens)
        if self._pending_tokens > ROWS_PER_PART * self._context:
            self._write(ROWS_PER_PART)

    def close(self) -> int:
        """Write what is left and return the number of rows."""
        self._write((self._pending_tokens - 1) // self._context)
        return self._rows

    def _write(self, rows: int) -> None:
        if rows < 1:
            return
        stream = np.concatenate(self._pending)
        windows = np.lib.stride_tricks.sliding_window_view(stream, self._context + 1)[:: self._context][:rows]
        column = pa.FixedSizeListArray.from_arrays(pa.array(windows.ravel(), type=pa.uint32()), self._context + 1)
        table = pa.table({"seq_id": pa.array(range(self._rows, self._rows + rows), type=pa.int64()), "tokens": column})
        pq.write_table(table, self._folder / f"part-{self._parts:05d}.parquet", compression="zstd")
        self._pending = [stream[rows * self._context :]]
        self._pending_tokens = len(self._pending[0])
        self._rows += rows
        self._parts += 1


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
    folder: Path, *, seed: int, rows: int, batch: int, first_step: int, steps: int, rank: int, world: int
) -> Iterator[Batch]:
    """Stream one rank's batches of the steps ``first_step .. steps - 1``, in order, reading ahead.

    Args:
        folder: a prepared corpus's folder.
        seed: of the order.
        rows: training rows in the corpus.
        batch: sequences of a global batch.
        first_step: where to begin: 0, or the step at which a checkpoint was taken.
        steps: the run's last step + 1.
        rank: this worker.
        world: how many workers share a batch.
    """
    quiet_ray_data()
    windows = [
        {"first": first, "steps": min(STEPS_PER_WINDOW, steps - first)}
        for first in range(first_step, steps, STEPS_PER_WINDOW)
    ]
    if not windows:
        return
    read = {"folder": str(folder), "seed": seed, "rows": rows, "batch": batch, "rank": rank, "world": world}
    dataset = ray.data.from_items(windows, override_num_blocks=len(windows))
    dataset = dataset.map_batches(_read_window, batch_size=None, fn_kwargs=read, num_cpus=DATA_CPUS)
    dataset.context.execution_options.preserve_order = True
    for window in dataset.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow"):
        seq_ids = np.stack(window["seq_ids"].to_numpy(zero_copy_only=False))
        tokens = np.stack(window["tokens"].to_numpy(zero_copy_only=False))
        for index, step in enumerate(window["step"].to_pylist()):
            yield Batch(step=step, seq_ids=seq_ids[index], tokens=tokens[index].reshape(batch // world, -1))


@lru_cache(maxsize=2)
def _reader(folder: str) -> RowReader:
    return RowReader(Path(folder))


def _read_window(
    window: dict[str, Any], *, folder: str, seed: int, rows: int, batch: int, rank: int, world: int
) -> pa.Table:
    steps: list[int] = []
    ids: list[npt.NDArray[np.int64]] = []
    for first, count in zip(window["first"].tolist(), window["steps"].tolist(), strict=True):
        whole = global_batches(seed=seed, rows=rows, batch=batch, first_step=first, steps=count)
        steps += range(first, first + count)
        ids += list(whole)
    reader = _reader(folder)
    tokens = [reader.read(row).ravel() for row in rank_share(np.stack(ids), rank=rank, world=world)]
    return pa.table({"step": steps, "seq_ids": [row.tolist() for row in ids], "tokens": pa.array(tokens)})

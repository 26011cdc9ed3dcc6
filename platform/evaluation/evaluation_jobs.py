"""Evaluate a model: held-out corpora, tasks, controls and the compute dial, one result after another."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from haltscale.platform.corpora.corpus import HeldOutDocument, PreparedCorpus, RowReader
from haltscale.platform.evaluation.controls import control, dial, first_tokens
from haltscale.platform.evaluation.held_out import Tally, read_events
from haltscale.platform.evaluation.scoring import score
from haltscale.platform.evaluation.tasks import Task, find_tasks, versions
from haltscale.platform.inference.model_ref import find_model, model_folder
from haltscale.platform.inference.models import LoadedModel, load_model
from haltscale.platform.llama import tokenizer_digest
from haltscale.platform.memory import keep_freed_memory
from haltscale.platform.store import RunStore


class EvaluationError(ValueError):
    """A model cannot be evaluated as requested; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to evaluate one model on. Plain data, so that it travels to any node."""

    model: str
    """Its name; see :mod:`haltscale.platform.inference.model_ref`."""
    store: str
    """Root of the run store."""
    corpora: tuple[str, ...] = ()
    """Folders of prepared corpora: the held-out text of each; controls and dial read the first."""
    tasks: tuple[str, ...] = ()
    """Names of standard tasks, ``all``, or files."""
    shots: tuple[int, ...] = (0, 5)
    """Examples before each question."""
    limit: int | None = None
    """So many items of each task."""
    held_out: bool = True
    """Whether the corpora are read for their held-out loss."""
    controls: bool = False
    dial: bool = False
    tokens: int | None = None
    """So many held-out tokens for controls and dial."""
    device: str = "cpu"

    def parts(self) -> list[Evaluation]:
        """The same in pieces of one result each, in the order of :meth:`results`."""
        alone = replace(self, corpora=(), tasks=(), held_out=False, controls=False, dial=False)
        parts = [replace(alone, corpora=(corpus,), held_out=True) for corpus in self.corpora if self.held_out]
        if self.controls:
            parts.append(replace(alone, corpora=self.corpora[:1], controls=True))
        if self.dial:
            parts.append(replace(alone, corpora=self.corpora[:1], dial=True))
        parts += [replace(alone, tasks=(name,), shots=(n,)) for name, n in versions(self.tasks, self.shots)]
        return parts

    def results(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, result) of each evaluation, as it is done; see :func:`evaluations`.

        Raises:
            ValueError: the model, a corpus or a task cannot be read, or there is nothing to evaluate on.
        """
        for name, value in (("limit", self.limit), ("tokens", self.tokens)):
            if value is not None and value < 1:
                raise EvaluationError(f"{name} must be at least 1 (got {value})")
        tasks = find_tasks(self.tasks, self.shots)
        store = RunStore(self.store)
        with model_folder(find_model(self.model, store), store) as folder:
            loaded = load_model(folder, device=self.device)
            corpora = [open_corpus(corpus, loaded) for corpus in self.corpora]
            yield from evaluations(
                loaded,
                corpora=corpora,
                tasks=tasks,
                limit=self.limit,
                held_out_loss=self.held_out,
                controls=self.controls,
                with_dial=self.dial,
                tokens=self.tokens,
            )


def open_corpus(folder: str | Path, loaded: LoadedModel) -> PreparedCorpus:
    """A prepared corpus that a model can read.

    Raises:
        EvaluationError: there is none, or its tokens are not the model's.
    """
    corpus = PreparedCorpus.open(folder)
    if corpus is None:
        raise EvaluationError(
            f"{folder} does not contain a prepared corpus (corpus.json); a study prepares its own when it runs"
        )
    own, models = (_tokenizer_of(where / "tokenizer.json") for where in (corpus.folder, loaded.folder))
    if own != models:
        raise EvaluationError(f"{folder} was tokenised with a different tokenizer from the model's")
    return corpus


def _tokenizer_of(file: Path) -> str:
    """What says whether two tokenizers are the same: their digest; of a file that is none, its text."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} cannot be read ({error}): prepare the corpus again") from error
    try:
        return tokenizer_digest(text)
    except (ValueError, KeyError, TypeError, AttributeError):
        return text


def evaluations(
    loaded: LoadedModel,
    *,
    corpora: Sequence[PreparedCorpus] = (),
    tasks: Sequence[Task] = (),
    limit: int | None = None,
    held_out_loss: bool = True,
    controls: bool = False,
    with_dial: bool = False,
    tokens: int | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of each evaluation, as it is done; results are JSON-able.

    Args:
        corpora: each for its held-out loss; the first also for controls and dial.
        limit: so many items of each task.
        held_out_loss: whether the corpora are read for it.
        controls: the learned halting against shuffled, fixed, posthoc thresholds, oracle and full (:func:`.control`);
            thresholds are tuned on rows of the training text.
        with_dial: loss against inference FLOPs (:func:`.dial`).
        tokens: read only so many held-out tokens, rounded up to whole documents, for controls and dial.

    Raises:
        EvaluationError: controls or dial are requested without a corpus.
    """
    if (controls or with_dial) and not corpora:
        raise EvaluationError("controls and dial require held-out text: name a prepared corpus")
    keep_freed_memory()
    context = loaded.model.config.context
    for corpus in corpora if held_out_loss else ():
        yield f"held-out-{corpus.counts['name']}", held_out(loaded, corpus)
    if controls or with_dial:
        documents = first_tokens(corpora[0].validation(), tokens)
        if controls:
            tuning = training_text(corpora[0], sum(len(document.tokens) - 1 for document in documents))
            found = control(loaded.model, documents, context=context, tuning=tuning)
            yield "controls", found or {"arms": [], "oracle": None}
        if with_dial:
            yield "dial", {"points": dial(loaded.model, documents, context=context)}
    for task in tasks:
        yield task.name, score(loaded, task, limit=limit).to_dict()


TUNING_TOKENS = 16_384


def training_text(corpus: PreparedCorpus, tokens: int) -> list[HeldOutDocument]:
    """Training rows spread over a corpus, as many tokens as requested but at most :data:`TUNING_TOKENS`; none where
    the folder holds held-out text alone."""
    if not (corpus.folder / "parts.json").is_file():
        return []
    each = int(corpus.counts["context"])
    count = max(1, min(corpus.rows, min(tokens, TUNING_TOKENS) // each))
    ids = np.linspace(0, corpus.rows - 1, count).astype(np.int64)
    rows = RowReader(corpus.folder).read(np.unique(ids)).astype(np.int64)
    return [HeldOutDocument(name=f"row {index}", bytes=0, tokens=row) for index, row in zip(ids, rows, strict=False)]


def held_out(loaded: LoadedModel, corpus: PreparedCorpus) -> dict[str, Any]:
    """The held-out documents of a corpus: loss and halting (see ``Tally.row``), FLOPs and seconds per token; and where
    it has several sources, under ``sources``, loss and halting of each."""
    tally, began = Tally(), time.perf_counter()
    parts: dict[str, Tally] = {}
    sizes: dict[str, int] = {}
    for source, documents in itertools.groupby(corpus.stream_validation(), key=lambda document: document.source):
        part = parts.setdefault(source, Tally())
        kept = Sizes(documents)
        for events in read_events(loaded.model, kept, context=loaded.model.config.context):
            tally.add(events)
            part.add(events)
        sizes[source] = sizes.get(source, 0) + kept.bytes
    seconds = time.perf_counter() - began
    several = {name: part.row(text_bytes=sizes[name]) for name, part in parts.items() if part.tokens}
    return {
        "corpus": corpus.counts["name"],
        **tally.row(text_bytes=sum(sizes.values())),
        "flops_realised": tally.flops.realised / tally.tokens,
        "seconds": seconds / tally.tokens,
        **({"sources": several} if len(parts) > 1 else {}),
    }


class Sizes:
    """Documents as they pass, and the bytes of those that have."""

    def __init__(self, documents: Iterable[HeldOutDocument]) -> None:
        self._documents, self.bytes = documents, 0

    def __iter__(self) -> Iterator[HeldOutDocument]:
        for document in self._documents:
            self.bytes += document.bytes
            yield document

"""Evaluate a finished model: held-out corpora, tasks, controls and the compute dial, one result after another."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from haltscale.platform.corpora.corpus import HeldOutDocument, PreparedCorpus
from haltscale.platform.evaluation.controls import control, dial, first_tokens
from haltscale.platform.evaluation.held_out import Tally, read_events
from haltscale.platform.evaluation.scoring import score
from haltscale.platform.evaluation.tasks import Task
from haltscale.platform.inference.models import LoadedModel
from haltscale.platform.store import RunStore, haltscale_home


class EvaluationError(ValueError):
    """A model cannot be evaluated as asked; the message says what to do."""


def open_corpus(folder: str | Path, loaded: LoadedModel) -> PreparedCorpus:
    """A prepared corpus that a model can read.

    Raises:
        EvaluationError: there is none, or its tokens are not the model's.
    """
    corpus = PreparedCorpus.open(Path(folder))
    if corpus is None:
        raise EvaluationError(f"{folder} holds no prepared corpus (corpus.json); a study prepares its own when it runs")
    if (corpus.folder / "tokenizer.json").read_text() != (loaded.folder / "tokenizer.json").read_text():
        raise EvaluationError(f"{folder} was tokenised with another tokenizer than the model's")
    return corpus


def own_corpus(store: RunStore, study: str, key: str) -> Path:
    """The folder of the corpus that a run was trained on, as the study prepared it on this machine."""
    about, identity = store.study(study)["corpus"], store.run(study, key).spec["identity"]
    return haltscale_home() / "corpora" / f"{about['name']}-{about['fingerprint']}-{identity['context']}"


def evaluations(
    loaded: LoadedModel,
    *,
    corpora: Sequence[PreparedCorpus] = (),
    tasks: Sequence[Task] = (),
    limit: int | None = None,
    controls: bool = False,
    with_dial: bool = False,
    tokens: int | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of each evaluation, as it is done; results are JSON-able.

    Args:
        corpora: each for its held-out loss; the first also for controls and dial.
        limit: so many items of each task.
        controls: the learned halting against shuffled, fixed and full (:func:`.control`).
        with_dial: loss against inference FLOPs (:func:`.dial`).
        tokens: read only so many held-out tokens, rounded up to whole documents, for controls and dial.

    Raises:
        EvaluationError: controls or dial are asked for without a corpus.
    """
    if (controls or with_dial) and not corpora:
        raise EvaluationError("controls and dial read held-out text: name a prepared corpus")
    context = loaded.model.config.context
    for corpus in corpora:
        yield f"held-out-{corpus.counts['name']}", held_out(loaded, corpus)
    if controls or with_dial:
        documents = first_tokens(corpora[0].validation(), tokens)
        if controls:
            yield "controls", control(loaded.model, documents, context=context) or {"arms": [], "oracle": None}
        if with_dial:
            yield "dial", {"points": dial(loaded.model, documents, context=context)}
    for task in tasks:
        yield task.name, score(loaded, task, limit=limit).to_dict()


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

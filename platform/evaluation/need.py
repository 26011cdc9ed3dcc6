"""Steps given against steps needed, on text whose need is known token by token (a corpus with a ``need`` function)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr
from tokenizers import Tokenizer

from haltscale.platform.corpora.corpus import HeldOutDocument, PreparedCorpus
from haltscale.platform.evaluation.held_out import TokenEvents

NeedOf = Callable[[Sequence[str]], Sequence[int | None]]
"""From a document's tokens, as words, to the latent steps that each needs; None for a token that no computation
predicts, and on which every step is wasted."""
UNPREDICTABLE = -1
"""What stands for None in arrays."""


class NeedOfCorpus:
    """The need of every token of a corpus's texts."""

    def __init__(self, need_of: NeedOf, words: Sequence[str]) -> None:
        self._need_of, self._words = need_of, words

    @classmethod
    def of(cls, corpus: PreparedCorpus) -> NeedOfCorpus | None:
        """The corpus's; None where its need is not known.

        Raises:
            ValueError: the function that the corpus names cannot be imported.
        """
        name = str(corpus.counts.get("need") or "")
        if not name:
            return None
        module, _, function = name.partition(":")
        try:
            need_of: NeedOf = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"corpus {corpus.counts['name']}: its need, {name}, cannot be imported ({error})"
            ) from error
        tokenizer = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
        size = int(corpus.counts["vocab_size"])
        return cls(need_of, [tokenizer.id_to_token(index) or "" for index in range(size)])

    def __call__(self, document: HeldOutDocument) -> npt.NDArray[np.int8]:
        """``(n,)`` of a document's tokens after its end-of-text."""
        found = self._need_of([self._words[token] for token in document.tokens[1:]])
        return np.array([UNPREDICTABLE if need is None else need for need in found], dtype=np.int8)


class NeedTally:
    """Counts over a stream of events, from which follows whether a model's steps are where they are needed."""

    def __init__(self, need: NeedOfCorpus, documents: Iterable[HeldOutDocument]) -> None:
        self._needs = [need(document) for document in documents]
        self._cells: dict[tuple[int, int], npt.NDArray[np.float64]] = {}

    def add(self, events: TokenEvents) -> None:
        """Take some events in."""
        needs = np.array(
            [self._needs[document][place] for document, place in zip(events.document, events.position, strict=True)],
            dtype=np.int64,
        )
        values = np.stack((np.ones(len(needs)), events.correct, events.nll.astype(np.float64)))
        for need, steps in {*zip(needs.tolist(), events.steps.tolist(), strict=True)}:
            here = (needs == need) & (events.steps == steps)
            self._cells[need, steps] = self._cells.get((need, steps), np.zeros(3)) + values[:, here].sum(1)

    def result(self) -> dict[str, Any]:
        """What was found.

        Returns:
            ``by_need``: rows of ``need`` (None: unpredictable), ``tokens``, ``accuracy``, ``loss`` (nats),
            ``mean_steps`` and ``steps_histogram``, ascending. ``rank_correlation``: Spearman's, between need and steps
            over all tokens, an unpredictable one needing 0; None where one of the two never varies. ``needy``:
            ``tokens``, ``accuracy``, ``loss`` and ``mean_steps`` of the tokens that need a step; None where there are
            none.
        """
        most = max(steps for _, steps in self._cells)
        rows = []
        for need in sorted({need for need, _ in self._cells}):
            row = self._over({need})
            assert row is not None
            counts = [self._cells.get((need, steps), np.zeros(3))[0] for steps in range(most + 1)]
            row["steps_histogram"] = [float(count / sum(counts)) for count in counts]
            rows.append({"need": None if need == UNPREDICTABLE else need, **row})
        return {"by_need": rows, "rank_correlation": self._rank_correlation(), "needy": self._over(range(1, 100))}

    def _over(self, needs: Collection[int]) -> dict[str, Any] | None:
        cells = {key: cell for key, cell in self._cells.items() if key[0] in needs}
        if not cells:
            return None
        tokens, correct, nats = np.sum(list(cells.values()), axis=0).tolist()
        steps = sum(cell[0] * key[1] for key, cell in cells.items())
        return {
            "tokens": int(tokens),
            "accuracy": correct / tokens,
            "loss": nats / tokens,
            "mean_steps": float(steps / tokens),
        }

    def _rank_correlation(self) -> float | None:
        needs, steps, counts = zip(
            *((max(need, 0), steps, int(cell[0])) for (need, steps), cell in self._cells.items()), strict=True
        )
        if len(set(needs)) < 2 or len(set(steps)) < 2:
            return None
        return float(spearmanr(np.repeat(needs, counts), np.repeat(steps, counts)).statistic)

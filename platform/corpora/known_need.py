"""Text with a known need: synthetic documents in which marked tokens take k more steps of computation, others none.

A document lists the edges of one random cycle over a few symbols, each as one token, in random order; then it asks.
``2?c`` asks for the symbol two hops beyond the successor of ``c``, and the next token is the answer:

    a>d c>b d>c b>a  0?c b  2?c d  1?a c ...

Finding a successor takes one look-up, which an ordinary pass does; each further hop needs the result of the one
before. So the answer to ``k?...`` *needs* k latent steps, and every other token needs none: edges and questions are
random, and no computation predicts them. In the twin (``needed=False``) the surface is the same, but the answer is the
successor whatever the number says, and nothing needs a step.

A router that finds need must put its steps on the first and none on the second; see ``studies/known_need.py``.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models, pre_tokenizers

from haltscale.platform.corpora.corpus import Corpus
from haltscale.platform.corpora.formats import Format
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import END_OF_TEXT, Pretrained
from haltscale.platform.durable import write_durably
from haltscale.platform.identity import digest
from haltscale.platform.store import haltscale_home

_QUESTION = re.compile(r"(\d+)\?(\w)")


@dataclass(frozen=True, kw_only=True)
class ChainedLookups:
    """Documents of one kind; see the module."""

    symbols: int = 7
    """In the cycle, 3 to 26."""
    most: int = 2
    """Latent steps that the hardest question needs; questions need 0 to so many, equally often."""
    questions: int = 12
    """In each document, all different: no answer can be copied."""
    needed: bool = True
    """False: the twin, whose answers need no step."""
    seed: int = 0

    def problems(self) -> list[str]:
        """All errors of the description."""
        found = []
        for name, low, high in (("symbols", 3, 26), ("most", 0, 9), ("questions", 1, 1000)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                found.append(f"{name} = {value!r}: must be an integer of at least {low} and at most {high}")
        if not found and self.questions > (there := (self.most + 1) * self.symbols):
            found.append(f"questions = {self.questions}: must be at most {there}, the number of different questions")
        return found

    @property
    def length(self) -> int:
        """Tokens of a document, with the end-of-text before it: at this context, a row is a document."""
        return 1 + self.symbols + 2 * self.questions

    @property
    def vocabulary(self) -> list[str]:
        """Every token; its place is its id. End-of-text, edges, questions, symbols."""
        names = string.ascii_lowercase[: self.symbols]
        edges = [f"{a}>{b}" for a in names for b in names if a != b]
        questions = [f"{k}?{a}" for k in range(self.most + 1) for a in names]
        return [END_OF_TEXT, *edges, *questions, *names]

    def documents(self, count: int) -> npt.NDArray[np.uint16]:
        """So many documents, end-of-text first: [count, length]. The first are the same whatever the count is."""
        S, Q = self.symbols, self.questions
        stream = np.random.default_rng([self.seed, S, self.most, Q, 17])
        kinds = (self.most + 1) * S  # of questions
        draws = stream.random((count, 2 * S + kinds))  # one row a document, so that more of them keep the first
        cycle = draws[:, :S].argsort(1)  # visited in this order
        after = np.empty_like(cycle)
        np.put_along_axis(after, cycle, np.roll(cycle, -1, axis=1), axis=1)  # each symbol's successor
        first_edge, first_question = 1, 1 + S * (S - 1)
        first_symbol = first_question + (self.most + 1) * S
        listed = draws[:, S : 2 * S].argsort(1)
        targets = np.take_along_axis(after, listed, axis=1)
        edges = first_edge + listed * (S - 1) + targets - (targets > listed)
        hops, keys = np.divmod(draws[:, 2 * S :].argsort(1)[:, :Q], S)
        answers = np.take_along_axis(after, keys, axis=1)
        for k in range(1, self.most + 1):
            further = np.take_along_axis(after, answers, axis=1)
            answers = np.where((hops >= k) & self.needed, further, answers)
        questions = np.stack((first_question + hops * S + keys, first_symbol + answers), axis=2).reshape(count, 2 * Q)
        begin = np.zeros((count, 1), dtype=np.int64)
        return np.concatenate((begin, edges, questions), axis=1).astype(np.uint16)

    def tokenizer(self) -> Tokenizer:
        """Word by word; the words are the vocabulary."""
        words = {word: index for index, word in enumerate(self.vocabulary)}
        made = Tokenizer(models.WordLevel(vocab=words, unk_token=END_OF_TEXT))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made.add_special_tokens([END_OF_TEXT])
        return made


def need_of_chained_lookups(words: Sequence[str]) -> list[int | None]:
    """Latent steps that each token of a text needs, from the text itself: an answer, what the question before it says;
    None for edges and questions, which no computation predicts."""
    return [int(question[1]) if question else None for question in _questions_before(words)]


def need_of_twin(words: Sequence[str]) -> list[int | None]:
    """The same of the twin: no answer needs a step."""
    return [0 if question else None for question in _questions_before(words)]


def _questions_before(words: Sequence[str]) -> list[re.Match[str] | None]:
    return [_QUESTION.fullmatch(word.strip()) for word in ["", *words[:-1]]]


def known_need(
    *, documents: int = 40_000, validation_documents: int = 400, lookups: ChainedLookups | None = None
) -> Corpus:
    """A corpus of documents whose need for latent steps is known token by token.

    Its files are generated once, below ``$HALTSCALE_HOME/generated``. A context of :attr:`ChainedLookups.length` makes
    every row one document.

    Args:
        documents: to generate in all.
        validation_documents: of them, held out.
        lookups: what they are like; ``ChainedLookups(needed=False)`` gives the twin.

    Raises:
        ValueError: the description has errors, or too few documents are requested.
    """
    lookups = lookups or ChainedLookups()
    problems = lookups.problems()
    if not isinstance(documents, int) or documents < validation_documents + 2:
        problems.append(f"documents = {documents!r}: must be an integer of at least {validation_documents + 2}")
    if problems:
        raise ValueError("; ".join(problems))
    name = "known-need" if lookups.needed else "known-need-twin"
    folder = haltscale_home() / "generated" / f"{name}-{digest([lookups, documents])}"
    texts, words = folder / "documents.u16", folder / "tokenizer.json"
    if not words.exists():
        folder.mkdir(parents=True, exist_ok=True)
        generated = lookups.documents(documents)
        # A document's end-of-text stands before it; token files have it behind.
        write_durably(texts, np.roll(generated, -1, axis=1).astype("<u2").tobytes())
        write_durably(words, json.dumps(json.loads(lookups.tokenizer().to_str())).encode())
    need = need_of_chained_lookups if lookups.needed else need_of_twin
    return Corpus(
        name=name,
        sources={"documents": Source(path=str(texts), format=Format.UINT16)},
        tokenizer=Pretrained(name=str(words)),
        validation_documents=validation_documents,
        remove_duplicates=False,
        need=f"{need.__module__}:{need.__name__}",
    )

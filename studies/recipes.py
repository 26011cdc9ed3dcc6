"""Recipes: which switches make loops train better, at equal realised training FLOPs?

**Compared.** Every switch of loop_options.py and of the vocabulary (docs/methods.md), Muon and the document mask, one
at a time, and a few of them together, on `adaptive` and on `looped`: 0.6m, three latent steps, the State of the Union
addresses. Every run spends 3e11 realised training FLOPs; what a switch saves on its passes buys tokens. Three seeds,
shared by all variants: the same initial weights where shapes agree, and the same order of texts.

**Analysis, decided before any result.** For each method and variant, `differences`: nats per token above the reference,
paired within held-out document and seed, over 24 held-out addresses, with the 95 % bootstrap interval of
`analysis.paired` over documents and seeds. The reference is the same method with everything off; gradients through the
last passes need an injection, so theirs is the injection alone. A switch helps (hurts) where the interval lies below
(above) 0; everything else is published as *not decided*. There are 32 intervals, and one in twenty of them misses by
chance: a helpful switch is worth adopting only if it helps both methods, or is confirmed at another size.

**What it cannot say.** All variants have the rate that was tuned for their method without switches
(`reference_tuning`), so a switch that wants another rate is undersold. Growing depths spend less per token early, hence
see more text; the comparison is at equal FLOPs, not at equal tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from haltscale.platform.analysis import Refusal, document_frame
from haltscale.platform.analysis.paired import paired_difference
from haltscale.platform.api import ExecutionConfig, Method, RunConfig, RunStore, Study, Sweep, grid, sotu
from haltscale.studies import reference

NAME = "recipes"
SIZE, BUDGET = "0.6m", 3e11
SEEDS = (0, 1, 2)
METHODS: Mapping[Method, Mapping[str, Any]] = {Method.ADAPTIVE: reference.HALTING, Method.LOOPED: {"steps": 3}}
OFF = "all off"
NORM: Mapping[str, Any] = {"injection": "norm"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    OFF: {},
    "injection, added": {"injection": "add"},
    "injection, normed": NORM,
    "norm at the border": {"loop_norm": True},
    "zero outputs": {"zero_outputs": True},
    "residuals / N": {"scaled_residuals": True},
    "depth grows, linear": {"depth_growth": 0.5},
    "depth grows, 1 - sqrt": {"depth_growth": 0.5, "depth_curve": "sqrt"},
    "late loops": {"depth_growth": 0.7, "depth_curve": "late"},
    "tied embeddings": {"tie_embeddings": True},
    "factorised embeddings": {"embedding_rank": 32},
    "Muon": {"optimizer": "muon"},
    "document mask": {"document_mask": True},
    "injection, normed; gradient of 2 passes": {**NORM, "gradient_passes": 2},
    "injection, normed; zero outputs": {**NORM, "zero_outputs": True},
    "injection, normed; zero outputs; 1 - sqrt": {
        **NORM,
        "zero_outputs": True,
        "depth_growth": 0.5,
        "depth_curve": "sqrt",
    },
    "injection, normed; zero outputs; 1 - sqrt; gradient of 2 passes": {
        **NORM,
        "zero_outputs": True,
        "depth_growth": 0.5,
        "depth_curve": "sqrt",
        "gradient_passes": 2,
    },
}
REFERENCES = {"injection, normed; gradient of 2 passes": "injection, normed"}
"""What a variant is compared with, where that is not all off."""


def point(method: Method, variant: str) -> dict[str, Any]:
    """What a variant of a method sets."""
    rate = reference.rate(method, SIZE)
    return {"method": method, "learning_rate": rate, **METHODS[method], **VARIANTS[variant]}


def sweep() -> Sweep:
    """Every variant of both methods at every seed; the references first."""
    every = [grid(**point(method, variant)) for variant in VARIANTS for method in METHODS]
    return sum(every, start=Sweep(())) * grid(seed=SEEDS, training_flops=BUDGET)


def study() -> Study:
    """The study; ``python -m haltscale.studies.recipes`` runs it."""
    return Study(
        name=NAME,
        question="Which switches make loops train better, at equal realised training FLOPs?",
        corpus=sotu(vocab_size=reference.VOCABULARY, validation_documents=24),
        base=RunConfig(size=SIZE, batch_tokens=reference.BATCH_TOKENS, context=256),
        sweep=sweep(),
        execution=ExecutionConfig(evaluations=1, checkpoints=1),
        note="recipes.differences has the paired differences: believe no smaller ones than their intervals.",
    )


def differences(store: RunStore) -> pd.DataFrame:
    """The table of the analysis: ``method``, ``variant``, ``reference``, ``seeds``, ``loss`` (nats/token, mean over
    seeds), ``flops`` and ``tokens`` (means over seeds, of training), ``mean_steps``; ``difference`` in nats per token
    with ``low`` and ``high``; ``verdict``, or why there is none. Variants without a finished run are left out."""
    records: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for view in store.runs(NAME):
        if not view.record or (variant := variant_of(view.record["identity"])) is None:
            continue
        identity = view.record["identity"]
        records.setdefault((identity["method"], variant), {})[identity["seed"]] = view.record
    rows = []
    for (method, variant), own in sorted(records.items(), key=lambda item: (item[0][0], [*VARIANTS].index(item[0][1]))):
        against = REFERENCES.get(variant, OFF)
        other = records.get((method, against), {})
        seeds = sorted(own.keys() & other.keys())
        row: dict[str, Any] = {"method": method, "variant": variant, "reference": against, "seeds": len(seeds)}
        for name, field in (("loss", "loss"), ("flops", "flops_realised"), ("tokens", "tokens")):
            row[name] = sum(float(record[field]) for record in own.values()) / len(own)
        row["mean_steps"] = sum(float(record.get("mean_steps") or 0) for record in own.values()) / len(own)
        if variant == OFF:
            rows.append(row | {"verdict": "the reference"})
            continue
        found = paired_difference([document_frame(own[s]) for s in seeds], [document_frame(other[s]) for s in seeds])
        if isinstance(found, Refusal):
            rows.append(row | {"verdict": found.reason})
            continue
        verdict = "helps" if found.high < 0 else "hurts" if found.low > 0 else "not decided"
        rows.append(row | {"difference": found.value, "low": found.low, "high": found.high, "verdict": verdict})
    return pd.DataFrame(rows)


def variant_of(identity: Mapping[str, Any]) -> str | None:
    """The variant that a run is; None for one that is no run of this study's."""
    switches = {name for changes in VARIANTS.values() for name in changes}
    values = {**identity, **identity["options"]}
    for variant, changes in VARIANTS.items():
        usual = {"tie_embeddings": False, "embedding_rank": 0, "injection": "none", "depth_curve": "linear"}
        usual |= {"optimizer": "adamw", "document_mask": False}
        wanted = {name: changes.get(name, usual.get(name, 0)) for name in switches}
        if all(values.get(name, usual.get(name, 0)) == value for name, value in wanted.items()):
            return variant
    return None


if __name__ == "__main__":
    study().main()

"""Gate ablation, English: which variants of the router are worth their FLOPs on ordinary text?

The variants of `gate_ablation.py` and the plain model, on the State of the Union addresses, at equal *realised*
training FLOPs: a variant that takes more steps sees less text. One layer, as on the text with a known need, and a
thousand optimizer steps or so. Decided before the held-out results were seen: the rates are the best of
`gate_ablation_tuning` (another seed) for each of the two bases and for the plain model, shared by a base's variants;
the figures are differences in held-out nats from the plain model, paired by seed and document.
"""

from haltscale.platform.api import Corpus, ExecutionConfig, RunConfig, Study, grid, sotu
from haltscale.studies import gate_ablation, known_need

FLOPS = 6e11
CONTEXT, BATCH = 128, 4
RATES = {"recipe": 2e-2, "paper": 2e-2, "vanilla": 2e-2}
"""Peak learning rates: the best of `gate_ablation_tuning`."""
BASE = RunConfig(
    size="1x64",
    flops=FLOPS,
    context=CONTEXT,
    batch_tokens=BATCH * CONTEXT,
    warmup_fraction=0.05,
    weight_decay=0.01,
    adam_beta2=0.98,
)
EXECUTION = ExecutionConfig(evaluations=1, checkpoints=1)


def corpus() -> Corpus:
    """The addresses, eight of them held out, with a tokenizer of 512 byte pairs."""
    return sotu(vocab_size=512, validation_documents=8)


def study() -> Study:
    """The study; ``python -m haltscale.studies.gate_ablation_english`` runs it."""
    recipe, paper = ({"learning_rate": RATES[base]} for base in ("recipe", "paper"))
    return Study(
        name="gate-ablation-english",
        question="Which variants of the router are worth their FLOPs on ordinary text?",
        corpus=corpus(),
        base=BASE,
        sweep=grid(method="vanilla", learning_rate=RATES["vanilla"], seed=known_need.SEEDS)
        + gate_ablation.sweep(known_need.SEEDS, recipe=recipe, paper=paper),
        execution=EXECUTION,
    )


if __name__ == "__main__":
    study().main()

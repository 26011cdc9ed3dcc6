"""Main comparison: at the same data, which way of thinking before a token gives the lowest loss for its FLOPs?

The paper's setting (arXiv 2602.08220): all methods at 410M and 1.4B parameters, 50,000 steps of 256 sequences x 2,048
tokens of the Pile, about 26B tokens; AdamW, cosine to 10 %, warm-up 2 %. With controls for every adaptive run: is it
the choice of where to think, or only the passes? And is it worth its FLOPs beside a plain model with more tokens?

For a cluster: each run takes 8 GPUs. `main_ladder` asks the same of one machine.
"""

from haltscale.platform.api import (
    RECIPES,
    Corpus,
    ExecutionConfig,
    Pretrained,
    RunConfig,
    Study,
    Sweep,
    controls,
    grid,
    zip_,
)

BATCH_TOKENS = 256 * 2048
STEPS = 50_000


def compared(sizes: Sweep) -> Sweep:
    """Every method and every control at some sizes."""
    adaptive = grid(method="adaptive", l_max=[3, 5]) * sizes
    others = ["vanilla", "looped", "pause", "ponder", "ponder2", "mor", "ponder3", "adaponder"]
    return grid(method=others) * sizes + adaptive + controls(of=adaptive)


def study() -> Study:
    """The study; ``python -m haltscale.studies.main_comparison`` runs it."""
    return Study(
        name="main-comparison",
        question="At the same data, which way of thinking before a token gives the lowest loss for its FLOPs?",
        corpus=Corpus(name="pile", sources={"pile": RECIPES["pile"]}, tokenizer=Pretrained(name="gpt-neox-20b")),
        base=RunConfig(tokens=STEPS * BATCH_TOKENS, context=2048, batch_tokens=BATCH_TOKENS, warmup_fraction=0.02),
        sweep=compared(zip_(size=["410m", "1.4b"], learning_rate=[3e-4, 2e-4])),
        execution=ExecutionConfig(
            workers=8, gpus_per_worker=1, micro_batch_sequences=8, evaluations=20, checkpoints=50, log_every_seconds=10
        ),
    )


if __name__ == "__main__":
    study().main()

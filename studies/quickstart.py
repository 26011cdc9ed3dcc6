"""Quickstart: does a small model learn where to think, and what do its thoughts cost?

Vanilla against adaptive latent chain-of-thought at two small sizes, on the State of the Union addresses; the same
tokens in the same order for each run. Minutes on two CPU cores.
"""

from haltscale.platform.api import RunConfig, Study, grid, sotu

SIZES = ["0.6m", "1.8m"]


def study() -> Study:
    """The study; ``python -m haltscale.studies.quickstart`` runs it."""
    return Study(
        name="quickstart",
        question="Does a small model learn where to think, and what do its thoughts cost?",
        corpus=sotu(vocab_size=4096),
        base=RunConfig(tokens=180_000, context=256, batch_tokens=1024, learning_rate=3e-3),
        sweep=grid(method="vanilla", size=SIZES)
        # A short run has few steps to learn when to stop: tau and the router's start are chosen so that it can.
        + grid(method="adaptive", size=SIZES, lam=[0.1, 1.0], l_max=3, tau=0.05, router_bias=1.0),
        note=(
            "A demo of this length shows the machinery and the halting, not the paper's gain: at a few hundred thousand"
            " tokens the extra passes hardly pay."
        ),
    )


if __name__ == "__main__":
    study().main()

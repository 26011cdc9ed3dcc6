"""State of the Union: where does a small model take latent steps on English, and what do they cost?

Vanilla against adaptive latent chain-of-thought at two small sizes, on the State of the Union addresses; the same
tokens in the same order for each run. Minutes on two CPU cores.
"""

from haltscale.platform.api import RunConfig, Study, grid, sotu

SIZES = ["0.6m", "1.8m"]


def study() -> Study:
    """The study; ``python -m haltscale.studies.state_of_the_union`` runs it."""
    return Study(
        name="state-of-the-union",
        question="Where does a small model take latent steps on English, and what do they cost?",
        corpus=sotu(vocab_size=4096),
        base=RunConfig(tokens=180_000, context=256, batch_tokens=1024, learning_rate=3e-3),
        sweep=grid(method="vanilla", size=SIZES)
        # A short run has few steps to learn when to stop: tau and the router's start are chosen so that it can.
        + grid(method="adaptive", size=SIZES, lam=[0.1, 1.0], l_max=3, tau=0.05, router_bias=1.0),
        note=(
            "Runs of this length show the machinery and the halting, not the paper's gain: at a few hundred thousand"
            " tokens the extra passes are not yet worth their cost."
        ),
    )


if __name__ == "__main__":
    study().main()

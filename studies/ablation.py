"""Ablation: how do the penalty's weight (lam), its exponent (beta) and the depth allowed (l_max) trade loss for FLOPs?

The whole grid at three sizes, with vanilla beside it; the same tokens everywhere, so that a point differs from its
neighbour in one thing.
"""

from haltscale.platform.api import RunConfig, Study, grid, sotu

SIZES = ["0.6m", "1.8m", "4m"]


def study() -> Study:
    """The study; ``python -m haltscale.studies.ablation`` runs it."""
    return Study(
        name="ablation",
        question="How do lam, beta and l_max trade loss for FLOPs, and does that change with the size?",
        corpus=sotu(),
        base=RunConfig(tokens=1_000_000, batch_tokens=2048),
        sweep=grid(method="vanilla", size=SIZES)
        + grid(
            method="adaptive",
            size=SIZES,
            lam=[0.0, 0.03, 0.1, 0.3, 1.0],
            beta=[0.5, 1.0, 2.0],
            l_max=[1, 3, 5],
            tau=0.05,
        ),
    )


if __name__ == "__main__":
    study().main()

"""Quickstart: does a small model learn where to think?

Vanilla against adaptive latent chain-of-thought at two small sizes, on the State of the Union addresses; the same
tokens in the same order for each run. It takes minutes on two CPU cores.
"""

from haltscale.model import Method
from haltscale.platform.config import RunConfig
from haltscale.platform.corpus import sotu
from haltscale.platform.study import Study
from haltscale.platform.sweep import grid

SIZES = ["0.6m", "1.8m"]


def study() -> Study:
    """The study; ``python -m haltscale.studies.quickstart`` runs it."""
    return Study(
        name="quickstart",
        question="Does a small model learn where to think, and what do its thoughts cost?",
        corpus=sotu(vocab_size=4096),
        base=RunConfig(tokens=400_000, context=256, batch_tokens=4096),
        sweep=grid(method=Method.VANILLA, size=SIZES)
        + grid(method=Method.ADAPTIVE, size=SIZES, lam=[0.1, 0.5], l_max=3),
        note=(
            "A demo of this length shows the machinery and the halting, not the paper's gain: at a few hundred thousand"
            " tokens the extra passes hardly pay."
        ),
    )


if __name__ == "__main__":
    study().main()

"""Main comparison on one machine: does the order of the methods already show on the small steps of the ladder?

The design of `main_comparison` (all methods, all controls), on the State of the Union addresses at 2 tokens per
parameter. Hours to days on a few cores; shorten it with ``--set`` or take sizes away.
"""

from haltscale.platform.api import RunConfig, Study, grid, ladder, sotu
from haltscale.studies.main_comparison import compared


def study() -> Study:
    """The study; ``python -m haltscale.studies.main_ladder`` runs it."""
    return Study(
        name="main-ladder",
        question="Does the order of the methods already show on the small steps of the ladder?",
        corpus=sotu(),
        base=RunConfig(batch_tokens=4096, learning_rate=2e-3),
        sweep=compared(grid(size=ladder("1.8m", "8m"), tokens_per_parameter=2)),
        note="Small models on little text: look at the order and at the halting, not at the size of a difference.",
    )


if __name__ == "__main__":
    study().main()

"""Quickstart: does a small model learn where latent steps are needed, and what is that worth?

One seed of `known_need.py`: text in which some answers need one or two steps of computation by construction, and
nothing else needs any. The plain model learns what takes a single look-up; the adaptive one learns the rest, and its
router puts the steps there; with the same number of steps in other places it is lost. Minutes on two CPU cores.
"""

from dataclasses import replace

from haltscale.platform.api import Study
from haltscale.studies import known_need


def study() -> Study:
    """The study; ``python -m haltscale.studies.quickstart`` runs it."""
    return replace(
        known_need.study(),
        name="quickstart",
        sweep=known_need.sweep(seeds=(0,)),
        question="Does a small model learn where latent steps are needed, and what is that worth?",
        note=(
            "needy: tokens that need one or two latent steps by construction; rank corr.: Spearman's, between the steps"
            " that tokens need and those that they get. The controls take as many steps as the router did, elsewhere."
            " One seed shows the machinery; known_need has three, and the twin without need. For a study on English:"
            " haltscale submit state_of_the_union"
        ),
    )


if __name__ == "__main__":
    study().main()

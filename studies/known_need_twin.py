"""Known need, the twin: where no token needs a latent step, does the router take none, and do all arms tie?

The same surface as in `known_need.py`, whose arms these are; the answer is always one look-up away.
"""

from haltscale.platform.api import Study
from haltscale.studies import known_need


def study() -> Study:
    """The study; ``python -m haltscale.studies.known_need_twin`` runs it."""
    return known_need.study(needed=False)


if __name__ == "__main__":
    study().main()

"""Gate ablation, the twin: which variants of the router take steps where no token needs any?

The variants of `gate_ablation.py`, on the text with the same surface and no need.
"""

from haltscale.platform.api import Study
from haltscale.studies import gate_ablation


def study() -> Study:
    """The study; ``python -m haltscale.studies.gate_ablation_twin`` runs it."""
    return gate_ablation.study(needed=False)


if __name__ == "__main__":
    study().main()

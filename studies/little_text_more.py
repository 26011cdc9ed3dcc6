"""Little text, four times as much: is it better to think than to grow?

The design of `little_text.py` with about 200,000 unique tokens in place of 50,000.
"""

from haltscale.platform.api import Study
from haltscale.studies import little_text


def study(waves: int = little_text.WAVES) -> Study:
    """The study; ``python -m haltscale.studies.little_text_more`` runs it.

    Args:
        waves: as :func:`little_text.sweep` takes them.
    """
    return little_text.study("little-text-more", waves)


if __name__ == "__main__":
    study().main()

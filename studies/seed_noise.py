"""Seed noise: how far apart are runs that differ in nothing but the seed? No smaller difference is a finding.

Eight seeds of the plain, the fixed-depth and the adaptive model at two sizes. A seed changes the initial weights and
the order of the sequences.
"""

from haltscale.platform.api import RunConfig, Study, grid, sotu


def study() -> Study:
    """The study; ``python -m haltscale.studies.seed_noise`` runs it."""
    methods = grid(method=["vanilla", "fixed", "adaptive"]).with_options(steps=2.0, lam=0.3)
    return Study(
        name="seed-noise",
        question="How far apart are runs that differ in nothing but the seed?",
        corpus=sotu(),
        base=RunConfig(tokens=500_000, batch_tokens=2048),
        sweep=methods * grid(size=["0.6m", "1.8m"], seed=range(8)),
    )


if __name__ == "__main__":
    study().main()

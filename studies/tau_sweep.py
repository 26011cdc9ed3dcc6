"""Tau sweep: how far can one checkpoint be dialled between fast and careful, and does it beat another size so?

One adaptive model with up to five latent steps, and plain models of three sizes at the same tokens. The sweep is made
after training, on the one checkpoint: it is read again at other tau and at lower maximum depth, which gives loss
against inference FLOPs.
"""

from haltscale.platform.api import RunConfig, Study, grid, ladder, sotu


def study() -> Study:
    """The study; ``python -m haltscale.studies.tau_sweep`` runs it."""
    return Study(
        name="tau-sweep",
        question="How far can one checkpoint be dialled between fast and careful, and does it beat another size?",
        corpus=sotu(),
        base=RunConfig(tokens=1_000_000, batch_tokens=2048),
        sweep=grid(method="adaptive", size="1.8m", lam=0.1, l_max=5)
        + grid(method="vanilla", size=ladder("0.6m", "4m")),
        note="The sweep of the checkpoint: haltscale evaluate tau-sweep/adaptive-1.8m --dial",
    )


if __name__ == "__main__":
    study().main()

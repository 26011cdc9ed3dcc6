"""Router ablation: does it matter what the router is, and does it beat thinking equally long, or at random?

Linear, MLP and none (one fixed probability of going on), one router for all steps or one for each; and, for the linear
one, the fixed-depth and shuffled controls. Three seeds, since the paper's differences are a few thousandths of a nat.
"""

from haltscale.platform.api import RunConfig, Study, controls, grid, sotu


def study() -> Study:
    """The study; ``python -m haltscale.studies.router_ablation`` runs it."""
    linear = grid(method="adaptive", router="linear", seed=range(3))
    return Study(
        name="router-ablation",
        question="Does it matter what the router is, and does it beat thinking equally long, or at random?",
        corpus=sotu(),
        base=RunConfig(size="1.8m", tokens=1_000_000, batch_tokens=2048),
        sweep=linear
        + grid(method="adaptive", router=["mlp", "none"], seed=range(3))
        + grid(method="adaptive", router_per_step=True, seed=range(3))
        + controls(of=linear, kinds=["fixed", "shuffled"]),
        note="Compare differences with the spread over seeds before believing them.",
    )


if __name__ == "__main__":
    study().main()

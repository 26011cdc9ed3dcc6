"""IsoFLOP: at a given number of realised training FLOPs, which size is best for each method, and how good is it?

Five sizes x four budgets x three methods, each budget spent to the last step: as tokens solved from the ledger for the
plain model and the fixed depth, as a budget in realised FLOPs for the learned router. The minima over size, budget by
budget, are each method's frontier.
"""

from haltscale.platform.api import RunConfig, Study, grid, isoflop, ladder, sotu

BUDGETS = [1e12, 3e12, 1e13, 3e13]


def study() -> Study:
    """The study; ``python -m haltscale.studies.isoflop`` runs it."""
    methods = grid(method=["vanilla", "fixed", "adaptive"]).with_options(steps=2.0, lam=0.3)
    return Study(
        name="isoflop",
        question="At a given number of realised training FLOPs, which size is best for each method?",
        corpus=sotu(),
        base=RunConfig(batch_tokens=2048),
        sweep=isoflop(sizes=ladder("0.6m", "17m"), flops=BUDGETS) * methods,
        note="A budget whose minimum lies at the smallest or the largest size says nothing about the best size.",
    )


if __name__ == "__main__":
    study().main()

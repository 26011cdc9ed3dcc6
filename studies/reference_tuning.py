"""Tuning for the reference study: which peak learning rate suits each method, and how does it change with the size?

Every method's rates at the two smaller sizes, and vanilla's at a larger one, which check the rule for sizes. The fixed
control is tuned at one step. The seed is one that the comparison does not use. `reference.rates` chooses from the
records.
"""

from __future__ import annotations

from dataclasses import replace

from haltscale.platform.api import ExecutionConfig, Method, Study, Sweep, grid
from haltscale.studies import reference

SEED = 100


def sweep() -> Sweep:
    """Every method's rates, and vanilla's at a larger size."""
    tried = Sweep(())
    for size, (budget, _) in reference.TUNED.items():
        for method in [*reference.METHODS, Method.FIXED]:
            if reference.can_be(method, size):
                options = {"steps": 1} if method is Method.FIXED else {}
                rates = reference.tuning(method, size)
                tried += grid(method=method, size=size, training_flops=budget, learning_rate=rates, **options)
    tried = tried.with_options(**reference.HALTING)
    return tried + grid(method="vanilla", learning_rate=[2.5e-3, 5e-3, 1e-2], size="4m", training_flops=1e12)


def study() -> Study:
    """The study; ``python -m haltscale.studies.reference_tuning`` runs it."""
    return Study(
        name="reference-tuning",
        question="Which peak learning rate suits each method, and how does it change with the size?",
        corpus=reference.corpus(),
        base=replace(reference.BASE, seed=SEED),
        sweep=sweep(),
        execution=ExecutionConfig(evaluations=1, checkpoints=1),
        role="tuning",
        note="A lowest loss at the smallest or the largest of the rates only bounds the best rate.",
    )


if __name__ == "__main__":
    study().main()

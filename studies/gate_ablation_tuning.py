"""Gate ablation, tuning: which peak learning rate suits each base of the ablation on English?

Both bases and the plain model, at a seed that is not compared; `gate_ablation_english.RATES` holds the best.
"""

from dataclasses import replace

from haltscale.platform.api import Study, grid
from haltscale.studies import gate_ablation
from haltscale.studies import gate_ablation_english as english

TRIED = [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2]


def study() -> Study:
    """The study; ``python -m haltscale.studies.gate_ablation_tuning`` runs it."""
    bases = grid(method="vanilla") + grid(**gate_ablation.RECIPE) + grid(**gate_ablation.PAPER)
    return Study(
        name="gate-ablation-tuning",
        question="Which peak learning rate suits each base of the ablation on English?",
        corpus=english.corpus(),
        base=replace(english.BASE, seed=20),
        sweep=grid(learning_rate=TRIED) * bases,
        execution=english.EXECUTION,
        role="tuning",
    )


if __name__ == "__main__":
    study().main()

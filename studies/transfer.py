"""Transfer: does the best learning rate of a small model hold for a large one, and under which parametrisation?

The plain model at three sizes and five rates, under the standard parametrisation and under CompleteP
(`model/parametrisation.py`); the same tokens in the same order everywhere. The claim: under CompleteP the best rate at
0.6m is within one step of the grid (a factor of two) of the best at 8m. Decided before any result: `best` is the rate
of the lowest held-out loss; one seed, so that a rate next to the best may be as good (`above_best` says how much worse
it is).
"""

from __future__ import annotations

import pandas as pd

from haltscale.platform.api import ExecutionConfig, RunConfig, RunStore, Study, grid, sotu
from haltscale.studies import reference

NAME = "transfer"
SIZES = ["0.6m", "1.8m", "8m"]
RATES = [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2]
TOKENS = 102_400


def study() -> Study:
    """The study; ``python -m haltscale.studies.transfer`` runs it."""
    return Study(
        name=NAME,
        question="Does the best learning rate of a small model hold for a large one, and under which parametrisation?",
        corpus=sotu(vocab_size=reference.VOCABULARY),
        base=RunConfig(tokens=TOKENS, batch_tokens=reference.BATCH_TOKENS, context=256),
        sweep=grid(method="vanilla", size=SIZES, learning_rate=RATES, parametrisation=["standard", "completep"]),
        execution=ExecutionConfig(evaluations=1, checkpoints=1),
        role="tuning",
    )


def best_rates(store: RunStore) -> pd.DataFrame:
    """``parametrisation``, ``size``, ``best`` (rate), ``loss`` (nats per token), and ``above_best``: by rate, how much
    higher the held-out loss is."""
    losses: dict[tuple[str, str], dict[float, float]] = {}
    for view in store.runs(NAME):
        if view.record:
            of = view.record["identity"]
            losses.setdefault((of["parametrisation"], of["size"]), {})[of["learning_rate"]] = view.record["loss"]
    rows = []
    for (parametrisation, size), found in sorted(
        losses.items(), key=lambda item: (item[0][0], SIZES.index(item[0][1]))
    ):
        best = min(found, key=found.__getitem__)
        above = {rate: found[rate] - found[best] for rate in sorted(found)}
        rows.append(
            {"parametrisation": parametrisation, "size": size, "best": best, "loss": found[best], "above_best": above}
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    study().main()

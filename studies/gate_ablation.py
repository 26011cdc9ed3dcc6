"""Gate ablation: which departures from the paper's method let a router learn where latent steps are needed?

On text with a known need (`known_need.py`): the recipe that works, each of its parts taken out alone, and the paper's
method with one or two of them put in. Read `need_rank_correlation` (steps against need over all held-out tokens),
`needy_accuracy` and `mean_steps`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from haltscale.platform.api import Study, Sweep, grid
from haltscale.studies import known_need

RECIPE: Mapping[str, Any] = {"method": "adaptive", "l_max": known_need.LOOKUPS.most, **known_need.LEARNS}
WITHOUT: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "labels that look ahead (next step only)": {"gate_target": "gain"},
    "a price of a step": {"gain_margin": 0.0},
    "an MLP router (linear)": {"router": "linear"},
    "a detached router": {"router_detached": False},
    "growing depth": {"depth_growth": 0.0},
    "a warm-up that trains every state": {"warmup_loss": "last"},
    "the last state's readout (mixture)": {"mixture": "hidden", "halting_rule": "reach"},
}
PAPER: Mapping[str, Any] = {"method": "adaptive", "l_max": known_need.LOOKUPS.most, "lam": 0.1, "tau": 0.05}
WITH: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "no confidence weight": {"beta": 0.0},
    "a warm-up": {"gate_warmup": 0.6, "lam_ramp": 0.2},
    "a warm-up and no confidence weight": {"gate_warmup": 0.6, "lam_ramp": 0.2, "beta": 0.0},
    "a PonderNet prior after a warm-up": {"gate_warmup": 0.6, "lam_ramp": 0.2, "prior_steps": 0.25},
    "a router that reads the change": {"router_input": "change"},
}


def sweep(seeds: tuple[int, ...], *, recipe: Mapping[str, Any] = {}, paper: Mapping[str, Any] = {}) -> Sweep:
    """Every variant at every seed.

    Args:
        seeds: of weights and data order.
        recipe, paper: what the variants of each base share beside it.
    """
    found = Sweep(())
    for base, changes in (({**RECIPE, **recipe}, WITHOUT), ({**PAPER, **paper}, WITH)):
        for change in changes.values():
            found += grid(seed=seeds, **{**base, **change})
    return found


def study(*, needed: bool = True) -> Study:
    """The study; ``python -m haltscale.studies.gate_ablation`` runs it.

    Args:
        needed: False: on the twin, where no token needs a step.
    """
    return replace(
        known_need.study(needed=needed),
        name="gate-ablation" if needed else "gate-ablation-twin",
        question=(
            "Which departures from the paper's method let a router learn where latent steps are needed?"
            if needed
            else "Which variants of the router take steps where no token needs any?"
        ),
        sweep=sweep(known_need.SEEDS),
    )


if __name__ == "__main__":
    study().main()

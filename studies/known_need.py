"""Known need: is a router's choice of where to spend latent steps worth anything, on text with a known answer?

Chained look-ups: the answer to ``k?c`` takes k look-ups more than a pass of a one-layer model makes, and no other token
takes any (`platform/corpora/known_need.py`). Arms at equal size and tokens: the plain model; adaptive, taught as below;
its replay controls, which take the same numbers of steps blindly; the plain model with adaptive's FLOPs; and adaptive
as the paper has it. On the twin, with the same surface and no need, all must tie. If the instrument could not see the
first, or saw something in the second, no verdict on English would count.

What lets a router learn: depth first, growing step by step; then gates that learn from labels (did going on lower this
token's loss?) and read states without shaping them. Decided before the held-out results were seen: the seeds are none
that a pilot used; the verdicts are the differences of adaptive to its controls in held-out nats, paired by seed and
document, and the rank correlation of steps with need over all held-out tokens.
"""

from dataclasses import replace

from haltscale.platform.api import ChainedLookups, ExecutionConfig, RunConfig, Study, Sweep, controls, grid, known_need

LOOKUPS = ChainedLookups(symbols=7, most=2, questions=12)
STEPS, BATCH = 1800, 64
SEEDS = (21, 22, 23)
LEARNS = {
    "mixture": "last",  # one state is read, so that what the gates decide is what happens
    "gate_target": "stopping",
    "gain_margin": 0.05,
    "router": "mlp",
    "router_detached": True,
    "depth_growth": 0.3,  # one step more after each tenth of the budget: hops are found one after the other
    "gate_warmup": 0.6,  # full depth, every state trained; the gates learn their labels beside it
    "warmup_loss": "every",
    "halting_rule": "gate",
    "tau": 0.5,
    "lam": 0.0,
}
BASE = RunConfig(
    size="1x64x16",  # one layer that looks up once a pass, and too small an MLP to know all cycles by heart
    tokens=STEPS * BATCH * LOOKUPS.length,
    context=LOOKUPS.length,
    batch_tokens=BATCH * LOOKUPS.length,
    learning_rate=5e-3,
    warmup_fraction=0.05,
    weight_decay=0.01,
    adam_beta2=0.98,
)


def sweep(seeds: tuple[int, ...] = SEEDS, *, kinds: tuple[str, ...] = ("shuffled", "fixed", "dense")) -> Sweep:
    """The arms; each seed is a pair across them, with one order of the text.

    Args:
        seeds: of weights and data order.
        kinds: of controls.
    """
    learned = grid(method="adaptive", l_max=LOOKUPS.most, seed=seeds, **LEARNS)
    plain = grid(method="vanilla", seed=seeds)
    return plain + learned + controls(of=learned, kinds=kinds)


def paper(seeds: tuple[int, ...] = SEEDS) -> Sweep:
    """Adaptive as the paper has it: the loss teaches the gates from the start, and confidence weighs the penalty."""
    return grid(method="adaptive", l_max=LOOKUPS.most, lam=[0.0, 0.1], tau=0.05, seed=seeds)


def study(*, needed: bool = True, seeds: tuple[int, ...] = SEEDS) -> Study:
    """The study; ``python -m haltscale.studies.known_need`` runs it.

    Args:
        needed: False: on the twin.
        seeds: of weights and data order.
    """
    lookups = replace(LOOKUPS, needed=needed)
    return Study(
        name="known-need" if needed else "known-need-twin",
        question=(
            "Where the need for latent steps is known, does the router put them there, and is that what they are worth?"
            if needed
            else "Where no token needs a latent step, does the router take none, and do all arms tie?"
        ),
        corpus=known_need(documents=40_000, validation_documents=400, lookups=lookups),
        base=BASE,
        sweep=sweep(seeds) + paper(seeds) if needed else sweep(seeds, kinds=("shuffled", "fixed")),
        execution=ExecutionConfig(micro_batch_sequences=BATCH, evaluations=5, checkpoints=1),
    )


if __name__ == "__main__":
    study().main()

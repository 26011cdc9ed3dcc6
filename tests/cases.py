"""Methods with options under which every part of them has work to do, and how each is built."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from haltscale.model import EmbeddingScale, Method, Shape
from haltscale.model.adaponder import AdaponderOptions
from haltscale.model.adaptive import AdaptiveOptions, GateTarget, Mixture, PenaltyProbability
from haltscale.model.fixed import FixedOptions
from haltscale.model.latent_loop import RouterInput, RouterKind
from haltscale.model.loop_options import Injection
from haltscale.model.looped import LoopedOptions
from haltscale.model.mor import Auxiliary, MorOptions, Routing
from haltscale.model.pause import PauseOptions
from haltscale.model.ponder import PonderOptions
from haltscale.model.ponder2 import Ponder2Options
from haltscale.model.ponder3 import Ponder3Options
from haltscale.model.shuffled import ShuffledOptions
from haltscale.model.step_source import StepsFrom
from haltscale.model.vanilla import VanillaOptions

RAGGED: dict[str, Any] = {"tau": 0.25, "router_bias": 0.5, "lam": 0.3, "beta": 0.7}
SCHEDULE = ((0.0, 0.0, 0.0, 0.1, 0.9), (0.5, 0.3, 0.3, 0.2, 0.2), (1.0, 0.2, 0.35, 0.25, 0.2))
SHUFFLED: dict[str, Any] = {"steps_from": StepsFrom.SHUFFLED, "steps_schedule": SCHEDULE, "steps_seed": 3}
FIXED: dict[str, Any] = SHUFFLED | {"steps_from": StepsFrom.FIXED}
SHUFFLED_MOR: dict[str, Any] = SHUFFLED | {"steps_schedule": ((0.0, 0.3, 0.4, 0.3),)}
CASES: dict[str, tuple[Method, Any]] = {
    "vanilla": (Method.VANILLA, VanillaOptions()),
    "adaptive": (Method.ADAPTIVE, AdaptiveOptions(**RAGGED)),
    "adaptive, mlp router": (Method.ADAPTIVE, AdaptiveOptions(router=RouterKind.MLP, **RAGGED)),
    "adaptive, no router": (Method.ADAPTIVE, AdaptiveOptions(router=RouterKind.NONE, **RAGGED)),
    "adaptive, router per step": (Method.ADAPTIVE, AdaptiveOptions(router_per_step=True, **RAGGED)),
    "adaptive, probabilities": (Method.ADAPTIVE, AdaptiveOptions(mixture=Mixture.PROBABILITY, **RAGGED)),
    "adaptive, truncated": (Method.ADAPTIVE, AdaptiveOptions(truncate_gradient=True, **RAGGED)),
    "adaptive, step penalty": (
        Method.ADAPTIVE,
        AdaptiveOptions(penalty_probability=PenaltyProbability.STEP, **RAGGED),
    ),
    "adaptive, shuffled steps": (Method.ADAPTIVE, AdaptiveOptions(**RAGGED, **SHUFFLED)),
    "adaptive, last state, gains": (
        Method.ADAPTIVE,
        AdaptiveOptions(
            mixture=Mixture.LAST,
            gate_target=GateTarget.GAIN,
            gain_margin=0.02,
            gain_weight=0.7,
            router_input=RouterInput.CHANGE,
            router_detached=True,
            router_rate=3.0,
            **RAGGED,
        ),
    ),
    "adaptive, expected loss, prior": (
        Method.ADAPTIVE,
        AdaptiveOptions(mixture=Mixture.EXPECTED_LOSS, prior_steps=1.5, **RAGGED),
    ),
    "adaptive, norm injection, last passes": (
        Method.ADAPTIVE,
        AdaptiveOptions(injection=Injection.NORM, gradient_passes=3, router_input=RouterInput.CHANGE, **RAGGED),
    ),
    "adaptive, border norm, scaled": (
        Method.ADAPTIVE,
        AdaptiveOptions(loop_norm=True, scaled_residuals=True, depth_growth=0.5, **RAGGED),
    ),
    "adaptive, added injection, last passes": (
        Method.ADAPTIVE,
        AdaptiveOptions(injection=Injection.ADD, loop_norm=True, gradient_passes=2, **RAGGED),
    ),
    "fixed": (Method.FIXED, FixedOptions(steps=1.4)),
    "fixed, norm injection, last passes": (
        Method.FIXED,
        FixedOptions(steps=2.4, injection=Injection.NORM, gradient_passes=2),
    ),
    "fixed, added injection, border norm, scaled": (
        Method.FIXED,
        FixedOptions(steps=1.4, injection=Injection.ADD, loop_norm=True, scaled_residuals=True),
    ),
    "looped, norm injection, last passes": (
        Method.LOOPED,
        LoopedOptions(steps=3, injection=Injection.NORM, gradient_passes=2),
    ),
    "looped, added injection, last pass": (
        Method.LOOPED,
        LoopedOptions(steps=2, injection=Injection.ADD, gradient_passes=1),
    ),
    "looped, border norm, scaled": (Method.LOOPED, LoopedOptions(steps=2, loop_norm=True, scaled_residuals=True)),
    "shuffled": (Method.SHUFFLED, ShuffledOptions(shift=3, **RAGGED)),
    "looped": (Method.LOOPED, LoopedOptions(steps=2)),
    "pause": (Method.PAUSE, PauseOptions(steps=2)),
    "ponder": (Method.PONDER, PonderOptions(steps=2)),
    "ponder, replacing": (Method.PONDER, PonderOptions(steps=2, accumulate=False)),
    "ponder, three likeliest": (Method.PONDER, PonderOptions(steps=2, accumulate=False, top_k=3)),
    "ponder2": (Method.PONDER2, Ponder2Options()),
    "ponder2, two thoughts": (Method.PONDER2, Ponder2Options(thoughts=2)),
    "ponder3": (Method.PONDER3, Ponder3Options(lam=0.3, tau=0.25, router_bias=0.5)),
    "ponder3, fixed steps": (Method.PONDER3, Ponder3Options(lam=0.3, tau=0.25, router_bias=0.5, **FIXED)),
    "adaponder, shuffled steps": (
        Method.ADAPONDER,
        AdaponderOptions(lam=0.3, fraction=0.4, tau=0.5, router_bias=0.3, **SHUFFLED),
    ),
    "adaponder": (Method.ADAPONDER, AdaponderOptions(lam=0.3, fraction=0.4, tau=0.5, router_bias=0.3)),
    "mor": (Method.MOR, MorOptions(auxiliary_weight=0.3)),
    "mor, published recipe": (
        Method.MOR,
        MorOptions(auxiliary=Auxiliary.MAIN, auxiliary_weight=0.3, z_weight=0.2),
    ),
    "mor, token choice, z-loss": (
        Method.MOR,
        MorOptions(routing=Routing.TOKEN_CHOICE, balance_weight=0.3, z_weight=0.2),
    ),
    "mor, shuffled steps": (Method.MOR, MorOptions(auxiliary_weight=0.3, **SHUFFLED_MOR)),
    "mor, token choice, shuffled steps": (
        Method.MOR,
        MorOptions(routing=Routing.TOKEN_CHOICE, balance_weight=0.3, **SHUFFLED_MOR),
    ),
    "mor, token choice": (Method.MOR, MorOptions(routing=Routing.TOKEN_CHOICE, balance_weight=0.3)),
}
ORACLES = {
    "vanilla": "vanilla_sequence",
    "adaptive": "adaptive_sequence",
    "adaptive, mlp router": "adaptive_sequence",
    "adaptive, no router": "adaptive_sequence",
    "adaptive, router per step": "adaptive_sequence",
    "adaptive, probabilities": "adaptive_sequence",
    "adaptive, truncated": "adaptive_sequence",
    "adaptive, step penalty": "adaptive_sequence",
    "adaptive, shuffled steps": "optioned_sequence",
    "adaptive, last state, gains": "optioned_sequence",
    "adaptive, expected loss, prior": "optioned_sequence",
    "ponder3, fixed steps": "ponder3_sequence",
    "adaponder, shuffled steps": "adaponder_sequence",
    "mor, published recipe": "mor_sequence",
    "mor, token choice, z-loss": "mor_sequence",
    "ponder, three likeliest": "ponder_sequence",
    "ponder2, two thoughts": "ponder2_sequence",
    "mor, shuffled steps": "mor_sequence",
    "mor, token choice, shuffled steps": "mor_sequence",
    "adaptive, norm injection, last passes": "optioned_sequence",
    "adaptive, border norm, scaled": "optioned_sequence",
    "adaptive, added injection, last passes": "optioned_sequence",
    "fixed": "fixed_sequence",
    "fixed, norm injection, last passes": "fixed_sequence",
    "fixed, added injection, border norm, scaled": "fixed_sequence",
    "looped, norm injection, last passes": "looped_sequence",
    "looped, added injection, last pass": "looped_sequence",
    "looped, border norm, scaled": "looped_sequence",
    "shuffled": "shuffled_sequence",
    "looped": "looped_sequence",
    "pause": "pause_sequence",
    "ponder": "ponder_sequence",
    "ponder, replacing": "ponder_sequence",
    "ponder2": "ponder2_sequence",
    "ponder3": "ponder3_sequence",
    "adaponder": "adaponder_sequence",
    "mor": "mor_sequence",
    "mor, token choice": "mor_sequence",
}
TINY = Shape(layers=2, d=16, heads=4, kv_heads=2, ffn=24)
LAYOUTS: dict[str, dict[str, Any]] = {
    "grouped queries, untied": {},
    "multi-head, tied": {"shape": replace(TINY, kv_heads=4), "tie_embeddings": True},
    "factorised, sqrt(d), eps 0.1": {"embedding_rank": 4, "embedding_scale": EmbeddingScale.SQRT_D, "norm_eps": 0.1},
    "factorised, tied": {"embedding_rank": 4, "tie_embeddings": True},
}


def build(tiny: Callable, case: str, **changes: Any) -> Any:
    method, options = CASES[case]
    if method is Method.MOR:
        changes["shape"] = replace(changes.get("shape", TINY), layers=4)
    return tiny(method, options, spread=2.0, **changes).eval()

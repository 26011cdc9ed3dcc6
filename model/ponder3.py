"""PonderLM-3 (arXiv 2603.02023): the number of a token's latent steps is planned after its first pass.

A router reads only the step-0 state and gives a distribution over the number of latent steps, as the probabilities of
another step after each; its tail, the probability of at least k steps, is what reaches state k. States whose tail is at
most tau are pruned. The tail also enters attention: its logarithm is added to every score that the state's key gets, so
that a state which is about to be pruned has faded from view already, and the gradient of attention teaches the router.

[R]: the chain is the exact one of latent_loop.py (the paper iterates its PonderLM-2 backbone); the head reads the
mixture of the states by their probabilities; the pressure to stop is lam times the expected number of steps.
"""

from dataclasses import dataclass, fields, replace

from haltscale.model.adaptive import AdaptiveModel, AdaptiveOptions
from haltscale.model.config import ModelConfig, in_range
from haltscale.model.language_model import LanguageModel
from haltscale.model.latent_loop import LatentLoop, LoopRules, RouterKind
from haltscale.model.ledger import PassCounts
from haltscale.model.step_source import Replay, SourceOptions


@dataclass(frozen=True, kw_only=True)
class Ponder3Options(SourceOptions):
    """Options of PonderLM-3."""

    lam: float = 0.1
    """Weight of the expected number of latent steps in the loss, nats per step [R]."""
    l_max: int = 3
    """Latent steps on top of the ordinary pass."""
    tau: float = 1e-4
    """States whose tail probability is at most this are pruned, in training and in inference."""
    router_bias: float = 2.0
    """Initial log-odds of another step, at every step [R]; the router's weights start at zero."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        return [
            *in_range("lam", self.lam, 0.0),
            *in_range("l_max", self.l_max, 1, 32, integer=True),
            *in_range("tau", self.tau, 0.0, 1.0),
            *in_range("router_bias", self.router_bias, -100.0, 100.0),
            *self.source_problems(self.l_max),
        ]

    def canonical(self) -> "Ponder3Options":
        """These options with those that have no effect at their defaults."""
        return replace(self, **self.idle_source())


class Ponder3Model(AdaptiveModel):
    """Adaptive's chain with a router that plans ahead and keys that fade."""

    def __init__(self, config: ModelConfig):
        LanguageModel.__init__(self, config)
        options = config.options
        assert isinstance(options, Ponder3Options)
        # The rest of adaptive is taken as it is: beta 0 makes its penalty the plain expected number of steps.
        source = {field.name: getattr(options, field.name) for field in fields(SourceOptions)}
        self.options = AdaptiveOptions(lam=options.lam, beta=0.0, l_max=options.l_max, tau=options.tau, **source)
        self.replay = Replay.of(options)
        rules = LoopRules(
            l_max=options.l_max,
            tau=options.tau,
            router=RouterKind.AHEAD,
            router_bias=options.router_bias,
            fading_keys=True,
        )
        self.latent_loop = LatentLoop(config, rules)

    def cache_row_width(self) -> int:
        shape = self.config.shape
        return shape.kv_heads * (shape.head_dim + 1)  # backbone.FadingPlan: one more dimension for the tail

    def extra_flops(self, counts: PassCounts) -> tuple[float, float]:
        """The router, on every token's first state, and attention's additional dimension."""
        shape = self.config.shape
        per_row = 2.0 * shape.d * self.options.l_max
        per_pair = 4.0 * shape.heads * shape.layers
        return (
            per_row * sum(counts.rows[:1]) + per_pair * sum(counts.keys),
            per_row * sum(counts.executed_rows[:1]) + per_pair * sum(counts.executed_keys),
        )

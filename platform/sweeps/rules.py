"""Rules over sizes: how a recipe (learning rate, weight decay, batch, warm-up) follows from shape and budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from haltscale.model import Parametrisation, ledger
from haltscale.platform.config import RunConfig


@dataclass(frozen=True)
class Rule:
    """Gives some of a run's settings from its shape and its budget.

    A rule is used in two ways. Alone (``tuned(sweep, rule=StepLaw())``) it sets what it gives. With settings that were
    tuned at another size or budget, it *carries* them: what was tuned is multiplied by the rule's ratio between the two
    places, so that of a published law only the exponents count and not the constant, which hangs on the data and on the
    optimiser. ``one & other`` is both, one after the other: ``StepLaw() & Timescale(0.2) & UntunedWarmup()`` gives the
    rate and the batch first, and the decay and the warm-up from them.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    """Where it is from."""
    gives: ClassVar[tuple[str, ...]] = ()
    """Fields of the run that :meth:`recipe` sets."""

    def recipe(self, run: RunConfig, vocab_size: int) -> dict[str, float]:
        """The fields that the rule gives, at the run's shape and budget."""
        raise NotImplementedError

    def problems(self, run: RunConfig) -> list[str]:
        """Why the rule cannot be used for a run."""
        if self.gives and run.flops is not None:
            return [f"rule {self.name} needs a budget in tokens, and this run has flops: give tokens"]
        return []

    def carried(
        self, values: Mapping[str, Any], tuned: RunConfig, wanted: RunConfig, vocab_size: int
    ) -> dict[str, Any]:
        """Values that were tuned at one run's place, at another's; a name that the rule does not give stays."""
        if not self.gives:
            return dict(values)
        there, here = self.recipe(tuned, vocab_size), self.recipe(wanted, vocab_size)
        moved = {name: value * here[name] / there[name] if name in here else value for name, value in values.items()}
        return rounded(moved, wanted)

    def __and__(self, other: Rule) -> Rule:
        return Together((*_parts(self), *_parts(other)))


def rounded(values: Mapping[str, Any], run: RunConfig) -> dict[str, Any]:
    """Values as a run can have them: 4 significant digits, a batch of whole sequences, whole tokens."""
    found = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}
    if "batch_tokens" in found:
        found["batch_tokens"] = max(1, round(found["batch_tokens"] / run.context)) * run.context
    if "warmup_tokens" in found:
        found["warmup_tokens"] = round(found["warmup_tokens"])
    return found


def _parts(rule: Rule) -> tuple[Rule, ...]:
    return rule.rules if isinstance(rule, Together) else (rule,)


@dataclass(frozen=True)
class Together(Rule):
    """Several rules, each applied to what those before it have set; ``one & other``."""

    rules: tuple[Rule, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return " & ".join(rule.name for rule in self.rules)

    @property
    def source(self) -> str:  # type: ignore[override]
        return "; ".join(rule.source for rule in self.rules)

    @property
    def gives(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(name for rule in self.rules for name in rule.gives))

    def recipe(self, run: RunConfig, vocab_size: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for rule in self.rules:
            made = rule.recipe(run, vocab_size) if rule.gives else {}
            found |= made
            run = replace(run, **rounded(made, run))
        return found

    def problems(self, run: RunConfig) -> list[str]:
        return list(dict.fromkeys(problem for rule in self.rules for problem in rule.problems(run)))

    def carried(
        self, values: Mapping[str, Any], tuned: RunConfig, wanted: RunConfig, vocab_size: int
    ) -> dict[str, Any]:
        found = dict(values)
        for rule in self.rules:
            found = rule.carried(found, tuned, _with(wanted, found), vocab_size)
        return found


def _with(run: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The run with those values that are its fields."""
    return replace(run, **{name: value for name, value in values.items() if hasattr(run, name)})


@dataclass(frozen=True)
class Constant(Rule):
    """The same recipe everywhere. A claim, not a default: small models are more sensitive than large ones."""

    name: ClassVar[str] = "constant"
    source: ClassVar[str] = "an assumption"


@dataclass(frozen=True)
class Transfer(Rule):
    """The same values at every width (``parametrisation="mup"``), and at every depth and number of latent steps too
    (``"completep"``): each weight's own rate is derived from them where it is trained. Says nothing of the budget."""

    name: ClassVar[str] = "transfer"
    source: ClassVar[str] = "muP, arXiv 2203.03466; CompleteP, arXiv 2505.01618"

    def problems(self, run: RunConfig) -> list[str]:
        """The rule holds under those parametrisations only."""
        if run.parametrisation is Parametrisation.STANDARD:
            return ["rule transfer needs parametrisation 'mup' or 'completep' (got 'standard'): set it in the base run"]
        return []


@dataclass(frozen=True)
class DeepSeekLaw(Rule):
    """Learning rate 0.3118 C^-0.125 and batch 0.292 C^0.3271 tokens, of compute C: non-embedding FLOPs per token of the
    plain model, attention included, times tokens. Fitted from 1e17 to 2e19 FLOPs; at smaller ones, an extrapolation."""

    name: ClassVar[str] = "deepseek"
    source: ClassVar[str] = "DeepSeek LLM, arXiv 2401.02954, equation 1"
    gives: ClassVar[tuple[str, ...]] = ("learning_rate", "batch_tokens")

    def recipe(self, run: RunConfig, vocab_size: int) -> dict[str, float]:
        shape = run.shape
        # As in the paper's M: 6 FLOPs per weight of the blocks, 12 d per layer and position for attention.
        per_token = 6 * non_embedding(run) + 12 * shape.layers * shape.d * run.context
        compute = float(per_token * run.tokens)
        return {"learning_rate": 0.3118 * compute**-0.125, "batch_tokens": 0.292 * compute**0.3271}


@dataclass(frozen=True)
class StepLaw(Rule):
    """Learning rate 1.79 N^-0.713 D^0.307 and batch 0.58 D^0.571 tokens, of N non-embedding parameters and D tokens.
    Fitted from 60 million parameters on; at smaller sizes, an extrapolation."""

    name: ClassVar[str] = "step-law"
    source: ClassVar[str] = "Step Law, arXiv 2503.04715"
    gives: ClassVar[tuple[str, ...]] = ("learning_rate", "batch_tokens")

    def recipe(self, run: RunConfig, vocab_size: int) -> dict[str, float]:
        rate = 1.79 * float(non_embedding(run)) ** -0.713 * float(run.tokens) ** 0.307
        return {"learning_rate": rate, "batch_tokens": 0.58 * float(run.tokens) ** 0.571}


@dataclass(frozen=True)
class Timescale(Rule):
    """The weight decay at which AdamW remembers the same share of training everywhere: B / (rate x decay x D), of batch
    B and D tokens, is constant. So the decay falls with the number of steps and with the rate. A later study (Power
    Lines, arXiv 2505.13738) confirms it over batches, and finds the best share to fall with D over parameters."""

    share: float
    """What the weights are an average over, in parts of the training. Cancels where a decay is carried."""

    name: ClassVar[str] = "timescale"
    source: ClassVar[str] = "Wang and Aitchison, arXiv 2405.13698"
    gives: ClassVar[tuple[str, ...]] = ("weight_decay",)

    def recipe(self, run: RunConfig, vocab_size: int) -> dict[str, float]:
        return {"weight_decay": run.batch_tokens / (run.learning_rate * run.tokens * self.share)}

    def problems(self, run: RunConfig) -> list[str]:
        found = super().problems(run)
        return found if self.share > 0 else [*found, f"rule timescale: share must be above 0 (got {self.share})"]


@dataclass(frozen=True)
class UntunedWarmup(Rule):
    """Warm-up over 2 / (1 - beta2) steps, for as long as Adam's second moment is young, and half of the budget at
    most."""

    name: ClassVar[str] = "untuned-warmup"
    source: ClassVar[str] = "Ma and Yarats, arXiv 1910.04209"
    gives: ClassVar[tuple[str, ...]] = ("warmup_tokens",)

    def recipe(self, run: RunConfig, vocab_size: int) -> dict[str, float]:
        return {"warmup_tokens": min(2 / (1 - run.adam_beta2) * run.batch_tokens, run.tokens / 2)}


def non_embedding(run: RunConfig) -> int:
    """Weights of the plain model's blocks."""
    return round(run.shape.layers * ledger.layer_row_flops(run.shape) / 2)

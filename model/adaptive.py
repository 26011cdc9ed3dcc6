"""Adaptive latent chain-of-thought (arXiv 2602.08220): 0 to l_max latent steps per token.

The chain itself is latent_loop.py. The head reads the mixture of a position's states by their exit masses. The loss
adds lam * mean_t( sg(p_t)^beta * sum_{k>=1} reach[t,k] ), which is largest on tokens that the model already predicts
well (p_t near 1). This lambda is not PonderNet's, which is a halting probability.

What the paper's public traces leave open is marked [R], a reconstruction, and each such decision has an option here or
a named place in latent_loop.py, halting.py or backbone.py.

Three questions are kept apart, each with options of its own: where the number of steps comes from (step_source.py),
what is read (`mixture`), and what the gates learn from and when (`gate_target`, `gate_warmup`, `lam_ramp`, `explore`,
`router_*`, `prior_steps`). The defaults are the paper's method. The switches of loop_options.py come on top.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from haltscale.model.backbone import Rope
from haltscale.model.config import ModelConfig, in_range, require
from haltscale.model.decoding import DecodingState, PromptStates
from haltscale.model.kernels import at_least_float32
from haltscale.model.language_model import IGNORE_INDEX, LanguageModel, LatentState, LoopOutput
from haltscale.model.latent_loop import HaltingRule, LatentLoop, LoopRules, RouterInput, RouterKind
from haltscale.model.ledger import PassCounts
from haltscale.model.loop_options import LoopOptions, loop_options
from haltscale.model.step_source import EXPLORE, Replay, SourceOptions, StepsFrom, draws


class Mixture(StrEnum):
    """What is read of a position's executed states, and by it trained."""

    HIDDEN = "hidden"
    """The mixture of the hidden states by their exit masses, before one head: the paper's choice."""
    LAST = "last"
    """The last executed state alone. The cross-entropy then teaches the gates nothing."""
    PROBABILITY = "probability"
    """The mixture of the next-token distributions, after a head on every executed state: the exact expectation over the
    router's stops, at the price of as many head rows as executed states."""
    EXPECTED_LOSS = "expected_loss"
    """Read as PROBABILITY, but trained on the expectation of the loss and not on the loss of the expectation: every
    executed state's own cross-entropy, weighted by its exit mass (PonderNet)."""

    @property
    def heads_every_state(self) -> bool:
        """Whether the head reads all executed states."""
        return self in (Mixture.PROBABILITY, Mixture.EXPECTED_LOSS)


class GateTarget(StrEnum):
    """What teaches the gates."""

    READOUT = "readout"
    """The gradient of the loss through the masses: the paper's choice."""
    GAIN = "gain"
    """Labels: did the next step lower this token's loss, as the head reads single states, by more than `gain_margin`?
    Binary cross-entropy over the executed steps; the masses take the gates as given, so that lam presses on nothing. A
    position that takes no step yields no labels: see `explore`."""
    STOPPING = "stopping"
    """Labels that look ahead: would continuing, and stopping at the best of the executed states after it, lower the
    loss by more than `gain_margin` for each step taken? Where a gain takes several steps, the next one alone shows
    none."""

    @property
    def labels(self) -> bool:
        """Whether the gates learn from labels."""
        return self is not GateTarget.READOUT


class WarmupLoss(StrEnum):
    """What is trained on while the gates are held open (`gate_warmup`)."""

    LAST = "last"
    """The loss of the last state."""
    EVERY = "every"
    """The mean of all states' own losses, so that each is good to stop at."""


class PenaltyProbability(StrEnum):
    """Whose probability of the true next token weighs the halting penalty."""

    MIXTURE = "mixture"
    """The model's own, after mixing [R]."""
    STEP = "step"
    """For step k, the one that state k - 1 would give if the head read it alone: was this step still needed? Costs a
    head row, forward only, for every state that is followed by another."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveOptions(SourceOptions, LoopOptions):
    """Options of adaptive latent chain-of-thought."""

    lam: float = 0.1
    """Weight of the halting penalty, nats per expected latent step of a token predicted with certainty. Up: more
    pruning, worse cross-entropy."""
    beta: float = 1.0
    """Exponent of p_t in the penalty [R]. Up: only very well predicted tokens are penalised; less pruning."""
    l_max: int = 3
    """Latent steps on top of the ordinary pass; a position has at most l_max + 1 states [R]. 0 is the plain model."""
    tau: float = 1e-2
    """A position takes another step only while the survival probability of the next state exceeds this [R]. It bounds
    how much of a token's mixture is cut off. The siblings' 1e-4 needs a router below 0.0001 at the first step before
    any compute is saved, which short runs never learn; at 0.01, at most 1 % of a token's mass moves to its last
    state."""
    halting_rule: HaltingRule = HaltingRule.REACH
    """What has to exceed tau for a position to take another step."""
    router: RouterKind = RouterKind.LINEAR
    """Kind of router."""
    router_bias: float = 2.0
    """Initial bias of the router [R]. +2 starts every position at 88 % per step: nearly full depth, so that the model
    first learns to use its steps and then to drop them, with the sigmoid far enough from saturation to learn."""
    router_per_step: bool = False
    """One router per step instead of one for all steps [R]."""
    router_input: RouterInput = RouterInput.STATE
    """What the router reads."""
    router_detached: bool = False
    """Whether the router reads states without shaping them: no gradient flows through its input."""
    router_rate: float = 1.0
    """Multiple of the learning rate at which the router's last layer is trained (Router says how)."""
    mixture: Mixture = Mixture.HIDDEN
    """What is read of the executed states."""
    gate_target: GateTarget = GateTarget.READOUT
    """What teaches the gates."""
    gain_margin: float = 0.0
    """Nats that a step has to gain to be labelled worth it: the price of a step where gates learn from labels."""
    gain_weight: float = 0.1
    """Weight of the labels' cross-entropy, which is a sum over a token's executed steps. Small, so that its gradient
    does not use up the norm at which all gradients together are clipped; Adam's steps do not depend on it otherwise."""
    gate_warmup: float = 0.0
    """Share of the training budget in which all gates count as 1: every position takes all steps, the last state is
    read, nothing presses. Gates that learn from labels do so from the start; others stay at router_bias until then."""
    warmup_loss: WarmupLoss = WarmupLoss.LAST
    """What is trained on in that share."""
    lam_ramp: float = 0.0
    """Share of the training budget, after the warm-up, over which lam rises from 0 in a straight line."""
    explore: float = 0.0
    """Share of positions that take all steps in training, whatever their gates say, drawn without looking at them
    (step_source.draws). What is read of them follows the gates as everywhere."""
    prior_steps: float = 0.0
    """Above 0: the penalty is lam * KL(exit masses || geometric distribution with this mean, cut at l_max), as in
    PonderNet, in place of the expected number of steps; beta then has no effect."""
    penalty_probability: PenaltyProbability = PenaltyProbability.MIXTURE
    """Whose probability weighs the penalty."""
    truncate_gradient: bool = False
    """Cut the gradient where a state is fed back, as if every latent step began from a given input [R: not cut]."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        found = [
            *in_range("lam", self.lam, 0.0),
            *in_range("beta", self.beta, 0.0),
            *in_range("l_max", self.l_max, 0, 32, integer=True),
            *in_range("tau", self.tau, 0.0, 1.0),
            *in_range("router_bias", self.router_bias, -100.0, 100.0),
            *in_range("router_rate", self.router_rate, 0.0, 1e4, above=True),
            *in_range("gain_margin", self.gain_margin, 0.0),
            *in_range("gain_weight", self.gain_weight, 0.0),
            *in_range("gate_warmup", self.gate_warmup, 0.0, 1.0),
            *in_range("lam_ramp", self.lam_ramp, 0.0, 1.0),
            *in_range("explore", self.explore, 0.0, 1.0),
            *in_range("prior_steps", self.prior_steps, 0.0),
            *self.source_problems(self.l_max),
            *self.loop_problems(self.l_max),
        ]
        kinds = [RouterKind.LINEAR, RouterKind.MLP, RouterKind.NONE]
        for name, choices in (
            ("router", kinds),
            ("halting_rule", HaltingRule),
            ("router_input", RouterInput),
            ("gate_target", GateTarget),
            ("warmup_loss", WarmupLoss),
            ("mixture", Mixture),
            ("penalty_probability", PenaltyProbability),
        ):
            value = getattr(self, name)
            found += require(value in list(choices), name, value, f"one of {', '.join(choices)}")
        for name in ("router_per_step", "router_detached", "truncate_gradient"):
            found += require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        every = (Mixture.PROBABILITY, Mixture.EXPECTED_LOSS, WarmupLoss.EVERY)
        if self.mixture in every or self.warmup_loss in every:
            allowed = "0 where every state is read: those without a gradient would teach nothing"
            found += require(not self.gradient_passes, "gradient_passes", self.gradient_passes, allowed)
        if self.router is RouterKind.MLP and self.router_input is RouterInput.CHANGE:
            found += require(False, "router_input", str(self.router_input), "state for the mlp router")
        return found

    @property
    def follows_budget(self) -> bool:
        """Whether what a training step computes depends on the share of the budget that is spent."""
        ramps = self.gate_warmup > 0 or self.lam_ramp > 0 or self.depth_growth > 0
        return ramps or self.steps_from is not StepsFrom.ROUTER

    def canonical(self) -> "AdaptiveOptions":
        """These options with those that have no effect at their defaults."""
        idle = self.idle_source()
        if self.explore:
            idle.pop("steps_seed", None)
        if not self.gate_target.labels:
            idle |= {"gain_margin": 0.0, "gain_weight": 0.1}
        if not self.gate_warmup:
            idle["warmup_loss"] = WarmupLoss.LAST
        idle |= self.idle_loop(self.l_max)
        return replace(self, **idle)


class AdaptiveModel(LanguageModel):
    """A Llama whose router decides how many latent steps each token takes."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        options = config.options
        assert isinstance(options, AdaptiveOptions)
        self.options = options
        rules = LoopRules(
            l_max=options.l_max,
            tau=options.tau,
            halting_rule=options.halting_rule,
            router=options.router,
            router_bias=options.router_bias,
            router_per_step=options.router_per_step,
            truncate_gradient=options.truncate_gradient,
            router_input=options.router_input,
            router_detached=options.router_detached,
            router_rate=options.router_rate,
            gates_apart=options.gate_target.labels,
            read_last=options.mixture is Mixture.LAST,
            keep_states=(
                options.mixture.heads_every_state
                or options.penalty_probability is PenaltyProbability.STEP
                or options.gate_target.labels
                or options.warmup_loss is WarmupLoss.EVERY
            ),
            switches=loop_options(options),
        )
        self.latent_loop = LatentLoop(config, rules)
        self.replay = Replay.of(options)

    @property
    def warming_up(self) -> bool:
        """Whether the gates are still held open."""
        return self.budget_share < self.options.gate_warmup

    @property
    def _trains_every_state(self) -> bool:
        """Whether the loss is one of every executed state."""
        options = self.options
        every = options.warmup_loss is WarmupLoss.EVERY and self.warming_up
        return every or options.mixture is Mixture.EXPECTED_LOSS

    @property
    def _most_steps(self) -> int:
        """The depth that has been grown at this share of the budget."""
        return self.options.most_steps(self.budget_share, self.options.l_max)

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        options = self.options
        at_least_BT = None
        if self.training and options.explore and not self.replay:
            explored_BT = draws(tokens_BT, options.steps_seed, salt=EXPLORE)[0] < options.explore
            at_least_BT = explored_BT * options.l_max
        loop_output: LoopOutput = self.latent_loop(
            self.embed(tokens_BT).flatten(0, 1),
            valid_BT,
            self.replay.steps(tokens_BT, self.budget_share) if self.replay else None,
            at_least_BT=at_least_BT,
            open_gates=self.warming_up,
            most_steps=self._most_steps,
            prompts=prompts,
        )
        return loop_output

    # Reading --------------------------------------------------------------------------------------------------------

    def mix_probabilities(self, states: Sequence[LatentState], rows: int) -> Tensor:
        """log sum_k exit[k] softmax(head(z[k])), [rows, V]: log-probabilities serve as logits."""
        mixed_NV: Tensor | None = None
        for state in states:
            probability_NV = torch.softmax(at_least_float32(self.lm_head(state.z_Nd)), dim=1)
            share_NV = state.exit_N[:, None].to(probability_NV.dtype) * probability_NV
            mixed_NV = share_NV if mixed_NV is None else mixed_NV.index_add(0, state.row_N, share_NV)
        assert mixed_NV is not None
        # Padding carries no mass; the floor keeps its logarithm finite.
        return mixed_NV.clamp(min=torch.finfo(mixed_NV.dtype).tiny).log()

    @property
    def heads_one_state(self) -> bool:
        return not self.options.mixture.heads_every_state

    def logits(self, loop_output: LoopOutput) -> Tensor:
        if not self.options.mixture.heads_every_state:
            return super().logits(loop_output)
        B, T = loop_output.trace.valid_BT.shape
        loop_output.trace.counts.head_rows += sum(len(state.row_N) for state in loop_output.states)
        return self.mix_probabilities(loop_output.states, B * T).view(B, T, -1)

    def logits_at(self, loop_output: LoopOutput, row_B: Tensor) -> Tensor:
        if not self.options.mixture.heads_every_state:
            return super().logits_at(loop_output, row_B)
        chosen = []
        for state in loop_output.states:
            at_N = torch.isin(state.row_N, row_B)
            place_N = torch.searchsorted(row_B, state.row_N[at_N])
            chosen.append(state._replace(row_N=place_N, z_Nd=state.z_Nd[at_N], exit_N=state.exit_N[at_N]))
        loop_output.trace.counts.head_rows += sum(len(state.row_N) for state in chosen)
        return self.mix_probabilities(chosen, len(row_B))

    def penalty(self, loop_output: LoopOutput, targets_BT: Tensor, nll_BT: Tensor) -> Tensor:
        """The correctness-aware penalty [R: the exponent, and the expected number of latent steps as its object]."""
        assert loop_output.reach_BTK is not None
        scored_BT = targets_BT != IGNORE_INDEX
        penalty = nll_BT.new_zeros(())
        if self.options.gate_target.labels:
            penalty = self.options.gain_weight * self._label_loss(loop_output, targets_BT)
            penalty = penalty / scored_BT.sum().clamp(min=1)
        if self.warming_up:
            return penalty
        if self.options.prior_steps:
            pressed_BT = _surplus(loop_output.reach_BTK, _geometric(self.options.prior_steps, self.options.l_max))
        else:
            if self.options.penalty_probability is PenaltyProbability.MIXTURE:
                probability_BTK = torch.exp(-nll_BT)[..., None]
            else:
                probability_BTK = self._probability_before_each_step(loop_output, targets_BT)
            pressed_BT = (probability_BTK.pow(self.options.beta) * loop_output.reach_BTK[..., 1:]).sum(2)
        pressed = self._lam() * (pressed_BT * scored_BT).sum() / scored_BT.sum().clamp(min=1)
        return penalty + pressed if self.options.gate_target.labels else pressed

    def _lam(self) -> float:
        """lam at this share of the budget."""
        options = self.options
        if not options.lam_ramp:
            return options.lam
        return options.lam * min(1.0, max(0.0, self.budget_share - options.gate_warmup) / options.lam_ramp)

    def objective(self, loop_output: LoopOutput, targets_BT: Tensor, nll_BT: Tensor) -> Tensor:
        if not self._trains_every_state:
            return super().objective(loop_output, targets_BT, nll_BT)
        target_N = targets_BT.flatten()
        expected = loop_output.hidden_BTd.sum() * 0.0  # every parameter has a gradient on every rank: routers too
        counts = loop_output.trace.counts
        counts.gradless = PassCounts(head_rows=counts.head_rows)  # what is only reported, by `logits`
        counts.head_rows = 0
        states_N = loop_output.trace.steps_BT.flatten().to(nll_BT.dtype) + 1
        for state in loop_output.states:
            counts.head_rows += len(state.row_N)
            nll_N = self._nll_of_states(state.z_Nd, target_N[state.row_N])
            weight_N = 1 / states_N[state.row_N] if self.warming_up else state.exit_N
            expected = expected + (weight_N * nll_N).sum()
        return expected / (targets_BT != IGNORE_INDEX).sum().clamp(min=1)

    def _nll_of_states(self, z_Nd: Tensor, target_N: Tensor) -> Tensor:
        """Nats of the targets as the head reads single states; 0 where there is none."""
        if self.reads_parts:
            return self.nll(z_Nd, target_N)
        logits_NV = at_least_float32(self.lm_head(z_Nd))
        return F.cross_entropy(logits_NV, target_N, reduction="none", ignore_index=IGNORE_INDEX)

    def _label_loss(self, loop_output: LoopOutput, targets_BT: Tensor) -> Tensor:
        """Binary cross-entropy of the gates against whether the next step paid, summed over the executed steps of
        scored positions."""
        target_N, states = targets_BT.flatten(), loop_output.states
        label_NL = self._labels(loop_output, target_N)
        total = states[0].reach_N.new_zeros(())
        for k, (state, following) in enumerate(pairwise(states)):
            assert state.gate_N is not None
            gate_N = state.gate_N[torch.searchsorted(state.row_N, following.row_N)]  # rows are ascending in every pass
            with torch.autocast(gate_N.device.type, enabled=False):
                missed_N = F.binary_cross_entropy(gate_N, label_NL[following.row_N, k], reduction="none")
            total = total + (missed_N * (target_N[following.row_N] != IGNORE_INDEX)).sum()
        return total

    @torch.no_grad()
    def _labels(self, loop_output: LoopOutput, target_N: Tensor) -> Tensor:
        """[B*T, l_max]: 1 where the step after state k paid; undefined where it was not taken."""
        states, counts = loop_output.states, loop_output.trace.counts
        gradless = counts.gradless = counts.gradless or PassCounts()
        nll_NK = states[0].reach_N.new_full((len(target_N), self.options.l_max + 1), torch.inf)
        for k, state in enumerate(states):
            row_N, z_Nd = state.row_N, state.z_Nd
            if k == 0:  # positions that take no step get no label
                row_N = states[1].row_N if len(states) > 1 else row_N[:0]
                z_Nd = z_Nd[torch.searchsorted(state.row_N, row_N)]
            gradless.head_rows += len(row_N)
            nll_NK[row_N, k] = self._nll_of_states(z_Nd, target_N[row_N]).to(nll_NK.dtype)
        labels, best_N = [], nll_NK[:, -1]
        for k in reversed(range(self.options.l_max)):
            ahead_N = best_N if self.options.gate_target is GateTarget.STOPPING else nll_NK[:, k + 1]
            onward_N = ahead_N + self.options.gain_margin
            labels.append(onward_N < nll_NK[:, k])
            best_N = torch.minimum(onward_N, nll_NK[:, k])
        stacked_NL = torch.stack(labels[::-1], dim=1) if labels else nll_NK[:, :0]
        return stacked_NL.to(nll_NK.dtype)

    @torch.no_grad()
    def _probability_before_each_step(self, loop_output: LoopOutput, targets_BT: Tensor) -> Tensor:
        """[B, T, l_max]: entry k - 1 is what the head, reading state k - 1 alone, gives to the true next token."""
        target_N = targets_BT.flatten().clamp(min=0)
        B, T = targets_BT.shape
        probability_NK = loop_output.states[0].reach_N.new_zeros(B * T, self.options.l_max)
        counts = loop_output.trace.counts
        gradless = counts.gradless = counts.gradless or PassCounts()
        for k, (state, following) in enumerate(zip(loop_output.states, loop_output.states[1:], strict=False)):
            gradless.head_rows += len(following.row_N)
            place_N = torch.searchsorted(state.row_N, following.row_N)  # rows are ascending in every pass
            nll_N = self._nll_of_states(state.z_Nd[place_N], target_N[following.row_N])
            probability_NK[following.row_N, k] = torch.exp(-nll_N).to(probability_NK.dtype)
        return probability_NK.view(B, T, -1)

    # Decoding --------------------------------------------------------------------------------------------------------

    def cache_widths(self) -> list[int]:
        return self.latent_loop.cache_widths()

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        rope = self.rope_at(state.positions)
        forced = self.replay.decode(tokens_B, state, self.budget_share) if self.replay else None
        hidden_Bd, steps_B, state.extra = self.latent_loop.decode(self.embed(tokens_B), rope, state, forced)
        return hidden_Bd, steps_B

    def decode_pass(self, tokens: Mapping[int, int], state: DecodingState) -> tuple[list[int], Tensor, Tensor]:
        if self.options.mixture.heads_every_state or self.device.type != "cpu":
            return super().decode_pass(tokens, state)  # accelerators would rather attend once than row by row
        return self._decode_by_depth(tokens, state)

    @torch.no_grad()
    def _decode_by_depth(self, tokens: Mapping[int, int], state: DecodingState) -> tuple[list[int], Tensor, Tensor]:
        begun = list(tokens)
        token_N = torch.tensor([tokens[b] for b in begun], dtype=torch.long, device=self.device)
        if begun:
            self._check_room(token_N, [state.positions[b] for b in begun])
            state.cache.make_room(max(state.positions[b] for b in begun) + 1)
            state.counts.tokens += len(begun)
        forced = self.replay.decode(token_N, state, self.budget_share, begun) if self.replay else []

        def rope(rows: list[int]) -> Rope:
            return self.rope_at([state.positions[b] for b in rows])

        done, hidden_Fd, steps = self.latent_loop.advance(self.embed(token_N), begun, state, rope, forced)
        for b in done:
            state.positions[b] += 1
        return done, self.decode_logits(hidden_Fd, state), torch.tensor(steps)

    def decode_logits(self, hidden_Bd: Tensor, state: DecodingState) -> Tensor:
        if not self.options.mixture.heads_every_state:
            return super().decode_logits(hidden_Bd, state)
        state.counts.head_rows += sum(len(one.row_N) for one in state.extra)
        return self.mix_probabilities(state.extra, state.batch)

    # Accounting ------------------------------------------------------------------------------------------------------

    def extra_flops(self, counts: PassCounts) -> tuple[float, float]:
        """Routers; and, where every state is read by the head, the head rows beyond one per token."""
        realised = executed = 0.0
        if self.latent_loop.routers:
            per_row = self.latent_loop.routers[0].flops()  # type: ignore[operator]
            routed = slice(0, self.latent_loop.rules.l_max)
            realised, executed = per_row * sum(counts.rows[routed]), per_row * sum(counts.executed_rows[routed])
        per_head_row = self.head_row_flops()
        if self.options.mixture.heads_every_state or self._trains_every_state:
            realised += per_head_row * sum(counts.rows[1:])
        return realised, executed


def _geometric(mean: float, l_max: int) -> list[float]:
    """Probabilities of 0..l_max under a geometric distribution with this mean, cut there."""
    weights = [(mean / (1 + mean)) ** k for k in range(l_max + 1)]
    return [weight / sum(weights) for weight in weights]


def _surplus(reach_BTK: Tensor, prior_K: list[float]) -> Tensor:
    """KL(exit masses || prior) [B, T] in nats; the last executed state has the mass that is left."""
    exit_BTK = reach_BTK - F.pad(reach_BTK[..., 1:], (0, 1))
    tiny = torch.finfo(exit_BTK.dtype).tiny
    log_ratio_BTK = exit_BTK.clamp(min=tiny).log() - torch.tensor(prior_K, dtype=exit_BTK.dtype).log().to(exit_BTK)
    return (exit_BTK * log_ratio_BTK).sum(2)

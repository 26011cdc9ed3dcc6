"""Evaluate a text token by token: what each latent step is worth, and what other halting would have given.

`read` gives, beside the negative log-likelihood of every token, the entropy and the confidence of the distribution that
it came from, and for some tokens the head's prediction had the position stopped earlier. `rules_changed` and
`dictated` run the same weights under other halting: another tau, another maximum depth, given numbers of steps.
"""

# ruff: noqa: N815 (fields of a dataclass carry shape suffixes too)

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haltscale.model.adaptive import AdaptiveModel
from haltscale.model.halting import HaltingTrace
from haltscale.model.kernels import at_least_float32, cache_sized_rows
from haltscale.model.language_model import LanguageModel, LatentState, LoopOutput
from haltscale.model.latent_loop import LatentLoop
from haltscale.model.posthoc import GoesOn
from haltscale.model.shuffled import ShuffledModel


@dataclass(frozen=True)
class Reading:
    """What a model made of a batch of text. All float32, detached."""

    nll_BT: Tensor
    """Nats of each true next token."""
    entropy_BT: Tensor
    """Nats, of the distribution over the next token."""
    confidence_BT: Tensor
    """The greatest probability in that distribution."""
    correct_BT: Tensor
    """bool: the true token has that probability."""
    nll_by_step_SK: Tensor
    """Of the requested tokens: nats had the position stopped after step k; NaN where step k was not executed. The last
    executed step's is the token's own."""
    entropy_by_step_SK: Tensor
    """Likewise the entropy."""
    trace: HaltingTrace
    """Executed steps, probabilities and cost."""


def latent_loop_of(model: LanguageModel) -> LatentLoop | None:
    """The model's latent chain; None if it has none."""
    loop = getattr(model, "latent_loop", None)
    return loop if isinstance(loop, LatentLoop) else None


def has_router(model: LanguageModel) -> bool:
    """Whether a router chooses each token's own number of latent steps."""
    return isinstance(model, AdaptiveModel) and not isinstance(model, ShuffledModel) and model.replay is None


@torch.no_grad()
def read(
    model: LanguageModel,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    *,
    lengths_B: Tensor,
    sampled_S: Tensor | None = None,
    steps_BT: Tensor | None = None,
    goes_on: GoesOn | None = None,
) -> Reading:
    """Read a batch.

    Args:
        targets_BT: the true next tokens; any value where there is none.
        lengths_B: real tokens of each row.
        sampled_S: indices into [B*T], ascending, of real tokens to read after every step. "Had it stopped after step
            k" means what the halting rule means by it: state k takes all the mass that is left. All other positions,
            and the keys that this one sees, stay as they were. It costs a head row for every step but the last.
        steps_BT: latent steps by order, in place of the router's; needs a latent chain.
        goes_on: a halting rule in place of the router's (posthoc.Threshold); needs a latent chain.
    """
    loop = latent_loop_of(model)
    observed: dict[str, Any] = {}

    def observe(loop_output: LoopOutput, logits_BTV: Tensor) -> None:
        flat = [x.view(targets_BT.shape) for x in surprise(logits_BTV.flatten(0, 1), targets_BT.flatten())]
        observed["whole"] = flat
        if sampled_S is not None and loop is not None:
            stop = _stopped_probabilities if _mixes_probabilities(model) else _stopped_hidden
            observed["steps"] = _by_step(model, loop_output, targets_BT.flatten(), sampled_S, flat, stop)

    def by_order(tokens_BT: Tensor, valid_BT: Tensor) -> LoopOutput:
        assert loop is not None, "only a latent chain takes given numbers of steps"
        x_Nd = model.embed(tokens_BT).flatten(0, 1)
        loop_output: LoopOutput = loop(x_Nd, valid_BT, steps_BT, goes_on=goes_on)
        return loop_output

    keep = {"keep_states": True} if loop is not None and sampled_S is not None else {}
    with rules_changed(model, **keep):
        dictated = steps_BT is not None or goes_on is not None
        output = model(tokens_BT, lengths_B=lengths_B, hidden_states=by_order if dictated else None, observe=observe)
    nll_BT, entropy_BT, confidence_BT, correct_BT = observed["whole"]
    K = output.trace.exit_BTK.shape[2]
    none_SK = nll_BT.new_empty(0, K)
    nll_SK, entropy_SK = observed.get("steps", (none_SK, none_SK))
    return Reading(nll_BT, entropy_BT, confidence_BT, correct_BT.bool(), nll_SK, entropy_SK, output.trace)


def surprise(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(nats of the targets, entropy in nats, greatest probability, 1 where the target has it) of each row, float32.

    The fused softmax, the fastest thing to do with a row, serves all four; the rows go by in parts that fit a cache.
    """
    found = []
    step = cache_sized_rows(logits_NV)
    for part_MV, target_M in zip(logits_NV.split(step), targets_N.clamp(min=0).split(step), strict=True):
        wide_MV = at_least_float32(part_MV)
        weight_MV = torch.softmax(wide_MV, dim=1)
        top_M, confidence_M = wide_MV.amax(1), weight_MV.amax(1)
        normaliser_M = top_M - confidence_M.log()  # logsumexp: the greatest weight is exp(top - normaliser)
        chosen_M = wide_MV.gather(1, target_M[:, None]).squeeze(1)
        # A logit of -inf has no weight, and 0 * -inf must not spoil the sum.
        mean_M = torch.linalg.vecdot(weight_MV, wide_MV.clamp(min=torch.finfo(wide_MV.dtype).min))
        entropy_M = (normaliser_M - mean_M).clamp_(min=0)  # of a certain row, rounding may leave less than nothing
        found.append(torch.stack((normaliser_M - chosen_M, entropy_M, confidence_M, (chosen_M == top_M).float())))
    nll_N, entropy_N, confidence_N, correct_N = torch.cat(found, dim=1).float()
    return nll_N, entropy_N, confidence_N, correct_N


# What each step was worth --------------------------------------------------------------------------------------------


def _mixes_probabilities(model: LanguageModel) -> bool:
    return isinstance(model, AdaptiveModel) and model.options.mixture.heads_every_state


def loop_reads_last(model: LanguageModel) -> bool:
    """Whether the head reads the last executed state alone."""
    loop = latent_loop_of(model)
    return loop is not None and loop.rules.read_last


def _stopped_hidden(model: LanguageModel, state: LatentState, at: Tensor) -> Tensor:
    return at_least_float32(state.z_Nd[at])


def _stopped_probabilities(model: LanguageModel, state: LatentState, at: Tensor) -> Tensor:
    return torch.softmax(at_least_float32(model.lm_head(state.z_Nd[at])), dim=1)


def _by_step(
    model: LanguageModel,
    loop_output: LoopOutput,
    targets_N: Tensor,
    sampled_S: Tensor,
    whole: Sequence[Tensor],
    said: Callable[[LanguageModel, LatentState, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """(nll_SK, entropy_SK): the mixture of the states so far, state k with all the mass that reached it.

    said: what a state puts into the mixture, hidden state or next-token distribution.
    """
    steps_S = loop_output.trace.steps_BT.flatten()[sampled_S].long()
    K = loop_output.trace.exit_BTK.shape[2]
    nll_SK, entropy_SK = (whole[0].new_full((len(sampled_S), K), torch.nan) for _ in range(2))
    every_S = torch.arange(len(sampled_S), device=sampled_S.device)
    for one_SK, own_BT in ((nll_SK, whole[0]), (entropy_SK, whole[1])):
        one_SK[every_S, steps_S] = own_BT.flatten()[sampled_S]
    mixture: Tensor | None = None
    for k, state in enumerate(loop_output.states):
        going_S = every_S[steps_S > k]  # whose last step this is has been read already
        if len(going_S) == 0:
            break
        at = torch.searchsorted(state.row_N, sampled_S[going_S])  # rows are ascending in every pass
        content = said(model, state, at)
        if mixture is None:
            mixture = content.new_zeros(len(sampled_S), content.shape[1])
        stopped = mixture[going_S] + state.reach_N[at, None] * content
        mixture[going_S] += state.exit_N[at, None] * content
        if loop_reads_last(model):
            logits = model.lm_head(content.to(state.z_Nd.dtype))
        elif _mixes_probabilities(model):
            logits = stopped.clamp(min=torch.finfo(stopped.dtype).tiny).log()
        else:
            logits = model.lm_head(stopped.to(state.z_Nd.dtype))
        nll_SK[going_S, k], entropy_SK[going_S, k], *_ = surprise(logits, targets_N[sampled_S[going_S]])
    return nll_SK, entropy_SK


# Other halting on the same weights -----------------------------------------------------------------------------------


@contextmanager
def rules_changed(model: LanguageModel, **changes: Any) -> Iterator[None]:
    """The latent chain under other rules (`LoopRules`: tau, l_max, ...) for a while. l_max can only be lowered."""
    loop = latent_loop_of(model)
    if loop is None or not changes:
        if changes:
            raise ValueError(f"method {model.config.method} has no latent chain whose rules could be changed")
        yield
        return
    before = loop.rules
    if changes.get("l_max", 0) > before.l_max:
        raise ValueError(f"l_max = {changes['l_max']}: the model was trained with {before.l_max}")
    loop.rules = dataclasses.replace(before, **changes)
    try:
        yield
    finally:
        loop.rules = before


def spread_steps(steps_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """As many steps in each row as were taken there, spread evenly: the fixed control at equal mean."""
    total_B1 = (steps_BT.long() * valid_BT).sum(1, keepdim=True)
    length_B1 = valid_BT.sum(1, keepdim=True).clamp(min=1)
    t_T = torch.arange(steps_BT.shape[1], device=steps_BT.device)
    return ((t_T + 1) * total_B1 // length_B1 - t_T * total_B1 // length_B1) * valid_BT


def shuffled_steps(steps_BT: Tensor, valid_BT: Tensor, generator: torch.Generator) -> Tensor:
    """The numbers of steps of each row, randomly permuted among the tokens of that row: their histogram stays."""
    key_BT = torch.rand(steps_BT.shape, generator=generator).to(steps_BT.device) + 2.0 * ~valid_BT
    order_BT = key_BT.argsort(dim=1)  # the real tokens of a row, in any order, then its padding
    return steps_BT.long().gather(1, order_BT) * valid_BT

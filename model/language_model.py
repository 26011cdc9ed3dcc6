"""What all methods share: embedding, head, loss, accounting, deterministic initialisation.

A method subclasses LanguageModel, builds its loop over the stack, and answers one question: which hidden state should
the head read at each position (`think`)? The rest is here.
"""

# ruff: noqa: N815 (fields of a dataclass carry shape suffixes too)

import hashlib
import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from haltscale.model import ledger
from haltscale.model.backbone import Block, Stack, at_least_float32
from haltscale.model.config import ModelConfig
from haltscale.model.halting import HaltingTrace
from haltscale.model.ledger import Flops, PassCounts
from torch import Tensor, nn

IGNORE_INDEX = -100
"""Target of a position that is not scored."""


@dataclass
class Output:
    """One forward pass."""

    loss: Tensor
    """Scalar, differentiable: cross_entropy + penalty. NaN if no targets were given."""
    cross_entropy: Tensor
    """Scalar, detached: mean over scored tokens, nats. NaN if no targets were given."""
    penalty: Tensor
    """Scalar, detached: what the method adds to the cross-entropy; 0 for most."""
    nll_BT: Tensor
    """float32, detached: nats per token, 0 where nothing is scored."""
    trace: HaltingTrace
    """Where the thinking went and what it cost."""
    logits_BTV: Tensor | None
    """Only if asked for, or if there are no targets."""


@dataclass
class Thought:
    """What a method's loop gives for a batch."""

    hidden_BTd: Tensor
    """The state that the head reads."""
    trace: HaltingTrace
    """Where the thinking went."""
    reach_sum_BT: Tensor | None = None
    """Differentiable sum over executed latent steps of their reach, for methods that penalise it."""


class LanguageModel(nn.Module):
    """A causal language model; `forward` is the same for all methods."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.shape.d)
        self.head = None if config.tie_embeddings else nn.Linear(config.shape.d, config.vocab_size, bias=False)

    # What a method defines -------------------------------------------------------------------------------------------

    def think(self, tokens_BT: Tensor, valid_BT: Tensor) -> Thought:
        """The hidden state that predicts the next token, at every position."""
        raise NotImplementedError

    def penalty(self, thought: Thought, probability_BT: Tensor, scored_BT: Tensor) -> Tensor:
        """What training adds to the cross-entropy. probability_BT: of the true next token, detached."""
        return probability_BT.new_zeros(())

    def router_flops(self, counts: PassCounts) -> tuple[float, float]:
        """(realised, executed) forward FLOPs of the method's routers; small, and left out of `paper`."""
        return 0.0, 0.0

    # What all share --------------------------------------------------------------------------------------------------

    def embed(self, tokens: Tensor) -> Tensor:
        """Input vectors of tokens, at unit scale (see ModelConfig.embedding_scale)."""
        vectors = self.embedding(tokens)
        return vectors * math.sqrt(2.5 * self.config.shape.d) if self.config.embedding_scale else vectors

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else cast(Tensor, self.head(hidden))

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        lengths_B: Tensor | None = None,
        return_logits: bool = False,
    ) -> Output:
        """Loss, per-token losses and halting trace of a batch.

        tokens_BT: long, T <= config.context. targets_BT: the true next tokens, IGNORE_INDEX where not scored.
        lengths_B: real tokens of each row; what follows is padding, which never thinks, is never counted, is never
        scored, and changes nothing. The loss is the mean over scored tokens; training only: without targets nothing
        looks at the truth.
        """
        B, T = tokens_BT.shape
        if self.config.context < T:
            raise ValueError(f"sequence of {T} tokens: the model's context is {self.config.context}")
        position_T = torch.arange(T, device=tokens_BT.device)
        valid_BT = (position_T < lengths_B[:, None]) if lengths_B is not None else position_T.expand(B, T) >= 0
        thought = self.think(tokens_BT, valid_BT)
        logits_BTV = self.logits(thought.hidden_BTd)
        thought.trace.counts.head_rows = B * T
        if targets_BT is None:
            unknown = torch.full((), math.nan, device=tokens_BT.device)
            silent_BT = torch.zeros(B, T, device=tokens_BT.device)
            zero = unknown.new_zeros(())
            return Output(unknown, unknown, zero, silent_BT, thought.trace, logits_BTV)

        targets_BT = targets_BT.masked_fill(~valid_BT, IGNORE_INDEX)
        scored_BT = targets_BT != IGNORE_INDEX
        scored = scored_BT.sum().clamp(min=1)
        nll_BT = F.cross_entropy(
            at_least_float32(logits_BTV).flatten(0, 1),
            targets_BT.flatten(),
            reduction="none",
            ignore_index=IGNORE_INDEX,
        ).view(B, T)
        cross_entropy = nll_BT.sum() / scored
        penalty = self.penalty(thought, torch.exp(-nll_BT.detach()), scored_BT)
        return Output(
            loss=cross_entropy + penalty,
            cross_entropy=cross_entropy.detach(),
            penalty=penalty.detach(),
            nll_BT=nll_BT.detach().float(),
            trace=thought.trace,
            logits_BTV=logits_BTV if return_logits else None,
        )

    def activation_checkpointing_(self, on: bool = True) -> "LanguageModel":
        """Recompute each block in the backward pass instead of keeping its inside. Changes memory, not results."""
        for module in self.modules():
            if isinstance(module, Stack):
                module.activation_checkpointing = on
        return self

    # Accounting ------------------------------------------------------------------------------------------------------

    def parameter_groups_count(self) -> dict[str, int]:
        """Parameters by part; asserted to sum to the true count."""
        groups = {"embedding": 0, "attention": 0, "mlp": 0, "norms": 0, "method": 0, "head": 0}
        for name, parameter in self.named_parameters():
            groups[_group_of(name)] += parameter.numel()
        assert sum(groups.values()) == sum(parameter.numel() for parameter in self.parameters())
        return groups

    def flops(self, counts: PassCounts) -> Flops:
        """Forward FLOPs of what was counted; training is 3 x this (ledger.py says why)."""
        config = self.config
        router_realised, router_executed = self.router_flops(counts)
        realised = ledger.stack_flops(config.shape, sum(counts.rows), sum(counts.keys))
        executed = ledger.stack_flops(config.shape, sum(counts.executed_rows), sum(counts.executed_keys))
        parameters = sum(self.parameter_groups_count().values())
        return Flops(
            realised=realised + router_realised + ledger.head_flops(config.shape, config.vocab_size, counts.tokens),
            executed=executed + router_executed + ledger.head_flops(config.shape, config.vocab_size, counts.head_rows),
            paper=ledger.paper_inference_flops(parameters, 1, sum(counts.rows)),
        )


def canonical_name(name: str) -> str:
    """A parameter's name without its method's wrapping, so that the weights which two methods share share names too."""
    return name.removeprefix("latent_loop.")


def _group_of(name: str) -> str:
    name = canonical_name(name)
    if name.startswith(("embedding.", "head.")):
        return name.split(".")[0]
    if "norm." in name:
        return "norms"
    if ".qkv." in name or ".out." in name:
        return "attention"
    if ".gate_up." in name or ".down." in name:
        return "mlp"
    return "method"


@torch.no_grad()
def initialise(model: LanguageModel, seed: int) -> None:
    """Give every parameter its initial value from the seed and its own canonical name.

    Each parameter has a random stream of its own, so weights that two methods share start out identical, and a method
    that adds a parameter disturbs no other. Normal with std sqrt(2/(5d)) (Nguyen & Salakhutdinov, 2019; PonderLM-2 for
    the embedding), projections into the residual stream divided by sqrt(2 layers) (GPT-2). What is not a plain weight
    (norm gains, routers) keeps the value that its module gave it.
    """
    shape = model.config.shape
    std = math.sqrt(2.0 / (5.0 * shape.d))
    into_residual = std / math.sqrt(2.0 * shape.layers)
    scale: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, Block):
            scale |= {id(module.qkv.weight): std, id(module.gate_up.weight): std}
            scale |= {id(module.out.weight): into_residual, id(module.down.weight): into_residual}
    scale[id(model.embedding.weight)] = std if model.config.embedding_scale else 0.02
    if model.head is not None:
        scale[id(model.head.weight)] = std
    for name, parameter in model.named_parameters():
        if id(parameter) in scale:
            digest = hashlib.sha256(f"{seed}/{canonical_name(name)}".encode()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            values = torch.randn(parameter.shape, generator=stream, dtype=torch.float32) * scale[id(parameter)]
            parameter.copy_(values)

"""What all methods share: embedding, head, loss, accounting, deterministic initialisation.

A method subclasses LanguageModel, builds its loop over the stack, and answers one question: which hidden state should
the head read at each position (`hidden_states`)? The rest is here.
"""

# ruff: noqa: N815 (fields of a dataclass carry shape suffixes too)

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haltscale.model import ledger
from haltscale.model.backbone import (
    AttentionKernel,
    Block,
    Rope,
    Stack,
    attention_by_indices,
    compute_dtype,
    documents_apart,
    rope_table,
)
from haltscale.model.config import EmbeddingScale, ModelConfig, Shape
from haltscale.model.decoding import FIRST_CAPACITY, DecodingState, KeyValueCache, PromptStates
from haltscale.model.halting import HaltingTrace
from haltscale.model.kernels import CrossEntropyFunction, HeadLossFunction
from haltscale.model.key_ranges import fits_flex
from haltscale.model.ledger import Flops, PassCounts
from haltscale.model.loop_options import loop_options
from haltscale.model.step_source import Replay

IGNORE_INDEX = -100
"""Target of a position that is not scored."""
LARGE_VOCABULARY = 8192
"""Tokens from which on the loss goes by parts on GPUs."""
PROMPT_TOKENS = 8192
"""Tokens of prompts, padding included, that one parallel pass reads; a longer prompt has a pass of its own."""
PROMPT_PADDING = 0.25
"""Of the tokens of such a pass, the most that may be padding: prompts whose lengths differ more are read apart."""


class HeadLoss(StrEnum):
    """How losses come from hidden states where nobody asks for logits. Changes rounding and memory only."""

    AUTO = "auto"
    """By parts on CUDA devices with a large vocabulary, whole elsewhere."""
    WHOLE = "whole"
    """From the logits of all positions."""
    PARTS = "parts"
    """By parts of the positions, so that the logits of all are never there at once; they are computed twice."""


class Head(nn.Linear):
    """The LM head; or, with targets, the losses of what it says. One module, whose weight ZeRO-3 gathers for it."""

    def forward(self, hidden: Tensor, target_N: Tensor | None = None) -> Tensor:
        """Logits [.., V] of hidden states; with target_N, nats of the targets [N] of [N, d], by parts."""
        if target_N is None:
            return super().forward(hidden)
        return loss_in_parts(hidden, self.weight, target_N)


def loss_in_parts(hidden_Nd: Tensor, weight_Vd: Tensor, target_N: Tensor) -> Tensor:
    """Nats of the targets under softmax(hidden weight^T), 0 where there is none; see HeadLossFunction."""
    dtype = compute_dtype(hidden_Nd)
    with torch.autocast(hidden_Nd.device.type, enabled=False):
        hidden_Nd, weight_Vd = hidden_Nd.to(dtype), weight_Vd.to(dtype)
        return cast(Tensor, HeadLossFunction.apply(hidden_Nd, weight_Vd, target_N, IGNORE_INDEX))


@dataclass
class Output:
    """One forward pass."""

    loss: Tensor
    """Scalar, differentiable: what training minimises. cross_entropy + penalty for most methods; some train on another
    objective than the cross-entropy that they report (`LanguageModel.objective`). NaN if no targets were given."""
    cross_entropy: Tensor
    """Scalar, detached: mean over scored tokens, nats. NaN if no targets were given."""
    penalty: Tensor
    """Scalar, detached: what the method adds to the cross-entropy; 0 for most."""
    nll_BT: Tensor
    """float32, detached: nats per token, 0 where nothing is scored."""
    trace: HaltingTrace
    """Executed steps, probabilities and cost."""
    logits_BTV: Tensor | None
    """Only if requested, or if there are no targets."""


class LoopOutput(NamedTuple):
    """What a method's loop gives for a batch. A tuple, because DeepSpeed's ZeRO-3 finds the tensors in tuples only."""

    hidden_BTd: Tensor
    """The state that the head reads."""
    trace: HaltingTrace
    """Executed steps, probabilities and cost."""
    reach_BTK: Tensor | None = None
    """Differentiable mass that reached each executed state, for methods that penalise it."""
    states: "Sequence[LatentState]" = ()
    """The states of every pass, for methods whose loss looks at them one by one."""
    auxiliary_BT: Tensor | None = None
    """Differentiable losses of the loop's own, nats per token; training adds their mean over scored tokens."""


class LatentState(NamedTuple):
    """The rows of one pass of a latent loop, packed."""

    row_N: Tensor
    """Which positions, as indices into [B*T]."""
    z_Nd: Tensor
    """Their states."""
    reach_N: Tensor
    """Mass that reached these states, differentiable."""
    exit_N: Tensor
    """Mass that leaves with these states, differentiable."""
    gate_N: Tensor | None = None
    """Probability of another step after these states, differentiable; None after the last possible one."""


class LanguageModel(nn.Module):
    """A causal language model; `forward` is the same for all methods."""

    replay: Replay | None = None
    """What decides the latent steps instead of the method's own router (step_source.py)."""
    attention_kernel: AttentionKernel = AttentionKernel.AUTO
    """How attention masks are represented."""
    head_loss: HeadLoss = HeadLoss.AUTO
    """How losses come from hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        d, rank = config.shape.d, config.embedding_rank
        self.embedding = nn.Embedding(config.vocab_size, rank or d)
        self.embedding_up = nn.Linear(rank, d, bias=False) if rank else None
        self.random_start: dict[str, float] = {}  # see `initialise`
        self.head: nn.Module | None = None
        if not config.tie_embeddings:
            down = [nn.Linear(d, rank, bias=False)] if rank else []
            up = Head(rank or d, config.vocab_size, bias=False)
            self.head = nn.Sequential(*down, up) if rank else up
        self.budget_share = 1.0

    def set_budget_share(self, share: float) -> None:
        """Say which share of the training budget is spent, 0 to 1; the training loop does, before every step.

        Methods with a schedule of their own (a warm-up of the gates, replayed steps) follow it. A model that is not
        being trained stands at the end, 1.
        """
        self.budget_share = share

    # What a method defines -------------------------------------------------------------------------------------------

    def begin_step(self, seed: int) -> None:
        """Draw whatever the method draws for one optimizer step; the training loop calls it before the step's first
        forward pass, with the same seed on all ranks and after a resumption.

        Drawing in `forward` would make a step's result depend on how its batch is cut into pieces and shared by ranks.
        """

    @classmethod
    def shape_problems(cls, shape: Shape) -> list[str]:
        """What the method cannot do with this shape, beside the shape's own errors."""
        return []

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        """The hidden state that predicts the next token, at every position. prompts: filled in with what the passes
        leave for decoding."""
        raise NotImplementedError

    def read_hidden_states(
        self, tokens_BT: Tensor, valid_BT: Tensor, state: DecodingState, rows: list[int]
    ) -> LoopOutput:
        """`hidden_states` of whole prompts, the beginnings of the sequences `rows` of a state, whose cache is filled
        with what was computed."""
        prompts = PromptStates()
        loop_output = self.hidden_states(tokens_BT, valid_BT, prompts=prompts)
        state.cache.fill(rows, valid_BT, prompts)
        return loop_output

    def logits_at(self, loop_output: LoopOutput, row_B: Tensor) -> Tensor:
        """Logits [B, V] at some positions, given as indices into [B*T], ascending; counts the rows of the head."""
        loop_output.trace.counts.head_rows += len(row_B)
        return self.lm_head(loop_output.hidden_BTd.flatten(0, 1)[row_B])

    def logits(self, loop_output: LoopOutput) -> Tensor:
        """Logits [B, T, V] of the next token; counts the rows that go through the head."""
        loop_output.trace.counts.head_rows += loop_output.hidden_BTd[..., 0].numel()
        return self.lm_head(loop_output.hidden_BTd)

    def penalty(self, loop_output: LoopOutput, targets_BT: Tensor, nll_BT: Tensor) -> Tensor:
        """What training adds to the cross-entropy. nll_BT: of the true next token, detached, 0 where not scored."""
        if loop_output.auxiliary_BT is None:
            return nll_BT.new_zeros(())
        scored_BT = targets_BT != IGNORE_INDEX
        return (loop_output.auxiliary_BT * scored_BT).sum() / scored_BT.sum().clamp(min=1)

    def objective(self, loop_output: LoopOutput, targets_BT: Tensor, nll_BT: Tensor) -> Tensor:
        """What training minimises beside the penalty: the mean of nll_BT over scored tokens, for most methods."""
        return nll_BT.sum() / (targets_BT != IGNORE_INDEX).sum().clamp(min=1)

    def cache_widths(self) -> list[int]:
        """Regions of the decoding cache and the most states that one token leaves in each (decoding.py)."""
        raise NotImplementedError

    def cache_row_width(self) -> int:
        """Numbers in one key (or value) of all heads together."""
        return self.config.shape.kv_heads * self.config.shape.head_dim

    def cache_layers(self) -> int:
        """Layers that keep keys and values while decoding."""
        return self.config.shape.layers

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        """The hidden states [B, d] that predict the next token, and the latent steps [B] that each took."""
        raise NotImplementedError

    def decode_logits(self, hidden_Bd: Tensor, state: DecodingState) -> Tensor:
        """Logits [B, V]."""
        state.counts.head_rows += len(hidden_Bd)
        return self.lm_head(hidden_Bd)

    def layers_per_pass(self, passes: int) -> list[int]:
        """Blocks that a row goes through in each counted pass: the whole stack for most methods."""
        return [self.config.shape.layers] * passes

    def extra_flops(self, counts: PassCounts) -> tuple[float, float]:
        """(realised, executed) forward FLOPs of what the method has beside stack and head; left out of `paper`."""
        return 0.0, 0.0

    # What all share --------------------------------------------------------------------------------------------------

    def embed(self, tokens: Tensor) -> Tensor:
        """Input vectors of tokens, scaled as ModelConfig.embedding_scale says."""
        found = cast(Tensor, self.embedding(tokens))
        return (found if self.embedding_up is None else self.embedding_up(found)) * self.embedding_factor

    def expected_embedding(self, probability_NV: Tensor) -> Tensor:
        """The mean input vector of tokens that are distributed so."""
        mean_N = probability_NV @ self.embedding.weight
        return (mean_N if self.embedding_up is None else self.embedding_up(mean_N)) * self.embedding_factor

    def document_starts(self, tokens_BT: Tensor) -> Tensor | None:
        """For each position, the one at which its document begins (0 in a row that begins within one); None where
        documents see each other."""
        if self.config.document_start is None:
            return None
        t_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return (t_T * (tokens_BT == self.config.document_start)).cummax(1).values

    @property
    def attends_by_indices(self) -> bool:
        """Whether attention masks are computed from indices (AttentionKernel)."""
        if self.attention_kernel is not AttentionKernel.AUTO:
            return self.attention_kernel is AttentionKernel.INDICES
        return fits_flex(self.embedding.weight, self.config.shape.head_dim)

    @property
    def embedding_factor(self) -> float:
        """What embeddings are multiplied by on the way in."""
        return self.config.embedding_scale.factor(self.config.shape.d)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """LM head."""
        if self.head is not None:
            return cast(Tensor, self.head(hidden))
        if self.embedding_up is not None:
            hidden = F.linear(hidden, self.embedding_up.weight.T)
        return F.linear(hidden, self.embedding.weight)

    @property
    def reads_parts(self) -> bool:
        """Whether losses go by parts of the positions (HeadLoss)."""
        if self.head_loss is not HeadLoss.AUTO:
            return self.head_loss is HeadLoss.PARTS
        return self.embedding.weight.device.type == "cuda" and self.config.vocab_size >= LARGE_VOCABULARY

    @property
    def heads_one_state(self) -> bool:
        """Whether the head reads one hidden state of each position, and what it says are the logits."""
        return True

    def nll(self, hidden_Nd: Tensor, target_N: Tensor) -> Tensor:
        """Nats of the targets [N] as the head reads these states, 0 where there is none."""
        if not self.reads_parts:
            return cast(Tensor, CrossEntropyFunction.apply(self.lm_head(hidden_Nd), target_N, IGNORE_INDEX))
        if isinstance(self.head, nn.Sequential):
            down, up = self.head
            return cast(Tensor, up(down(hidden_Nd), target_N))
        if self.head is not None:
            return cast(Tensor, self.head(hidden_Nd, target_N))
        if self.embedding_up is not None:
            hidden_Nd = F.linear(hidden_Nd, self.embedding_up.weight.T)
        return loss_in_parts(hidden_Nd, self.embedding.weight, target_N)

    def vocabulary_matrices(self) -> tuple[Tensor, Tensor]:
        """Embedding and head as whole matrices, [V, d] each; the embedding without its scale."""
        embedding = self.embedding.weight
        if self.embedding_up is not None:
            embedding = embedding @ self.embedding_up.weight.T
        if self.head is None:
            return embedding, embedding
        if isinstance(self.head, nn.Sequential):
            down, up = (cast(Tensor, part.weight) for part in self.head)
            return embedding, up @ down
        return embedding, cast(Tensor, self.head.weight)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        lengths_B: Tensor | None = None,
        return_logits: bool = False,
        hidden_states: Callable[[Tensor, Tensor], LoopOutput] | None = None,
        observe: Callable[[LoopOutput, Tensor], None] | None = None,
    ) -> Output:
        """Loss, per-token losses and halting trace of a batch.

        tokens_BT: long, T <= config.context. targets_BT: the true next tokens, IGNORE_INDEX where not scored.
        lengths_B: real tokens of each row; what follows is padding, which takes no latent step, is never counted, is
        never scored, and changes nothing. The loss is the mean over scored tokens; training only: without targets
        nothing looks at the truth.
        hidden_states: instead of the method's own (probing.py). observe: called with the loop's output and the logits,
        inside the forward pass, where ZeRO-3 gathers whatever weights it may still need.
        """
        B, T = tokens_BT.shape
        if self.config.context < T:
            raise ValueError(f"sequence of {T} tokens: the model's context is {self.config.context}")
        position_T = torch.arange(T, device=tokens_BT.device)
        valid_BT = (position_T < lengths_B[:, None]) if lengths_B is not None else position_T.expand(B, T) >= 0
        self._check_vocabulary(tokens_BT)
        with documents_apart(self.document_starts(tokens_BT)), attention_by_indices(self.attends_by_indices):
            loop_output = (hidden_states or self.hidden_states)(tokens_BT, valid_BT)
        in_parts = self.reads_parts and self.heads_one_state and targets_BT is not None and observe is None
        logits_BTV = None if in_parts and not return_logits else self.logits(loop_output)
        if observe is not None and logits_BTV is not None:
            observe(loop_output, logits_BTV)
        if targets_BT is None:
            unknown = torch.full((), math.nan, device=tokens_BT.device)
            silent_BT = torch.zeros(B, T, device=tokens_BT.device)
            zero = unknown.new_zeros(())
            return Output(unknown, unknown, zero, silent_BT, loop_output.trace, logits_BTV)

        targets_BT = targets_BT.masked_fill(~valid_BT, IGNORE_INDEX)
        self._check_vocabulary(targets_BT)
        scored_BT = targets_BT != IGNORE_INDEX
        scored = scored_BT.sum().clamp(min=1)
        if logits_BTV is None:
            loop_output.trace.counts.head_rows += B * T
            nll_N = self.nll(loop_output.hidden_BTd.flatten(0, 1), targets_BT.flatten())
        else:
            nll_N = CrossEntropyFunction.apply(logits_BTV.flatten(0, 1), targets_BT.flatten(), IGNORE_INDEX)
        nll_BT = nll_N.view(B, T)
        objective = self.objective(loop_output, targets_BT, nll_BT)
        penalty = self.penalty(loop_output, targets_BT, nll_BT.detach())
        return Output(
            loss=objective + penalty,
            cross_entropy=(nll_BT.detach().sum() / scored),
            penalty=penalty.detach(),
            nll_BT=nll_BT.detach().float(),
            trace=loop_output.trace,
            logits_BTV=logits_BTV if return_logits else None,
        )

    def start_decoding(self, batch_size: int, *, capacity: int = FIRST_CAPACITY) -> DecodingState:
        """An empty state for `batch_size` sequences that will be read or written together, token by token.

        capacity: tokens to set memory aside for at once; it grows when they are exceeded.
        """
        weight = self.embedding.weight
        cache = KeyValueCache(
            batch_size,
            self.cache_row_width(),
            self.cache_widths(),
            layers=self.cache_layers(),
            dtype=compute_dtype(weight),
            device=weight.device,
            capacity=capacity,
        )
        return DecodingState(batch=batch_size, cache=cache)

    @torch.no_grad()
    def decode_step(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        """Read one token of each sequence: (logits_BV of the next one, steps_B latent steps that were taken).

        The halting rule is the one of `forward`, so feeding a text token by token gives forward's logits and steps.
        """
        if len(tokens_B) != state.batch:
            raise ValueError(f"{len(tokens_B)} tokens: the decoding state was started for {state.batch} sequences")
        self._check_room(tokens_B, state.positions)
        state.cache.make_room(max(state.positions) + 1)
        state.counts.tokens += state.batch
        hidden_Bd, steps_B = self.decode_hidden_states(tokens_B, state)
        logits_BV = self.decode_logits(hidden_Bd, state)
        state.positions = [position + 1 for position in state.positions]
        return logits_BV, steps_B

    @torch.no_grad()
    def decode_pass(self, tokens: Mapping[int, int], state: DecodingState) -> tuple[list[int], Tensor, Tensor]:
        """Go on reading single tokens, which sequences need not do in step: (the sequences, ascending, whose tokens are
        read, logits [F, V] of the next ones, latent steps [F] that were taken).

        tokens: the next token of each sequence that has none in reading; before the first call, of all. Where a method
        can (`AdaptiveModel`), this is one pass of all sequences, each at its own depth; otherwise all of `decode_step`.
        """
        logits_BV, steps_B = self.decode_step(torch.tensor([tokens[b] for b in state.everyone]).to(self.device), state)
        return state.everyone, logits_BV, steps_B

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embedding.weight.device

    @torch.no_grad()
    def read_prompts(
        self, prompts: Sequence[Sequence[int]], state: DecodingState, *, every_position: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read the prompts of all sequences of an empty state, each at least one token long, in parallel passes as in
        training: (logits_BV of the token after each, steps_B latent steps of its last token).

        To rounding, and in all that is counted as realised, this equals reading them with `decode_step`; prompts of
        unequal length are read together and are not padded afterwards. every_position: the logits of all positions
        instead, [B, T, V], T the longest prompt; those after a prompt's end have no meaning.

        Raises:
            ValueError: as many prompts as sequences are needed, none empty, none longer than the context, all of known
                tokens; the state is to be new.
        """
        lengths = [len(prompt) for prompt in prompts]
        if len(prompts) != state.batch or min(lengths, default=0) < 1:
            raise ValueError(f"{len(prompts)} prompts of {lengths} tokens: the decoding state was started for"
                             f" {state.batch} sequences, and every prompt needs a token")  # fmt: skip
        if any(state.positions):
            raise ValueError("the decoding state has read tokens already: read prompts into a new one")
        if max(lengths) > self.config.context:
            raise ValueError(f"sequence of {max(lengths)} tokens: the model's context is {self.config.context}")
        state.cache.make_room(max(lengths))

        groups = list(_alike(lengths))
        training = self.training
        self.train(False)  # some methods look ahead while they are trained
        try:
            found = [self._read_group([prompts[b] for b in rows], rows, state, every_position) for rows in groups]
        finally:
            self.train(training)
        state.positions = lengths
        state.counts.tokens += sum(lengths)
        order = torch.tensor([b for rows in groups for b in rows], device=found[0][0].device).argsort()
        longest = max(lengths)
        logits = [F.pad(one, (0, 0, 0, longest - one.shape[1])) if every_position else one for one, _ in found]
        return torch.cat(logits)[order], torch.cat([steps_B for _, steps_B in found])[order]

    def _read_group(
        self, prompts: Sequence[Sequence[int]], rows: list[int], state: DecodingState, every_position: bool
    ) -> tuple[Tensor, Tensor]:
        device = self.embedding.weight.device
        lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        tokens_BT = torch.zeros(len(rows), int(lengths_B.max()), dtype=torch.long)
        for row_T, prompt in zip(tokens_BT, prompts, strict=True):
            row_T[: len(prompt)] = torch.as_tensor(prompt)
        self._check_vocabulary(tokens_BT)
        tokens_BT, lengths_B = tokens_BT.to(device), lengths_B.to(device)
        T = tokens_BT.shape[1]
        loop_output = self.read_hidden_states(
            tokens_BT, torch.arange(T, device=device) < lengths_B[:, None], state, rows
        )
        if self.replay is not None:
            self.replay.read(tokens_BT, lengths_B, state, rows)
        last_B = torch.arange(len(rows), device=device) * T + lengths_B - 1
        logits = self.logits(loop_output) if every_position else self.logits_at(loop_output, last_B)
        counts = replace(loop_output.trace.counts, tokens=0, gradless=None)
        state.counts += counts + (loop_output.trace.counts.gradless or PassCounts())
        return logits, loop_output.trace.steps_BT.flatten()[last_B].long()

    def keep_sequences(self, state: DecodingState, rows: list[int]) -> None:
        """Go on decoding some of a state's sequences alone: the others are finished, and cost nothing any more."""
        state.keep(rows)

    def _check_room(self, tokens: Tensor, positions: Sequence[int]) -> None:
        """Refuse tokens that cannot be read at these positions."""
        if max(positions) >= self.config.context:
            raise ValueError(f"the model's context of {self.config.context} tokens is full")
        self._check_vocabulary(tokens)

    def _check_vocabulary(self, tokens: Tensor) -> None:
        """Refuse tokens that the model does not have, on CPUs; elsewhere that would cost a trip to the device, and the
        kernels assert it."""
        size = self.config.vocab_size
        if tokens.device.type == "cpu" and tokens.numel() and int(tokens.max()) >= size:
            raise ValueError(f"token {int(tokens.max())}: the model's vocab_size is {size}, less than the tokenizer's")

    def rope_at(self, positions: Sequence[int]) -> Rope:
        """Rotary angles of one row at each position; of one row for all where they are the same."""
        config, longest = self.config, max(positions)
        length = min(config.context, 1 << longest.bit_length())
        cos_T1E, sin_T1E = rope_table(length, config.shape, config.rope_theta, self.embedding.weight)
        if min(positions) == longest:
            return cos_T1E[longest : longest + 1], sin_T1E[longest : longest + 1]
        position_N = torch.tensor(positions, device=cos_T1E.device)
        return cos_T1E[position_N], sin_T1E[position_N]

    def activation_checkpointing_(self, on: bool = True) -> "LanguageModel":
        """Recompute each block in the backward pass instead of keeping its inside. Changes memory, not results."""
        for module in self.modules():
            if isinstance(module, Stack):
                module.activation_checkpointing = on
        return self

    def compile_blocks_(self, backend: str | Callable[..., Any] = "inductor") -> "LanguageModel":
        """Have torch.compile compile every block, but for its attention, when it is first run. Changes rounding.

        backend: of torch.compile.
        """
        for module in self.modules():
            if isinstance(module, Block):
                module.compile_(backend)
        return self

    # Accounting ------------------------------------------------------------------------------------------------------

    def parameter_groups_count(self) -> dict[str, int]:
        """Parameters by part; asserted to sum to the true count."""
        groups = {"embedding": 0, "attention": 0, "mlp": 0, "norms": 0, "method": 0, "head": 0}
        for name, parameter in self.named_parameters():
            groups[_group_of(name)] += _true_numel(parameter)
        assert sum(groups.values()) == sum(map(_true_numel, self.parameters()))
        return groups

    def recurrent_parameters(self) -> int:
        """Parameters that every pass of a token after the first uses again: those of the blocks that `layers_per_pass`
        gives it, and the norm behind the stack where that is all of them."""
        layers, groups = self.config.shape.layers, self.parameter_groups_count()
        again = self.layers_per_pass(2)[1]
        if again == layers:
            return groups["attention"] + groups["mlp"] + groups["norms"]
        blocks = (groups["attention"] + groups["mlp"]) // layers
        return again * (blocks + 2 * self.config.shape.d)

    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that decoding sets aside for each token of a sequence, however early it halts.

        One state would take a row in every layer; where a state is written to several regions, to read each in one
        stride, this counts the copies (decoding.py).
        """
        row = 2 * self.cache_row_width() * compute_dtype(self.embedding.weight).itemsize
        return row * self.cache_layers() * sum(self.cache_widths())

    def state_bytes_per_token(self, counts: PassCounts) -> float:
        """Bytes of keys and values that the states counted while decoding leave behind, each kept once, per token:
        what the method needs, as `realised` is in FLOPs."""
        row = 2 * self.cache_row_width() * compute_dtype(self.embedding.weight).itemsize
        layers = self.layers_per_pass(len(counts.rows))
        return row * sum(n * depth for n, depth in zip(counts.rows, layers, strict=True)) / max(counts.tokens, 1)

    def flops(self, counts: PassCounts) -> Flops:
        """Forward FLOPs of what was counted; training is 3 x this (ledger.py says why)."""
        config = self.config
        layers = self.layers_per_pass(len(counts.rows))
        realised = ledger.passes_flops(config.shape, counts.rows, counts.keys, layers)
        head = counts.tokens * (self.head_row_flops() + self._embedding_row_flops)
        embedding = self.embedded_rows(counts) * self._embedding_row_flops
        parameters = sum(self.parameter_groups_count().values())
        passes = sum(rows * depth / config.shape.layers for rows, depth in zip(counts.rows, layers, strict=True))
        gradless = self._executed_flops(counts.gradless) if counts.gradless else 0.0
        first = counts.forward_only or PassCounts()
        depths = layers[: len(first.rows)]
        return Flops(
            realised=realised + self.extra_flops(counts)[0] + head,
            executed=self._executed_flops(counts) + gradless + embedding,
            paper=ledger.paper_inference_flops(parameters, 1, passes),
            executed_gradless=gradless
            + ledger.passes_flops(config.shape, first.executed_rows, first.executed_keys, depths),
            realised_gradless=ledger.passes_flops(config.shape, first.rows, first.keys, depths),
            paper_gradless=ledger.paper_inference_flops(parameters, 1, sum(first.rows)),
        )

    def _executed_flops(self, counts: PassCounts) -> float:
        layers = self.layers_per_pass(len(counts.executed_rows))
        executed = ledger.passes_flops(self.config.shape, counts.executed_rows, counts.executed_keys, layers)
        return executed + self.extra_flops(counts)[1] + counts.head_rows * self.head_row_flops()

    def head_row_flops(self) -> float:
        """Of one row in the LM head; as many for a mean of embeddings (`expected_embedding`)."""
        return ledger.head_flops(self.config.shape, self.config.vocab_size, 1, rank=self.config.embedding_rank)

    @property
    def _embedding_row_flops(self) -> float:
        """Of one row on its way in: looking up costs nothing, the second factor of a factorised embedding does."""
        return 2.0 * self.config.embedding_rank * self.config.shape.d

    def embedded_rows(self, counts: PassCounts) -> int:
        """Rows that were embedded, padding included: those of the first pass, for most methods."""
        return sum(counts.executed_rows[:1])


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The indices of prompts in groups to be read together, the longest first."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        longest = lengths[group[0]] if group else 0
        padded = longest * (len(group) + 1)
        real = sum(lengths[b] for b in group) + lengths[index]
        if group and (padded > PROMPT_TOKENS or padded - real > PROMPT_PADDING * padded):
            yield group
            group = []
        group.append(index)
    yield group


def _true_numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter; under ZeRO-3 it is empty between uses, and DeepSpeed keeps its size in `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def canonical_name(name: str) -> str:
    """A parameter's name without its method's wrapping, so that the weights which two methods share share names too."""
    return name.removeprefix("latent_loop.")


def _group_of(name: str) -> str:
    name = canonical_name(name)
    if name.startswith(("embedding.", "embedding_up.")):
        return "embedding"
    if name.startswith("head."):
        return "head"
    if name.startswith("border."):
        return "method"
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
    the embedding; a factorised one has the same std as a product), projections into the residual stream divided by
    sqrt(2 layers) (GPT-2), or zero (`LoopOptions.zero_outputs`). Any module may name further parameters of its own in a
    dict `random_start`, each with its std. Any other parameter (norm gains, a router's last layer) keeps the value
    that its module gave it.
    """
    shape = model.config.shape
    std = math.sqrt(2.0 / (5.0 * shape.d))
    into_residual = std / math.sqrt(2.0 * shape.layers)
    if loop_options(model.config.options).zero_outputs:
        into_residual = 0.0
    scale: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, Block):
            scale |= {id(module.qkv.weight): std, id(module.gate_up.weight): std}
            scale |= {id(module.out.weight): into_residual, id(module.down.weight): into_residual}
        for name, own_std in getattr(module, "random_start", {}).items():
            scale[id(module.get_parameter(name))] = own_std
    scale[id(model.embedding.weight)] = 0.02 if model.config.embedding_scale is EmbeddingScale.NONE else std
    if model.embedding_up is not None:
        scale[id(model.embedding_up.weight)] = 1 / math.sqrt(model.config.embedding_rank)
    if isinstance(model.head, nn.Sequential):
        down, up = model.head
        scale |= {id(down.weight): std, id(up.weight): 1 / math.sqrt(model.config.embedding_rank)}
    elif model.head is not None:
        scale[id(model.head.weight)] = std
    for name, parameter in model.named_parameters():
        if id(parameter) in scale:
            digest = hashlib.sha256(f"{seed}/{canonical_name(name)}".encode()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            values = torch.randn(parameter.shape, generator=stream, dtype=torch.float32) * scale[id(parameter)]
            parameter.copy_(values)

"""Generation: several prompts continued together, each as if it were alone.

Prompts are read in parallel passes, as in training, and each sequence continues from the end of its own: nothing is
padded and no position is shifted. Each sequence draws from a random stream of its own.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haltscale.model.config import in_range
from haltscale.model.kernels import at_least_float32
from haltscale.model.language_model import LanguageModel


class GenerationError(ValueError):
    """The prompts cannot be continued as requested; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the most likely token; otherwise logits are divided by it: from 1e-6, below which it is 0 to a float."""
    top_k: int = 0
    """Draw among the k most likely tokens only; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens that hold at least this much probability."""
    seed: int = 0
    """Of the random streams; sequence i of a call draws from stream (seed, i)."""

    def problems(self) -> list[str]:
        """All errors."""
        return [
            *([] if self.temperature == 0 else in_range("temperature", self.temperature, 1e-6, 100.0)),
            *in_range("top_k", self.top_k, 0, integer=True),
            *in_range("top_p", self.top_p, 0.0, 1.0, above=True),
            *in_range("seed", self.seed, 0, 2**31 - 1, integer=True),
        ]


GREEDY = Sampling()


class Emitted(NamedTuple):
    """One token, as it is written."""

    sequence: int
    """Which prompt it continues."""
    token: int
    steps: int
    """Latent steps taken before it."""
    nll: float
    """Nats that the model gave it, before temperature and cuts."""


@dataclass
class Cost:
    """What a generation has cost so far; filled in while it runs."""

    cache_bytes: int = 0
    """Keys and values set aside."""
    tokens: int = 0
    """Tokens read and written, of all sequences."""
    flops_realised: float = 0.0


def cache_bytes(model: LanguageModel, sequences: int, tokens: int) -> int:
    """Bytes of keys and values for so many sequences of so many tokens."""
    return model.cache_bytes_per_token() * sequences * tokens


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Collection[int] = (),
    max_cache_bytes: int | None = None,
    cost: Cost | None = None,
    unwanted: Collection[int] = (),
) -> Iterator[Emitted]:
    """Continue prompts; tokens come as they are written, those of one sequence in order. One that has ended costs
    nothing from then on.

    Args:
        new_tokens: at most so many for each prompt.
        stop_tokens: a sequence ends after writing one of them.
        max_cache_bytes: refuse rather than set aside more.
        cost: filled in on the way.
        unwanted: a set that the caller adds sequences to while it reads: they end.

    Raises:
        GenerationError: before anything is set aside: no prompt or an empty one, unknown tokens, no room in the
            context or in the cache, unsound sampling.
    """
    longest = max(map(len, prompts), default=0)
    _check(model, prompts, new_tokens, sampling, max_cache_bytes)
    cost = cost if cost is not None else Cost()
    cost.cache_bytes = cache_bytes(model, len(prompts), longest + new_tokens)
    return _run(model, prompts, longest, new_tokens, sampling, frozenset(stop_tokens), cost, unwanted)


def _check(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: Sampling,
    max_cache_bytes: int | None,
) -> None:
    config = model.config
    found = [f"sampling.{problem}" for problem in sampling.problems()]
    found += in_range("new_tokens", new_tokens, 1, integer=True)
    if not prompts:
        found.append("there is no prompt")
    for index, prompt in enumerate(prompts):
        if not prompt:
            found.append(f"prompt {index} is empty: give it at least one token")
        elif not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            found.append(f"prompt {index} holds tokens outside of 0..{config.vocab_size - 1}")
        elif config.document_start is not None and config.document_start in prompt[1:]:
            found.append(
                f"prompt {index} begins another document after its first token, and attention stops there: give the"
                " last document alone"
            )
        if len(prompt) > config.context:
            found.append(f"prompt {index} has {len(prompt)} tokens, more than the model's context of {config.context}")
        elif not found and len(prompt) + new_tokens - 1 > config.context:  # the last token is written, never read
            room = config.context - len(prompt) + 1
            found.append(
                f"prompt {index} has {len(prompt)} tokens, which leaves room for {room} new ones in the model's"
                f" context of {config.context}: new_tokens is {new_tokens}"
            )
    if not found and max_cache_bytes is not None:
        needed = cache_bytes(model, len(prompts), max(map(len, prompts)) + new_tokens)
        if needed > max_cache_bytes:
            found.append(
                f"keys and values need {needed:,} bytes, {max_cache_bytes:,} are allowed: fewer prompts, fewer tokens"
            )
    if found:
        raise GenerationError("\n".join(found))


def _run(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    longest: int,
    new_tokens: int,
    sampling: Sampling,
    stop_tokens: frozenset[int],
    cost: Cost,
    unwanted: Collection[int],
) -> Iterator[Emitted]:
    model.eval()
    state = model.start_decoding(len(prompts), capacity=longest + new_tokens)
    left = dict.fromkeys(range(len(prompts)), new_tokens)  # sequences that are not finished: tokens left to write
    streams = [torch.Generator().manual_seed((sampling.seed << 20) + index) for index in range(len(prompts))]
    going = list(left)  # the sequence of each row
    logits_BV, steps_B = model.read_prompts(prompts, state)
    written = state.everyone  # the rows that these are of: sequences whose tokens take many steps fall behind
    while True:
        cost.tokens, cost.flops_realised = state.counts.tokens, model.flops(state.counts).realised
        newest = dict[int, int]()
        for row, log_p_V, steps in zip(written, _log_p(logits_BV), steps_B.tolist(), strict=True):
            index = going[row]
            token = newest[index] = choose(log_p_V, sampling, streams[index])
            left[index] -= 1
            if token in stop_tokens or not left[index]:
                del left[index]
            yield Emitted(index, token, steps, -float(log_p_V[token]))
        rows = [row for row, index in enumerate(going) if index in left and index not in unwanted]
        if not rows:
            return
        if len(rows) < len(going):
            model.keep_sequences(state, rows)
        going = [going[row] for row in rows]
        due = {row: newest[index] for row, index in enumerate(going) if index in newest}
        written, logits_BV, steps_B = model.decode_pass(due, state)


def _log_p(logits_BV: Tensor) -> Tensor:
    return at_least_float32(logits_BV).log_softmax(1).cpu()


def choose(log_p_V: Tensor, sampling: Sampling, stream: torch.Generator) -> int:
    """The next token, from log-probabilities."""
    if sampling.temperature == 0:
        return int(log_p_V.argmax())
    p_V = torch.softmax((log_p_V.double() - log_p_V.max()) / sampling.temperature, 0)
    ordered_V, token_V = p_V.sort(descending=True, stable=True)
    kept = len(ordered_V) if sampling.top_k == 0 else min(sampling.top_k, len(ordered_V))
    before_V = ordered_V.cumsum(0) - ordered_V  # what more likely tokens hold
    if sampling.top_k:
        before_V = before_V / ordered_V[:kept].sum()
    allowed_V = (before_V < sampling.top_p) & (torch.arange(len(ordered_V)) < kept)
    return int(token_V[torch.multinomial(ordered_V * allowed_V, 1, generator=stream)])

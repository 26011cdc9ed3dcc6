"""Text from a finished model, and how it looks in a terminal: every token with the latent steps before it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text
from tokenizers.decoders import DecodeStream

from haltscale.model.generation import GREEDY, Cost, GenerationError, Sampling, generate
from haltscale.platform.inference.models import LoadedModel, TextError, encode

MAX_CACHE_BYTES = 1 << 31
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
SHADES = ("", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30")
"""Background by latent steps, from viridis; the count stands beside the token, so colour is never the only sign."""


@dataclass(frozen=True, kw_only=True)
class WrittenToken:
    """One token of a continuation."""

    prompt: int
    """Which prompt it continues."""
    token_id: int
    text: str
    """What it adds to the text; empty while a character is not complete."""
    steps: int
    """Latent steps before it."""
    nll: float
    """Nats that the model gave it."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def write(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    max_cache_bytes: int = MAX_CACHE_BYTES,
    cost: Cost | None = None,
    unwanted: Collection[int] = (),
) -> Iterator[WrittenToken]:
    """Continue prompts, each as the beginning of a document; tokens come as they are written.

    Args:
        new_tokens: at most so many for each; None: as many as the context has room for beside the longest prompt.
        stop: tokens (their text) that end a continuation, beside end-of-text.
        unwanted: a set that the caller adds prompts to while it reads: their continuations end.

    Raises:
        GenerationError: a prompt is empty, too long or no text, a stop is no single token, or the cache would be too
            large.
    """
    end = loaded.end_of_text
    encoded = [_encoded(loaded, f"prompt {index}", prompt, end) for index, prompt in enumerate(prompts)]
    empty = [index for index, ids in enumerate(encoded) if not ids]
    if empty or not prompts:
        raise GenerationError(f"prompt {empty[0] if empty else 0} is empty: give the model a text to continue")
    stops = {loaded.end_of_text, *(_one_token(loaded, text) for text in stop)}
    texts = [[loaded.end_of_text, *ids] for ids in encoded]
    if new_tokens is None:
        new_tokens = max(loaded.model.config.context + 1 - max(map(len, texts)), 1)
    emitted = generate(
        loaded.model,
        texts,
        new_tokens=new_tokens,
        sampling=sampling,
        stop_tokens=stops,
        max_cache_bytes=max_cache_bytes,
        cost=cost,
        unwanted=unwanted,
    )
    return _decoded(loaded, encoded, emitted)


def _decoded(loaded: LoadedModel, prompts: list[list[int]], emitted: Iterator[Any]) -> Iterator[WrittenToken]:
    streams = []
    for prompt in prompts:  # the decoder of some tokenizers looks at what stands before
        streams.append(DecodeStream(skip_special_tokens=True))
        for token in prompt:
            streams[-1].step(loaded.tokenizer, token)
    for one in emitted:
        text = streams[one.sequence].step(loaded.tokenizer, one.token) or ""
        yield WrittenToken(prompt=one.sequence, token_id=one.token, text=text, steps=one.steps, nll=one.nll)


def _encoded(loaded: LoadedModel, what: str, text: str, end_of_text: int | None = None) -> list[int]:
    if len(text) > longest_text(loaded):  # before it is tokenised, which takes seconds for megabytes
        raise GenerationError(
            f"{what} has {len(text):,} characters, more than any text of the model's context of"
            f" {loaded.model.config.context} tokens"
        )
    try:
        return encode(loaded.tokenizer, text, end_of_text)
    except TextError as error:
        raise GenerationError(f"{what}: {error}") from error


def longest_text(loaded: LoadedModel) -> int:
    """Characters that no text of the model's context exceeds; generous, since a tokenizer may drop some."""
    longest = max(map(len, loaded.tokenizer.get_vocab()), default=1)
    return 4 * longest * loaded.model.config.context


def _one_token(loaded: LoadedModel, text: str) -> int:
    ids = _encoded(loaded, "stop", text)
    if len(ids) != 1 and (special := loaded.tokenizer.token_to_id(text)) is not None:
        return int(special)  # in a text it would be letters
    if len(ids) != 1:
        raise GenerationError(f"stop {text!r} is {len(ids)} tokens of this tokenizer; a stop is one token")
    return int(ids[0])


def marked(token: WrittenToken) -> Text:
    """A token for the terminal: on the shade of its steps, and followed by their number."""
    shade = SHADES[min(token.steps, len(SHADES) - 1)]
    shown = Text(token.text, style=f"white on {shade}" if shade and token.text.strip() else "")
    return shown.append(str(token.steps).translate(SUPERSCRIPTS) if token.steps else "", style="dim")


def show(console: Console, prompts: Sequence[str], tokens: Iterator[WrittenToken]) -> list[WrittenToken]:
    """Print prompts and their continuations: one prompt's as it is written, those of several one after another."""
    if len(prompts) > 1:
        every = list(tokens)
        for index, prompt in enumerate(prompts):
            show(console, [prompt], (token for token in every if token.prompt == index))
        return every
    console.print(Text(prompts[0], style="bold"), end="", soft_wrap=True)
    written = []
    for token in tokens:
        written.append(token)
        console.print(marked(token), end="", soft_wrap=True)
    console.print()
    return written


def legend(deepest: int) -> Text:
    """What the shades and numbers mean."""
    text = Text("latent steps before a token: ")
    for steps in range(deepest + 1):
        example = WrittenToken(prompt=0, token_id=0, text=f" {steps} ", steps=steps, nll=0.0)
        text.append_text(marked(example)).append(" ")
    return text


def summary(tokens: Sequence[WrittenToken], cost: Cost, seconds: float) -> dict[str, Any]:
    """Of what was written: tokens, mean latent steps, mean nats; and the cost, per token read or written.

    Returns:
        ``tokens``, ``mean_steps``, ``mean_nll``, ``tokens_per_second`` (written), ``flops_realised`` per token and
        ``cache_bytes``.
    """
    count = max(len(tokens), 1)
    return {
        "tokens": len(tokens),
        "mean_steps": sum(token.steps for token in tokens) / count,
        "mean_nll": sum(token.nll for token in tokens) / count,
        "tokens_per_second": len(tokens) / max(seconds, 1e-9),
        "flops_realised": cost.flops_realised / max(cost.tokens, 1),
        "cache_bytes": cost.cache_bytes,
    }

"""Speed of the models, side by side in one run, as medians of interleaved repeats.

    python benchmarks/model_speed.py [tax] [llama] [decode] [--repeats 9] [--threads 2] [--cpu-time]

tax     realised FLOP/s of adaptive over vanilla, forward and backward: what is lost by computing raggedly. Aim: 0.85.
llama   tokens per second of vanilla over transformers' Llama with the same weights, forward and backward. Aim: 1.0.
decode  time per decoded token, adaptive over vanilla, divided by adaptive's mean passes. Aim: at most 1.15.

Ratios are taken within each repeat, where both sides saw the same machine, and then their median. d 256, 6 layers,
4 sequences of 256 tokens (128 when decoding), vocabulary 4,096; the router has random weights, so halting is ragged.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from haltscale.model import (
    AdaptiveOptions,
    LanguageModel,
    Method,
    MethodOptions,
    ModelConfig,
    Shape,
    VanillaOptions,
    build_model,
)

SHAPE = Shape(layers=6, d=256, heads=4, kv_heads=4, ffn=688)
CLOCK = [time.perf_counter]  # what `timed` reads
VOCABULARY, LENGTH, SEQUENCES, DECODED = 4096, 256, 4, 128


def model_of(method: Method, options: MethodOptions) -> LanguageModel:
    """A model of the benchmark's size; a router gets random weights."""
    config = ModelConfig(
        method=method, shape=SHAPE, vocab_size=VOCABULARY, context=LENGTH, options=options, embedding_scale=True
    )
    model = build_model(config, seed=0)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("score.weight"):
                weight.copy_(torch.randn(weight.shape, generator=stream) * 1.5 / SHAPE.d**0.5)
    return model


def ragged() -> LanguageModel:
    """Adaptive with halting at every depth."""
    return model_of(Method.ADAPTIVE, AdaptiveOptions(tau=0.3))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work gave."""
    start = CLOCK[0]()
    result = work()
    return CLOCK[0]() - start, result


def interleaved(one: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[float, float, float]:
    """Medians of both measures and of their ratio, one over the other; the first, cold repeat is dropped."""
    pairs = [(one(), other()) for _ in range(repeats + 1)][1:]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def training_step(model: LanguageModel, tokens: torch.Tensor) -> Callable[[], float]:
    """Realised GFLOP/s of one forward and backward."""

    def step() -> float:
        def work() -> Any:
            out = model(tokens, tokens)
            out.loss.backward()
            model.zero_grad()
            return out.trace

        seconds, trace = timed(work)
        return model.flops(trace.counts).training.realised / seconds / 1e9

    return step


def tax(repeats: int) -> None:
    """Adaptivity tax."""
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
    vanilla = model_of(Method.VANILLA, VanillaOptions())
    for name, adaptive in (
        ("ragged", ragged()),
        ("all steps", model_of(Method.ADAPTIVE, AdaptiveOptions(tau=0.0, router_bias=8.0))),
    ):
        trace = adaptive(tokens, tokens).trace
        a, v, ratio = interleaved(training_step(adaptive, tokens), training_step(vanilla, tokens), repeats)
        print(
            f"tax, {name}: adaptive {a:.1f} / vanilla {v:.1f} realised GFLOP/s = {ratio:.3f} "
            f"at {1 + trace.mean_steps:.2f} passes, steps {trace.histogram()}"
        )


def llama(repeats: int) -> None:
    """Vanilla against transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vanilla = model_of(Method.VANILLA, VanillaOptions())
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=SHAPE.d,
            intermediate_size=SHAPE.ffn,
            num_hidden_layers=SHAPE.layers,
            num_attention_heads=SHAPE.heads,
            num_key_value_heads=SHAPE.kv_heads,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))

    def ours_step() -> float:
        def work() -> None:
            vanilla(tokens, tokens).loss.backward()
            vanilla.zero_grad()

        return tokens.numel() / timed(work)[0]

    def their_step() -> float:
        def work() -> None:
            theirs(input_ids=tokens, labels=tokens, shift_labels=tokens, use_cache=False).loss.backward()
            theirs.zero_grad()

        return tokens.numel() / timed(work)[0]

    a, b, ratio = interleaved(ours_step, their_step, repeats)
    print(f"llama: vanilla {a:.0f} / transformers {b:.0f} tokens/s, forward and backward = {ratio:.3f}")


def decode(repeats: int) -> None:
    """Decoding time per token and pass."""
    vanilla, adaptive = model_of(Method.VANILLA, VanillaOptions()).eval(), ragged().eval()
    for batch in (1, 4):
        tokens = torch.randint(VOCABULARY, (batch, LENGTH))
        passes: list[float] = []

        def run(model: LanguageModel, tokens: torch.Tensor = tokens, passes: list[float] = passes) -> float:
            state = model.start_decoding(len(tokens))

            def work() -> None:
                for t in range(DECODED):
                    model.decode_step(tokens[:, t], state)

            seconds = timed(work)[0]
            if model is adaptive:
                passes.append(state.counts.mean_passes)
            return seconds / DECODED * 1e3

        a, b, ratio = interleaved(lambda run=run: run(adaptive), lambda run=run: run(vanilla), max(3, repeats // 3))
        print(
            f"decode, batch {batch}: adaptive {a:.2f} / vanilla {b:.2f} ms per token = {ratio:.2f} "
            f"at {passes[-1]:.2f} passes: {ratio / passes[-1]:.3f} x mean passes"
        )


def main() -> None:
    """Run the benchmarks that were named, or all."""
    known: dict[str, Callable[[int], None]] = {"tax": tax, "llama": llama, "decode": decode}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="tax, llama, decode; all if none is named")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds on one thread, for a machine that is busy")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if arguments.cpu_time:
        CLOCK[0], arguments.threads = time.process_time, 1
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for name in arguments.names or known:
        known[name](arguments.repeats)


if __name__ == "__main__":
    main()

"""Speed of the models, side by side in one run, as medians of interleaved repeats.

    python benchmarks/model_speed.py [tax llama litgpt decode prompt rate small methods where] [--repeats 9]
    python benchmarks/model_speed.py tax llama rate --device cuda --size 410m --length 2048 --dtype bf16 [--compile]

tax     realised FLOP/s of adaptive over vanilla, forward and backward: what is lost by computing raggedly.
        Aim: at least 0.90 on 2 cores; on a GPU, at 410m and 2,048 tokens in bf16, at least 0.80.
llama   tokens per second of vanilla over transformers' Llama of the same size, forward and backward.
        Aim: at least 1.1 on CPU; on a GPU, with --compile, at least 1.2 over transformers uncompiled.
litgpt  the same over litgpt's GPT, where it is installed. Aim: at least 1.1.
decode  time for each pass of each sequence while adaptive decodes, over the plain model's time per token in as large a
        batch; and of 8 sequences that halt at different depths over 8 that take all steps. Aim: at most 1.15.
prompt  time until a prompt of 1,000 tokens is read and its next token is known, over one forward pass of it without a
        gradient, for every method. Aim: at most 1.3.
rate    vanilla's realised FLOP/s, forward and backward, over the machine's matrix rate, measured on square matrices in
        the same type. Aim: on a GPU at 410m at least 0.45.
small   the same for whole training steps (optimizer included) of the two smallest models, the better of two batches, in
        float32 and in bf16.
methods a training step of every method over vanilla's, at the options' defaults, and adaptive's over PonderLM-2's at
        equal latent steps (one of every token): the reason for masking in parallel.
where   which operators the time of a training step goes to, for vanilla and adaptive: what limits the tax.

Ratios are taken within each repeat, where both sides saw the same machine; printed: median, lowest, highest.
The default is d 256, 6 layers, 4 sequences of 256 tokens (128 when decoding), vocabulary 4,096, float32; the router has
random weights, so halting is ragged. --size takes a step of the ladder, with the authors' vocabulary from 125m on.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from figures import Figure, interleaved, show
from setting import Setting, add_arguments, setting_from

from haltscale.model import METHODS, SIZES, AdaptiveOptions, LanguageModel, Method
from haltscale.model.generation import generate
from haltscale.platform.memory import keep_freed_memory

DECODED = 128
PROMPT = 1000
CLOCK = [time.perf_counter]  # what `timed` reads


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work gave."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = CLOCK[0]()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCK[0]() - start, result


def training_step(
    model: LanguageModel, tokens: torch.Tensor, optimize: Callable[[], Any] = lambda: None
) -> Callable[[], float]:
    """Realised GFLOP/s of one forward and backward, and of what follows them."""

    def step() -> float:
        def work() -> Any:
            out = model(tokens, tokens)
            out.loss.backward()
            optimize()
            model.zero_grad()
            return out.trace

        seconds, trace = timed(work)
        return model.flops(trace.counts).training.realised / seconds / 1e9

    return step


def tax(setting: Setting) -> None:
    """Adaptivity tax."""
    tokens = setting.tokens()
    vanilla = setting.vanilla()
    for name, adaptive in (
        ("ragged", setting.ragged()),
        ("all steps", setting.model(Method.ADAPTIVE, AdaptiveOptions(tau=0.0, router_bias=8.0))),
    ):
        trace = adaptive(tokens, tokens).trace
        a, v, ratios = interleaved(training_step(adaptive, tokens), training_step(vanilla, tokens), setting.repeats)
        show(
            Figure(
                name=f"tax, {name}",
                values=ratios,
                at_least=0.80 if setting.device.type == "cuda" else 0.90,
                detail=f"adaptive {a:.1f} / vanilla {v:.1f} realised GFLOP/s at {1 + trace.mean_steps:.2f} passes",
            )
        )


def llama(setting: Setting, show: Callable[[Figure], None] = show) -> None:
    """Vanilla against transformers' Llama; show: what is done with the figure."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = setting.shape
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=shape.d,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=setting.length,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens, shift_labels=tokens, use_cache=False).loss

    over_peer(setting, "transformers' Llama", model, loss, at_least=1.2 if setting.compiled else 1.1, show=show)


def litgpt(setting: Setting) -> None:
    """Vanilla against litgpt's GPT in its Llama configuration, with litgpt's own loss."""
    try:
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.utils import chunked_cross_entropy
    except ImportError as error:
        print(f"litgpt: not measured, {error} (benchmarks/README.md says how to install it)")
        return
    shape = setting.shape
    config = Config(
        block_size=setting.length,
        vocab_size=setting.vocabulary,
        padded_vocab_size=setting.vocabulary,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_query_groups=shape.kv_heads,
        n_embd=shape.d,
        head_size=shape.d // shape.heads,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape.ffn,
    )
    model: Any = GPT(config)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(model(tokens), tokens, chunk_size=0)

    over_peer(setting, "litgpt's GPT", model, loss, at_least=1.1)


def over_peer(
    setting: Setting,
    name: str,
    peer: torch.nn.Module,
    loss: Callable[[torch.Tensor], torch.Tensor],
    *,
    at_least: float,
    show: Callable[[Figure], None] = show,
) -> None:
    """Tokens per second of vanilla over another implementation of the same model.

    Args:
        setting: what is measured.
        name: what the other is called.
        peer: the other, on the CPU in float32.
        loss: the other's mean loss of tokens (sequences, length), which are their own targets.
        at_least: the aim.
        show: what is done with the figure.
    """
    vanilla, tokens = setting.vanilla(), setting.tokens()
    peer.to(setting.device, setting.dtype)
    ours, theirs = (sum(weight.numel() for weight in model.parameters()) for model in (vanilla, peer))
    if ours != theirs:
        raise SystemExit(f"{name} has {theirs:,} parameters and vanilla {ours:,}: not the same model")

    def rate(work: Callable[[], Any]) -> float:
        return tokens.numel() / timed(work)[0]

    def our_step() -> None:
        vanilla(tokens, tokens).loss.backward()
        vanilla.zero_grad()

    def their_step() -> None:
        loss(tokens).backward()
        peer.zero_grad()

    a, b, ratios = interleaved(partial(rate, our_step), partial(rate, their_step), setting.repeats)
    show(
        Figure(
            name=f"vanilla over {name}",
            values=ratios,
            at_least=at_least,
            detail=f"{a:.0f} / {b:.0f} tokens/s, forward and backward",
        )
    )


def decode(setting: Setting) -> None:
    """Decoding time per pass: over the plain model's, and where sequences halt at different depths over those of a
    model whose sequences all take all steps."""
    vanilla, adaptive = setting.vanilla().eval(), setting.ragged().eval()
    uneven = setting.model(Method.ADAPTIVE, AdaptiveOptions(tau=0.3, router_bias=0.0)).eval()  # 2 to 3 passes a token
    deep = setting.model(Method.ADAPTIVE, AdaptiveOptions(tau=0.0, router_bias=8.0)).eval()
    for batch, model, peer, name, at_most in (
        (1, adaptive, vanilla, "vanilla's", 1.15),
        (4, adaptive, vanilla, "vanilla's", 1.15),
        (8, uneven, vanilla, "vanilla's", None),
        (8, uneven, deep, "that of a batch at one depth", 1.15),
    ):
        tokens = setting.tokens(batch)
        mine, others = (partial(_decoding, each, tokens) for each in (model, peer))
        a, b, ratios = interleaved(mine, others, setting.repeats)
        show(
            Figure(
                name=f"decode, batch {batch}, time per pass over {name}",
                values=ratios,
                at_most=at_most,
                detail=f"adaptive {a:.3f} / {b:.3f} ms for each sequence's pass",
            )
        )


def _decoding(model: LanguageModel, tokens: torch.Tensor) -> float:
    """Milliseconds for each pass of each sequence, while all sequences decode."""
    state = model.start_decoding(len(tokens))
    ended = False

    def work() -> None:
        nonlocal ended
        read = [0] * len(tokens)
        due = dict(enumerate(tokens[:, 0].tolist()))
        while not ended:
            done, _, _ = model.decode_pass(due, state)
            for b in done:
                read[b] += 1
            ended = max(read) == DECODED
            due = {b: int(tokens[b, read[b]]) for b in done} if not ended else {}

    seconds = timed(work)[0]
    return seconds / sum(state.counts.rows) * 1e3


def prompt(setting: Setting) -> None:
    """Reading a prompt over one forward pass of it."""
    long = replace(setting, length=PROMPT + 1)
    tokens = long.tokens(1)
    text = tokens[0, :PROMPT].tolist()
    for method, entry in METHODS.items():
        if entry.model.shape_problems(setting.shape):
            continue
        model = (long.ragged() if method is Method.ADAPTIVE else long.model(method, entry.options())).eval()

        def read(model: LanguageModel = model) -> float:
            return timed(lambda: next(generate(model, [text], new_tokens=1)))[0]

        def forward(model: LanguageModel = model) -> float:
            with torch.no_grad():
                return timed(lambda: model(tokens[:, :PROMPT]))[0]

        a, b, ratios = interleaved(read, forward, setting.repeats)
        show(
            Figure(
                name=f"prompt of {PROMPT:,} tokens read over one forward pass, {method}",
                values=ratios,
                at_most=1.3,
                detail=f"{a * 1e3:.0f} / {b * 1e3:.0f} ms",
            )
        )


def matrix_rate(setting: Setting) -> tuple[int, Callable[[], float]]:
    """GFLOP/s of square matrices in the setting's type, the best of three, and their size."""
    size = 8192 if setting.device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=setting.device).to(setting.dtype) for _ in range(2))
    return size, lambda: 2 * size**3 / min(timed(lambda: a @ b)[0] for _ in range(3)) / 1e9


def rate(setting: Setting) -> None:
    """Vanilla against the machine's matrix rate."""
    tokens, (size, product) = setting.tokens(), matrix_rate(setting)
    v, m, ratios = interleaved(training_step(setting.vanilla(), tokens), product, setting.repeats)
    show(
        Figure(
            name="vanilla over the machine's matrix rate",
            values=ratios,
            at_least=0.45 if setting.device.type == "cuda" else None,
            detail=f"{v:.1f} realised / matrix product of {size} {m:.1f} GFLOP/s",
        )
    )


def _best(steps: list[Callable[[], float]]) -> float:
    return max(step() for step in steps)


def small(setting: Setting) -> None:
    """Training steps of the smallest models against the machine's matrix rate."""
    for name in ("0.6m", "1.8m"):
        for dtype, called in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            here = replace(setting, shape=SIZES[name], dtype=dtype)
            model = here.vanilla()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

            steps = [training_step(model, here.tokens(sequences), optimizer.step) for sequences in (8, 32)]
            size, product = matrix_rate(here)
            v, m, ratios = interleaved(partial(_best, steps), product, setting.repeats)
            show(
                Figure(
                    name=f"training step over the machine's matrix rate, {name}, {called}",
                    values=ratios,
                    detail=f"{v:.1f} realised / matrix product of {size} {m:.1f} GFLOP/s",
                )
            )


def methods(setting: Setting) -> None:
    """Every method's training step over vanilla's, per token, and adaptive's over PonderLM-2's at equal steps."""
    tokens = setting.tokens()
    vanilla = setting.vanilla()

    def seconds(model: LanguageModel) -> Callable[[], float]:
        def step() -> float:
            def work() -> None:
                model(tokens, tokens).loss.backward()
                model.zero_grad()

            return timed(work)[0]

        return step

    for method, entry in METHODS.items():
        if method is Method.VANILLA or entry.model.shape_problems(setting.shape):
            continue
        model = setting.model(method, entry.options())
        passes = model(tokens, tokens).trace.counts.mean_passes
        a, b, ratios = interleaved(seconds(model), seconds(vanilla), setting.repeats)
        show(
            Figure(
                name=f"training step, {method} over vanilla",
                values=ratios,
                detail=f"{a * 1e3:.0f} / {b * 1e3:.0f} ms at {passes:.2f} passes",
            )
        )
    ponder2 = setting.model(Method.PONDER2, METHODS[Method.PONDER2].options())
    adaptive = setting.model(Method.ADAPTIVE, AdaptiveOptions(l_max=1, tau=0.0))
    a, b, ratios = interleaved(seconds(adaptive), seconds(ponder2), setting.repeats)
    show(
        Figure(
            name="training step, adaptive over ponder2 at equal latent steps",
            values=ratios,
            detail=f"{a * 1e3:.0f} / {b * 1e3:.0f} ms, one latent step of every token",
        )
    )


def where(setting: Setting) -> None:
    """Shares of a training step's time by kind of operator."""
    from torch.profiler import ProfilerActivity, profile

    tokens = setting.tokens()
    kinds = {
        "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::mv"),
        "attention": ("aten::_scaled_dot_product",),
        "copies and gathers": ("aten::copy_", "aten::index", "aten::cat", "aten::gather", "aten::clone"),
    }
    cuda = setting.device.type == "cuda"
    for name, model in (("vanilla", setting.vanilla()), ("adaptive, ragged", setting.ragged())):
        step = training_step(model, tokens)
        step()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
            for _ in range(setting.repeats):
                step()
        shares = dict.fromkeys([*kinds, "the rest"], 0.0)
        for event in profiled.key_averages():
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            kind = next((k for k, starts in kinds.items() if event.key.startswith(starts)), "the rest")
            shares[kind] += spent
        total = sum(shares.values())
        print(f"where, {name}: " + ", ".join(f"{kind} {100 * spent / total:.0f} %" for kind, spent in shares.items()))


def main() -> None:
    """Run the benchmarks that were named, or all."""
    known: dict[str, Callable[[Setting], None]] = {
        "tax": tax,
        "llama": llama,
        "litgpt": litgpt,
        "decode": decode,
        "prompt": prompt,
        "rate": rate,
        "small": small,
        "methods": methods,
        "where": where,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"{', '.join(known)}; all if none is named")
    add_arguments(parser, sequences=4, repeats=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds on one thread, for a machine that is busy")
    parser.add_argument("--compile", action="store_true", help="compile our blocks with torch.compile")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if arguments.length < DECODED:
        parser.error(f"--length {arguments.length}: at least {DECODED}")
    if arguments.cpu_time:
        CLOCK[0], arguments.threads = time.process_time, 1
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as training does
    torch.manual_seed(0)
    setting = setting_from(arguments, threads=arguments.threads)
    for name in arguments.names or known:
        known[name](setting)


if __name__ == "__main__":
    main()

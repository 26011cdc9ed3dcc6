"""What a GPU makes of the models: one table, with the card's name on it.

    python benchmarks/gpu.py                     the core, in minutes: rate, llama, tax, ponder2, memory
    python benchmarks/gpu.py loop                the main comparison's methods for 200 steps each, without Ray
    python benchmarks/gpu.py --device cpu --size 0.6m --length 64 --repeats 1 --no-compile    all of it, as a rehearsal

rate     vanilla's realised FLOP/s, forward and backward, compiled, over the card's matrix rate, measured on square
         matrices in the same type. Aim: at least 0.45.
llama    tokens per second of vanilla, compiled, over transformers' Llama as it comes. Aim: at least 1.2.
tax      realised FLOP/s of adaptive, halting at every depth and at none, over vanilla's, by either way of telling
         attention who sees whom (`AttentionKernel`): the faster is the one to take. Aim: at least 0.80.
ponder2  a training step of adaptive over PonderLM-2's at equal latent steps. Aim: at most 0.5.
memory   the planner's bound of adaptive's activations and logits at full depth over the measured peak: at least 1.
loop     tokens per second of the training loop with DeepSpeed, ZeRO 1, and the loss before and after.

The setting is the authors' 410m at 2,048 tokens in bfloat16; the loop's is 125m. Compiling is timed apart: it is in no
rate. Ratios are taken within each repeat, as in model_speed.py.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from figures import Figure, interleaved, machine, show
from model_speed import llama as llama_over
from model_speed import timed, training_step
from run import verdict
from setting import Setting, add_arguments, setting_from

from haltscale.model import METHODS, SIZES, AdaptiveOptions, LanguageModel, Method, VanillaOptions, build_model
from haltscale.model.backbone import AttentionKernel
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.sweeps.memory_plan import memory as planned_memory
from haltscale.platform.training.metrics import compile_seconds

TABLE = Path(__file__).parent / "GPU.md"
FULL_DEPTH = AdaptiveOptions(tau=0.0, router_bias=8.0)
SHOWN: list[Figure] = []


def keep(figure: Figure) -> None:
    """Print a figure, and keep it for the table."""
    show(figure)
    SHOWN.append(figure)


def matrix_rate(setting: Setting) -> Callable[[], float]:
    """GFLOP/s of the best of three products of square matrices."""
    size = 8192 if setting.device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=setting.device).to(setting.dtype) for _ in range(2))
    return lambda: 2 * size**3 / min(timed(lambda: a @ b)[0] for _ in range(3)) / 1e9


def rate(setting: Setting) -> None:
    """Vanilla against the card's matrix rate."""
    before = compile_seconds()
    step = training_step(setting.vanilla(), setting.tokens())
    step()
    compiling = compile_seconds() - before
    v, m, ratios = interleaved(step, matrix_rate(setting), setting.repeats)
    aim = 0.45 if setting.device.type == "cuda" else None
    detail = f"{v / 1e3:.1f} of {m / 1e3:.1f} TFLOP/s; compiled in {compiling:.0f} s"
    keep(Figure(name="vanilla over the card's matrix rate", values=ratios, at_least=aim, detail=detail))


def llama(setting: Setting) -> None:
    """Vanilla against transformers' Llama."""
    figures: list[Figure] = []
    llama_over(setting, show=figures.append)
    keep(*figures)


def tax(setting: Setting) -> None:
    """Adaptive against vanilla, by either attention kernel."""
    tokens = setting.tokens()
    vanilla = training_step(setting.vanilla(), tokens)
    kernels = [AttentionKernel.DENSE, AttentionKernel.INDICES]
    for name, options in (("ragged", AdaptiveOptions(tau=0.3)), ("all steps", FULL_DEPTH)):
        for kernel in kernels:
            model = setting.model(Method.ADAPTIVE, options)
            model.attention_kernel = kernel
            before = compile_seconds()
            trace = model(tokens, tokens).trace
            step = training_step(model, tokens)
            step()
            compiling = compile_seconds() - before
            a, v, ratios = interleaved(step, vanilla, setting.repeats)
            detail = f"{a / 1e3:.1f} / {v / 1e3:.1f} realised TFLOP/s at {1 + trace.mean_steps:.2f} passes"
            detail += f"; compiled in {compiling:.0f} s"
            name_of = f"adaptive over vanilla, {name}, {kernel}"
            keep(Figure(name=name_of, values=ratios, at_least=0.80, detail=detail))


def ponder2(setting: Setting) -> None:
    """A step of adaptive against one of PonderLM-2."""
    tokens = setting.tokens()

    def seconds(model: LanguageModel) -> Callable[[], float]:
        def work() -> None:
            model(tokens, tokens).loss.backward()
            model.zero_grad()

        return lambda: timed(work)[0]

    theirs = setting.model(Method.PONDER2, METHODS[Method.PONDER2].options())
    ours = setting.model(Method.ADAPTIVE, replace(FULL_DEPTH, l_max=1))
    a, b, ratios = interleaved(seconds(ours), seconds(theirs), setting.repeats)
    detail = f"{a * 1e3:.0f} / {b * 1e3:.0f} ms, one latent step of every token"
    keep(Figure(name="step of adaptive over PonderLM-2's", values=ratios, at_most=0.5, detail=detail))


def memory(setting: Setting) -> None:
    """The planner's bound over the measured peak."""
    if setting.device.type != "cuda":
        print("memory: measured on CPUs by tests/platform/sweeps/test_memory_plan.py")
        return
    model, tokens = setting.model(Method.ADAPTIVE, FULL_DEPTH), setting.tokens()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    model(tokens, tokens).loss.backward()
    measured = torch.cuda.max_memory_allocated() - weights
    run = run_of(setting, Method.ADAPTIVE, FULL_DEPTH, steps=1)
    execution = ExecutionConfig(micro_batch_sequences=setting.sequences, gpus_per_worker=1)
    found = planned_memory(run, execution, setting.vocabulary)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    bound = found.activations + found.moment + gradients
    detail = f"{bound / 2**30:.1f} / {measured / 2**30:.1f} GiB at full depth"
    keep(Figure(name="planned over measured memory of a step", values=[bound / measured], at_least=1.0, detail=detail))


def run_of(setting: Setting, method: Method, options: Any, *, steps: int) -> RunConfig:
    """A run in the setting, one micro-batch for each step."""
    batch = setting.sequences * setting.length
    size = next((name for name, shape in SIZES.items() if shape == setting.shape), "")
    precision = Precision.BF16 if setting.dtype is torch.bfloat16 else Precision.FP32
    run = RunConfig(method=method, options=options, size=size, context=setting.length, batch_tokens=batch)
    return replace(run, tokens=steps * batch, precision=precision)


def loop(setting: Setting, *, steps: int) -> None:
    """The training loop, method by method."""
    from haltscale.platform.training.engine import build_engine
    from haltscale.platform.training.loop import Hooks, train
    from haltscale.platform.training.progress import Progress

    for method, options in (
        (Method.VANILLA, VanillaOptions()),
        (Method.ADAPTIVE, AdaptiveOptions()),
        (Method.PONDER2, METHODS[Method.PONDER2].options()),
    ):
        run = run_of(setting, method, options, steps=steps)
        execution = ExecutionConfig(
            micro_batch_sequences=setting.sequences,
            gpus_per_worker=int(setting.device.type == "cuda"),
            log_every_seconds=0.0,
            compile=setting.compiled,
            checkpoints=1,
            evaluations=1,
        )
        engine = build_engine(build_model(run.model_config(setting.vocabulary), seed=0), run, execution)
        rows: list[dict[str, Any]] = []
        hooks = Hooks(log=lambda row, _, rows=rows: rows.append(row), checkpoint=nothing, evaluate=nothing)
        began = time.perf_counter()
        train(engine, repeated(setting, steps), run, Progress(), hooks, execution=execution)
        seconds = time.perf_counter() - began
        rates = [row["tokens_per_second"] for row in rows[len(rows) // 4 :]]
        detail = f"{steps} steps in {seconds:.0f} s, loss {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}"
        keep(Figure(name=f"training loop, {method}", values=rates, unit="tokens/s", detail=detail))


def nothing(progress: Any) -> None:
    """A hook that does nothing."""


def repeated(setting: Setting, steps: int) -> Iterator[Any]:
    """Batches in which there is something to learn: 16 of them, again and again."""
    stream = np.random.default_rng(0)
    shape = (16, setting.sequences, setting.length + 1)
    tokens = stream.zipf(1.3, shape).clip(max=setting.vocabulary) - 1
    for step in range(steps):
        yield SimpleNamespace(step=step, seq_ids=np.arange(setting.sequences), tokens=tokens[step % 16])


def table(setting: Setting) -> str:
    """What was measured, as a page."""
    shape = setting.shape
    lines = [
        "# On a GPU",
        "",
        f"Written by `python benchmarks/gpu.py` on {datetime.datetime.now(datetime.UTC).date().isoformat()}, on"
        f" {machine(torch.get_num_threads(), setting.device.type)}: d {shape.d}, {shape.layers} layers,"
        f" {setting.sequences} x {setting.length} tokens, vocabulary {setting.vocabulary}, {setting.dtype}"
        f"{', compiled' if setting.compiled else ''}.",
        "",
        "| Figure | Median | Aim | |",
        "|---|---|---|---|",
    ]
    for figure in SHOWN:
        spread = f"{min(figure.values):.3g} to {max(figure.values):.3g}, {len(figure.values)}"
        median = f"{figure.median:.3g}{' ' + figure.unit if figure.unit else ''} [{spread}]"
        lines.append(f"| {figure.name} | {median} | {verdict(figure)} | {figure.detail} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what was named, or the core; print the table, and on a GPU write it."""
    core: dict[str, Callable[[Setting], None]] = {
        "rate": rate,
        "llama": llama,
        "tax": tax,
        "ponder2": ponder2,
        "memory": memory,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"{', '.join([*core, 'loop'])}; all but loop if none is named")
    add_arguments(parser, sequences=8, repeats=5)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave our blocks uncompiled")
    parser.add_argument("--steps", type=int, default=200, help="of the training loop")
    parser.add_argument("--out", type=Path, help=f"where the table goes; on a GPU {TABLE.name} beside this file")
    parser.set_defaults(device="cuda", length=2048)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in (*core, "loop")]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join([*core, 'loop'])}")
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit(
            "no CUDA device here: nothing was measured (--device cpu rehearses it, its figures say nothing of GPUs)"
        )
    if on_gpu:
        arguments.dtype = "bf16"
    torch.manual_seed(0)
    SHOWN.clear()
    names = arguments.names or list(core)
    for size, chosen in (("410m", [n for n in names if n in core]), ("125m", [n for n in names if n == "loop"])):
        if not chosen:
            continue
        own = argparse.Namespace(**vars(arguments) | {"size": arguments.size or size})
        setting = setting_from(own, threads=torch.get_num_threads())
        for name in chosen:
            if name == "loop":
                loop(setting, steps=arguments.steps)
            else:
                core[name](setting)
    text = table(setting)
    print(text)
    if out := arguments.out or (TABLE if on_gpu else None):
        out.write_text(text)


if __name__ == "__main__":
    main()

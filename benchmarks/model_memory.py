"""Peak memory of a training step: adaptive with activation checkpointing over vanilla without. Aim: at most 1.6.

    python benchmarks/model_memory.py [--repeats 3] [--sequences 8]
    python benchmarks/model_memory.py --device cuda --size 410m --length 2048 --dtype bf16

Each arm runs in a process of its own: forward and backward at d 256, 6 layers, vocabulary 4,096, on 8 sequences of 256
tokens, every latent step of l_max 3 taken. Its figure is the peak over one step, above what the process held when the
model was built and the libraries were warm from a small model's step: gradients, activations and logits. Once more with
the weights on top, as a machine must hold it; optimizer state is left out. On a CPU it is resident memory; on a GPU it
is what PyTorch has allocated.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from figures import Figure, show
from setting import Setting, add_arguments, setting_from

from haltscale.model import SIZES, AdaptiveOptions, Method, MethodOptions, VanillaOptions

ALL_STEPS = AdaptiveOptions(l_max=3, tau=0.0)
ARMS: dict[str, tuple[Method, MethodOptions, bool]] = {
    "vanilla": (Method.VANILLA, VanillaOptions(), False),
    "vanilla, checkpointing": (Method.VANILLA, VanillaOptions(), True),
    "adaptive, all steps": (Method.ADAPTIVE, ALL_STEPS, False),
    "adaptive, all steps, checkpointing": (Method.ADAPTIVE, ALL_STEPS, True),
}

PROMPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc then hands a freed tensor back at once: resident memory follows what is alive, not the heap's holes."""


def now(device: torch.device) -> float:
    """Memory of this process, MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak(device: torch.device) -> float:
    """Its peak, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(arm: str, setting: Setting) -> dict[str, float]:
    """Peak of one step over what was there before, MiB; the weights, MiB; passes per token."""
    torch.set_num_threads(1)
    method, options, checkpointing = ARMS[arm]
    small = replace(setting, shape=SIZES["0.6m"], vocabulary=256, sequences=1)
    few = small.tokens()[:, :8]
    small.model(method, options).activation_checkpointing_(checkpointing)(few, few).loss.backward()
    model = setting.model(method, options).activation_checkpointing_(checkpointing)
    tokens = setting.tokens()
    before = now(setting.device)
    out = model(tokens, tokens)
    out.loss.backward()
    step = peak(setting.device) - before
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return {"step": step, "weights": weights, "passes": out.trace.counts.mean_passes}


def main() -> None:
    """All arms, each in fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=list(ARMS), help="measure one arm in this process and print JSON")
    add_arguments(parser, sequences=8, repeats=3)
    arguments = parser.parse_args()
    setting = setting_from(arguments, threads=1)
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, setting)))
        return
    plain = 0.0
    for arm in ARMS:
        runs = [
            json.loads(
                subprocess.run(
                    [sys.executable, *sys.argv, "--arm", arm], check=True, capture_output=True, env=os.environ | PROMPT
                ).stdout.splitlines()[-1]
            )
            for _ in range(arguments.repeats)
        ]
        step, weights = [run["step"] for run in runs], runs[0]["weights"]
        middle = statistics.median(step)
        plain = plain or middle
        show(
            Figure(
                name=f"memory of a step over vanilla's: {arm}",
                values=[one / plain for one in step],
                at_most=1.6 if arm == list(ARMS)[-1] else None,
                detail=f"{middle:.0f} MiB, with weights {middle + weights:.0f} MiB; {runs[0]['passes']:.2f} passes",
            )
        )


if __name__ == "__main__":
    main()

"""Peak memory of a training step: adaptive with activation checkpointing against vanilla without. Aim: at most 1.6 x.

    python benchmarks/model_memory.py [--repeats 3]

Each arm runs in a process of its own: forward and backward on 8 sequences of 256 tokens at d 256, 6 layers, vocabulary
4,096. Its figure is the growth of the process's peak resident memory over the state before the first real step (model
built, kernels warm from a step on 8 tokens), so gradients, activations and logits count and libraries do not.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys

import torch

from haltscale.model import AdaptiveOptions, Method, MethodOptions, ModelConfig, Shape, VanillaOptions, build_model

ARMS: dict[str, tuple[Method, MethodOptions, bool]] = {
    "vanilla": (Method.VANILLA, VanillaOptions(), False),
    "vanilla, checkpointing": (Method.VANILLA, VanillaOptions(), True),
    "adaptive, all steps": (Method.ADAPTIVE, AdaptiveOptions(l_max=3, tau=0.0), False),
    "adaptive, all steps, checkpointing": (Method.ADAPTIVE, AdaptiveOptions(l_max=3, tau=0.0), True),
}

PROMPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc then hands a freed tensor back at once: resident memory follows what is alive, not the heap's holes."""


def peak() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(arm: str) -> dict[str, float]:
    """Growth of the peak over one step, MiB, and passes per token."""
    torch.set_num_threads(1)
    method, options, checkpointing = ARMS[arm]
    shape = Shape(layers=6, d=256, heads=4, kv_heads=4, ffn=688)
    model = build_model(
        ModelConfig(method=method, shape=shape, vocab_size=4096, context=256, options=options), seed=0
    ).activation_checkpointing_(checkpointing)
    small, tokens = torch.randint(4096, (1, 8)), torch.randint(4096, (8, 256))
    model(small, small).loss.backward()
    before = peak()
    out = model(tokens, tokens)
    out.loss.backward()
    return {"mib": peak() - before, "passes": out.trace.counts.mean_passes}


def main() -> None:
    """All arms, each in fresh processes; medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", choices=list(ARMS), help="measure one arm in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm)))
        return
    found = {}
    for arm in ARMS:
        runs = [
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--arm", arm], check=True, capture_output=True, env=os.environ | PROMPT
                ).stdout
            )
            for _ in range(arguments.repeats)
        ]
        found[arm] = statistics.median(run["mib"] for run in runs)
        ratio = found[arm] / found["vanilla"]
        print(f"{arm}: {found[arm]:.0f} MiB, {ratio:.2f} x vanilla, {runs[0]['passes']:.2f} passes")


if __name__ == "__main__":
    main()

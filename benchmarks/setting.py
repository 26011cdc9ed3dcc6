"""What the model benchmarks measure: a shape, a batch, a device."""

import argparse
from dataclasses import dataclass

import torch
from figures import machine

from haltscale.model import (
    SIZES,
    AdaptiveOptions,
    LanguageModel,
    Method,
    MethodOptions,
    ModelConfig,
    Shape,
    VanillaOptions,
    build_model,
)

BENCH = Shape(layers=6, d=256, heads=4, kv_heads=4, ffn=688)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What is measured, and how often."""

    shape: Shape
    vocabulary: int
    length: int
    sequences: int
    dtype: torch.dtype
    device: torch.device
    compiled: bool
    repeats: int

    def tokens(self, sequences: int | None = None) -> torch.Tensor:
        """A batch of random tokens."""
        return torch.randint(self.vocabulary, (sequences or self.sequences, self.length), device=self.device)

    def model(self, method: Method, options: MethodOptions) -> LanguageModel:
        """A model; a router gets random weights."""
        config = ModelConfig(
            method=method, shape=self.shape, vocab_size=self.vocabulary, context=self.length, options=options
        )
        model = build_model(config, seed=0)
        stream = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("score.weight"):
                    weight.copy_(torch.randn(weight.shape, generator=stream) * 1.5 / self.shape.d**0.5)
        model = model.to(self.device, self.dtype)
        return model.compile_blocks_() if self.compiled else model

    def vanilla(self) -> LanguageModel:
        """The plain model."""
        return self.model(Method.VANILLA, VanillaOptions())

    def ragged(self) -> LanguageModel:
        """Adaptive with halting at every depth."""
        return self.model(Method.ADAPTIVE, AdaptiveOptions(tau=0.3))


def add_arguments(parser: argparse.ArgumentParser, *, sequences: int, repeats: int) -> None:
    """The arguments that describe a setting."""
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=list(SIZES), help="a step of the ladder instead of d 256, 6 layers")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--sequences", type=int, default=sequences)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")


def setting_from(arguments: argparse.Namespace, *, threads: int) -> Setting:
    """The setting that the arguments describe; prints it and the machine."""
    shape = SIZES[arguments.size] if arguments.size else BENCH
    setting = Setting(
        shape=shape,
        vocabulary=50_304 if shape.d >= 768 else 4096,
        length=arguments.length,
        sequences=arguments.sequences,
        dtype=DTYPES[arguments.dtype],
        device=torch.device(arguments.device),
        compiled=getattr(arguments, "compile", False),
        repeats=arguments.repeats,
    )
    print(f"machine: {machine(threads, arguments.device)}")
    print(
        f"setting: d {shape.d}, {shape.layers} layers, {setting.sequences} x {setting.length} tokens, "
        f"vocabulary {setting.vocabulary}, {arguments.dtype}{', compiled' if setting.compiled else ''}"
        f"{', CPU seconds' if getattr(arguments, 'cpu_time', False) else ''}"
    )
    return setting

"""Number formats, and which of them a machine is fast in."""

from __future__ import annotations

from enum import StrEnum

import torch


class Precision(StrEnum):
    """Number format of weights and activations; optimizer state and master weights are always float32."""

    AUTO = "auto"
    """bf16 where the machine multiplies matrices faster in it (GPUs; CPUs with AVX512-BF16 or AMX), else fp32."""
    BF16 = "bf16"
    FP16 = "fp16"
    """With dynamic loss scaling: a step whose gradient overflows is counted, and leaves the weights as they are."""
    FP32 = "fp32"


def fast_precision(*, on_gpu: bool = False) -> Precision:
    """What ``precision=auto`` stands for: bf16 where matrix products are faster in it, else fp32.

    Args:
        on_gpu: the run trains on GPUs. Where this machine has none to ask, bf16: all since 2020 have it.
    """
    if on_gpu or torch.cuda.is_available():
        without = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
        return Precision.FP32 if without else Precision.BF16
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return Precision.BF16 if fast else Precision.FP32

"""Number formats that this machine is fast in."""

from __future__ import annotations

import torch

from haltscale.platform.config import Precision


def resolve_precision(precision: Precision) -> Precision:
    """bf16 where the machine's matrix products are faster in it, else fp32; anything but AUTO is taken as it is."""
    if precision is not Precision.AUTO:
        return precision
    if torch.cuda.is_available():
        return Precision.BF16 if torch.cuda.is_bf16_supported() else Precision.FP32
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return Precision.BF16 if fast else Precision.FP32

"""What a device could compute at most, for the model FLOPs utilisation (MFU, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

import torch

PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}
"""FLOP/s of dense matrix products in bf16 and fp16 by a part of the device's name, the more special ones first; from
NVIDIA's data sheets, where figures "with sparsity" are twice these."""


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of the device of this name; None where it is not known: other devices, CPUs, float32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((peak for part, peak in PEAKS.items() if part in name), None)

"""One measured figure: shown to whoever runs a benchmark, and kept for the table that `make bench` writes."""

import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

KEPT_IN = "HALTSCALE_FIGURES"
"""Environment variable: the file to which figures are appended, one JSON document a line."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured quantity, nearly always a ratio of two things measured side by side in one run."""

    name: str
    """What was measured; the same in every run, since figures are compared by it."""
    values: list[float]
    """One per repeat."""
    unit: str = ""
    """Empty for a ratio."""
    detail: str = ""
    """The two sides and the setting."""
    at_least: float | None = None
    """The aim, where more is better."""
    at_most: float | None = None
    """The aim, where less is better."""

    @property
    def median(self) -> float:
        """Of all repeats."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        spread = f"{min(self.values):.3g} to {max(self.values):.3g}, {len(self.values)} repeats"
        text = f"{self.name}: {self.median:.3g}{' ' + self.unit if self.unit else ''} [{spread}]"
        if self.at_least is not None:
            text += f", aim at least {self.at_least:g}"
        if self.at_most is not None:
            text += f", aim at most {self.at_most:g}"
        return f"{text}; {self.detail}" if self.detail else text


def show(figure: Figure) -> None:
    """Print a figure, and keep it where `make bench` asks for it."""
    print(figure, flush=True)
    if path := os.environ.get(KEPT_IN):
        with Path(path).open("a") as file:
            file.write(json.dumps(asdict(figure)) + "\n")


def interleaved(one: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[float, float, list[float]]:
    """Medians of both measures, and all ratios, one over the other; the first, cold repeat is dropped."""
    pairs = [(one(), other()) for _ in range(repeats + 1)][1:]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        [a / b for a, b in pairs],
    )


def machine(threads: int, device: str = "cpu") -> str:
    """What the figures were measured on, in general words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    capabilities: dict[str, Any] = torch.cpu.get_capabilities()
    extensions = [name for name in ("avx512", "avx512_bf16", "amx_bf16") if capabilities.get(name)]
    cpu = f"{names[0] if names else platform.machine()} ({', '.join(extensions) or 'no AVX512'})"
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return f"{threads} threads of {cpu}{gpu}, torch {torch.__version__}"

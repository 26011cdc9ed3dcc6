"""What a plan will cost on a device: hours at a stated utilisation, money at a stated price, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from haltscale.model.config import in_range
from haltscale.platform.config import ConfigError
from haltscale.platform.store import RunState
from haltscale.platform.training.mfu import PEAKS

MEMORY = {"H200 NVL": 141e9, "H200": 141e9, "H100 PCIe": 80e9, "H100 NVL": 94e9, "H100": 80e9, "A100": 40e9}
"""Bytes of memory of the devices whose peak is known, the least that is sold under that name."""
LEFT = 0.9
"""Share of a device's memory that tensors can have: the rest is PyTorch's, the driver's, and between tensors."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is stated about the devices that will train."""

    mfu: float
    """Realised FLOP/s over the device's peak in half precision, above 0, at most 1."""
    device: str = "H100"
    """Name of a device whose peak is known (``PEAKS``)."""
    price: float | None = None
    """Of one device for an hour, in whatever currency."""

    def __post_init__(self) -> None:
        problems = in_range("--mfu", self.mfu, 0.0, 1.0, above=True)
        if self.device not in PEAKS:
            problems.append(f"--device {self.device!r}: must be one of {', '.join(PEAKS)}")
        if self.price is not None:
            problems += in_range("--price", self.price, 0.0)
        if problems:
            raise ConfigError(problems)

    def hours(self, flops: float) -> float:
        """Device-hours of realised training FLOPs, whatever the number of devices."""
        return flops / (self.mfu * PEAKS[self.device]) / 3600


def priced(plan: pd.DataFrame, rates: Rates) -> pd.DataFrame:
    """A plan (:meth:`Study.plan`) with ``device_hours``, ``cost`` (where a price is stated) and ``fits``.

    Hours are those of the FLOPs that are expected, or where a router decides, of those with every latent step taken.
    They are the training's alone: evaluations, start-up and waiting come on top. ``fits``: whether each worker's memory
    is within that of a device.
    """
    flops = plan["flops_expected"].astype(float).fillna(plan["flops_bound"].astype(float))
    found = plan.assign(device_hours=flops.map(rates.hours))
    if rates.price is not None:
        found = found.assign(cost=found["device_hours"] * rates.price)
    room = LEFT * MEMORY[rates.device]
    fits = plan["memory_bytes"].map(lambda needed: "" if pd.isna(needed) else "yes" if needed <= room else "no")
    return found.assign(fits=fits)


def summary(plan: pd.DataFrame, rates: Rates) -> str:
    """What the runs of a priced plan that have no result yet will take, in a sentence or two."""
    to_come = plan[plan["state"] != RunState.FINISHED]
    text = f"{_number(to_come['device_hours'].sum())} device-hours at {rates.mfu:.0%} of an {rates.device}'s"
    text += f" {PEAKS[rates.device] / 1e12:.0f} TFLOP/s"
    if rates.price is not None:
        text += f", {_number(to_come['cost'].sum())} at {rates.price:g} an hour"
    if unknown := int(to_come["device_hours"].isna().sum()):
        text += f"; {unknown} runs that wait for others are not in it"
    if at_most := int((to_come["flops_expected"].isna() & to_come["flops_bound"].notna()).sum()):
        text += f"; of {at_most} runs whose router decides, every latent step is counted"
    if (too_large := to_come[to_come["fits"] == "no"]).shape[0]:
        text += (
            f"; {len(too_large)} runs do not fit into the {MEMORY[rates.device] / 1e9:.0f} GB of an {rates.device}:"
            " lower micro_batch_sequences, set activation_checkpointing, or raise zero_stage and workers"
        )
    return text


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

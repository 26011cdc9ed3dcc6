"""TensorBoard and Weights & Biases: copies of a run's metrics. The run store stays the truth; a sink can only add.

TensorBoard files lie in ``$HALTSCALE_HOME/tensorboard/<study>/<run>`` (``tensorboard --logdir`` shows all studies). W&B
takes its settings from its own environment variables (``WANDB_MODE=offline`` only writes files, for ``wandb sync``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from haltscale.platform.execution import Sink
from haltscale.platform.store import haltscale_home

Writer = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def open_sinks(
    sinks: Iterable[Sink], *, study: str, key: str, label: str, config: Mapping[str, Any], step: int
) -> Iterator[Writer]:
    """Gives what writes a row of metrics to every sink, until the block ends.

    Args:
        config: what W&B shows as the run's configuration.
        step: where the run begins; what an earlier attempt wrote after it no longer counts.
    """
    openers = {Sink.TENSORBOARD: _tensorboard, Sink.WANDB: _wandb}
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(openers[sink](study, key, label, config, step)) for sink in sinks]

        def write(row: Mapping[str, Any]) -> None:
            for each in writers:
                each(row)

        yield write


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if name not in ("step", "time")}


@contextlib.contextmanager
def _tensorboard(study: str, key: str, label: str, config: Mapping[str, Any], step: int) -> Iterator[Writer]:
    from tensorboardX import SummaryWriter

    folder = haltscale_home() / "tensorboard" / study / key
    # A suffix of its own, or an attempt that begins in the same second would overwrite the one before it.
    with SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10, filename_suffix=f".from-{step}") as writer:

        def write(row: Mapping[str, Any]) -> None:
            for name, value in _scalars(row).items():
                writer.add_scalar(name, value, row["step"], walltime=row.get("time"))

        yield write


@contextlib.contextmanager
def _wandb(study: str, key: str, label: str, config: Mapping[str, Any], step: int) -> Iterator[Writer]:
    import wandb

    folder = haltscale_home() / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=study, id=f"{study}-{key}", name=label, config=dict(config), dir=str(folder), resume="allow"
    )
    with run:
        yield lambda row: run.log(_scalars(row), step=row["step"])

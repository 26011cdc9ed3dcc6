"""Sinks get the rows that the store gets; a resumed run leaves no step twice."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from haltscale.platform.execution import Sink
from haltscale.platform.training.sinks import open_sinks

ROWS = [{"step": step, "loss": 5.0 - step, "steps_histogram": [1.0], "time": 1e9 + step} for step in range(1, 5)]


def write(sink: Sink, rows: list[dict[str, Any]], *, step: int = 0) -> None:
    config = {"lam": 0.3}
    with open_sinks([sink], study="study", key="run", label="a run", config=config, step=step) as write:
        for row in rows:
            write(row)


def test_tensorboard_has_every_scalar_and_drops_what_an_earlier_attempt_wrote(home: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    write(Sink.TENSORBOARD, ROWS[:3])
    write(Sink.TENSORBOARD, ROWS[2:], step=2)
    found: list[tuple[str, int, float]] = []
    starts = []
    for file in sorted((home / "tensorboard" / "study" / "run").iterdir()):
        for event in events(file, Event):
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            starts += [event.step] if event.session_log.status == 1 else []
    assert sorted({step for _, step, _ in found}) == [1, 2, 3, 4]
    assert {tag for tag, _, _ in found} == {"loss"}
    assert {step: loss for _, step, loss in found} == pytest.approx({n: 5.0 - n for n in range(1, 5)})
    assert 3 in starts, "the second attempt says from where on it counts"


def events(file: Path, kind: Any) -> list[Any]:
    """The records of a TFRecord file: length, its checksum, content, its checksum."""
    content, at, found = file.read_bytes(), 0, []
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        found.append(kind.FromString(content[at + 12 : at + 12 + length]))
        at += 16 + length
    return found


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is an extra")
def test_wandb_writes_its_files_offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(Sink.WANDB, ROWS)
    importlib.import_module("wandb").teardown()  # waits for the process that writes the file
    (log,) = (home / "wandb").rglob("*.wandb")
    assert log.stat().st_size > 0
    assert b"loss" in log.read_bytes()

"""The benchmark runner: keeps figures, compares them with the last table, and writes down what it measured."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
FAKE = """
import sys
from figures import Figure, show
show(Figure(name="one over other", values=[float(x) for x in sys.argv[1:]], at_least=0.9, detail="1 / 2 s"))
"""


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """benchmarks/run.py, with its table in a folder of the test and a command that takes no time."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("run")
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER), prepend=":")
    monkeypatch.setattr(module, "FOLDER", tmp_path / "benchmarks")
    monkeypatch.setattr(module, "KEPT", tmp_path / "benchmarks" / "results.json")
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(module, "COMMANDS", {"fake": [f"{script} 0.8 0.7 1.0"]})
    monkeypatch.setattr(sys, "argv", ["run.py"])
    yield module
    for name in ("run", "figures"):
        sys.modules.pop(name, None)


def test_a_table_with_aims_met_and_missed(runner: ModuleType) -> None:
    runner.main()
    text = (runner.FOLDER / "RESULTS.md").read_text()
    assert "| one over other | 0.8 [0.7 to 1, 3] | ≥ 0.9: missed by 0.1 |  | 1 / 2 s |" in text


def test_a_change_beyond_the_spread_is_marked_and_one_within_is_not(runner: ModuleType, tmp_path: Path) -> None:
    runner.main()
    runner.COMMANDS["fake"] = [f"{tmp_path / 'fake.py'} 0.9 0.95 0.99"]
    runner.main()
    assert "up" not in (runner.FOLDER / "RESULTS.md").read_text(), "0.95 lies within 0.7 to 1"
    runner.COMMANDS["fake"] = [f"{tmp_path / 'fake.py'} 0.5 0.5 0.6"]
    runner.main()
    assert "**down** from 0.95" in (runner.FOLDER / "RESULTS.md").read_text()


def test_every_command_names_a_script_that_is_there() -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        commands = importlib.import_module("run").COMMANDS
    finally:
        sys.path.remove(str(FOLDER))
    for group in commands.values():
        for command in group:
            assert (FOLDER.parent / command.split()[0]).is_file(), command


@pytest.fixture
def gpu_benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("gpu")
    for name in ("gpu", "run", "figures", "setting", "model_speed"):
        sys.modules.pop(name, None)


REHEARSAL = "--device cpu --size 0.6m --length 16 --sequences 2 --repeats 1 --no-compile --steps 2"


def test_the_gpu_benchmark_can_be_rehearsed_on_a_cpu(
    gpu_benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of its code but the measurement of a card's memory; its figures say nothing."""
    names = ["rate", "llama", "tax", "ponder2", "memory", "loop"]
    arguments = [*names, *REHEARSAL.split(), "--out", str(tmp_path / "table.md")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu_benchmark.main()
    text = (tmp_path / "table.md").read_text()
    for figure in (
        "vanilla over the card's matrix rate",
        "vanilla over transformers' Llama",
        *(
            f"adaptive over vanilla, {depth}, {way}"
            for depth in ("ragged", "all steps")
            for way in ("dense", "indices")
        ),
        "step of adaptive over PonderLM-2's",
        *(f"training loop, {method}" for method in ("vanilla", "adaptive", "ponder2")),
    ):
        assert f"| {figure} | " in text
    assert "2 x 16 tokens" in text


def test_without_a_card_nothing_is_measured(gpu_benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device here: nothing was measured"):
        gpu_benchmark.main()

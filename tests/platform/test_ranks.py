"""Two real processes that train together: they think differently long, score differently much, go and come back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from haltscale.model import build_model
from haltscale.model.language_model import IGNORE_INDEX

from looping import BATCH, LARGE, RUNS

MEMBER = str(Path(__file__).parents[1] / "member.py")
CASES = {"equal": [2, 2], "unequal": [3, 1], "zero": [2, 0]}
"""Latent steps of every token on rank 0 and on rank 1."""


def together(folder: Path, *, world: int = 2, **task: Any) -> list[dict[str, Any]]:
    """Run one task in ``world`` processes over gloo; gives each rank's answer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"world": world, **task}))
    members = [
        subprocess.Popen(
            [sys.executable, MEMBER, str(folder), str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(world)
    ]
    try:
        outputs = [member.communicate(timeout=120)[0].decode() for member in members]
    finally:
        for member in members:
            member.kill()
    assert [member.returncode for member in members] == [0] * world, "\n".join(outputs)
    return [json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Losses of every case at every stage; one pair of processes does them all, since importing takes longer."""
    folder = tmp_path_factory.mktemp("matrix")
    first, second = together(folder, do="matrix", cases=CASES)
    assert first["losses"] == second["losses"], "a row of metrics is about all ranks"
    return first


@pytest.mark.parametrize("case", CASES)
def test_any_depths_train_at_every_stage_to_the_same_losses(matrix, case):
    """No hang, and losses equal across ZeRO stages to 4 digits in float32."""
    plain = matrix["losses"][case]["0"]
    assert plain[-1] < plain[0]
    for stage in ("1", "2", "3"):
        assert matrix["losses"][case][stage] == pytest.approx(plain, rel=1e-4), stage


def test_the_cases_are_what_they_say(matrix):
    """Mean steps over both ranks, and how far the deeper one is above it."""
    for case, depths in CASES.items():
        for stage in "0123":
            assert matrix["mean_steps"][case][stage] == pytest.approx(sum(depths) / 2)
            assert matrix["straggling"][case][stage] == pytest.approx(max(depths) / (sum(depths) / 2))


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_the_gradient_is_that_of_one_process_however_the_scored_tokens_lie(zero_stage, tmp_path):
    """Rank 1 has rows that end early, and so has one micro-batch of rank 0: the mean is over all scored tokens."""
    run = RUNS["adaptive"]
    lengths = [16, 16, 3, 16, 16, 2, 9, 1]
    rows = np.random.default_rng(0).integers(0, LARGE, (BATCH, run.context + 1))
    for row, length in zip(rows, lengths, strict=True):
        row[length + 1 :] = IGNORE_INDEX
    (first, _) = together(tmp_path, do="padded", zero_stage=zero_stage, rows=rows.tolist())

    model = build_model(run.model_config(LARGE), seed=run.seed)
    tokens = torch.as_tensor(rows)
    loss = torch.zeros(())
    for row, length in zip(tokens, lengths, strict=True):  # one sequence at a time, weighed by hand
        output = model(row[None, :length], row[None, 1 : length + 1])
        loss = loss + output.loss * length / sum(lengths)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert first["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    if zero_stage:  # DeepSpeed tells no norm at stage 0
        assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    step = float(run.learning_rate)
    assert step > 0
    for name, parameter in model.named_parameters():  # Adam's first step has the sign of the gradient
        moved = torch.tensor(first["moved"][name])
        sure = parameter.grad.abs().flatten()[: len(moved)] > 1e-6 if parameter.grad is not None else None
        if sure is not None and sure.any():
            assert (moved.sign()[sure] == -parameter.grad.flatten()[: len(moved)][sure].sign()).all(), name


@pytest.mark.parametrize(("first", "then"), [((2, 1), (1, 1)), ((1, 2), (2, 3)), ((2, 3), (1, 0)), ((2, 0), (2, 2))])
def test_a_run_goes_on_with_another_number_of_ranks(first, then, tmp_path):
    """(ranks, stage) before and after: elastic at every stage, on the same global batches."""
    store = str(tmp_path / "runs")
    (world, stage), (other_world, other_stage) = first, then
    whole = together(tmp_path / "whole", world=world, do="train", store=store, zero_stage=stage, until=6)[0]
    for path in sorted((tmp_path / "runs").rglob("step-00000006/*")):
        path.unlink()
    rest = together(tmp_path / "rest", world=other_world, do="train", store=store, zero_stage=other_stage, until=6)[0]
    assert rest["from"] == 3
    assert rest["losses"] == pytest.approx(whole["losses"][3:], rel=1e-4)
    assert rest["digest"] == whole["digest"]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_ranks_resume_to_the_last_bit(zero_stage, tmp_path):
    store = str(tmp_path / "runs")
    whole = together(tmp_path / "whole", do="train", store=store, zero_stage=zero_stage, until=6)[0]
    for path in sorted((tmp_path / "runs").rglob("step-00000006/*")):
        path.unlink()
    rest = together(tmp_path / "rest", do="train", store=store, zero_stage=zero_stage, until=6)[0]
    assert rest["losses"] == whole["losses"][3:]


def test_notice_on_one_rank_makes_all_save(tmp_path):
    """A just-in-time checkpoint: after the step in which rank 1 was told that it may end, once."""
    store = str(tmp_path / "runs")
    answers = together(tmp_path / "run", do="train", store=store, zero_stage=1, until=6, notice=[1, 4])
    assert [answer["saved"] for answer in answers] == [[3, 4, 6]] * 2

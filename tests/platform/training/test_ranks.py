"""Two real processes that train together: they think differently long, score differently much, go and come back."""

from __future__ import annotations

from typing import Any

import gradients
import muon_steps
import numpy as np
import pytest
import torch

from haltscale.model import build_model
from haltscale.model.language_model import IGNORE_INDEX
from haltscale.platform.config import Precision

from looping import BATCH, LARGE, RUNS, answer_together, forget, train_and_save

CASES = {"equal": [2, 2], "unequal": [3, 1], "zero": [2, 0]}
"""Latent steps of every token on rank 0 and on rank 1."""
DIAGONAL = {
    f"gradients of {case}": {"case": case, "precision": precision, "pieces": pieces, "zero_stage": stage}
    for case, precision, pieces, stage in gradients.diagonal()
}
DIAGONAL |= {f"muon's {name}": {**task, "optimizer": "muon"} for name, task in list(DIAGONAL.items())[::3]}
MUON = {
    f"muon's steps of {case}": {"do": "muon", "case": case, "pieces": gradients.PIECES[1 + n % 2], "zero_stage": n % 4}
    for n, case in enumerate(gradients.CASES)
}
LENGTHS = [16, 16, 3, 16, 16, 2, 9, 1]
"""Scored tokens of each row: rank 1 has fewer, and so has one micro-batch of rank 0."""


def padded_rows() -> Any:
    rows = np.random.default_rng(0).integers(0, LARGE, (BATCH, RUNS["adaptive"].context + 1))
    for row, length in zip(rows, LENGTHS, strict=True):
        row[length + 1 :] = IGNORE_INDEX
    return rows


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks over gloo answer to all tasks, one after the other: starting the pair is what takes long."""
    folder = tmp_path_factory.mktemp("pair")
    one, two, three, noticed = (str(folder / name) for name in ("one", "two", "three", "noticed"))
    alone = train_and_save(one, zero_stage=2)
    forget(one, 6)
    tasks: dict[str, Any] = {
        f"{case} {stage}": {"do": "depths", "per_rank": per_rank, "zero_stage": stage}
        for case, per_rank in CASES.items()
        for stage in range(4)
    }
    rows = padded_rows().tolist()
    tasks |= {f"padded {stage}": {"do": "padded", "rows": rows, "zero_stage": stage} for stage in (0, 1, 3)}
    for name, store, stage in (("two", two, 1), ("three", three, 3)):
        tasks[f"{name} whole"] = {"do": "trained", "store": store, "zero_stage": stage}
        tasks[f"{name} forget"] = {"do": "forget", "store": store, "step": 6}
        tasks[f"{name} resumed"] = {"do": "trained", "store": store, "zero_stage": stage}
    for stage in (1, 3):
        kept = {"store": str(folder / f"muon {stage}"), "case": "muon"}
        tasks[f"muon {stage} whole"] = {"do": "trained", **kept, "zero_stage": stage}
        tasks[f"muon {stage} forget"] = {"do": "forget", "store": kept["store"], "step": 6}
        tasks[f"muon {stage} resumed"] = {"do": "trained", **kept, "zero_stage": stage}
    tasks["harm"] = {"do": "harm", "store": two, "step": 6, "shard": 1}
    tasks["after harm"] = {"do": "trained", "store": two, "zero_stage": 1}
    tasks["more ranks"] = {"do": "trained", "store": one, "zero_stage": 3}
    tasks["noticed"] = {"do": "trained", "store": noticed, "zero_stage": 1, "notice": [1, 4]}
    tasks |= {name: {"do": "gradients", **task} for name, task in DIAGONAL.items()} | MUON
    found = answer_together(folder, tasks)
    forget(three, 6)
    forget(str(folder / "muon 3"), 6)
    found[0]["muon 3 fewer ranks"] = train_and_save(str(folder / "muon 3"), zero_stage=0, case="muon")
    found[0] |= {"alone": alone, "fewer ranks": train_and_save(three, zero_stage=0)}
    return found


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_any_depths_train_at_every_stage_to_the_same_losses(answers, case):
    """No hang, and losses equal across ZeRO stages to 4 digits in float32."""
    first, second = answers
    plain = losses(first[f"{case} 0"])
    assert len(plain) == 3
    for stage in range(4):
        assert losses(first[f"{case} {stage}"]) == pytest.approx(plain, rel=1e-4), stage
        assert losses(second[f"{case} {stage}"]) == losses(first[f"{case} {stage}"]), "a row is about all ranks"


def test_straggling_is_measured(answers):
    """Mean steps over both ranks, and how far the deeper rank is above it."""
    for case, depths in CASES.items():
        for row in (row for stage in range(4) for row in answers[0][f"{case} {stage}"]):
            assert row["mean_steps"] == pytest.approx(sum(depths) / 2)
            assert row["straggling"] == pytest.approx(max(depths) / (sum(depths) / 2))


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_the_gradient_is_that_of_one_process_however_the_scored_tokens_lie(answers, zero_stage):
    """The mean is over all scored tokens, wherever they are."""
    run = RUNS["adaptive"]
    model = build_model(run.model_config(LARGE), seed=run.seed)
    loss = torch.zeros(())
    for row, length in zip(torch.as_tensor(padded_rows()), LENGTHS, strict=True):  # one at a time, weighed by hand
        loss = loss + model(row[None, :length], row[None, 1 : length + 1]).loss * length / sum(LENGTHS)
    loss.backward()
    gradients = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()

    mine, theirs = (rank[f"padded {zero_stage}"] for rank in answers)
    assert mine["loss"] == theirs["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    if zero_stage:  # DeepSpeed tells no norm at stage 0
        assert mine["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    seen = 0
    for name, start, signs in [*mine["moved"], *theirs["moved"]]:  # Adam's first step has the sign of the gradient
        gradient = gradients[name][start : start + len(signs)]
        clear = gradient.abs() > 1e-5
        assert torch.equal(torch.tensor(signs)[clear], -gradient[clear].sign()), name
        seen += int(clear.sum())
    assert seen > 1000


@pytest.mark.parametrize("name", DIAGONAL)
def test_the_gradient_of_every_method_is_that_of_one_plain_process(answers, name):
    task = DIAGONAL[name]
    for rank in answers:
        gradients.check(rank[name], Precision(task["precision"]), task["zero_stage"])


@pytest.mark.parametrize("name", MUON)
def test_muons_steps_are_those_of_full_matrices_in_one_process(answers, name):
    for rank in answers:
        muon_steps.check(rank[name])


@pytest.mark.parametrize("name", ["two", "three", "muon 1", "muon 3"])
def test_two_ranks_resume_to_the_last_bit(answers, name):
    whole, resumed = answers[0][f"{name} whole"], answers[0][f"{name} resumed"]
    assert resumed["from"] == 3
    assert resumed["losses"] == whole["losses"][3:]
    assert resumed["digest"] == whole["digest"]


def test_damage_that_one_rank_finds_makes_all_go_back(answers):
    """The second shard, which rank 1 verifies: both resume from the checkpoint before it, and say why."""
    whole = answers[0]["two whole"]
    for rank in answers:
        harmed = rank["after harm"]
        assert harmed["from"] == 3
        assert harmed["losses"] == whole["losses"][3:]
        (event,) = harmed["events"]
        assert "step 6 is damaged (shard-00001-of-00002.safetensors" in event["what"]


@pytest.mark.parametrize(
    ("before", "after"),
    [("alone", "more ranks"), ("three whole", "fewer ranks"), ("muon 3 whole", "muon 3 fewer ranks")],
)
def test_a_run_goes_on_with_another_number_of_ranks(answers, before, after):
    """Elastic at every stage, on the same global batches: one rank at stage 2 to two at 3, two at 3 to one at 0."""
    whole, rest = answers[0][before], answers[0][after]
    assert rest["from"] == 3
    assert rest["losses"] == pytest.approx(whole["losses"][3:], rel=1e-4)
    assert rest["digest"] == whole["digest"]


def test_notice_on_one_rank_makes_all_save(answers):
    """A just-in-time checkpoint, once: after the step in which rank 1 was told that it may end."""
    assert [rank["noticed"]["saved"] for rank in answers] == [[3, 4, 6]] * 2

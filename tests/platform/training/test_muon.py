"""Muon's steps are those of full matrices in one plain process, at every ZeRO stage."""

from __future__ import annotations

import itertools
from pathlib import Path

import gradients
import muon_steps
import pytest
import torch

from haltscale.platform.config import Optimizer, Precision, RunConfig
from haltscale.platform.training.muon import Matrix, MuonAdamW, Piece, matrices, orthogonalised, with_muon

from looping import answer_together

DIAGONAL = [(case, gradients.PIECES[1 + n % 2], n % 4) for n, case in enumerate(gradients.CASES)]
EVERY = list(itertools.product(gradients.CASES, gradients.PIECES))


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (40, 16), (16, 40), (1, 7)])
def test_the_momentum_is_made_orthogonal(rows, columns):
    """Its singular vectors stay, its singular values come close to 1."""
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    s = s.clamp(min=0.1 * s.max())
    found = u.T @ orthogonalised(u @ torch.diag(s) @ v, torch.float32) @ v.T
    assert torch.allclose(found, torch.diag(found.diag()), atol=1e-4)
    assert 0.6 < found.diag().min() <= found.diag().max() < 1.3


def test_one_matrix_goes_where_pytorchs_muon_takes_it(one_process):
    torch.manual_seed(0)
    start, gradient = torch.randn(24, 16), torch.randn(3, 24, 16)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    matrix, run = Matrix("w", 0, 24, 16), RunConfig(weight_decay=0.2)
    group = {"params": [mine], "muon_matrices": [matrix], "momentum": 0.9, "muon_rate": 1.0, "weight_decay": 0.2}
    ours = MuonAdamW([group], precision=Precision.BF16, lr=0.02)
    ours.place({matrix: [Piece(mine, 0, 0, mine.numel())]}, torch.device("cpu"))
    right = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=run.weight_decay, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        mine.grad, theirs.grad = gradient[step].clone(), gradient[step].clone()
        ours.step()
        right.step()
        assert torch.allclose(mine, theirs, atol=1e-3 * float((theirs.detach() - start).abs().max()))


@pytest.fixture
def one_process() -> None:
    from haltscale.platform.training.engine import open_process_group

    open_process_group()


@pytest.mark.parametrize("case", gradients.CASES)
def test_only_matrices_of_the_blocks_are_muons(case):
    model = gradients.model_of(case)
    every = [p for p in model.parameters() if p.ndim >= 2]
    groups = with_muon([{"params": every, "weight_decay": 0.1}], model, RunConfig(optimizer=Optimizer.MUON))
    (adam, muon) = groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inside = {names[id(parameter)] for parameter in muon["params"]}
    assert inside == set(matrices(model))
    assert len(inside) == 4 * model.config.shape.layers
    assert all(".blocks." in f".{name}" for name in inside)
    assert not any(".blocks." in f".{names[id(parameter)]}" for parameter in adam["params"])
    assert {id(p) for group in groups for p in group["params"]} == set(map(id, every))
    assert (adam["weight_decay"], muon["weight_decay"]) == (0.1, 0.1)


@pytest.mark.parametrize(("case", "pieces", "zero_stage"), DIAGONAL[::2])
def test_alone_the_steps_are_those_of_full_matrices(case, pieces, zero_stage):
    muon_steps.check(muon_steps.through_deepspeed(case, pieces=pieces, zero_stage=zero_stage))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero_stage", range(4))
def test_everywhere_the_steps_are_those_of_full_matrices(zero_stage: int, tmp_path: Path):
    tasks = {
        f"{case}, {pieces}": {"do": "muon", "case": case, "pieces": pieces, "zero_stage": zero_stage}
        for case, pieces in EVERY
    }
    ranks = answer_together(tmp_path, tasks, timeout=850)
    for case, pieces in EVERY:
        muon_steps.check(muon_steps.through_deepspeed(case, pieces=pieces, zero_stage=zero_stage))
        for rank in ranks:
            muon_steps.check(rank[f"{case}, {pieces}"])

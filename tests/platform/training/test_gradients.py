"""Accumulation, ranks and ZeRO stages do not change the gradient of any method, in float32 or bfloat16."""

from __future__ import annotations

import itertools
from pathlib import Path

import gradients
import pytest

from haltscale.platform.config import Precision

from looping import answer_together


@pytest.mark.parametrize("precision", gradients.DTYPES)
@pytest.mark.parametrize("case", gradients.CASES)
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(case, precision):
    """In plain PyTorch: a method that draws, normalises or balances within a piece would differ."""
    whole, norm = gradients.plain(case, precision)
    cut, norm_of_cut = gradients.plain(case, precision, pieces=4, world=2)
    bound = 2e-2 if precision is Precision.BF16 else 1e-5  # each forward pass rounds: bfloat16 has 8 bits
    assert norm_of_cut == pytest.approx(norm, rel=bound)
    for name, right in whole.items():
        assert gradients.unlike(cut[name], right) < bound, name


@pytest.mark.parametrize(("case", "precision", "pieces", "zero_stage"), gradients.diagonal()[::3])
def test_alone_it_is_that_of_plain_pytorch(device, case, precision, pieces, zero_stage):
    errors = gradients.through_deepspeed(case, precision, pieces=pieces, zero_stage=zero_stage, device=device)
    gradients.check(errors, precision, zero_stage, device)


EVERY = list(itertools.product(gradients.CASES, gradients.PIECES))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", gradients.DTYPES)
@pytest.mark.parametrize("zero_stage", range(4))
def test_everywhere_it_is_that_of_plain_pytorch(zero_stage: int, precision: Precision, tmp_path: Path):
    tasks = {
        f"{case}, {pieces}": {
            "do": "gradients",
            "case": case,
            "precision": precision,
            "pieces": pieces,
            "zero_stage": zero_stage,
        }
        for case, pieces in EVERY
    }
    ranks = answer_together(tmp_path, tasks, timeout=850)
    for case, pieces in EVERY:
        alone = gradients.through_deepspeed(case, precision, pieces=pieces, zero_stage=zero_stage)
        for errors in (alone, *(rank[f"{case}, {pieces}"] for rank in ranks)):
            gradients.check(errors, precision, zero_stage)

"""With `document_start`, a row of several documents is read as each of them alone, and costs as much as they do."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from haltscale.model import METHODS, AdaptiveOptions, Method, Shape, VanillaOptions, config_problems
from haltscale.model.adaponder import AdaponderOptions
from haltscale.model.fixed import FixedOptions
from haltscale.model.generation import GenerationError, generate
from haltscale.model.looped import LoopedOptions
from haltscale.model.mor import MorOptions, Routing
from haltscale.model.pause import PauseOptions
from haltscale.model.ponder import PonderOptions
from haltscale.model.ponder2 import Ponder2Options
from haltscale.model.ponder3 import Ponder3Options
from haltscale.model.shuffled import ShuffledOptions

BEGIN = 0
LENGTHS = (70, 45, 1, 30)
"""Above 128 tokens together, so that queries are cut into chunks."""
RAGGED: dict[str, Any] = {"tau": 0.25, "router_bias": 0.5}
ALONE: dict[str, tuple[Method, Any]] = {
    "vanilla": (Method.VANILLA, VanillaOptions()),
    "adaptive": (Method.ADAPTIVE, AdaptiveOptions(**RAGGED)),
    "fixed": (Method.FIXED, FixedOptions(steps=2)),
    "looped": (Method.LOOPED, LoopedOptions(steps=2)),
    "pause": (Method.PAUSE, PauseOptions(steps=2)),
    "ponder": (Method.PONDER, PonderOptions(steps=2)),
    "ponder2": (Method.PONDER2, Ponder2Options()),
    "ponder3": (Method.PONDER3, Ponder3Options(**RAGGED)),
    "adaponder": (Method.ADAPONDER, AdaponderOptions(tau=0.5, router_bias=0.3)),
    "mor": (Method.MOR, MorOptions()),
    "mor, token choice": (Method.MOR, MorOptions(routing=Routing.TOKEN_CHOICE)),
    "shuffled": (Method.SHUFFLED, ShuffledOptions(shift=199, **RAGGED)),
}
"""All methods. What deals numbers of steps by the place in the row is given numbers that do not depend on it: `fixed` a
whole one, `shuffled` a shift at which every token keeps its own."""
TINY = Shape(layers=2, d=16, heads=4, kv_heads=2, ffn=24)
every_case = pytest.mark.parametrize("case", list(ALONE))


def documents(*lengths: int) -> list[Tensor]:
    """The first one goes on from an earlier row."""
    stream = torch.Generator().manual_seed(0)
    found = [torch.randint(1, 31, (length,), generator=stream) for length in lengths]
    for document in found[1:]:
        document[0] = BEGIN
    return found


def built(tiny: Callable, case: tuple[Method, Any], kv_heads: int = 4, **changes: Any) -> Any:
    shape = replace(TINY, layers=4 if case[0] is Method.MOR else 2, kv_heads=kv_heads)
    changes = {"document_start": BEGIN, "context": 200, "shape": shape} | changes
    return tiny(*case, spread=2.0, **changes).eval()


def test_all_methods_are_here() -> None:
    assert {method for method, _ in ALONE.values()} == set(METHODS)


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped queries", "fused kernel"])
@every_case
def test_a_row_is_read_as_its_documents_alone(tiny: Callable, case: str, kv_heads: int) -> None:
    """Beside it in the batch stands a shorter row, padded."""
    model, parts = built(tiny, ALONE[case], kv_heads), documents(*LENGTHS)
    row, short = torch.cat(parts), documents(20, 9)
    padded = torch.cat((*short, row[: len(row) - 29]))
    together = model(torch.stack((row, padded)), lengths_B=torch.tensor([len(row), 29]))
    alone = [model(part[None]) for part in (*parts, *short)]
    logits, steps = (
        torch.cat([each[0] for each in every])
        for every in (
            [one.logits_BTV for one in alone],
            [one.trace.steps_BT for one in alone],
        )
    )
    found = (torch.cat((x[0], x[1, :29])) for x in (together.logits_BTV, together.trace.steps_BT))
    torch.testing.assert_close(next(found), logits, atol=1e-9, rtol=0)
    assert torch.equal(next(found), steps)
    spent = sum((one.trace.counts for one in alone[1:]), start=alone[0].trace.counts)
    counts = together.trace.counts
    assert (counts.rows, counts.keys, counts.tokens) == (spent.rows, spent.keys, spent.tokens)
    seen = built(tiny, ALONE[case], kv_heads, document_start=None)(row[None])
    assert not torch.allclose(seen.logits_BTV[0], logits[: len(row)], atol=1e-4), "documents see each other without"


@pytest.mark.parametrize("case", ["vanilla", "adaptive", "ponder3", "looped", "pause", "ponder", "ponder2"])
def test_its_gradient_is_theirs(tiny: Callable, case: str) -> None:
    model, parts = built(tiny, ALONE[case]), documents(*LENGTHS)
    row = torch.cat(parts)[None]
    targets = torch.randint(31, row.shape, generator=torch.Generator().manual_seed(1))
    loss = model(row, targets).loss
    apart = zip(parts, targets[0].split(LENGTHS), strict=True)
    right = sum(model(part[None], target[None]).loss * len(part) / row.shape[1] for part, target in apart)
    assert loss.item() == pytest.approx(right.item(), abs=1e-9)
    weights = list(model.parameters())
    for mine, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(right, weights), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


def test_the_keys_of_a_causal_pass_are_those_of_triangles(tiny: Callable) -> None:
    model = built(tiny, (Method.VANILLA, VanillaOptions()))
    counts = model(torch.cat(documents(*LENGTHS))[None]).trace.counts
    assert counts.keys == [sum(n * (n + 1) // 2 for n in LENGTHS)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", [(Method.VANILLA, VanillaOptions()), ALONE["adaptive"], ALONE["pause"], ALONE["mor"]])
def test_executed_equals_torchs_counter(tiny: Callable, case: tuple[Method, Any], backward: bool) -> None:
    model, row = built(tiny, case), torch.cat(documents(*LENGTHS))[None]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(row, row)
        if backward:
            out.loss.backward()
    flops = model.flops(out.trace.counts)
    executed = flops.training.executed if backward else flops.executed
    assert executed == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert flops.realised < flops.executed


def test_half_precision_and_recomputation_read_the_same(tiny: Callable) -> None:
    row = torch.cat(documents(*LENGTHS))[None]
    plain = built(tiny, ALONE["looped"], dtype=torch.float32)
    plain(row, row).loss.backward()
    again = built(tiny, ALONE["looped"], dtype=torch.float32).activation_checkpointing_()
    again(row, row).loss.backward()
    for mine, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    half = built(tiny, ALONE["looped"], dtype=torch.bfloat16)
    assert half(row, row).loss.item() == pytest.approx(plain(row, row).loss.item(), rel=0.02)


def test_decoding_reads_one_document(tiny: Callable) -> None:
    model = built(tiny, (Method.ADAPTIVE, AdaptiveOptions(tau=0.25, router_bias=0.5)))
    assert generate(model, [[BEGIN, 3, 4]], new_tokens=2)
    with pytest.raises(GenerationError, match="prompt 0 begins another document"):
        generate(model, [[3, BEGIN, 4]], new_tokens=2)


def test_a_start_that_is_no_token_is_refused(tiny: Callable) -> None:
    config = built(tiny, (Method.VANILLA, VanillaOptions())).config
    for wrong in (-1, 31, True, "<|endoftext|>"):
        (problem,) = config_problems(replace(config, document_start=wrong))
        assert "document_start" in problem
    assert not config_problems(replace(config, document_start=30))

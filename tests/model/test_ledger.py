"""What the ledger says is what torch counts, what the authors table, and what the paper's convention gives."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from haltscale.model import (
    SIZES,
    AdaptiveOptions,
    Method,
    ModelConfig,
    PassCounts,
    VanillaOptions,
    build_model,
    paper_passes,
    paper_training_flops,
)
from haltscale.model.config import rung


@pytest.mark.parametrize(
    ("size", "millions"), [("125m", 162.7), ("410m", 406.6), ("834m", 837.6), ("1.4b", 1420.4), ("2.8b", 2634.7)]
)
def test_the_authors_sizes(size: str, millions: float) -> None:
    assert SIZES[size].parameters(50_304) / 1e6 == pytest.approx(millions, abs=0.06)
    assert SIZES[size].head_dim == 64


@pytest.mark.parametrize("size", ["0.6m", "1.8m", "4m", "8m", "17m", "35m", "70m"])
def test_our_sizes_bear_their_parameter_count(size: str) -> None:
    config = ModelConfig(
        method=Method.VANILLA, shape=SIZES[size], vocab_size=4096, context=64, options=VanillaOptions()
    )
    with torch.device("meta"):
        from haltscale.model.vanilla import VanillaModel

        model = VanillaModel(config)
    counted = sum(model.parameter_groups_count().values())
    assert counted == SIZES[size].parameters(4096)
    assert counted / 1e6 == pytest.approx(float(size[:-1]), rel=0.07)


@pytest.mark.parametrize("size", list(SIZES))
def test_the_ladder_follows_its_rule(size: str) -> None:
    shape = SIZES[size]
    assert shape == rung(shape.layers, shape.d)
    assert shape.d % 64 == 0
    assert shape.kv_heads == shape.heads >= 2
    assert shape.head_dim == (64 if shape.d >= 192 else 32)
    assert shape.ffn / shape.d == 2.6875
    if shape.d < 768:  # our own
        meant = 0.99e6 * float(size[:-1])
        assert rung(shape.layers - 1, shape.d).parameters(4096) < meant <= shape.parameters(4096)


def test_the_papers_flops_table() -> None:
    """Nominal N = 1.4e9, D = 26e9 tokens."""
    assert paper_training_flops(1.4e9, 26e9, 1) / 1e20 == pytest.approx(2.18, abs=0.005)
    assert paper_training_flops(1.4e9, 26e9, 8) / 1e20 == pytest.approx(17.47, abs=0.005)
    assert paper_passes(7.47e20, 1.4e9, 26e9) == pytest.approx(3.42, abs=0.005)
    assert paper_passes(10.84e20, 1.4e9, 26e9) == pytest.approx(4.96, abs=0.005)
    assert paper_passes(2.27e20, 0.41e9, 26e9) == pytest.approx(3.55, abs=0.005)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", [Method.VANILLA, Method.ADAPTIVE])
def test_executed_equals_torchs_counter(
    tiny: Callable, batch: Callable, method: Method, backward: bool, ragged: bool
) -> None:
    options = VanillaOptions() if method is Method.VANILLA else AdaptiveOptions(tau=0.25, router_bias=0.5)
    model = tiny(method, options, spread=2.0 if ragged else 0.0)
    tokens, targets = batch(2, 40)
    lengths = torch.tensor([40, 23]) if ragged else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(tokens, targets, lengths_B=lengths)
        if backward:
            out.loss.backward()
    flops = model.flops(out.trace.counts)
    executed = flops.training.executed if backward else flops.executed
    assert executed == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert flops.realised <= flops.executed
    parameters = sum(p.numel() for p in model.parameters())
    assert flops.paper == pytest.approx(2 * parameters * out.trace.counts.tokens * out.trace.counts.mean_passes)


def test_counts_add_up() -> None:
    one = PassCounts(rows=[4, 2], keys=[10, 7], executed_rows=[4, 2], executed_keys=[16, 8], tokens=4, head_rows=4)
    two = PassCounts(rows=[3], keys=[6], executed_rows=[4], executed_keys=[16], tokens=3, head_rows=4)
    total = one + two
    assert total.rows == [7, 2]
    assert total.executed_keys == [32, 8]
    assert total.tokens == 7
    assert total.mean_passes == pytest.approx(9 / 7)


def test_flops_of_counts_are_additive(tiny: Callable, batch: Callable) -> None:
    model = tiny(options=AdaptiveOptions(tau=0.25, router_bias=0.5), spread=2.0)
    a, b = (model(*batch(2, 12, seed)).trace.counts for seed in (1, 2))
    assert model.flops(a + b).realised == pytest.approx((model.flops(a) + model.flops(b)).realised)
    assert build_model(model.config, seed=3).flops(a) == model.flops(a)

"""The memory of a training step, as it is planned, against what a training step has on a CPU at its most crowded."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from haltscale.model import METHODS, Method, build_model
from haltscale.model.language_model import HeadLoss
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.sweeps.memory_plan import _at_full_depth, memory

from looping import BATCH, LARGE, RUN, batches, engine_of, go

V = 2000
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made within the block and are still there: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return found

    def _gone(self, place: int) -> None:
        self.now -= self._sizes.pop(place, 0)


def run_of(method: str, precision: Precision, context: int = 256) -> RunConfig:
    size = "1.8m" if method == "mor" else "0.6m"  # three layers at least
    run = RunConfig(method=Method(method), options=METHODS[method].options(), size=size, precision=precision)
    return replace(run, context=context, batch_tokens=2 * context)


CASES = [
    *[(method, Precision.FP32, False, HeadLoss.WHOLE) for method in METHODS],
    ("adaptive", Precision.BF16, False, HeadLoss.WHOLE),
    ("vanilla", Precision.FP32, True, HeadLoss.WHOLE),
    ("adaptive", Precision.FP32, True, HeadLoss.WHOLE),
    ("adaptive", Precision.FP32, False, HeadLoss.PARTS),
]


@pytest.mark.parametrize(("method", "precision", "again", "head_loss"), CASES)
def test_activations_and_logits_are_those_of_a_step_at_full_depth(method, precision, again, head_loss, monkeypatch):
    """The bound holds, and is no more than a third too high."""
    for module in ("haltscale.model.kernels.rows_in_a_part", "haltscale.model.kernels.cache_sized_rows"):
        monkeypatch.setattr(module, lambda _: 128)
    monkeypatch.setattr("haltscale.platform.sweeps.memory_plan.PART_BYTES", 128 * V * 4)
    monkeypatch.setattr("haltscale.platform.sweeps.memory_plan.CACHE_BYTES", 128 * V * 4)
    run = run_of(method, precision)
    execution = ExecutionConfig(micro_batch_sequences=2, activation_checkpointing=again, head_loss=head_loss)
    planned = memory(run, execution, V)
    _, options = _at_full_depth(run.method, run.options)
    if type(options) is not type(run.options):
        options = run.options
    run = replace(run, options=options)
    model = build_model(run.model_config(V), seed=0).to(DTYPES[precision]).train()
    model.head_loss = head_loss
    model.activation_checkpointing_(again)
    tokens = torch.randint(V, (2, run.context))
    with LiveBytes() as live:
        model(tokens, tokens).loss.backward()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    expected = planned.activations + planned.moment + gradients
    assert 0.97 * live.most < expected < 1.33 * live.most


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("zero_stage", range(4))
def test_with_the_optimizer_it_is_what_a_run_has(precision, zero_stage):
    """Weights, gradients and moments through DeepSpeed, which makes copies of its own."""
    run = replace(RUN, size="1.8m", precision=precision, tokens=2 * RUN.batch_tokens)
    with LiveBytes() as live:
        engine = engine_of(run, zero_stage=zero_stage, vocabulary=LARGE)
        go(engine, run, batches(run), zero_stage=zero_stage)
    execution = ExecutionConfig(zero_stage=zero_stage, micro_batch_sequences=BATCH)
    assert 0.85 * live.most < memory(run, execution, LARGE).total < 1.4 * live.most


def test_states_are_divided_among_workers():
    run = replace(run_of("vanilla", Precision.BF16), batch_tokens=8 * 256)
    states = [memory(run, ExecutionConfig(workers=4, zero_stage=stage), V).states for stage in range(4)]
    parameters = run.parameters(V)
    bucket = 4
    each = [2 + 8 + 12, 2 + 4 + 3 + bucket, 2 + 1 + 3 + bucket, 0.5 + 1 + 3 + bucket]
    assert states == pytest.approx([parameters * n for n in each])


def test_memory_grows_as_the_shape_says():
    """At the authors' 410m, 2,048 tokens, bf16: rows, layers and widths by hand, all four passes of adaptive."""
    run = RunConfig(method=Method.ADAPTIVE, options=METHODS["adaptive"].options(), size="410m", context=2048)
    run = replace(run, batch_tokens=8 * 2048, precision=Precision.BF16)
    execution = ExecutionConfig(micro_batch_sequences=1, gpus_per_worker=1)
    d, ffn, layers = 1024, 2752, 24
    block = 2 * (7 * d + 3 * d + 3 * ffn)  # inputs of norms and products, queries, keys, values; bytes of a row
    merged = 2 * 2 * d * sum((k + 1) * 2048 for k in range(1, 4))  # keys and values of all passes, side by side
    by_hand = layers * (4 * 2048 * block + merged)
    assert memory(run, execution, 50_304).activations == pytest.approx(by_hand, rel=0.15)

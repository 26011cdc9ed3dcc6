"""The memory that a training step needs, before it runs: states by the ZeRO stage, activations by asking the method.

What a forward pass keeps for the way back is a sum of parts, each of them proportional to rows and to one width: of the
model, of its keys, of its feed-forward, of its heads, of its vocabulary. So small models of the same method, options
and precision are run at full depth, with every latent step taken, and what they keep says how much of each there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from haltscale.model import METHODS, Method, ModelConfig, Shape
from haltscale.model.language_model import LARGE_VOCABULARY, HeadLoss, LanguageModel
from haltscale.model.mor import Routing
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.execution import ExecutionConfig, Offload
from haltscale.platform.sweeps import planning

LENGTH = 128
"""Tokens of a probe. Masks grow with the square of the length, all else with the length."""
BUCKET = 500_000_000
"""Numbers in DeepSpeed's bucket of gradients at most; the engine sets no more than there are parameters."""
CACHE_BYTES, PART_BYTES = 2**20, 2**28
"""Float32 logits that the loss treats at once on a CPU, and on a GPU or by parts (kernels.py)."""
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.bfloat16}
"""What probes are run in, on CPUs: fp16, which is as wide as bf16, is for GPUs."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that each worker needs at the most crowded moment of a training step, where every latent step is taken."""

    states: float
    """Weights, gradients and the optimizer's, divided as the ZeRO stage says; what is offloaded is not in here."""
    activations: float
    """What the forward pass keeps for the way back."""
    moment: float
    """What is there for a moment on the way back: gradients of the logits, or of the inside of a block."""

    @property
    def total(self) -> float:
        return self.states + self.activations + self.moment


def memory(run: RunConfig, execution: ExecutionConfig, vocab_size: int) -> Memory:
    """What a run needs; PyTorch's own few hundred megabytes, and what its allocator leaves between tensors, come on
    top.

    Raises:
        ValueError: the run has errors (:meth:`RunConfig.problems`).
    """
    micro, _ = execution.accumulation(run.batch_sequences)
    precision = run.resolved(on_gpu=bool(execution.gpus_per_worker)).precision
    parts, again = _in_parts(execution, vocab_size), execution.activation_checkpointing
    outside, layers, inside = _kept(run, vocab_size, precision, parts=parts, again=again)
    logits = float(micro * run.context * vocab_size)
    some = min(4 * logits, PART_BYTES if execution.gpus_per_worker or parts else CACHE_BYTES)
    head = 3 * some if parts else DTYPES[precision].itemsize * logits + 3 * some
    return Memory(
        states=_states(run, execution, vocab_size, precision),
        activations=micro * (outside + layers),
        moment=max(head, micro * inside),
    )


def _in_parts(execution: ExecutionConfig, vocab_size: int) -> bool:
    if execution.head_loss is HeadLoss.AUTO:
        return bool(execution.gpus_per_worker) and vocab_size >= LARGE_VOCABULARY
    return execution.head_loss is HeadLoss.PARTS


def _states(run: RunConfig, execution: ExecutionConfig, vocab_size: int, precision: Precision) -> float:
    """ZeRO: arXiv 1910.02054, section 5. Gradients are added up in float32 whatever the precision (engine.py)."""
    half = precision is not Precision.FP32
    stage, workers = execution.zero_stage, execution.workers
    weights, gradients, optimizer = (2, 4, 12) if half else (4, 4, 8)
    if half and stage == 0:
        gradients += 4  # DeepSpeed copies them for the optimizer
    if not half and stage > 0:
        optimizer += 4  # the optimizer steps flat copies of the weights
        gradients += 4  # and is given flat copies of their gradients
    each = 0.0 if execution.offload_optimizer is not Offload.NONE else optimizer / (workers if stage >= 1 else 1)
    each += gradients / (workers if stage >= 2 else 1)
    each += 0.0 if execution.offload_parameters is not Offload.NONE else weights / (workers if stage >= 3 else 1)
    parameters = run.parameters(vocab_size)
    staged = (stage >= 1 and workers > 1) or (stage >= 2 and half)  # which stages gradients in float32
    bucket = 4.0 * min(BUCKET, parameters) if staged else 0.0
    return parameters * each + bucket


# ---- asking the methods ---------------------------------------------------------------------------------------------

BASE = Shape(layers=1, d=32, heads=2, kv_heads=2, ffn=16)
WIDER = (
    BASE,
    replace(BASE, d=64, kv_heads=1),  # keys as wide as before
    replace(BASE, kv_heads=1),
    replace(BASE, ffn=48),
    replace(BASE, heads=4, kv_heads=4),
)
"""Shapes of which each differs from the first in one of the widths."""
FEWEST_TOKENS, LEAST_RANK = 32, 8


def _widths(shape: Shape) -> list[float]:
    return [shape.d, shape.kv_heads * shape.head_dim, shape.ffn, shape.heads, 1.0]


def _kept(
    run: RunConfig, vocab_size: int, precision: Precision, *, parts: bool, again: bool
) -> tuple[float, float, float]:
    """Of one sequence, the bytes that the forward pass keeps outside the layers and in them, and what the way back adds
    in one block of one pass: the gradients of its inside; with activation checkpointing (``again``) its inside too."""
    shape, length, options = run.shape, run.context, planning._priced(run.method, run.options)
    probe = _probe(run.method, options, precision, parts=parts, factorised=bool(run.embedding_rank))
    outside = length * float(probe.outside @ [shape.d, vocab_size, run.embedding_rank, 1.0])
    outside += length**2 * probe.square
    per_layer = length * float(probe.per_layer @ _widths(shape))
    passes = planning._counts(*planning._every_step(run.method, options), 8).rows
    kv, rows = shape.kv_heads * shape.head_dim, length * sum(passes) / 8
    looks_back, itemsize = _looks_back(run.method), DTYPES[precision].itemsize
    carried = (
        shape.layers * rows * itemsize * 2 * kv if looks_back else 0.0
    )  # gradients of earlier passes' keys, values
    inside = per_layer / len(passes)
    if not again:
        return outside, shape.layers * per_layer, inside + carried
    # A block's input is kept, and what later passes see of it: keys and values, in the tensors that they are part of.
    seen = shape.d + kv + shape.d + 2 * kv if looks_back else 0
    return outside, shape.layers * rows * itemsize * (shape.d + seen), 2 * inside + carried


def _looks_back(method: str) -> bool:
    """Whether later passes of a method see the states of earlier ones; assumed of other packages' methods."""
    looks = (Method.ADAPTIVE, Method.SHUFFLED, Method.FIXED, Method.PONDER3, Method.ADAPONDER)
    return method in looks or method not in list(Method)


@dataclass(frozen=True)
class _Probe:
    per_layer: np.ndarray[Any, Any]
    """[5]: bytes of a token and layer, by width (`_widths`)."""
    outside: np.ndarray[Any, Any]
    """[4]: bytes of a token by width: model, vocabulary, rank of a factorised embedding, one."""
    square: float
    """Bytes of a token by token."""


@cache
def _probe(method: str, options: Any, precision: Precision, *, parts: bool, factorised: bool) -> _Probe:
    method, options = _at_full_depth(method, options)
    problems = METHODS[method].model.shape_problems
    least = next(layers for layers in range(1, 100) if not problems(replace(BASE, layers=layers)))

    def kept(
        shape: Shape, *, more: int = 0, tokens: int = FEWEST_TOKENS, rank: int = LEAST_RANK, times: int = 1
    ) -> float:
        """Per token."""
        config = ModelConfig(
            method=method,
            shape=replace(shape, layers=least + more),
            vocab_size=tokens,
            context=times * LENGTH,
            options=options,
            embedding_rank=rank if factorised else 0,
        )
        found = _kept_by(config, DTYPES[precision], times * LENGTH, parts=parts)
        return found / (times * LENGTH)

    square = (kept(BASE, times=2) - kept(BASE)) / LENGTH
    one = np.array([kept(shape) for shape in WIDER])
    deeper = np.array([kept(shape, more=1) for shape in WIDER])
    widths = np.array([_widths(shape) for shape in WIDER])
    per_layer = np.linalg.solve(widths, deeper - one)
    rest = one - least * (deeper - one) - LENGTH * square
    outside = np.zeros(4)
    outside[0] = (rest[1] - rest[0]) / (WIDER[1].d - BASE.d)
    outside[1] = (kept(BASE, tokens=2 * FEWEST_TOKENS) - one[0]) / FEWEST_TOKENS
    outside[2] = (kept(BASE, rank=2 * LEAST_RANK) - one[0]) / LEAST_RANK if factorised else 0.0
    outside[3] = rest[0] - outside[:3] @ [BASE.d, FEWEST_TOKENS, LEAST_RANK]
    return _Probe(per_layer, outside, square)


def _at_full_depth(method: str, options: Any) -> tuple[str, Any]:
    """A method, or one in its place, that takes every latent step."""
    if hasattr(options, "router_bias"):
        return method, replace(options, router_bias=100.0, tau=0.0)
    if getattr(options, "routing", None) is Routing.EXPERT_CHOICE:  # its depths do not depend on the data
        return method, options
    return planning._every_step(method, options)


def _kept_by(config: ModelConfig, dtype: torch.dtype, length: int, *, parts: bool) -> float:
    """Bytes that autograd keeps of the forward pass of one sequence, the model's own weights apart."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        model: LanguageModel = METHODS[config.method].model(config).to(dtype).train()
        model.head_loss = HeadLoss.PARTS if parts else HeadLoss.WHOLE
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        tokens_BT = torch.arange(length)[None] % config.vocab_size
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens_BT, tokens_BT)
    return float(sum(storage.nbytes() for storage in kept.values()))

"""DeepSpeed: the engine of a run, and its checkpoints. The only module that imports deepspeed."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from haltscale.model import LanguageModel
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.training import Progress

TAG = "state"


def resolve_precision(precision: Precision) -> Precision:
    """bf16 where the machine's matrix products are faster in it, else fp32; anything but AUTO is taken as it is."""
    if precision is not Precision.AUTO:
        return precision
    if torch.cuda.is_available():
        return Precision.BF16 if torch.cuda.is_bf16_supported() else Precision.FP32
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return Precision.BF16 if fast else Precision.FP32


def build_engine(model: LanguageModel, run: RunConfig, *, zero_stage: int, micro_batch: int, accumulation: int) -> Any:
    """Wrap a model for training.

    The process group is opened here if nobody (Ray Train) did before. AdamW decays matrices only.

    Returns:
        ``deepspeed.DeepSpeedEngine``.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")
    precision = resolve_precision(run.precision)
    if zero_stage == 3 and isinstance(loop := getattr(model, "latent_loop", None), nn.Module):
        # The loop runs a data-dependent number of times: gather its parameters once, as one leaf.
        deepspeed.utils.set_z3_leaf_modules(model, [type(loop)])
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": run.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=run.learning_rate,
        betas=(run.adam_beta1, run.adam_beta2),
        fused=True,
    )
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.clip,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": precision is Precision.BF16},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def save_checkpoint(engine: Any, folder: Path, progress: Progress) -> None:
    """Every rank writes its shard into ``folder``."""
    engine.save_checkpoint(str(folder), tag=TAG, client_state={"progress": progress.to_dict()})


def load_checkpoint(engine: Any, folder: Path) -> Progress:
    """Restore an engine from what :func:`save_checkpoint` wrote, by the same number of ranks.

    Raises:
        RuntimeError: the folder holds no checkpoint that this engine can read.
    """
    held = (folder / TAG).is_dir()  # without it DeepSpeed fails on an assertion of its own
    loaded, state = engine.load_checkpoint(str(folder), tag=TAG) if held else (None, {})
    if loaded is None:
        raise RuntimeError(f"{folder} holds no checkpoint that this run can resume from; remove it to start anew")
    return Progress(**state["progress"])


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The model's weights, whole, on the CPU; under ZeRO-3 gathered from all ranks (all must call)."""
    import deepspeed

    module: nn.Module = engine.module
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=engine.zero_optimization_stage() == 3):
        return {name: weight.detach().cpu().contiguous().clone() for name, weight in module.state_dict().items()}

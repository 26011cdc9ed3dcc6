"""DeepSpeed: the engine of a run, and what of it goes into a checkpoint. The only module that imports deepspeed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from haltscale.model import LanguageModel, build_model
from haltscale.platform import llama
from haltscale.platform.checkpoints import (
    ADAM_MOMENTS,
    MOMENTS,
    MUON_MOMENTS,
    WEIGHT,
    Checkpoints,
    Saved,
    Shard,
    tensor_name,
)
from haltscale.platform.config import Optimizer, Precision, RunConfig
from haltscale.platform.execution import ExecutionConfig, Offload
from haltscale.platform.memory import keep_freed_memory
from haltscale.platform.training.muon import MuonAdamW, Piece, matrices, with_muon
from haltscale.platform.training.parameter_groups import parameter_groups
from haltscale.platform.training.progress import Progress

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scalers count."""


def open_process_group() -> None:
    """Open the process group of a process that trains alone; Ray Train opens it for its workers."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "gloo" if os.environ.get("DS_ACCELERATOR") == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def build_engine(model: LanguageModel, run: RunConfig, execution: ExecutionConfig) -> Any:
    """Wrap a model for training; AdamW decays matrices only.

    Returns:
        ``deepspeed.DeepSpeedEngine``.
    """
    keep_freed_memory()
    open_process_group()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile a collective for CPUs that only inference uses, under a lock file. Killed meanwhile,
    # a process leaves the file behind, and every later start on that machine would wait for it, for ever and silently.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if execution.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    model.activation_checkpointing_(execution.activation_checkpointing)
    model.attention_kernel, model.head_loss = execution.attention, execution.head_loss
    if execution.compile:
        model.compile_blocks_()
    if execution.zero_stage == 3 and isinstance(loop := getattr(model, "latent_loop", None), nn.Module):
        # The loop runs a data-dependent number of times: gather its parameters once, as one leaf.
        deepspeed.utils.set_z3_leaf_modules(model, [type(loop)])
    groups = parameter_groups(model, run)
    settings: dict[str, Any] = {
        "lr": 0.0,  # the loop sets it at every step; some of DeepSpeed's wrappers take one while they are built
        "betas": (run.adam_beta1, run.adam_beta2),
        "fused": True,
    }
    if is_muon := run.optimizer is Optimizer.MUON:
        precise = run.resolved().precision
        optimizer: torch.optim.AdamW = MuonAdamW(with_muon(groups, model, run), precision=precise, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings)
    micro_batch, accumulation = execution.accumulation(run.batch_sequences)
    precision = run.resolved().precision
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.clip,
        "zero_optimization": _zero(execution, sum(parameter.numel() for parameter in model.parameters())),
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW steps offloaded state too
        "zero_allow_untested_optimizer": is_muon,
        "bf16": {"enabled": precision is Precision.BF16},
        "fp16": {"enabled": precision is Precision.FP16},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
    if is_muon:  # it requires a parameter group to be stepped as a whole
        config["zero_optimization"]["sub_group_size"] = max(10**9, sum(p.numel() for p in model.parameters()))
    if precision is Precision.BF16:
        config["communication_data_type"] = "fp32"
        if execution.zero_stage > 0:  # at 0 it takes gradients in whatever dtype they come
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            config["bf16"]["immediate_grad_update"] = True
        # It would collect garbage and print six reports of memory while it is built: two seconds.
        deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if precision is Precision.BF16:
        _accumulate_in_float32(engine)
    if isinstance(optimizer, MuonAdamW):
        _place(engine, optimizer)
    engine.basic_optimizer.state.clear()  # of the steps that wrappers took: counts and moments start from nothing
    return engine


def _place(engine: Any, optimizer: MuonAdamW) -> None:
    """Tell the optimizer where the matrices are that Muon steps."""
    places: dict[Any, list[Piece]] = {}
    owned = matrices(engine.module)
    for fragment in fragments(engine):
        for matrix in owned.get(fragment.parameter, ()):
            first, end = max(fragment.start, matrix.start), min(fragment.start + fragment.numel, matrix.end)
            if first < end:
                at = fragment.offset + first - fragment.start
                place = Piece(fragment.stepped, at, first - matrix.start, end - first)
                places.setdefault(matrix, []).append(place)
    optimizer.place(places, engine.device)


def _accumulate_in_float32(engine: Any) -> None:
    """Have the gradients of bfloat16 weights added up in float32, over the uses of a weight in one forward pass, over
    pieces and over ranks: bfloat16 forgets what is below a 256th of the sum so far.

    DeepSpeed's settings alone round each piece's gradient to bfloat16, where the uses of a weight are added up.
    """
    for parameter in engine.module.parameters():
        parameter.grad_dtype = torch.float32
    if hasattr(engine.optimizer, "_gradient_reduction_buffer_dtype"):  # ZeRO-2 would stage them in the model's dtype
        engine.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32


def _zero(execution: ExecutionConfig, parameters: int) -> dict[str, Any]:
    # The bucket is allocated whole, 2 GB by default: no larger than the gradients.
    zero: dict[str, Any] = {"stage": execution.zero_stage, "reduce_bucket_size": min(500_000_000, parameters)}
    for name, device in (("optimizer", execution.offload_optimizer), ("param", execution.offload_parameters)):
        if device is not Offload.NONE:
            zero[f"offload_{name}"] = {"device": str(device), "pin_memory": torch.cuda.is_available()}
    return zero


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of one parameter that this rank's optimizer steps, in float32."""

    parameter: str
    start: int
    """First element, in the flattened parameter."""
    numel: int
    stepped: torch.Tensor
    """The tensor that the optimizer steps, and by which it keeps its moments."""
    offset: int
    """First element, in the flattened ``stepped``."""
    mine: bool = True
    """Whether this rank saves it: what all ranks step alike is saved by one of them."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment of ``stepped``, or of one of its moments; a view."""
        return tensor.data.view(-1).narrow(0, self.offset, self.numel)


def fragments(engine: Any) -> Iterator[Fragment]:
    """Where the float32 weights of every parameter are on this rank, at any ZeRO stage."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    rank, world = dist.get_rank(), dist.get_world_size()
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    master = {}  # ZeRO stage 0 in half precision
    if stage == 0 and hasattr(optimizer, "fp32_groups"):
        for halves, wholes in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            master.update({id(half): whole for half, whole in zip(halves, wholes, strict=True)})
    if stage == 3:
        for group, members in enumerate(optimizer.fp16_groups):
            for parameter in members:
                _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = rank * length
                numel = min(length, parameter.ds_numel - start)
                if numel > 0:
                    flat = optimizer.fp32_partitioned_groups_flat[group]
                    yield Fragment(names[id(parameter)], start, numel, flat, offset)
        return
    for index, parameter in enumerate(engine.module.parameters()):
        name = names[id(parameter)]
        if stage > 0:
            if (mapping := parameter._hp_mapping) is None:
                continue
            partitions = getattr(optimizer, "single_partition_of_fp32_groups", None)
            flat = (partitions or optimizer.fp32_groups_flat_partition)[mapping.param_group_index]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(name, here.start, here.numel, flat, there.start)
        else:
            stepped = master.get(id(parameter), parameter)
            yield Fragment(name, 0, stepped.numel(), stepped, 0, mine=index % world == rank)


def snapshot(engine: Any) -> Shard:
    """A copy of what this rank has to save; training may continue while it is written."""
    tensors, state, optimizer_step = {}, engine.basic_optimizer.state, 0
    for fragment in fragments(engine):
        moments = state.get(fragment.stepped, {})
        optimizer_step = int(moments.get("step", 0))
        if fragment.mine:
            for kind, tensor in [(WEIGHT, fragment.stepped), *((kind, moments.get(kind)) for kind in MOMENTS)]:
                if tensor is not None:
                    copied = fragment.of(tensor).detach().to("cpu", torch.float32, copy=True)
                    tensors[tensor_name(kind, fragment.parameter, fragment.start)] = copied
    scaler = _loss_scaler(engine) if engine.fp16_enabled() else None
    scales = {name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)}
    return Shard(tensors=tensors, counters={"optimizer_step": optimizer_step, "loss_scaler": scales})


def start(
    model: LanguageModel,
    run: RunConfig,
    execution: ExecutionConfig,
    checkpoints: Checkpoints,
    branch: Saved | None = None,
) -> tuple[Any, Progress]:
    """An engine and how far it is: as the newest intact checkpoint says, else as ``branch`` does, else at the start
    (``run.init_from``).

    Any number of ranks at any ZeRO stage can resume from a checkpoint of any other; with the same number at the same
    stage the run resumes to the last bit.

    Raises:
        CheckpointError: there are checkpoints, but none that can be read.
        InitialModelError: the weights to start from are not there, or have changed.
    """
    saved, damage = checkpoints.newest()
    if saved is None:
        saved = branch
    if saved is None:
        if run.init_from:
            llama.load_into(model, run.init_from)
        return build_engine(model, run, execution), Progress()
    saved.load_weights(model)
    engine = build_engine(model, run, execution)
    restore(engine, saved)
    progress = Progress(**saved.progress)
    if saved is branch:
        progress.pinned = []  # in the other run's folder
    progress.events += [
        {"step": progress.step, "what": f"{what}; resumed from step {progress.step}"} for what in damage
    ]
    return engine, progress


@torch.no_grad()
def restore(engine: Any, saved: Saved) -> None:
    """Give an engine the saved master weights, moments and counters.

    The engine's model must have been given the saved weights before it was wrapped (:meth:`Saved.load_weights`): what
    DeepSpeed derives from the master weights is right then, at every stage.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    state, optimizer_step = engine.basic_optimizer.state, saved.counters["optimizer_step"]
    by_muon = engine.basic_optimizer.parameters if isinstance(engine.basic_optimizer, MuonAdamW) else ()
    for fragment in fragments(engine):
        place = (fragment.parameter, fragment.start, fragment.numel)
        fragment.of(fragment.stepped).copy_(saved.read(WEIGHT, *place))
        if optimizer_step == 0:
            continue
        kinds = MUON_MOMENTS if fragment.parameter in by_muon else ADAM_MOMENTS
        if fragment.stepped not in state:
            fused = engine.basic_optimizer.defaults.get("fused") and kinds != MUON_MOMENTS
            device = fragment.stepped.device if fused else "cpu"
            moments = {kind: torch.zeros_like(fragment.stepped) for kind in kinds}
            state[fragment.stepped] = {"step": torch.tensor(float(optimizer_step), device=device), **moments}
        for kind in kinds:
            fragment.of(state[fragment.stepped][kind]).copy_(saved.read(kind, *place))
    for name, value in saved.counters["loss_scaler"].items():
        if hasattr(_loss_scaler(engine), name):  # the wrapper of ZeRO stage 0 has no hysteresis
            setattr(_loss_scaler(engine), name, value)


def _loss_scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The model's weights, whole, on the CPU; under ZeRO-3 gathered from all ranks (all must call)."""
    import deepspeed

    module: nn.Module = engine.module
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=engine.zero_optimization_stage() == 3):
        return {name: weight.detach().cpu().contiguous().clone() for name, weight in module.state_dict().items()}


@contextmanager
def readable(engine: Any) -> Iterator[tuple[LanguageModel, bool]]:
    """A model to evaluate with, and whether ranks may read different texts with it; all ranks call.

    Under ZeRO-3 a forward pass fetches weights from all ranks, as often as its text asks for. So a whole copy is read
    with, where it fits beside what training needs: on CPUs, where the export puts all weights together anyway, and on
    GPUs that all have room. Elsewhere ranks stay in step, and all read everything.
    """
    model: LanguageModel = engine.module
    if engine.zero_optimization_stage() < 3:
        yield model, True
    elif _has_room_for_a_copy(engine):
        whole = build_model(model.config, seed=0).to(next(model.parameters()).dtype)
        whole.load_state_dict(full_weights(engine))
        whole.attention_kernel, whole.head_loss = model.attention_kernel, model.head_loss
        yield whole.to(engine.device), True
    else:
        yield model, False


def _has_room_for_a_copy(engine: Any) -> bool:
    """Whether every rank's device has room for all weights, and for as much again to read with; all ranks call."""
    if engine.device.type == "cpu":
        return True
    needed = sum(int(parameter.ds_numel) * parameter.element_size() for parameter in engine.module.parameters())
    free, _ = torch.cuda.mem_get_info(engine.device)
    fits = torch.tensor([int(free > 2 * needed)], device=engine.device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    return bool(fits)

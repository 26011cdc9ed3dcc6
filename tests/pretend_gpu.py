"""A CUDA device that is none: tensors that say they are on it, and lie in the CPU's memory.

What needs no device to be found out is found out here: a tensor that was made on the wrong device, and every wait for
the device. Kernels are the CPU's, so their results are; what only a GPU can tell (its kernels, its speed) is not told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten
WAITS = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default),
    *(aten.is_nonzero.default, aten.bincount.default, aten._unique2.default, aten.repeat_interleave.Tensor),
}
"""What cannot answer before the device has done all its work so far: a number, or a size, depends on it."""
ANYWHERE = {aten.copy_.default, aten._to_copy.default}
"""What takes tensors from everywhere."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
"""What takes its indices from everywhere."""


class Pretended(Tensor):
    """A tensor on the device."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device="meta",  # PyTorch for CPUs knows no guard of CUDA devices, and needs none of this one
        )
        made.inside = inside
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.inside})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of pretended_gpu()")


class _Pretending(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._fused_sdp_choice.default:
            return 0  # the plain one: the CPU has no other that the GPU has too
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, Pretended)]
        indices = [id(x) for x in args[1]] if func in INDEXED else []
        here = [x for x in tensors if not isinstance(x, Pretended) and id(x) not in indices]
        asked = kwargs.get("device")
        if func not in ANYWHERE and there and any(x.dim() for x in here):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        masked = func in INDEXED and any(x is not None and x.dtype is torch.bool for x in args[1])
        to_cpu = func is aten._to_copy.default and asked is not None and torch.device(asked).type == "cpu"
        fetched = func is aten.copy_.default and isinstance(args[1], Pretended) and not isinstance(args[0], Pretended)
        if there and (func in WAITS or masked or to_cpu or fetched):
            self.waits.append(str(func))
        on_device = bool(there)
        if asked is not None:
            on_device = torch.device(asked).type != "cpu"  # "meta" is what PyTorch itself sees
            kwargs["device"] = "cpu"
        if func is aten.copy_.default:
            on_device = isinstance(args[0], Pretended)
        inner_args, inner_kwargs = tree_map(lambda x: x.inside if isinstance(x, Pretended) else x, (args, kwargs))
        found = func(*inner_args, **inner_kwargs)
        if not on_device:
            return found
        by_identity = {id(x.inside): x for x in there}

        def outside(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return by_identity.get(id(x)) if id(x) in by_identity else Pretended(x)

        leaves, shape = tree_flatten(found)
        return tree_unflatten([outside(x) for x in leaves], shape)


@contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """Within the block, DEVICE is there, and the list holds every wait for it so far."""
    torch._C._ensureCUDADeviceGuardSet()
    mode, before = _Pretending(), torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) moves in the open then
    try:
        with mock.patch("torch.cuda._lazy_init"), mode:
            yield mode.waits
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def put(module: torch.nn.Module) -> torch.nn.Module:
    """A module on the device; its parameters are new ones."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            owner.register_parameter(name, torch.nn.Parameter(Pretended(parameter.detach())))
    return module

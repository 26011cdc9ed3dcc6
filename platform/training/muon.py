"""Muon for the matrices inside the blocks, AdamW for the rest, on whatever part of a parameter this rank steps.

Muon (Jordan, 2024) makes the momentum of a whole matrix orthogonal. Under ZeRO a rank holds consecutive elements of it,
so the momentum of a matrix that several ranks hold is put together before: the update is that of one process at every
stage. Neither DeepSpeed's Muon nor PyTorch's serves here: DeepSpeed's makes *gradients* orthogonal before they are
clipped and before a loss scale is known, PyTorch's knows no fragments.

The steps are those of ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` (Liu et al., 2025, arXiv 2502.16982): an
update has the root mean square of AdamW's, so one learning rate and one weight decay serve both. Queries, keys, values,
gate and up, which the blocks keep in joint tensors, are matrices of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from haltscale.model import LanguageModel
from haltscale.model.backbone import Block
from haltscale.platform.checkpoints import MUON_MOMENTS
from haltscale.platform.config import Precision, RunConfig

(MOMENTUM,) = MUON_MOMENTS
MATRICES = "muon_matrices"
"""Name, in a parameter group, of the matrices that are in it; a group without it is AdamW's."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's, of the quintic iteration."""
ITERATIONS = 5


@dataclass(frozen=True)
class Matrix:
    """Consecutive rows of a parameter that are a matrix of their own."""

    parameter: str
    start: int
    """First element, in the flattened parameter."""
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.start + self.rows * self.columns


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a matrix in a tensor that this rank steps."""

    stepped: Tensor
    offset: int
    """First element, in the flattened ``stepped``."""
    start: int
    """First element, in the flattened matrix."""
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of ``stepped``, or of a tensor of its shape; a view."""
        return tensor.view(-1).narrow(0, self.offset, self.numel)


def matrices(model: LanguageModel) -> dict[str, list[Matrix]]:
    """The matrices that Muon steps, by the name of the parameter that holds them: those of the blocks.

    Embeddings, heads, norms, biases, routers and vectors are not among them.
    """
    found: dict[str, list[Matrix]] = {}
    for prefix, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        shape = block.shape
        kv = shape.kv_heads * shape.head_dim
        parts = {"qkv": (shape.d, kv, kv), "out": (shape.d,), "gate_up": (shape.ffn,) * 2, "down": (shape.d,)}
        for name, heights in parts.items():
            layer: nn.Linear = getattr(block, name)
            parameter, start = f"{prefix}.{name}.weight", 0
            found[parameter] = []
            for rows in heights:
                found[parameter].append(Matrix(parameter, start, rows, layer.in_features))
                start = found[parameter][-1].end
    return found


def with_muon(groups: Iterable[dict[str, Any]], model: LanguageModel, run: RunConfig) -> list[dict[str, Any]]:
    """AdamW's parameter groups with the blocks' matrices taken out, into groups of their own with the same settings."""
    owned = matrices(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parted: list[dict[str, Any]] = []
    for group in groups:
        inside = [parameter for parameter in group["params"] if names[id(parameter)] in owned]
        rest = [parameter for parameter in group["params"] if names[id(parameter)] not in owned]
        if rest:
            parted.append({**group, "params": rest})
        if inside:
            held = [matrix for parameter in inside for matrix in owned[names[id(parameter)]]]
            own = {MATRICES: held, "momentum": run.muon_momentum, "muon_rate": run.muon_rate}
            parted.append({**group, "params": inside, **own})
    return parted


def orthogonalised(momentum_RC: Tensor, dtype: torch.dtype) -> Tensor:
    """The momentum with singular values near 1 (between about 0.7 and 1.2), by Newton-Schulz steps in ``dtype``."""
    a, b, c = COEFFICIENTS
    x = momentum_RC.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(momentum_RC.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for the groups of :func:`with_muon`, which Muon steps; :meth:`place` comes before the first step."""

    def __init__(self, groups: list[dict[str, Any]], *, precision: Precision, **adamw: Any) -> None:
        """
        Args:
            precision: of the run; in half precision the orthogonalisation is computed in bfloat16, else in float32.
            adamw: what ``torch.optim.AdamW`` takes.
        """
        super().__init__(groups, **adamw)
        self._dtype = torch.float32 if precision is Precision.FP32 else torch.bfloat16
        self._device = torch.device("cpu")
        self._pieces: Mapping[Matrix, list[Piece]] | None = None
        self._shared: set[Matrix] = set()
        self.parameters = {matrix.parameter for group in groups for matrix in group.get(MATRICES, ())}
        """Names of the parameters that Muon steps."""

    def place(self, pieces: Mapping[Matrix, list[Piece]], device: torch.device) -> None:
        """Say where the matrices are on this rank; all ranks call.

        Args:
            pieces: by matrix; nothing, or an empty list, for one that is on other ranks.
            device: where momenta are put together and made orthogonal, wherever they live.
        """
        self._pieces, self._device = pieces, device
        whole = {m: sum(piece.numel for piece in pieces.get(m, ())) == m.end - m.start for m in self._all()}
        every: list[Any] = [None] * dist.get_world_size()
        # A matrix is whole on the ranks that have any of it, or it is shared: all agree on which.
        dist.all_gather_object(every, [bool(pieces.get(m)) and not whole[m] for m in self._all()])
        self._shared = {m for m, *parts in zip(self._all(), *every, strict=True) if any(parts)}

    def _all(self) -> list[Matrix]:
        return [matrix for group in self.param_groups for matrix in group.get(MATRICES, ())]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the groups that are there; under ZeRO all ranks call with the same ones."""
        every = self.param_groups
        self.param_groups = [group for group in every if MATRICES not in group]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        if self._pieces is not None:  # DeepSpeed's wrappers take steps of rate 0 while they are built
            for group in every:
                if MATRICES in group:
                    self._muon(group, self._pieces)
        return loss

    def _muon(self, group: dict[str, Any], places: Mapping[Matrix, list[Piece]]) -> None:
        rate, updates = group["lr"] * group["muon_rate"], {}
        for stepped in group["params"]:
            if stepped.grad is None:
                continue
            state = self.state[stepped]
            if MOMENTUM not in state:
                state["step"], state[MOMENTUM] = torch.tensor(0.0), torch.zeros_like(stepped)
            state["step"] += 1
            gradient = stepped.grad.to(stepped.dtype)
            state[MOMENTUM].lerp_(gradient, 1 - group["momentum"])
            updates[stepped] = gradient.lerp(state[MOMENTUM], group["momentum"])  # Nesterov's
            stepped.mul_(1 - rate * group["weight_decay"])
        for matrix in group[MATRICES]:
            pieces = [piece for piece in places.get(matrix, ()) if piece.stepped in updates]
            if not pieces and matrix not in self._shared:
                continue
            momentum = torch.zeros(matrix.end - matrix.start, device=self._device)
            for piece in pieces:
                momentum.narrow(0, piece.start, piece.numel).copy_(piece.of(updates[piece.stepped]))
            if matrix in self._shared:
                dist.all_reduce(momentum)  # each element is on one rank, and 0 on all others
            if pieces:
                update = orthogonalised(momentum.view(matrix.rows, matrix.columns), self._dtype).flatten()
                scaled = rate * 0.2 * max(matrix.rows, matrix.columns) ** 0.5
                for piece in pieces:
                    part = update.narrow(0, piece.start, piece.numel).to(piece.stepped.device)
                    piece.of(piece.stepped).add_(part, alpha=-scaled)

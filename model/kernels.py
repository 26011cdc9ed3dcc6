"""Functions whose gradients are written by hand, because autograd's cost too much memory traffic.

On a CPU, up to half the time of a small model goes into reading and writing tensors between the matrix products.
Autograd makes that worse: every slice of the keys gets a full-sized gradient of zeros, and a norm leaves four tensors
behind where one number per row is enough. Each function here has the plain formula as its definition, and the tests
hold it to that. Where torch.compile is at work, the plain formula serves (backbone.py): it fuses better by itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision; softmax, cross-entropy, gates and masses are computed in this."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RMSNormFunction(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean square in at least float32."""

    @staticmethod
    def forward(ctx: Any, x_Nd: Tensor, weight_d: Tensor, eps: float) -> Tensor:
        wide_Nd = at_least_float32(x_Nd)
        mean_N1 = torch.linalg.vector_norm(wide_Nd, dim=-1, keepdim=True).square_().div_(x_Nd.shape[-1])
        scale_N1 = mean_N1.add_(eps).rsqrt_()
        ctx.save_for_backward(x_Nd, weight_d, scale_N1)
        normed_Nd: Tensor = (wide_Nd * scale_N1).to(x_Nd.dtype).mul_(weight_d)
        return normed_Nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Nd: Tensor) -> tuple[Tensor, Tensor, None]:
        x_Nd, weight_d, scale_N1 = ctx.saved_tensors
        wide_d = at_least_float32(weight_d)
        unit_Nd = at_least_float32(x_Nd) * scale_N1
        grad_Nd = at_least_float32(grad_Nd)
        product_Nd = grad_Nd * unit_Nd
        grad_weight_d = product_Nd.sum(0)
        along_N = product_Nd.mv(wide_d).div_(x_Nd.shape[-1])  # the part of the gradient that would only rescale x
        grad_x_Nd = torch.mul(grad_Nd, wide_d, out=product_Nd).mul_(scale_N1)
        grad_x_Nd.addcmul_(unit_Nd, along_N[:, None] * scale_N1, value=-1)
        return grad_x_Nd.to(x_Nd.dtype), grad_weight_d.to(weight_d.dtype), None


def _turn(x_NHE: Tensor, cos_N1E: Tensor, sin_N1E: Tensor, direction: int) -> Tensor:
    half = x_NHE.shape[-1] // 2
    wide_NHE = x_NHE.to(cos_N1E.dtype)
    a_NHE, b_NHE = wide_NHE[..., :half], wide_NHE[..., half:]
    out_NHE = torch.empty(x_NHE.shape, dtype=wide_NHE.dtype, device=x_NHE.device)
    torch.mul(a_NHE, cos_N1E, out=out_NHE[..., :half]).addcmul_(b_NHE, sin_N1E, value=-direction)
    torch.mul(b_NHE, cos_N1E, out=out_NHE[..., half:]).addcmul_(a_NHE, sin_N1E, value=direction)
    return out_NHE.to(x_NHE.dtype)


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up, gate and up the halves of the last dimension; keeps nothing but its input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


class CrossEntropyFunction(torch.autograd.Function):
    """-log softmax(logits)[target] of each row in at least float32; 0 where the target is `ignored`.

    The rows go by in parts that fit a cache, so nothing of the size of the logits is made but their gradient, and
    that in their own dtype; PyTorch's own keeps the log-probabilities and, in half precision, three float32 copies.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, ignored: int) -> Tensor:
        scored_N = target_N != ignored
        target_N1 = target_N.masked_fill(~scored_N, 0)[:, None]
        ctx.save_for_backward(logits_NV, target_N1, scored_N)
        step = cache_sized_rows(logits_NV)
        parts = zip(logits_NV.split(step), target_N1.split(step), strict=True)
        chosen = [at_least_float32(part_MV).log_softmax(1).gather(1, target_M1) for part_MV, target_M1 in parts]
        return torch.cat(chosen).squeeze(1).neg_().masked_fill_(~scored_N, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, target_N1, scored_N = ctx.saved_tensors
        grad_N1 = (grad_N * scored_N)[:, None]
        grad_NV = torch.empty_like(logits_NV)
        step = cache_sized_rows(logits_NV)
        every = (logits_NV, target_N1, grad_N1, grad_NV)
        for part_MV, target_M1, grad_M1, grad_MV in zip(*(x.split(step) for x in every), strict=True):
            excess_MV = at_least_float32(part_MV).softmax(1)
            excess_MV.scatter_add_(1, target_M1, excess_MV.new_full((), -1.0).expand(target_M1.shape))
            grad_MV.copy_(excess_MV.mul_(grad_M1))
        return grad_NV, None, None


class HeadLossFunction(torch.autograd.Function):
    """-log softmax(hidden weight^T)[target] of each row in at least float32; 0 where the target is `ignored`.

    The same as the head and CrossEntropyFunction, by parts of the rows: the logits of all rows are never there at once,
    and are computed again on the way back. PyTorch's own, `linear_cross_entropy`, rounds losses to half precision.
    """

    @staticmethod
    def forward(ctx: Any, hidden_Nd: Tensor, weight_Vd: Tensor, target_N: Tensor, ignored: int) -> Tensor:
        scored_N = target_N != ignored
        target_N1 = target_N.masked_fill(~scored_N, 0)[:, None]
        ctx.save_for_backward(hidden_Nd, weight_Vd, target_N1, scored_N)
        step = rows_in_a_part(weight_Vd)
        parts = zip(hidden_Nd.split(step), target_N1.split(step), strict=True)
        chosen = [
            at_least_float32(part_Md @ weight_Vd.T).log_softmax(1).gather(1, target_M1) for part_Md, target_M1 in parts
        ]
        return torch.cat(chosen).squeeze(1).neg_().masked_fill_(~scored_N, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_Nd, weight_Vd, target_N1, scored_N = ctx.saved_tensors
        grad_N1 = (grad_N * scored_N)[:, None]
        grad_hidden_Nd = torch.empty_like(hidden_Nd)
        grad_weight_Vd = torch.zeros_like(at_least_float32(weight_Vd))
        step = rows_in_a_part(weight_Vd)
        every = (hidden_Nd, target_N1, grad_N1, grad_hidden_Nd)
        for part_Md, target_M1, grad_M1, grad_Md in zip(*(x.split(step) for x in every), strict=True):
            excess_MV = at_least_float32(part_Md @ weight_Vd.T).softmax(1)
            excess_MV.scatter_add_(1, target_M1, excess_MV.new_full((), -1.0).expand(target_M1.shape))
            excess_MV = excess_MV.mul_(grad_M1).to(hidden_Nd.dtype)
            torch.mm(excess_MV, weight_Vd, out=grad_Md)
            grad_weight_Vd += excess_MV.T @ part_Md
        return grad_hidden_Nd, grad_weight_Vd, None, None


def rows_in_a_part(weight_Vd: Tensor) -> int:
    """Rows whose logits are made at once: 64 MiB of them in float32 on a CPU, 256 MiB elsewhere."""
    numbers = 1 << (24 if weight_Vd.device.type == "cpu" else 26)
    return max(1, numbers // len(weight_Vd))


def cache_sized_rows(logits_NV: Tensor) -> int:
    """Rows to treat at once: 1 MiB of float32 on a CPU, whose cache it should fit; 256 MiB elsewhere."""
    numbers = 1 << (18 if logits_NV.device.type == "cpu" else 26)
    return max(1, numbers // max(1, logits_NV.shape[1]))


class RotateFunction(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of the last dimension; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x_NHE: Tensor, cos_N1E: Tensor, sin_N1E: Tensor) -> Tensor:
        ctx.save_for_backward(cos_N1E, sin_N1E)
        return _turn(x_NHE, cos_N1E, sin_N1E, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHE: Tensor) -> tuple[Tensor, None, None]:
        cos_N1E, sin_N1E = ctx.saved_tensors
        return _turn(grad_NHE, cos_N1E, sin_N1E, -1), None, None


class MergeFunction(torch.autograd.Function):
    """The rows of several parts put into their slots of [size, d]; slots that get nothing stay 0.

    Each slot gets one row at most, but for the last, spare one, which nobody reads; so the gradient is a plain gather.
    """

    @staticmethod
    def forward(ctx: Any, size: int, full: bool, slots: list[Tensor], *parts: Tensor) -> Tensor:
        """full: every slot but the spare one gets a row, so there is nothing to fill with 0."""
        ctx.slots = slots
        last = parts[-1]
        merged = last.new_empty(size, last.shape[1]) if full else last.new_zeros(size, last.shape[1])
        merged[-1].zero_()
        for own_slots, part in zip(slots, parts, strict=True):
            merged.index_copy_(0, own_slots, part)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(grad.index_select(0, own_slots) for own_slots in ctx.slots)


class TakeFunction(torch.autograd.Function):
    """Some rows, each at most once; so the gradient is a plain copy into zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.size = len(rows)
        return rows.index_select(0, index_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, grad.shape[1]).index_copy_(0, index_N, grad), None


Chunk = tuple[int, int, int, Tensor | None]
"""Queries a..b see keys 0..width under an additive mask, or, without one, those up to their own."""


class ChunkedAttentionFunction(torch.autograd.Function):
    """Attention of queries in chunks, each over a prefix of the keys, with PyTorch's fused CPU kernels.

    Equal to calling scaled_dot_product_attention chunk by chunk; the gradients of keys and values are added up in
    place over the prefixes. Gradients of half precision are computed in float32: the kernel is up to twice as fast in
    it, and rounds less.
    """

    @staticmethod
    def forward(ctx: Any, q_BHME: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, chunks: list[Chunk]) -> Tensor:
        parts, sums = [], []
        for a, b, width, mask in chunks:
            out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_BHME[:, :, a:b], k_BHSE[:, :, :width], v_BHSE[:, :, :width], 0.0, mask is None, attn_mask=mask
            )
            parts.append(out)
            sums.append(log_sum)
        ctx.chunks = chunks
        ctx.save_for_backward(q_BHME, k_BHSE, v_BHSE, *parts, *sums)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHME: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHME, k_BHSE, v_BHSE, *rest = ctx.saved_tensors
        chunks: list[Chunk] = ctx.chunks
        dtype = q_BHME.dtype
        grad_BHME, q_BHME, k_BHSE, v_BHSE = map(at_least_float32, (grad_BHME, q_BHME, k_BHSE, v_BHSE))
        grad_q = torch.empty_like(q_BHME)
        grad_k: Any = None
        grad_v: Any = None
        for n, (a, b, width, mask) in reversed(list(enumerate(chunks))):  # the widest first
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_BHME[:, :, a:b],
                q_BHME[:, :, a:b],
                k_BHSE[:, :, :width],
                v_BHSE[:, :, :width],
                at_least_float32(rest[n]),
                rest[len(chunks) + n],
                0.0,
                mask is None,
                attn_mask=None if mask is None else at_least_float32(mask),
            )
            grad_q[:, :, a:b] = dq
            if grad_k is None and width == k_BHSE.shape[2]:
                grad_k, grad_v = dk, dv
                continue
            if grad_k is None:
                grad_k, grad_v = torch.zeros_like(k_BHSE), torch.zeros_like(v_BHSE)
            grad_k[:, :, :width] += dk
            grad_v[:, :, :width] += dv
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), None


def fused_cpu_attention(q: Tensor) -> bool:
    """Whether attention may call the fused CPU kernels directly (not under `sdpa_kernel(SDPBackend.MATH)`)."""
    return q.device.type == "cpu" and torch.backends.cuda.flash_sdp_enabled()

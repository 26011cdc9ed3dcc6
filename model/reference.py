"""Adaptive latent chain-of-thought (arXiv 2602.08220) in one file: slow, obvious, and the tests' oracle.

A token's hidden state z[t,0] may be fed back 0 to l_max times, z[t,k] = f(z[t,k-1]), where f is the whole Llama stack
with its final norm. After each pass a router gives the probability of another step; the token stops for good once less
than tau of its probability mass would reach the next state. The head reads the mean of its states, weighted by the mass
that stopped at each. Reconstructions of what the paper's public traces leave open are marked [R] in adaptive.py.

Everything is computed densely: all states of all tokens, with masks; model/latent_loop.py does the same work packed.
The parameters have the names of `AdaptiveModel`, so that either loads the other's weights. Shapes: B rows, T tokens,
d hidden size, H heads of size E, S states that are looked at, V vocabulary. `python -m haltscale.model.reference`
trains a small one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x_BTHE: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotary position embedding: all latent steps of a token use the token's own position."""
    T, half = x_BTHE.shape[1], x_BTHE.shape[3] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle_T1e = (torch.arange(T, dtype=torch.float64)[:, None] * frequency)[:, None]
    cos, sin = angle_T1e.cos().to(x_BTHE.dtype), angle_T1e.sin().to(x_BTHE.dtype)
    a, b = x_BTHE[..., :half], x_BTHE[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Attention and SwiGLU. A state sees the states of steps up to its own, at its position and before it."""

    def __init__(self, d: int, heads: int, ffn: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = RMSNorm(d), RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.gate_up, self.down = nn.Linear(d, 2 * ffn, bias=False), nn.Linear(ffn, d, bias=False)

    def forward(self, x_BTd: Tensor, earlier: list[tuple[Tensor, Tensor]], exists: list[Tensor]) -> Tensor:
        """earlier: keys and values of steps 0..k-1, to which this step's are added; exists: per step, which states
        were executed [B, T], this step's last."""
        B, T, d = x_BTd.shape
        q, k, v = self.qkv(self.attention_norm(x_BTd)).view(B, T, 3, self.heads, -1).unbind(2)
        earlier.append((rotate(k), v))
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*earlier, strict=True))
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        seen_BTS = torch.cat([causal & there_BT[:, None, :] for there_BT in exists], dim=2)
        own = torch.eye(T, dtype=torch.bool).repeat(1, len(exists))  # a state that is not executed sees itself alone,
        seen_BTS = torch.where(exists[-1][:, :, None], seen_BTS, own)  # so that no row of the softmax is empty
        scores = torch.einsum("bthe,bshe->bhts", rotate(q), keys) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~seen_BTS[:, None], -math.inf).softmax(dim=-1)
        x_BTd = x_BTd + self.out(torch.einsum("bhts,bshe->bthe", weights, values).reshape(B, T, d))
        gate, up = self.gate_up(self.mlp_norm(x_BTd)).chunk(2, dim=-1)
        mlp_BTd: Tensor = self.down(F.silu(gate) * up)
        return x_BTd + mlp_BTd


class Stack(nn.Module):
    """f: all blocks and the final norm, one pass over every token."""

    def __init__(self, layers: int, d: int, heads: int, ffn: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(d, heads, ffn) for _ in range(layers))
        self.final_norm = RMSNorm(d)

    def forward(self, x_BTd: Tensor, memory: list[list[tuple[Tensor, Tensor]]], exists: list[Tensor]) -> Tensor:
        for block, earlier in zip(self.blocks, memory, strict=True):
            x_BTd = block(x_BTd, earlier, exists)
        z_BTd: Tensor = self.final_norm(x_BTd)
        return z_BTd


class Router(nn.Module):
    """The probability of another step: sigmoid(w . z + b). It starts the same for every token."""

    def __init__(self, d: int, bias: float):
        super().__init__()
        self.score = nn.Linear(d, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, bias)

    def forward(self, z_BTd: Tensor) -> Tensor:
        return torch.sigmoid(self.score(z_BTd)).squeeze(-1)


class LatentLoop(nn.Module):
    """The parts of a latent step, under the names that `AdaptiveModel` gives them."""

    def __init__(self, stack: Stack, router: Router):
        super().__init__()
        self.stack, self.routers = stack, nn.ModuleList([router])


class AdaptiveLatentCoT(nn.Module):
    """The model and its loss."""

    def __init__(
        self,
        *,
        layers: int,
        d: int,
        heads: int,
        ffn: int,
        vocab_size: int,
        l_max: int = 3,
        tau: float = 1e-4,
        lam: float = 0.1,
        beta: float = 1.0,
        router_bias: float = 2.0,
    ):
        super().__init__()
        self.l_max, self.tau, self.lam, self.beta, self.d = l_max, tau, lam, beta, d
        self.embedding = nn.Embedding(vocab_size, d)
        self.latent_loop = LatentLoop(Stack(layers, d, heads, ffn), Router(d, router_bias))
        self.head = nn.Linear(d, vocab_size, bias=False)
        nn.init.normal_(
            self.embedding.weight, std=math.sqrt(2 / (5 * d))
        )  # times sqrt(2.5 d) on the way in: unit scale

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> dict[str, Tensor]:
        """Loss (nats per token, penalty included) of next tokens, logits, and what each token did."""
        stack, (router,) = self.latent_loop.stack, self.latent_loop.routers
        x_BTd = self.embedding(tokens_BT) * math.sqrt(2.5 * self.d)
        memory: list[list[tuple[Tensor, Tensor]]] = [[] for _ in stack.blocks]
        exists = [torch.ones_like(tokens_BT, dtype=torch.bool)]  # which states are executed, by step
        reach_BT = torch.ones(tokens_BT.shape, dtype=x_BTd.dtype)  # probability mass that gets to this step
        hidden_BTd = torch.zeros_like(x_BTd)
        expected_BT = torch.zeros_like(reach_BT)  # latent steps, as the masses expect them
        for k in range(self.l_max + 1):
            z_BTd = stack(x_BTd, memory, exists)
            onward_BT = reach_BT * router(z_BTd) if k < self.l_max else torch.zeros_like(reach_BT)
            goes_on_BT = exists[-1] & (onward_BT > self.tau)
            # What stops here: the mass that goes no further; all that is left where the token stops for good.
            exit_BT = torch.where(goes_on_BT, reach_BT - onward_BT, reach_BT) * exists[-1]
            hidden_BTd = hidden_BTd + exit_BT[..., None] * z_BTd
            expected_BT = expected_BT + (reach_BT * exists[-1] if k > 0 else 0.0)
            x_BTd, reach_BT = z_BTd, onward_BT
            exists = [*exists, goes_on_BT]
        logits_BTV = self.head(hidden_BTd)
        nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
        confidence_BT = torch.exp(-nll_BT.detach())  # of the true token: what is predicted well is pressed to stop
        penalty = self.lam * (confidence_BT**self.beta * expected_BT).mean()
        steps_BT = torch.stack(exists[1:-1]).sum(0) if self.l_max else torch.zeros_like(tokens_BT)
        return {"loss": nll_BT.mean() + penalty, "nll": nll_BT, "logits": logits_BTV, "steps": steps_BT}


if __name__ == "__main__":
    torch.manual_seed(0)
    model = AdaptiveLatentCoT(layers=2, d=32, heads=2, ffn=86, vocab_size=16, tau=0.1, lam=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(101):
        text = torch.arange(33).remainder(7) + torch.randint(0, 9, (16, 1))
        out = model(text[:, :-1], text[:, 1:])
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: {out['nll'].mean():.3f} nats, {out['steps'].float().mean():.2f} latent steps")  # noqa: T201

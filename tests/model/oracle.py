"""Slow models straight from the definitions: one row at a time, Python loops, no masks, no packing.

They read the weights of the model under test and share none of its code. conftest.py hands this module to the tests
as the fixture `oracle`.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

States = list[dict[tuple[int, int], tuple[Tensor, Tensor]]]  # per layer: (position, step) -> key, value


def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    return x / torch.sqrt((x * x).mean() + module.eps) * module.weight


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of one head's vector: pair i is (x[i], x[i + E/2]), turned by position * theta^(-2i/E)."""
    half = x.shape[-1] // 2
    out = [None] * x.shape[-1]
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[-1])
        out[i] = x[..., i] * math.cos(angle) - x[..., i + half] * math.sin(angle)
        out[i + half] = x[..., i] * math.sin(angle) + x[..., i + half] * math.cos(angle)
    return torch.stack(out, dim=-1)


def block_row(
    block: torch.nn.Module,
    x: Tensor,
    position: int,
    theta: float,
    states: dict[tuple[int, int], tuple[Tensor, Tensor]],
    me: tuple[int, int],
    visible: Iterable[tuple[int, int]],
) -> Tensor:
    """One row through one block. It leaves its key and value in `states[me]` and looks at `visible` (me included)."""
    shape = block.shape
    H, G, E = shape.heads, shape.kv_heads, shape.head_dim
    qkv = block.qkv.weight @ norm(x, block.attention_norm)
    q = turn(qkv[: H * E].view(H, E), position, theta)
    k = turn(qkv[H * E : (H + G) * E].view(G, E), position, theta)
    states[me] = (k, qkv[(H + G) * E :].view(G, E))
    seen = [states[other] for other in visible]
    heads = []
    for h in range(H):
        g = h // (H // G)
        scores = torch.stack([q[h] @ key[g] for key, _ in seen]) / math.sqrt(E)
        weights = torch.softmax(scores, dim=0)
        heads.append(sum(w * value[g] for w, (_, value) in zip(weights, seen, strict=True)))
    x = x + block.out.weight @ torch.cat(heads)
    gate, up = (block.gate_up.weight @ norm(x, block.mlp_norm)).chunk(2)
    return x + block.down.weight @ (gate / (1 + torch.exp(-gate)) * up)


def stack_row(
    stack: torch.nn.Module,
    x: Tensor,
    position: int,
    theta: float,
    states: States,
    me: tuple[int, int],
    visible: list[tuple[int, int]],
    *,
    final_norm: bool = True,
) -> Tensor:
    """One row through all blocks and the final norm."""
    for block, layer_states in zip(stack.blocks, states, strict=True):
        x = block_row(block, x, position, theta, layer_states, me, visible)
    return norm(x, stack.final_norm) if final_norm else x


def embed(model: torch.nn.Module, token: int) -> Tensor:
    scale = math.sqrt(2.5 * model.config.shape.d) if model.config.embedding_scale else 1.0
    return model.embedding.weight[token] * scale


def head(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    weight = model.embedding.weight if model.head is None else model.head.weight
    return weight @ hidden


def new_states(stack: torch.nn.Module) -> States:
    return [{} for _ in stack.blocks]


def loss_of(logits_TV: list[Tensor], targets: list[int], extra: list[Tensor | float], lam: float, beta: float):
    """Sums over scored tokens of one sequence: (nats, penalty, number)."""
    nats, pressed, scored = 0.0, 0.0, 0
    for logits, target, steps in zip(logits_TV, targets, extra, strict=True):
        if target == -100:
            continue
        nll = -torch.log_softmax(logits, dim=0)[target]
        nats = nats + nll
        pressed = pressed + torch.exp(-nll.detach()) ** beta * steps
        scored += 1
    return nats, lam * pressed, scored


def adaptive_sequence(model: torch.nn.Module, tokens: list[int]):
    """Adaptive latent chain-of-thought over one sequence, in decoding order: (logits, expected steps, executed)."""
    options, theta = model.options, model.config.rope_theta
    stack, router = model.latent_loop.stack, model.latent_loop.router
    states = new_states(stack)
    executed: list[int] = []
    all_logits, expected = [], []
    for t, token in enumerate(tokens):
        z = embed(model, token)
        reach = torch.ones((), dtype=z.dtype)
        mixture, steps = torch.zeros_like(z), torch.zeros((), dtype=z.dtype)
        executed.append(0)
        for k in range(options.l_max + 1):
            visible = [(j, i) for j in range(t) for i in range(min(k, executed[j] - 1) + 1)]
            executed[t] = k + 1
            visible += [(t, i) for i in range(k + 1)]
            z = stack_row(stack, z, t, theta, states, (t, k), visible)
            if k > 0:
                steps = steps + reach
            onward = None
            if k < options.l_max:
                score = router.score
                onward = reach / (1 + torch.exp(-(score.weight[0] @ z + score.bias[0])))
            if onward is None or not onward > options.tau:
                mixture = mixture + reach * z
                break
            mixture = mixture + (reach - onward) * z
            reach = onward
        all_logits.append(head(model, mixture))
        expected.append(steps)
    return all_logits, expected, executed


def vanilla_sequence(model: torch.nn.Module, tokens: list[int]):
    """The plain Llama over one sequence."""
    states = new_states(model.stack)
    out = []
    for t, token in enumerate(tokens):
        visible = [(j, 0) for j in range(t + 1)]
        z = stack_row(model.stack, embed(model, token), t, model.config.rope_theta, states, (t, 0), visible)
        out.append(head(model, z))
    return out, [0.0] * len(tokens), [1] * len(tokens)


def batch_loss(model: torch.nn.Module, sequence, rows: list[list[int]], targets: list[list[int]], lam=0.0, beta=1.0):
    """(loss, logits per row, executed states per row) of unpadded rows, with `sequence` one of the functions above."""
    nats, pressed, scored, logits, executed = 0.0, 0.0, 0, [], []
    for tokens, wanted in zip(rows, targets, strict=True):
        row_logits, steps, row_executed = sequence(model, tokens)
        one = loss_of(row_logits, wanted, steps, lam, beta)
        nats, pressed, scored = nats + one[0], pressed + one[1], scored + one[2]
        logits.append(torch.stack(row_logits))
        executed.append(row_executed)
    return (nats + pressed) / scored, logits, executed

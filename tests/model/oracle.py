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
    fade: dict[tuple[int, int], Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """One row through one block. It leaves its key and value in `states[me]` and looks at `visible` (me included).

    fade: added to the score of each key. scale: of what is added to the residual stream.
    """
    visible = list(visible)
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
        if fade is not None:
            scores = scores + torch.stack([fade[other] for other in visible])
        weights = torch.softmax(scores, dim=0)
        heads.append(sum(w * value[g] for w, (_, value) in zip(weights, seen, strict=True)))
    x = x + scale * (block.out.weight @ torch.cat(heads))
    gate, up = (block.gate_up.weight @ norm(x, block.mlp_norm)).chunk(2)
    return x + scale * (block.down.weight @ (gate / (1 + torch.exp(-gate)) * up))


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
    fade: dict[tuple[int, int], Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """One row through all blocks and the final norm."""
    for block, layer_states in zip(stack.blocks, states, strict=True):
        x = block_row(block, x, position, theta, layer_states, me, visible, fade, scale)
    return norm(x, stack.final_norm) if final_norm else x


def embed(model: torch.nn.Module, token: int) -> Tensor:
    return table(model)[token]


def table(model: torch.nn.Module) -> Tensor:
    """The input vectors of all tokens."""
    scale = {"none": 1.0, "sqrt_d": model.config.shape.d**0.5, "unit": (2.5 * model.config.shape.d) ** 0.5}
    factors = model.embedding.weight
    whole = factors if not model.config.embedding_rank else factors @ model.embedding_up.weight.T
    return whole * scale[model.config.embedding_scale]


def head(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    if model.config.embedding_rank:
        if model.config.tie_embeddings:
            return model.embedding.weight @ (model.embedding_up.weight.T @ hidden)
        return model.head[1].weight @ (model.head[0].weight @ hidden)
    weight = model.embedding.weight if model.head is None else model.head.weight
    return weight @ hidden


def new_states(stack: torch.nn.Module) -> States:
    return [{} for _ in stack.blocks]


def loss_of(logits_TV: list[Tensor], targets: list[int], extra: list[Tensor | float], lam: float, beta: float | None):
    """Sums over scored tokens of one sequence: (nats, penalty, number). beta None: `extra` is weighted already."""
    nats, pressed, scored = 0.0, 0.0, 0
    for logits, target, steps in zip(logits_TV, targets, extra, strict=True):
        if target == -100:
            continue
        nll = -torch.log_softmax(logits, dim=0)[target]
        nats = nats + nll
        pressed = pressed + (1.0 if beta is None else torch.exp(-nll.detach()) ** beta) * steps
        scored += 1
    return nats, lam * pressed, scored


def crossed(model: torch.nn.Module, z: Tensor, e: Tensor) -> Tensor:
    """A state on its way into the stack again, e being its embedded token."""
    options, border = model.config.options, model.latent_loop.border
    if options.injection == "norm":
        z = norm(z, border.state_norm) + border.alpha[0] * e
    elif options.injection == "add":
        z = z + e
    return norm(z, border.input_norm) if options.loop_norm else z


def switches(model: torch.nn.Module, most: int) -> tuple[int, int, float]:
    """(latent steps allowed at the model's share of the budget, passes without a gradient, residual scale)."""
    options, share = model.config.options, model.budget_share
    deepest, W = most, options.depth_growth
    if share < W:
        curve = options.depth_curve
        passes = (most + 1) * (1 - math.sqrt((W - share) / W)) if curve == "sqrt" else (most + 1) * share / W
        deepest = {"linear": math.floor(passes), "sqrt": max(math.ceil(passes), 1) - 1, "late": 0}[curve]
    gradless = deepest + 1 - options.gradient_passes if options.gradient_passes else 0
    return deepest, max(gradless, 0), 1 / (most + 1) if options.scaled_residuals else 1.0


def adaptive_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    """Adaptive latent chain-of-thought over one sequence, in decoding order: (logits, expected steps, executed)."""
    options, theta = model.options, model.config.rope_theta
    stack, routers = model.latent_loop.stack, model.latent_loop.routers
    states = new_states(stack)
    executed: list[int] = []
    all_logits, expected = [], []

    def gate(z: Tensor, k: int) -> Tensor:
        if options.router == "none":
            return torch.tensor(1 / (1 + math.exp(-options.router_bias)), dtype=z.dtype)
        router = routers[k if options.router_per_step else 0]
        if options.router == "mlp":
            z = router.hidden.weight @ z
            z = z / (1 + torch.exp(-z))
        return 1 / (1 + torch.exp(-(router.score.weight[0] @ z + router.score.bias[0])))

    def spoken(z: Tensor) -> Tensor:
        return torch.softmax(head(model, z), dim=0) if options.mixture == "probability" else z

    for t, token in enumerate(tokens):
        z = embed(model, token)
        reach = torch.ones((), dtype=z.dtype)
        mixture, steps = torch.zeros_like(spoken(z)), torch.zeros((), dtype=z.dtype)
        executed.append(0)
        for k in range(options.l_max + 1):
            visible = [(j, i) for j in range(t) for i in range(min(k, executed[j] - 1) + 1)]
            executed[t] = k + 1
            visible += [(t, i) for i in range(k + 1)]
            before, z = z, stack_row(stack, z, t, theta, states, (t, k), visible)
            if k > 0 and options.penalty_probability == "mixture":
                steps = steps + reach
            elif k > 0 and targets[t] != -100:
                probability = torch.softmax(head(model, before), dim=0)[targets[t]].detach()
                steps = steps + probability**options.beta * reach
            onward = None
            if k < options.l_max:
                onward = reach * gate(z, k)
            if onward is None or not onward > options.tau:
                mixture = mixture + reach * spoken(z)
                break
            mixture = mixture + (reach - onward) * spoken(z)
            reach = onward
            if options.truncate_gradient:
                z = z.detach()
        all_logits.append(torch.log(mixture) if options.mixture == "probability" else head(model, mixture))
        expected.append(steps)
    return all_logits, expected, executed


def vanilla_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
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
        row_logits, steps, row_executed = sequence(model, tokens, wanted)
        one = loss_of(row_logits, wanted, steps, lam, beta)
        nats, pressed, scored = nats + one[0], pressed + one[1], scored + one[2]
        logits.append(torch.stack(row_logits))
        executed.append(row_executed)
    return (nats + pressed) / scored, logits, executed


def fixed_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    """The latent chain with a dictated number of steps, read at the last state."""
    stack, theta = model.latent_loop.stack, model.config.rope_theta
    states = new_states(stack)
    executed: list[int] = []
    out = []
    deepest, gradless, scale = switches(model, math.ceil(model.steps))
    for t, token in enumerate(tokens):
        whole = math.floor(model.steps)
        share = (t + 1) * 0.6180339887498949
        steps = whole + (1 if share - math.floor(share) < model.steps - whole else 0)
        z = e = embed(model, token)
        executed.append(0)
        for k in range(min(steps, deepest) + 1):
            executed[t] = k + 1
            visible = [(j, i) for j in range(t + 1) for i in range(min(k, executed[j] - 1) + 1)]
            with torch.set_grad_enabled(k >= gradless):
                x = crossed(model, z, e) if k else e
                z = stack_row(stack, x, t, theta, states, (t, k), visible, scale=scale)
        out.append(head(model, z))
    return out, [0.0] * len(tokens), executed


def shuffled_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    """Adaptive with the scout's steps carried out `shift` tokens later."""
    _, _, meant = adaptive_sequence(model, tokens, targets)
    stack, theta, score = model.latent_loop.stack, model.config.rope_theta, model.latent_loop.routers[0].score
    states = new_states(stack)
    executed: list[int] = []
    out, expected = [], []
    for t, token in enumerate(tokens):
        wanted = meant[t - model.shift] if t >= model.shift else meant[t]
        z, executed = embed(model, token), [*executed, 0]
        reach, mixture, steps = torch.ones((), dtype=z.dtype), torch.zeros_like(z), torch.zeros((), dtype=z.dtype)
        for k in range(wanted):
            executed[t] = k + 1
            visible = [(j, i) for j in range(t + 1) for i in range(min(k, executed[j] - 1) + 1)]
            z = stack_row(stack, z, t, theta, states, (t, k), visible)
            if k:
                steps = steps + reach
            if k == wanted - 1:
                mixture = mixture + reach * z
            else:
                onward = reach / (1 + torch.exp(-(score.weight[0] @ z + score.bias[0])))
                mixture, reach = mixture + (reach - onward) * z, onward
        out.append(head(model, mixture))
        expected.append(steps)
    return out, expected, executed


def causal_pass(
    model: torch.nn.Module, rows: list[Tensor], positions: list[int], *, final_norm: bool = True, scale: float = 1.0
):
    """One ordinary causal pass over these input vectors."""
    stack, out = model.latent_loop.stack, []
    states = new_states(stack)
    for n, (row, position) in enumerate(zip(rows, positions, strict=True)):
        visible = [(m, 0) for m in range(n + 1)]
        theta = model.config.rope_theta
        out.append(stack_row(stack, row, position, theta, states, (n, 0), visible, final_norm=final_norm, scale=scale))
    return out


def looped_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    rows = first = [embed(model, token) for token in tokens]
    steps, gradless, scale = switches(model, model.steps)
    for k in range(steps + 1):
        with torch.set_grad_enabled(k >= gradless):
            if k:
                rows = [crossed(model, row, e) for row, e in zip(rows, first, strict=True)]
            rows = causal_pass(model, rows, list(range(len(tokens))), final_norm=k == steps, scale=scale)
    return [head(model, row) for row in rows], [0.0] * len(tokens), [steps + 1] * len(tokens)


def pause_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    rows, positions = [], []
    for t, token in enumerate(tokens):
        rows += [embed(model, token), *[model.pause] * model.steps]
        positions += [t] * (model.steps + 1)
    out = causal_pass(model, rows, positions)[model.steps :: model.steps + 1]
    return [head(model, row) for row in out], [0.0] * len(tokens), [model.steps + 1] * len(tokens)


def ponder_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    first = [embed(model, token) for token in tokens]
    vectors = table(model)
    rows = first
    for _ in range(model.steps):
        guessed = []
        base = rows if model.options.accumulate else first
        for row, z in zip(base, causal_pass(model, rows, list(range(len(tokens)))), strict=True):
            p = torch.softmax(head(model, z), dim=0)
            if model.options.top_k:
                kept = sorted(range(len(p)), key=lambda v: -float(p[v].detach()))[: model.options.top_k]
                p = [p[v] / sum(p[u] for u in kept) if v in kept else 0.0 for v in range(len(p))]
            guessed.append(row + sum(p[v] * vectors[v] for v in range(len(p))))
        rows = guessed
    out = causal_pass(model, rows, list(range(len(tokens))))
    return [head(model, row) for row in out], [0.0] * len(tokens), [model.steps + 1] * len(tokens)


def ponder2_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    x = [embed(model, token) for token in tokens]
    z = causal_pass(model, x, list(range(len(tokens))))
    K = model.options.thoughts
    positions = [t for t in range(len(tokens)) for _ in range(K + 1)]
    thoughts = [[row] * K for row in z]
    for _ in range(model.options.jacobi_high + 1):
        out = causal_pass(model, [slot for t in range(len(x)) for slot in (x[t], *thoughts[t])], positions)
        thoughts = [[out[t * (K + 1) + n] for n in range(K)] for t in range(len(x))]
    return [head(model, row) for row in out[K :: K + 1]], [0.0] * len(tokens), [K + 1] * len(tokens)


def mor_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    """Mixture-of-Recursions, one recursion after another over the whole sequence; the extra is the auxiliary loss."""
    loop, options, theta = model.latent_loop, model.options, model.config.rope_theta
    blocks, T, R = loop.stack.blocks, len(tokens), model.options.recursions

    def run(part, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        states = [{} for _ in part]
        for t in sorted(rows):
            visible = [(j, 0) for j in sorted(rows) if j <= t]
            for block, layer in zip(part, states, strict=True):
                rows = rows | {t: block_row(block, rows[t], t, theta, layer, (t, 0), visible)}
        return rows

    first = run(blocks[:1], {t: embed(model, token) for t, token in enumerate(tokens)})
    h, extra, executed = dict(first), [torch.zeros((), dtype=first[0].dtype) for _ in range(T)], [1] * T
    expert = options.routing == "expert_choice"
    given = replayed(model, tokens)
    if not expert:
        p = [torch.softmax(loop.routers[0].score.weight @ first[t], dim=0) for t in range(T)]
        depth = given or [int(p[t].argmax()) for t in range(T)]
        share = [sum(d == r for d in depth) / T for r in range(R)]
        extra = [options.balance_weight * R * sum(share[r] * p[t][r] for r in range(R)) for t in range(T)]
        for t in range(T):
            scores = loop.routers[0].score.weight @ first[t]
            extra[t] = extra[t] + options.z_weight * torch.log(sum(torch.exp(s) for s in scores)) ** 2
    inside = list(range(T))
    for i in range(R):
        for t in inside if expert else []:
            extra[t] = extra[t] + options.z_weight * (loop.routers[i].score.weight[0] @ h[t]) ** 2
        if i and given is not None:
            inside = [t for t in inside if given[t] >= i]
        elif i and expert:
            if options.auxiliary == "main":
                foretold = {t: loop.routers[i].score.weight[0] @ h[t] for t in inside}
            else:
                foretold = {t: loop.auxiliary_routers[i - 1].score.weight[0] @ h[t].detach() for t in inside}
            if model.training:
                ranked = sorted(inside, key=lambda t: -float((loop.routers[i].score.weight[0] @ h[t]).detach()))
                picked = sorted(ranked[: math.ceil(T * (R - i) / R)])
            else:
                picked = [t for t in inside if foretold[t] > 0]
            for t in inside:
                probability = 1 / (1 + torch.exp(-foretold[t]))
                likely = probability if t in picked else 1 - probability
                extra[t] = extra[t] - options.auxiliary_weight * torch.log(likely)
            inside = picked
        elif i:
            inside = [t for t in inside if depth[t] >= i]
        out = run(blocks[1:-1], {t: h[t] for t in inside})
        for t in inside:
            executed[t] = i + 1
            if expert:
                score = loop.routers[i].score.weight[0] @ h[t]
                h[t] = h[t] + options.alpha / (1 + torch.exp(-score)) * out[t]
            else:
                h[t] = p[t][depth[t]] * out[t] + first[t] if depth[t] == i else out[t]
    last = run(blocks[-1:], h)
    return [head(model, norm(last[t], loop.stack.final_norm)) for t in range(T)], extra, executed


def adaponder_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    """AdaPonderLM in decoding order; a token shows its newest state up to the pass that looks. Extra: sparsity loss."""
    options, theta, stack = model.options, model.config.rope_theta, model.latent_loop.stack
    vectors = table(model)
    states, last, out = new_states(stack), [], []
    gates: list[list[tuple[int, Tensor]]] = [[] for _ in range(options.l_max)]
    given = replayed(model, tokens)
    for t, token in enumerate(tokens):
        e = embed(model, token)
        last.append(0)
        for k in range(options.l_max + 1):
            last[t] = k
            z = stack_row(stack, e, t, theta, states, (t, k), [(j, min(k, last[j])) for j in range(t + 1)])
            if k == options.l_max:
                break
            router = model.latent_loop.routers[k]
            hidden = router.hidden.weight @ z
            score = router.score.weight[0] @ (hidden / (1 + torch.exp(-hidden))) + router.score.bias[0]
            gate = 1 / (1 + torch.exp(-score))
            gates[k].append((t, gate))
            if not (gate > options.tau if given is None else given[t] > k):
                break
            p = torch.softmax(head(model, z), dim=0)
            e = e + gate * sum(p[v] * vectors[v] for v in range(len(p)))
        out.append(head(model, z))
    extra = [torch.zeros((), dtype=out[0].dtype) for _ in tokens]
    for of_pass in gates:
        lowest = sorted(of_pass, key=lambda pair: float(pair[1].detach()))
        for t, gate in lowest[: math.ceil(len(of_pass) * options.fraction)]:
            extra[t] = extra[t] + options.lam * gate
    return out, extra, [k + 1 for k in last]


def ponder3_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    """PonderLM-3: the tail is known after the first pass; keys fade with its logarithm."""
    options, theta = model.config.options, model.config.rope_theta
    stack, score = model.latent_loop.stack, model.latent_loop.routers[0].score
    states, executed, fade = new_states(stack), [], {}
    given = replayed(model, tokens)
    all_logits, expected = [], []
    for t, token in enumerate(tokens):
        z = embed(model, token)
        one = torch.ones((), dtype=z.dtype)
        tail, mixture = [one], torch.zeros_like(z)
        executed.append(0)
        for k in range(options.l_max + 1):
            executed[t] = k + 1
            fade[t, k] = torch.log(tail[k])
            visible = [(j, i) for j in range(t + 1) for i in range(min(k, executed[j] - 1) + 1)]
            z = stack_row(stack, z, t, theta, states, (t, k), visible, fade=fade)
            if k == 0:
                going_on = 1 / (1 + torch.exp(-(score.weight @ z + score.bias)))
                for gate in going_on:
                    tail.append(tail[-1] * gate)
            if k == options.l_max or not (tail[k + 1] > options.tau if given is None else given[t] > k):
                mixture = mixture + tail[k] * z
                break
            mixture = mixture + (tail[k] - tail[k + 1]) * z
        all_logits.append(head(model, mixture))
        expected.append(sum(tail[1 : executed[t]], start=0.0 * one))
    return all_logits, expected, executed


def drawn(tokens: list[int], seed: int, salt: int = 0) -> list[float]:
    """Numbers in [0, 1): a hash of the seed, the position and the text up to there, in plain integers."""
    golden, all_bits = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mixed(x: int) -> int:
        x &= all_bits
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & all_bits
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & all_bits
        return x ^ (x >> 31)

    out = []
    for t in range(len(tokens)):
        keys = [mixed(mixed(j * golden + seed) + salt) for j in range(t + 1)]
        text = sum(mixed(key + token * golden) for key, token in zip(keys, tokens, strict=False))
        out.append((mixed(text + keys[t]) >> 11) / 2**53)
    return out


def replayed(model: torch.nn.Module, tokens: list[int]) -> list[int] | None:
    """Steps of each token from the recorded schedule; None where the router decides."""
    options = model.config.options
    if options.steps_from == "router":
        return None
    row = [row for row in options.steps_schedule if row[0] <= model.budget_share][-1]
    chances = list(row[1:])
    if options.steps_from == "fixed":
        mean = sum(k * p for k, p in enumerate(chances))
        chances = [max(0.0, 1 - abs(k - mean)) for k in range(len(chances))]
    common = chances.index(max(chances))
    steps = []
    for t, u in enumerate(drawn(tokens, options.steps_seed)):
        now = chances
        if t < 2:
            now = [1.0 if k == common else 0.0 for k in range(len(chances))]
        elif t < 16:
            now = [p * 16 / 14 for p in chances]
            now[common] -= sum(now) - 1
        k = 0
        while k < len(now) - 1 and u >= sum(now[: k + 1]):
            k += 1
        steps.append(k)
    return steps


def optioned_sequence(model: torch.nn.Module, tokens: list[int], targets: list[int]):
    """Adaptive with options of its own for source, readout and gates. Extra: all that is added to the nats of the
    logits that are read, weighted: penalties, and what another objective differs by."""
    options, theta, share = model.options, model.config.rope_theta, model.budget_share
    stack, routers = model.latent_loop.stack, model.latent_loop.routers
    states, executed, all_logits, extras = new_states(stack), [], [], []
    given = replayed(model, tokens)
    explored = [u < options.explore for u in drawn(tokens, options.steps_seed, salt=1)]
    warm = share < options.gate_warmup
    deepest, gradless, scale = switches(model, options.l_max)
    lam = options.lam
    if options.lam_ramp:
        lam = lam * min(1, max(0, share - options.gate_warmup) / options.lam_ramp)
    for t, token in enumerate(tokens):
        z, reach, gates, zs = embed(model, token), [torch.ones((), dtype=model.embedding.weight.dtype)], [], []
        executed.append(0)
        for k in range(options.l_max + 1):
            executed[t] = k + 1
            visible = [(j, i) for j in range(t + 1) for i in range(min(k, executed[j] - 1) + 1)]
            with torch.set_grad_enabled(k >= gradless):
                x = crossed(model, z, embed(model, token)) if k else z
                before, z = z, stack_row(stack, x, t, theta, states, (t, k), visible, scale=scale)
            zs.append(z)
            if k == deepest:
                break
            seen = torch.cat((z, z - before)) if options.router_input == "change" else z
            seen = seen.detach() if options.router_detached else seen
            if options.router == "mlp":
                seen = routers[0].hidden.weight @ seen
                seen = seen / (1 + torch.exp(-seen))
            score = options.router_rate * (routers[0].score.weight[0] @ seen + routers[0].score.bias[0])
            gate = 1 / (1 + torch.exp(-score))
            gates.append(gate)
            gate = torch.ones_like(gate) if warm else gate
            onward = reach[-1] * (gate if options.gate_target == "readout" else gate.detach())
            goes = (gate if options.halting_rule == "gate" else onward) > options.tau or (
                model.training and explored[t]
            )
            if given is not None:
                goes = given[t] > k
            if not goes:
                break
            reach.append(onward)
        masses = [a - b for a, b in zip(reach, [*reach[1:], 0.0], strict=True)]
        probability = sum(m * torch.softmax(head(model, z), dim=0) for m, z in zip(masses, zs, strict=True))
        mixed = sum(m * z for m, z in zip(masses, zs, strict=True))
        logits = {
            "hidden": lambda mixed=mixed: head(model, mixed),
            "last": lambda zs=zs: head(model, zs[-1]),
            "probability": lambda probability=probability: torch.log(probability),
            "expected_loss": lambda probability=probability: torch.log(probability),
        }[options.mixture]()
        all_logits.append(logits)
        extra = 0.0 * z.sum()
        if targets[t] != -100:
            nll = [-torch.log_softmax(head(model, z), dim=0)[targets[t]] for z in zs]
            read = -torch.log_softmax(logits, dim=0)[targets[t]]
            if options.mixture == "expected_loss":
                extra = extra + sum(m * n for m, n in zip(masses, nll, strict=True)) - read
            if not warm and options.prior_steps:
                q = options.prior_steps / (1 + options.prior_steps)
                prior = [q**k / sum(q**j for j in range(options.l_max + 1)) for k in range(options.l_max + 1)]
                kl = sum(m * (torch.log(m) - math.log(p)) for m, p in zip(masses, prior, strict=False))
                extra = extra + lam * kl
            elif not warm:
                extra = extra + lam * torch.exp(-read.detach()) ** options.beta * sum(reach[1:], start=0.0 * z.sum())
            if warm and options.warmup_loss == "every":
                extra = extra + sum(nll) / len(nll) - read
            for k in range(len(zs) - 1) if options.gate_target != "readout" else []:
                ahead = [float(n.detach()) + options.gain_margin * (i + 1) for i, n in enumerate(nll[k + 1 :])]
                onward = ahead[0] if options.gate_target == "gain" else min(ahead)
                gate = gates[k] if onward < float(nll[k].detach()) else 1 - gates[k]
                extra = extra - options.gain_weight * torch.log(gate)
        extras.append(extra)
    return all_logits, extras, executed

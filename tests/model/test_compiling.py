"""torch.compile: the same few graphs serve every layer, every latent step and every number of active rows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from haltscale.model import AdaptiveOptions, Method
from haltscale.model.backbone import AttentionKernel

from cases import RAGGED, TINY

SENTENCES = ((2, 20), (3, 33))


def test_rows_steps_and_layers_make_no_new_graphs(tiny: Callable, batch: Callable) -> None:
    """One row and no row among them: sizes of 0 and 1 would be compiled for themselves, if rows were not padded."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def seen(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        forward: Callable[..., Any] = graph.forward
        return forward

    first: list[int] = []
    for layers, l_max in ((2, 1), (9, 3)):  # nine, for torch.compile gives up after eight graphs of one function
        options = AdaptiveOptions(l_max=l_max, **RAGGED)
        model = tiny(Method.ADAPTIVE, options, spread=2.0, shape=replace(TINY, layers=layers))
        model.attention_kernel = AttentionKernel.INDICES
        rows: set[int] = set()
        plain: list[float] = []
        for compiled in (False, True):
            losses = []
            if compiled:
                model.compile_blocks_(seen)
            for most in (None, 0, 1):  # as routers decide, then nobody goes on, then one
                for B, T in SENTENCES:
                    tokens, targets = batch(B, T)
                    forced = torch.zeros(B, T, dtype=torch.long)
                    forced[0, 3] = most or 0
                    hidden = None if most is None else forced_states(model, forced)
                    out = model(tokens, targets, hidden_states=hidden)
                    out.loss.backward()
                    losses.append(out.loss.item())
                    rows |= {*out.trace.counts.rows[1:]}
                if compiled and layers == 2 and most is None and not first:
                    first.append(len(graphs))
            plain = plain or losses
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain), atol=1e-6, rtol=0)
        assert 1 in rows
        assert len(rows) > (4 if l_max > 1 else 2)
    assert 0 < len(graphs) == first[0] <= 6


def forced_states(model: Any, forced_BT: torch.Tensor) -> Callable[..., Any]:
    def hidden(tokens_BT: torch.Tensor, valid_BT: torch.Tensor) -> Any:
        return model.latent_loop(model.embed(tokens_BT).flatten(0, 1), valid_BT, forced_BT)

    return hidden

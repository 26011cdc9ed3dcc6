"""The method in one file: it is what the packed model computes, and it runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from haltscale.model import AdaptiveOptions, Method, ModelConfig, Shape, build_model, reference

SHAPE = Shape(layers=2, d=32, heads=2, kv_heads=2, ffn=48)


@pytest.mark.parametrize(
    "options", [{}, {"l_max": 0}, {"tau": 0.4}, {"tau": 0.15, "lam": 0.5, "beta": 0.5, "l_max": 4}]
)
def test_the_packed_model_computes_the_same(options: dict[str, float]) -> None:
    """Loss, logits, steps and all gradients, in float64, with halting that is ragged."""
    own = AdaptiveOptions(**options)  # type: ignore[arg-type]
    config = ModelConfig(method=Method.ADAPTIVE, shape=SHAPE, vocab_size=50, context=24, options=own)
    packed = build_model(config, seed=1).double()
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in packed.named_parameters():
            if "routers" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=stream, dtype=torch.float64))
    values = {"l_max": own.l_max, "tau": own.tau, "lam": own.lam, "beta": own.beta}
    sizes = {"layers": SHAPE.layers, "d": SHAPE.d, "heads": SHAPE.heads, "ffn": SHAPE.ffn}
    plain = reference.AdaptiveLatentCoT(**sizes, vocab_size=50, **values).double()  # type: ignore[arg-type]
    missing, unexpected = plain.load_state_dict(packed.state_dict(), strict=False)
    assert not unexpected
    assert not missing or own.l_max == 0, "without a latent step there is no router"
    text = torch.randint(0, 50, (3, 25), generator=stream)
    tokens, targets = text[:, :-1], text[:, 1:]
    theirs, ours = packed(tokens, targets, return_logits=True), plain(tokens, targets)
    assert theirs.logits_BTV is not None
    torch.testing.assert_close(ours["logits"], theirs.logits_BTV, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours["loss"], theirs.loss, rtol=1e-10, atol=1e-10)
    assert ours["steps"].tolist() == theirs.trace.steps_BT.tolist()
    assert own.l_max == 0 or len(set(ours["steps"].flatten().tolist())) > 1
    ours["loss"].backward()
    theirs.loss.backward()
    gradients = dict(packed.named_parameters())
    for name, parameter in plain.named_parameters():
        if name in gradients and gradients[name].grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-8, atol=1e-10)


def test_it_can_be_read_at_a_sitting_and_it_learns() -> None:
    path = Path(reference.__file__)
    assert len(path.read_text().splitlines()) < 180
    done = subprocess.run(
        [sys.executable, "-m", "haltscale.model.reference"], capture_output=True, text=True, check=True
    )
    nats = [float(line.split(": ")[1].split(" nats")[0]) for line in done.stdout.splitlines()]
    assert nats[-1] < 0.5 * nats[0]

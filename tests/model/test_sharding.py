"""Every method trains under ZeRO-3, where a parameter is empty until the module that owns it is called."""

import pytest
import torch

from haltscale.model import METHODS, Method, ModelConfig, Shape, build_model
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.engine import build_engine

VOCABULARY = 2000
"""Above DeepSpeed's threshold: embedding and head lie in shards between passes, and so do the blocks."""


@pytest.mark.parametrize("method", list(Method))
def test_sharded_parameters_give_the_same_losses(method: Method) -> None:
    config = ModelConfig(
        method=method,
        shape=Shape(layers=3, d=128, heads=2, kv_heads=2, ffn=344),
        vocab_size=VOCABULARY,
        context=16,
        options=METHODS[method].options(),
    )
    run = RunConfig(method=method, options=config.options, precision=Precision.FP32)
    tokens = torch.randint(VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for stage in (0, 3):
        torch.manual_seed(0)  # PonderLM-2 draws its number of passes
        engine = build_engine(build_model(config, seed=0), run, zero_stage=stage, micro_batch=4, accumulation=1)
        for _ in range(2):
            loss = engine(tokens[:, :-1], tokens[:, 1:]).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-4)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4), "the step is meant to change the weights"

"""Every method trains under ZeRO-3, where a parameter is empty until the module that owns it is called."""

import pytest
import torch

from haltscale.model import METHODS, AdaptiveOptions, Method, Mixture, ModelConfig, Shape, build_model, probing
from haltscale.model.language_model import HeadLoss
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.training.engine import build_engine

VOCABULARY = 2000
"""Above DeepSpeed's threshold: embedding and head lie in shards between passes, and so do the blocks."""


@pytest.mark.parametrize("method", list(Method))
def test_sharded_parameters_give_the_same_losses(method: Method) -> None:
    """Whole logits at stage 0, losses by parts at stage 3."""
    config = ModelConfig(
        method=method,
        shape=Shape(layers=3, d=128, heads=2, kv_heads=2, ffn=344),
        vocab_size=VOCABULARY,
        context=16,
        options=METHODS[method].options(),
    )
    run = RunConfig(method=method, options=config.options, precision=Precision.FP32, context=16, batch_tokens=64)
    tokens = torch.randint(VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for stage, head_loss in ((0, HeadLoss.WHOLE), (3, HeadLoss.PARTS)):
        execution = ExecutionConfig(zero_stage=stage, micro_batch_sequences=4, head_loss=head_loss)
        engine = build_engine(build_model(config, seed=0), run, execution)
        for group in engine.optimizer.param_groups:
            group["lr"] = run.learning_rate  # the training loop's task
        for _ in range(2):
            loss = engine(tokens[:, :-1], tokens[:, 1:]).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-4)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4), "the step is meant to change the weights"


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("mixture", list(Mixture))
def test_sharded_parameters_can_be_read_after_every_step(mixture: Mixture, tie_embeddings: bool) -> None:
    options = AdaptiveOptions(mixture=mixture, l_max=2)
    config = ModelConfig(
        method=Method.ADAPTIVE,
        shape=Shape(layers=3, d=128, heads=2, kv_heads=2, ffn=344),
        vocab_size=VOCABULARY,
        context=16,
        options=options,
        tie_embeddings=tie_embeddings,
    )
    run = RunConfig(method=Method.ADAPTIVE, options=options, precision=Precision.FP32, context=16, batch_tokens=64)
    tokens = torch.randint(VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(0))
    lengths, sampled = torch.full((4,), 16), torch.arange(0, 64, 5)
    found = []
    for stage in (0, 3):
        execution = ExecutionConfig(zero_stage=stage, micro_batch_sequences=4)
        engine = build_engine(build_model(config, seed=0), run, execution)
        reading = probing.read(engine.module, tokens[:, :-1], tokens[:, 1:], lengths_B=lengths, sampled_S=sampled)
        found.append(reading.nll_by_step_SK)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found[0].isfinite().any()

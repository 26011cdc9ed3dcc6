"""The backbone against the definition and against transformers' Llama."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from haltscale.model import Method, Shape, VanillaOptions


def test_forward_and_gradients_equal_the_definition(tiny: Callable, batch: Callable, oracle: ModuleType) -> None:
    model = tiny(Method.VANILLA, VanillaOptions())
    tokens, targets = batch(2, 7)
    loss, logits, _ = oracle.batch_loss(model, oracle.vanilla_sequence, tokens.tolist(), targets.tolist())
    out = model(tokens, targets, return_logits=True)
    torch.testing.assert_close(out.logits_BTV, torch.stack(logits), atol=1e-9, rtol=0)
    parameters = list(model.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(out.loss, parameters), torch.autograd.grad(loss, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


def as_llama_names(model: Any, what: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """What belongs to each weight, by the name that transformers gives it."""
    shape = model.config.shape
    q, kv = shape.d, shape.kv_heads * shape.head_dim
    head = model.embedding if model.head is None else model.head
    named = {
        "model.embed_tokens.weight": what(model.embedding.weight),
        "model.norm.weight": what(model.stack.final_norm.weight),
        "lm_head.weight": what(head.weight),
    }
    for i, block in enumerate(model.stack.blocks):
        parts = dict(zip("qkv", what(block.qkv.weight).split((q, kv, kv)), strict=True))
        gate, up = what(block.gate_up.weight).chunk(2)
        named |= {f"model.layers.{i}.self_attn.{name}_proj.weight": part for name, part in parts.items()}
        named |= {
            f"model.layers.{i}.self_attn.o_proj.weight": what(block.out.weight),
            f"model.layers.{i}.mlp.gate_proj.weight": gate,
            f"model.layers.{i}.mlp.up_proj.weight": up,
            f"model.layers.{i}.mlp.down_proj.weight": what(block.down.weight),
            f"model.layers.{i}.input_layernorm.weight": what(block.attention_norm.weight),
            f"model.layers.{i}.post_attention_layernorm.weight": what(block.mlp_norm.weight),
        }
    return named


def as_llama(model: Any) -> LlamaForCausalLM:
    """transformers' Llama with the same weights."""
    config, shape = model.config, model.config.shape
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=shape.d,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.context,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    llama.load_state_dict(as_llama_names(model, lambda weight: weight.detach().clone()))
    return llama


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_equals_transformers_llama(tiny: Callable, batch: Callable, tie_embeddings: bool, kv_heads: int) -> None:
    """Logits to 1e-4, and so every gradient."""
    model = tiny(
        Method.VANILLA,
        VanillaOptions(),
        dtype=torch.float32,
        embedding_scale=False,
        tie_embeddings=tie_embeddings,
        shape=Shape(layers=2, d=16, heads=4, kv_heads=kv_heads, ffn=24),
    )
    llama = as_llama(model)
    tokens, targets = batch(3, 20)
    out = model(tokens, targets, return_logits=True)
    theirs = llama(input_ids=tokens, labels=targets, shift_labels=targets)
    torch.testing.assert_close(out.logits_BTV, theirs.logits, atol=1e-4, rtol=0)
    assert out.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    out.loss.backward()
    theirs.loss.backward()
    wanted = as_llama_names(model, lambda weight: weight.grad)
    if tie_embeddings:
        del wanted["lm_head.weight"]
    assert set(wanted) == {name for name, _ in llama.named_parameters()}
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(wanted[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_context_is_a_limit(tiny: Callable, batch: Callable) -> None:
    tokens, _ = batch(1, 65)
    with pytest.raises(ValueError, match="65 tokens: the model's context is 64"):
        tiny(Method.VANILLA, VanillaOptions())(tokens)


def test_context_is_a_limit_of_decoding(tiny: Callable) -> None:
    model = tiny(Method.VANILLA, VanillaOptions(), context=3)
    state = model.start_decoding(2)
    for _ in range(3):
        model.decode_step(torch.tensor([1, 2]), state)
    with pytest.raises(ValueError, match="the model's context of 3 tokens is full"):
        model.decode_step(torch.tensor([1, 2]), state)
    with pytest.raises(ValueError, match="1 tokens: the decoding state was started for 2 sequences"):
        model.decode_step(torch.tensor([1]), state)

"""The class that `transformers` loads an exported model with. `haltscale export` copies this file, with the files of
haltscale.model that it needs, beside the weights; it runs there without haltscale.

A plain forward pass reads whole texts, padded on the right where they are of unequal length. `generate` keeps keys and
values from token to token, in the model's own cache and not in one of `transformers`, since their number differs from
token to token; it continues texts of one length.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from haltscale.model.decoding import DecodingState
from haltscale.model.language_model import IGNORE_INDEX
from haltscale.model.registry import METHODS, config_from_dict


class HaltscaleConfig(PretrainedConfig):
    """What `transformers` wants to know, and the model's own configuration under `haltscale`."""

    model_type = "haltscale"

    def __init__(self, haltscale: dict[str, Any] | None = None, **more: Any):
        self.haltscale = haltscale
        shape = (haltscale or {}).get("shape", {})
        more.setdefault("vocab_size", (haltscale or {}).get("vocab_size"))
        more.setdefault("max_position_embeddings", (haltscale or {}).get("context"))
        more.setdefault("hidden_size", shape.get("d"))
        more.setdefault("num_hidden_layers", shape.get("layers"))
        more.setdefault("num_attention_heads", shape.get("heads"))
        super().__init__(**more)


class HaltscaleForCausalLM(PreTrainedModel, GenerationMixin):
    """A haltscale model behind the interface of `transformers`."""

    config_class = HaltscaleConfig
    base_model_prefix = "inner"
    main_input_name = "input_ids"
    _is_stateful = True  # what was read cannot be taken back: no assisted generation

    def __init__(self, config: HaltscaleConfig):
        super().__init__(config)
        own = config_from_dict(config.haltscale or {})
        self.inner = METHODS[own.method].model(own)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """All weights come from the checkpoint."""

    def get_input_embeddings(self) -> Any:
        return self.inner.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: DecodingState | None = None,
        use_cache: bool = False,
        **more: Any,
    ) -> Any:
        """Logits [B, T, V]; with labels, which are shifted as `transformers` does, the mean cross-entropy too, in one
        pass and differentiable: what vanilla's export answers. Padding is never scored. What the method adds in
        training (a price on latent steps, losses of a router) is not part of it.

        With use_cache and without labels, the tokens go on what `past_key_values` holds, read one after another.
        """
        if use_cache and labels is None:
            state = past_key_values or self.inner.start_decoding(len(input_ids))
            logits = [self.inner.decode_step(tokens_B, state)[0] for tokens_B in input_ids.unbind(1)]
            return CausalLMOutputWithPast(logits=torch.stack(logits, dim=1), past_key_values=state)  # type: ignore[arg-type]
        lengths_B = None
        if attention_mask is not None:
            lengths_B = attention_mask.long().sum(1)
            places_T = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            if not torch.equal(attention_mask.bool(), places_T < lengths_B[:, None]):
                raise ValueError("this model takes padding on the right only: set tokenizer.padding_side = 'right'")
        output = self.inner(input_ids, lengths_B=lengths_B)
        loss = None
        if labels is not None:
            if attention_mask is not None:
                labels = labels.masked_fill(~attention_mask.bool(), IGNORE_INDEX)
            counted = {name: more[name] for name in ("num_items_in_batch", "shift_labels") if name in more}
            loss = self.loss_function(output.logits_BTV, labels, vocab_size=self.inner.config.vocab_size, **counted)
        return CausalLMOutputWithPast(loss=loss, logits=output.logits_BTV)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DecodingState | None = None,
        use_cache: bool | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        """What has not been read yet; without a cache the whole text, at every step."""
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("generate() continues texts of one length: call it once for each length, without padding")
        if not use_cache:
            return {"input_ids": input_ids}
        read = past_key_values.position if past_key_values is not None else 0
        return {"input_ids": input_ids[:, read:], "past_key_values": past_key_values, "use_cache": True}

    def generate(self, *arguments: Any, **settings: Any) -> Any:
        """As `transformers` does. Beam search goes without a cache: its sequences change places."""
        config = settings.get("generation_config") or self.generation_config
        if (settings.get("num_beams") or config.num_beams or 1) > 1:
            settings["use_cache"] = False
        return super().generate(*arguments, **settings)  # type: ignore[misc]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


__all__ = ["HaltscaleConfig", "HaltscaleForCausalLM"]

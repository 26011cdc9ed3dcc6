"""The class that `transformers` loads an exported model with. `haltscale export` copies this file, with the files of
haltscale.model that it needs, beside the weights; it runs there without haltscale.

Each forward pass reads the whole text: there is no cache, since a text's keys differ in number from token to token.
Sequences of unequal length are padded on the right.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from haltscale.model.config import ModelConfig
from haltscale.model.language_model import IGNORE_INDEX
from haltscale.model.registry import METHODS


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
        super().__init__(**({"use_cache": False} | more))


class HaltscaleForCausalLM(PreTrainedModel, GenerationMixin):
    """A haltscale model behind the interface of `transformers`."""

    config_class = HaltscaleConfig
    base_model_prefix = "inner"
    main_input_name = "input_ids"

    def __init__(self, config: HaltscaleConfig):
        super().__init__(config)
        own = ModelConfig.from_dict(config.haltscale or {})
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
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """Logits [B, T, V]; with labels, which are shifted here as `transformers` does, the cross-entropy too."""
        lengths_B = None
        if attention_mask is not None:
            lengths_B = attention_mask.long().sum(1)
            places_T = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            if not torch.equal(attention_mask.bool(), places_T < lengths_B[:, None]):
                raise ValueError("this model takes padding on the right only: set tokenizer.padding_side = 'right'")
        output = self.inner(input_ids, lengths_B=lengths_B)
        loss = None
        if labels is not None:
            shifted_BT = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            loss = self.inner(input_ids, shifted_BT, lengths_B=lengths_B).cross_entropy
        return CausalLMOutputWithPast(loss=loss, logits=output.logits_BTV)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **ignored: Any
    ) -> dict[str, Any]:
        """The whole text, at every step."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


__all__ = ["HaltscaleConfig", "HaltscaleForCausalLM"]

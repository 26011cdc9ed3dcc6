"""The class that `transformers` loads an exported model with. `haltscale export` copies this file, with the files of
haltscale.model that it needs, beside the weights; it runs there without haltscale.

Texts of unequal length may be padded on either side. `generate` reads them in parallel passes and keeps keys and values
from token to token, in the model's own cache and not in one of `transformers`, since their number differs from token to
token.
"""

from dataclasses import dataclass
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


@dataclass
class Read:
    """What stands for `past_key_values`."""

    state: DecodingState
    """The texts that have been read."""
    columns: int
    """Columns of `input_ids` that they took, padding included."""


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
        past_key_values: "Read | None" = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **more: Any,
    ) -> Any:
        """Logits [B, T, V]; with labels, which are shifted as `transformers` does, the mean cross-entropy too, in one
        pass and differentiable: what vanilla's export answers. What the method adds in training (a price on latent
        steps, losses of a router) is not part of it.

        A text is what attention_mask marks: padding may stand anywhere, shifts no position and is never scored, and
        its logits are those of the token before it. Nothing predicts the first token of a text.

        With use_cache and without labels, texts are read into a cache in parallel passes; what is added to them later,
        token by token. logits_to_keep: the logits of so many last columns alone; 0: of all.
        """
        valid_BT = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            valid_BT = attention_mask[:, -input_ids.shape[1] :].bool()
        place_BT = (valid_BT.cumsum(1) - 1).clamp(min=0)  # of each column, its token's position in the text
        if use_cache and labels is None:
            logits_BTV, past_key_values = self._continued(
                input_ids, valid_BT, place_BT, past_key_values, logits_to_keep
            )
            return CausalLMOutputWithPast(logits=logits_BTV, past_key_values=past_key_values)  # type: ignore[arg-type]
        order_BT = (~valid_BT).long().argsort(dim=1, stable=True)  # the text first, padding after it
        output = self.inner(input_ids.gather(1, order_BT), lengths_B=valid_BT.sum(1))
        logits_BTV = _taken(output.logits_BTV, place_BT)
        loss = None
        if labels is not None:
            first_BT = valid_BT & (valid_BT.cumsum(1) == 1)
            labels = labels.masked_fill(~valid_BT | first_BT, IGNORE_INDEX)
            counted = {name: more[name] for name in ("num_items_in_batch", "shift_labels") if name in more}
            loss = self.loss_function(logits_BTV, labels, vocab_size=self.inner.config.vocab_size, **counted)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV[:, -logits_to_keep:])

    @torch.no_grad()
    def _continued(
        self, input_ids: Tensor, valid_BT: Tensor, place_BT: Tensor, read: "Read | None", logits_to_keep: int
    ) -> tuple[Tensor, "Read"]:
        """(logits of the last columns, what has been read)."""
        columns = input_ids.shape[1]
        if read is not None:
            if not valid_BT.all():
                raise ValueError(
                    "tokens appended to processed texts contain padding: process the texts again as a whole"
                )
            logits = [self.inner.decode_step(tokens_B, read.state)[0] for tokens_B in input_ids.unbind(1)]
            return torch.stack(logits, dim=1)[:, -logits_to_keep:], Read(read.state, read.columns + columns)
        state = self.inner.start_decoding(len(input_ids))
        texts = [row_T[valid_T].tolist() for row_T, valid_T in zip(input_ids, valid_BT, strict=True)]
        if logits_to_keep == 1:
            return self.inner.read_prompts(texts, state)[0][:, None], Read(state, columns)
        logits_BTV, _ = self.inner.read_prompts(texts, state, every_position=True)
        return _taken(logits_BTV, place_BT)[:, -logits_to_keep:], Read(state, columns)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: "Read | None" = None,
        use_cache: bool | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        """What has not been read yet; without a cache the whole text, at every step."""
        if not use_cache:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        read = past_key_values.columns if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, read:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def generate(self, *arguments: Any, **settings: Any) -> Any:
        """As `transformers` does. Beam search goes without a cache: its sequences change places."""
        config = settings.get("generation_config") or self.generation_config
        if (settings.get("num_beams") or config.num_beams or 1) > 1:
            settings["use_cache"] = False
        return super().generate(*arguments, **settings)  # type: ignore[misc]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _taken(logits_BTV: Tensor, place_BT: Tensor) -> Tensor:
    """The logits of each column, from those of the texts' positions."""
    return logits_BTV.gather(1, place_BT[..., None].expand(-1, -1, logits_BTV.shape[2]))


__all__ = ["HaltscaleConfig", "HaltscaleForCausalLM"]

"""FLASH as transformers and `linearized.models` call it: tokens to hidden vectors, to logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from linearized.attention.base import positions_of, widen
from linearized.cache import CACHE, let_generate
from linearized.context import Context
from linearized.errors import ModelError
from linearized.flash.config import FlashConfig
from linearized.flash.unit import GatedAttention, MixedChunkAttention, ScaleNorm
from linearized.slots import assign_slots


class FlashPreTrainedModel(PreTrainedModel):
    config_class = FlashConfig
    config: FlashConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GatedAttention"]  # noqa: RUF012, as transformers has it
    _can_record_outputs = {"hidden_states": GatedAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScaleNorm):
            init.ones_(module.gain)
        elif isinstance(module, GatedAttention):
            init.normal_(module.scale, std=self.config.initializer_range)
            init.zeros_(module.offset)
        elif isinstance(module, MixedChunkAttention) and module.taps is not None:
            init.zeros_(module.taps)


class FlashModel(FlashPreTrainedModel):
    """Tokens to hidden vectors."""

    def __init__(self, config: FlashConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([GatedAttention(config, layer) for layer in layers])
        self.norm = ScaleNorm(config.norm_eps)
        self.gradient_checkpointing = False
        assign_slots(self)
        let_generate(self)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        linear_context: Context | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """`attention_mask` and `segment_ids` are [B, T]. Positions follow from them and from the
        state, as groups do: `position_ids` are not read. `past_key_values` is what transformers
        called `cache` before 5.24."""
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("give FLASH either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = state = layout = None
        if linear_context is not None:
            mask, layout, state = (
                linear_context.mask,
                linear_context.layout,
                linear_context.state.layers,
            )
        elif cache is not None and cache.get_seq_length() > 0:
            raise ModelError("decoding from a state has no gradient: use torch.no_grad()")
        elif attention_mask is not None and not bool(attention_mask.all()):
            mask = attention_mask.bool()
        positions = positions_of(hidden[:, None], state, mask, segment_ids, layout)
        rotary = self._rotary(positions, widen(hidden).dtype)
        for layer in self.layers:
            hidden = layer(hidden, positions, rotary, mask, segment_ids, linear_context)
        named: Any = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **named)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, T, R/2]."""
        width = self.config.rotary_width
        steps = torch.arange(0, width, 2, device=positions.device, dtype=dtype)
        angles = positions[..., None] * self.config.rotary_base ** (-steps / max(width, 1))
        return angles.cos(), angles.sin()


class FlashForCausalLM(FlashPreTrainedModel, GenerationMixin):
    """Tokens to the next token's logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FlashConfig) -> None:
        super().__init__(config)
        self.model = FlashModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], of the last `logits_to_keep` columns only if that is above 0; the loss
        too, given `labels` [B, T]. With `use_cache` the state is in `cache`, which before 5.24 of
        transformers is called `past_key_values`."""
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None and not torch.is_grad_enabled():
            cache = DynamicCache()  # a state takes its place
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            **kwargs,
        )
        hidden = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        named: Any = {CACHE: output.get(CACHE)}
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, **named
        )

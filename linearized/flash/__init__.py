"""FLASH, a language model that is linear from the start: layers of one gated attention unit each.
Knows the architecture; the mathematics is in `linearized/ops/`, decoding in `linearized.models`.

    model = FlashForCausalLM(FlashConfig(vocab_size=32000))
    state = linearized.new_state(model)

A layer, for hidden vectors h [B, T, C] and x = ScaleNorm(h), whose first C/2 channels are those of
the token before (token shift):

    U, V, Z = SiLU(x W + b)                          widths E, E, D; E = expansion · C
    q, k, q', k' = Z ⊙ γ_i + β_i, then partial rotary
    weight of j in t's group:   laplace(q_t·k_j / G)
    weight of an earlier one:   q'_t·k'_j / s(t),    s(t) = G·⌊t/G⌋, the tokens before t's group
    out = h + (U ⊙ (Σ weight_j V_j + Σ_i w_i V_{t-i})) W_o + b_o

Source: Hua et al., "Transformer Quality in Linear Time", ICML 2022, in the form of You et al., ICML
2024: Laplace weights (Ma et al., "Mega", 2023), token shift, and the masked depthwise convolution,
one kernel for all channels, where `augment` is on. What is ours:

- FLASH divides the sum over all tokens by their number where it reads in both directions; its
  causal form divides by G alone, so that the sum grows with the text. Here a query divides by s(t),
  the tokens that the sum has: a mean, as in both directions, of equal size at any length, and known
  from the position alone.
- No table of positions is added to the embeddings and no bias to the local scores: rotary angles
  are all that a position does, so that no length is the last one.
"""

from __future__ import annotations

import transformers

from linearized.flash.config import FlashConfig
from linearized.flash.model import FlashForCausalLM, FlashModel

__all__ = ["FlashConfig", "FlashForCausalLM", "FlashModel"]

transformers.AutoConfig.register(FlashConfig.model_type, FlashConfig)
transformers.AutoModel.register(FlashConfig, FlashModel)
transformers.AutoModelForCausalLM.register(FlashConfig, FlashForCausalLM)

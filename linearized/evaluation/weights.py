"""What training has made of the parameters that linearizing added, layer by layer: a far part whose
weight is 0, or taps that are, say that a layer does without. Knows variants; knows no text.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from linearized.attention import LinearAttention
from linearized.slots import layer_number, linear_modules, variant_of


def by_layer(model: PreTrainedModel) -> dict[int, dict[str, float]]:
    """Of each linear layer, averaged over its heads: `far`, the absolute weight α of the far part,
    `taps`, the sum of absolute weights of the convolution, and `bound`, the number of far tokens
    from which on the far part's mass stays. Only what a layer has; the last of several attentions
    with one number, as in decoders with cross attention."""
    return {
        layer_number(name): numbers
        for name, module in linear_modules(model).items()
        if isinstance(variant := variant_of(module), LinearAttention)
        and (numbers := _numbers(variant))
    }


def _numbers(variant: LinearAttention) -> dict[str, float]:
    found: dict[str, float] = {}
    alpha = variant.scale()
    if alpha is not None:
        found["far"] = float(alpha.detach().abs().float().mean())
    if variant.taps is not None:
        found["taps"] = float(variant.taps.detach().abs().float().sum(1).mean())
    bound = getattr(variant, "log_bound", None)
    if bound is not None:
        found["bound"] = float(bound.detach().float().exp().mean())
    return {name: round(number, 5) for name, number in found.items()}

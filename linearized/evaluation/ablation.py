"""A linearized model with a part of it taken out for a while, to see what that part is worth. Knows
variants and their parameters; knows no text.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearized.attention import LinearAttention
from linearized.slots import SUBMODULE, layer_number, linear_modules, variant_of


def parts(model: PreTrainedModel) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """What can be taken out of this model, by a name for tables. A score of a linearized model says
    little without those of the model with each part off: a window or a few softmax layers may do
    all the work. The weights must be whole, not shared out among processes."""
    found: dict[str, Callable[[], AbstractContextManager[None]]] = {}
    if has_far_part(model):
        found["far part off"] = functools.partial(without_far_part, model)
    if has_convolution(model):
        found["convolution off"] = functools.partial(without_convolution, model)
    return found


def has_far_part(model: PreTrainedModel) -> bool:
    """Do its layers tell near tokens from far ones, and attend to both?"""
    forms = [variant.form for variant in _variants(model)]
    return bool(forms) and all(form.exact and form.features for form in forms)


def has_convolution(model: PreTrainedModel) -> bool:
    return any(variant.taps is not None for variant in _variants(model))


@contextlib.contextmanager
def without_far_part(model: PreTrainedModel) -> Iterator[None]:
    """Near tokens only."""
    weights = [variant.far_weight() for variant in _variants(model)]
    with _replaced([found for found in weights if found is not None]):
        yield


@contextlib.contextmanager
def without_convolution(model: PreTrainedModel) -> Iterator[None]:
    """No tap weighs anything."""
    taps = [variant.taps for variant in _variants(model)]
    with _replaced([(x, 0.0) for x in taps if x is not None]):
        yield


@contextlib.contextmanager
def softmax_in(model: PreTrainedModel, layers: Collection[int]) -> Iterator[None]:
    """These layers attend as they did before the model was linearized, with the projections that
    they have now. For whole texts, not on a decode state."""
    modules = [m for name, m in linear_modules(model).items() if layer_number(name) in layers]
    taken = [module._modules.pop(SUBMODULE) for module in modules]
    try:
        yield
    finally:
        for module, attention in zip(modules, taken, strict=True):
            module._modules[SUBMODULE] = attention


@contextlib.contextmanager
def _replaced(changes: Sequence[tuple[Tensor, float]]) -> Iterator[None]:
    """Tensors filled with one number each."""
    kept = [x.detach().clone() for x, _ in changes]
    with torch.no_grad():
        for x, number in changes:
            x.fill_(number)
    try:
        yield
    finally:
        with torch.no_grad():
            for (x, _), old in zip(changes, kept, strict=True):
                x.copy_(old)


def _variants(model: PreTrainedModel) -> list[LinearAttention]:
    found = [variant_of(module) for module in linear_modules(model).values()]
    return [variant for variant in found if isinstance(variant, LinearAttention)]

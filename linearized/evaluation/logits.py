"""What a model thinks comes next, in a text that it reads as a whole: hidden states first, logits
of a few tokens at a time after that. Logits of all tokens may take more memory than the model (a
batch of 8 × 4,096 tokens over a vocabulary of 150,000 is 20 GB). Knows models as transformers calls
them; knows nothing of losses.

B batch, T tokens, N tokens that are asked about, C hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearized.errors import ModelError

CHUNK_BYTES = 1 << 26
"""Of float32 logits, that are held at a time."""


class Reading:
    """A model that has read tokens [B, T], up to its last layer."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, **inputs: Any) -> None:
        """`inputs` are further arguments of the model, such as `segment_ids`.

        Raises:
            ModelError: the model has no output layer apart from its body.
        """
        wrapped: Any = getattr(model, "get_base_model", None)
        if wrapped is not None:  # by PEFT, whose layers are inside the model
            model = wrapped()
        base = model.base_model
        if base is model or getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(
                f"{type(model).__name__} is no causal language model with a body and an output "
                "layer; bring a model of a class that ends in ForCausalLM"
            )
        self._model = model
        with torch.no_grad(), _evaluating(model):
            tokens = tokens.to(model.device)
            self._output: Any = base(input_ids=tokens, use_cache=False, **inputs)

    @property
    def hidden(self) -> Tensor:
        """[B, T, C]."""
        states: Tensor = self._output.last_hidden_state
        return states

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [N, V] of hidden states [N, C]. The model makes them itself, so that they
        have its soft caps and scales."""
        given = copy.copy(self._output)
        given.last_hidden_state = hidden[None]
        tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with _evaluating(self._model), _standing_in(self._model, given):
            logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return logits[0].float()

    def chunks(self, asked: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Some of the tokens that are asked about, and their logits [n, V], until none is left.
        `asked` are N indices into the B·T tokens; None: all of them."""
        states = self.hidden.flatten(0, 1)
        if asked is not None:
            states = states[asked.to(states.device)]
        size = chunk_size(self._model)
        for first in range(0, len(states), size):
            part = slice(first, min(first + size, len(states)))
            yield part, self.logits(states[part])


def chunk_size(model: PreTrainedModel) -> int:
    """Number of tokens whose logits are held at a time."""
    return max(1, CHUNK_BYTES // (4 * int(model.config.get_text_config().vocab_size)))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Given(nn.Module):
    """Gives what a model's body gave."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output


@contextlib.contextmanager
def _standing_in(model: PreTrainedModel, output: Any) -> Iterator[None]:
    """The model with a body that gives this."""
    name = model.base_model_prefix
    body = model._modules[name]
    model._modules[name] = _Given(output)
    try:
        yield
    finally:
        model._modules[name] = body

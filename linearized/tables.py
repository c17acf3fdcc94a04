"""Tables of positions, learned or fixed, from which some models add a row to every token: how long
they are, and how to read them at the positions of a decode state. Knows transformers' modules.

B batch, T tokens or tree nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from linearized.errors import StateError
from linearized.state import DecodeState

_NAMES = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "pos_emb")
"""What models call their tables."""
_LIMIT = "_linearized_limit"


def context_limit(model: PreTrainedModel) -> int | None:
    """Tokens that a text may have at most, where the model has a table of positions. None:
    it works positions out, and no length is the last one."""
    if _LIMIT not in model.__dict__:
        model.__dict__[_LIMIT] = _limit(_decoder(model), model.config)
    limit: int | None = model.__dict__[_LIMIT]
    return limit


def check_length(model: PreTrainedModel, state: DecodeState, num_tokens: int) -> None:
    """
    Raises:
        StateError: the model has no positions for so many more tokens.
    """
    limit = context_limit(model)
    if limit is None:
        return
    length = int(state.length.max())
    if length + num_tokens > limit:
        raise StateError(
            f"a text of {length} tokens cannot be extended by {num_tokens}: {type(model).__name__} "
            f"has positions for {limit}"
        )


@contextlib.contextmanager
def reading_at(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """While this lasts, the decoder of an encoder-decoder model reads its table at `positions`
    [B, T]. It would count them from a cache, which knows no trees and one length for all rows."""
    table = getattr(model.get_decoder(), "embed_positions", None)
    if table is None:
        yield
        return
    longest = int(positions.max()) + 1
    no_padding = 1 if getattr(table, "padding_idx", None) == 0 else 0

    def lengthen(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of one row with all positions, given as tokens or as a shape."""
        given, *rest = args
        row = (1, longest)
        given = given.new_full(row, no_padding) if isinstance(given, Tensor) else row
        return (given, *rest), {name: kwargs[name] for name in kwargs if name != "position_ids"}

    def pick(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.reshape(longest, -1)[positions]

    hooks = [
        table.register_forward_pre_hook(lengthen, with_kwargs=True),
        table.register_forward_hook(pick),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _decoder(model: PreTrainedModel) -> nn.Module:
    if not getattr(model.config, "is_encoder_decoder", False):
        return model
    stack = model.get_decoder()
    return model if stack is None else stack


def _limit(stack: nn.Module, config: Any) -> int | None:
    declared = getattr(config, "max_position_embeddings", None)
    for name, table in chain(stack.named_parameters(), stack.named_buffers()):
        if table.ndim == 2 and any(part in _NAMES for part in name.split(".")):
            # Some tables have rows before the first position.
            return declared if isinstance(declared, int) and declared < len(table) else len(table)
    return None

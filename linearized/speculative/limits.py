"""How long a text a model can read at all. Knows models; knows no texts."""

from __future__ import annotations

from itertools import chain

from transformers import PreTrainedModel

NAMES = ("wpe", "embed_positions", "position_embeddings", "pos_emb", "pos_encoding")
"""What models call their tables of positions."""


def longest_text(model: PreTrainedModel) -> int | None:
    """Tokens of a text for which the model's table of positions, learned or filled beforehand, has
    rows; None: positions are computed as they come, there is no such limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, table in chain(model.named_parameters(), model.named_buffers()):
        if table.ndim == 2 and any(part in NAMES for part in name.split(".")):
            return limit if isinstance(limit, int) and limit <= len(table) else len(table)
    return None

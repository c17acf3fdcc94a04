"""Several documents in a row of tokens: which token belongs to which, and who sees whom. Knows
masks and segment numbers; knows nothing of queries and keys.

B batch, T tokens. `segments` [B, T] are numbers that change where a new document begins: two
documents may have the same number if another one lies between them. `mask` [B, T] is False where
there is no token: nobody sees it, and it takes no position.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def numbers(segments: Tensor) -> Tensor:
    """[B, T], the number of each column's document in its row, from 0 in order of time."""
    return _changes(segments).long().cumsum(1)


def positions(segments: Tensor | None, mask: Tensor | None) -> Tensor:
    """[B, T], of each token in its document. One of the two must be given. A column without a
    token has the position of the token before it, or 0."""
    if mask is None:
        assert segments is not None
        kept = torch.ones_like(segments, dtype=torch.int64)
    else:
        kept = mask.long()
    count = kept.cumsum(1)
    if segments is not None:
        earlier = torch.where(_changes(segments), count - kept, 0)
        count = count - earlier.cummax(1).values
    return (count - 1).clamp(min=0)


def visible(
    columns: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """[B or 1, T, T], does the token see the other? It does within its document, and if `causal`
    no later ones. `columns` [T] are 0 to T-1 on the device of the result; `rows` are the queries
    that are asked for."""
    lags = columns[rows, None] - columns
    seen = (lags >= 0)[None] if causal else torch.ones_like(lags, dtype=torch.bool)[None]
    if mask is not None:
        seen = seen & mask.bool()[:, None, :]
    if segments is not None:
        documents = numbers(segments)
        seen = seen & (documents[:, rows, None] == documents[:, None, :])
    return seen


def _changes(segments: Tensor) -> Tensor:
    """[B, T], does a document begin in this column, other than in the first?"""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=False)

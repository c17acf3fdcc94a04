"""A batch: token rows, the documents in them, and which tokens are learned. Knows tensors and what
models call their arguments; knows nothing of files or of losses.

B rows, T tokens.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from linearized import documents
from linearized.errors import ConfigError, ModelError
from linearized.slots import NAME

IGNORED = -100
"""The label of a token whose prediction is not in the loss, as torch and transformers have it."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    tokens: Tensor
    """int64 [B, T]."""
    segment_ids: Tensor | None = None
    """int64 [B, T], numbers that change where a new document begins; documents do not see each
    other. None: every row is one document."""
    trained: Tensor | None = None
    """bool [B, T], False where the prediction of this token is not in the loss: in a prompt, at the
    first token of a document, and in the first column. None: the first column alone."""

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def split(self, parts: int) -> list[Batch]:
        """`parts` batches of consecutive rows, as equal as can be."""
        if not 1 <= parts <= len(self):
            raise ConfigError(f"a batch of {len(self)} rows cannot be split into {parts} parts")
        edges = [len(self) * part // parts for part in range(parts + 1)]
        rows = [slice(a, b) for a, b in itertools.pairwise(edges)]
        return [self._each(lambda x, rows=rows: x[rows]) for rows in rows]

    def first(self, context: int) -> Batch:
        """The first `context` tokens of each row."""
        length = self.tokens.shape[1]
        if not 2 <= context <= length:
            raise ConfigError(f"context must be from 2 to the block's {length}, got {context}")
        return self._each(lambda x: x[:, :context])

    def labels(self) -> Tensor:
        """int64 [B, T], the tokens, and IGNORED where the prediction is not in the loss."""
        labels = self.tokens.clone()
        labels[:, 0] = IGNORED
        return labels if self.trained is None else labels.masked_fill_(~self.trained, IGNORED)

    def predictions(self) -> int:
        """Number of tokens whose prediction is in the loss."""
        if self.trained is None:
            return self.tokens[:, 1:].numel()
        return int(self.trained[:, 1:].sum())

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """The arguments of the model's forward. `use_cache=False` is among them, since transformers
        looks for documents in a row only where nothing is cached.

        Raises:
            ModelError: rows hold several documents, and the model cannot keep them apart.
        """
        given: dict[str, Any] = {"input_ids": self.tokens, "use_cache": False}
        if self.segment_ids is None:
            return given
        takes = _takes(model)
        linear = bool(getattr(model.config, NAME, None)) or "segment_ids" in takes
        if not linear and "position_ids" not in takes:
            raise ModelError(
                f"{type(model).__name__} takes no position_ids, by which a softmax model keeps the "
                "documents of a row apart; train another model, or linearize it first"
            )
        if linear:
            given["segment_ids"] = self.segment_ids
        if "position_ids" in takes:
            given["position_ids"] = documents.positions(self.segment_ids, None)
        if model in _MASKED:
            given["attention_mask"] = _mask(self.segment_ids, _dtype(model))
        return given

    def _each(self, change: Any) -> Batch:
        segment_ids, trained = (
            None if x is None else change(x) for x in (self.segment_ids, self.trained)
        )
        return Batch(change(self.tokens), segment_ids, trained)


@torch.no_grad()
def keep_apart(model: nn.Module) -> None:
    """Make sure that the documents of a row do not see each other in this model, by trying it on a
    few tokens. Where position_ids that begin anew are not enough, it is given a mask from then on.

    Raises:
        ModelError: nothing keeps them apart.
    """
    was_training = model.training
    model.eval()
    try:
        if not _leaks(model):
            return
        _MASKED[model] = True
        if _leaks(model):
            del _MASKED[model]
            raise ModelError(
                f"{type(model).__name__} lets the documents of a row see each other; train another "
                "model, or linearize it first"
            )
    finally:
        model.train(was_training)


_MASKED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Models that need a mask."""


def _leaks(model: nn.Module) -> bool:
    """Do the logits of a second document depend on the first?"""
    device = next(model.parameters()).device
    config: Any = model.config
    size = config.get_text_config().vocab_size
    apart = torch.tensor([[0, 0, 0, 1, 1, 1]], device=device)
    found = []
    for first in ([1, 2, 3], [7, 8, 9]):
        tokens = torch.tensor([[*first, 4, 5, 6]], device=device) % size
        found.append(model(**Batch(tokens, apart).inputs(model))[0][:, 3:].float())
    one, other = found
    return not torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def _takes(model: nn.Module) -> set[str]:
    """Names of the arguments of a model's forward. PEFT's wrappers hand on what they are given."""
    unwrapped: Any = getattr(model, "get_base_model", lambda: model)
    inner = unwrapped()
    return set(inspect.signature(type(inner).forward).parameters)


def _mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T], what is added to scores."""
    columns = torch.arange(segments.shape[1], device=segments.device)
    seen = documents.visible(columns, causal=True, segments=segments)[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype

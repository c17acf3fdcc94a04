"""Guesses from the target's own hidden state, by Medusa's heads."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import ClassVar
from weakref import ref

import torch
from transformers import PreTrainedModel

from linearized.medusa import MedusaHeads, output_matrix
from linearized.models import fingerprint
from linearized.speculative.drafters.base import Ask, Drafter
from linearized.speculative.tree import Shape, TokenTree


class MedusaDrafter(Drafter):
    """One small product a text, no state. The tree has the fixed shape that was most often right
    on held-out text; its tokens and their probabilities are the heads'."""

    needs_hidden: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel, heads: MedusaHeads) -> None:
        """`heads` stay as they are; where the model has another type or device, a copy drafts.

        Raises:
            ModelError: the heads were trained on another model.
        """
        heads.check(fingerprint(model))
        self.heads = _like(heads, model)
        self._given = ref(heads)
        self.depth = heads.num_heads
        output_matrix(model)  # there is one
        self._output = model.get_output_embeddings()
        self._shapes: dict[tuple[int, int], Shape] = {}

    @property
    def identity(self) -> Hashable:
        return type(self), self._given

    @torch.no_grad()
    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        ready = [i for i, ask in enumerate(asks) if ask.text.hidden is not None]
        trees = [TokenTree.empty] * len(asks)
        if not ready:
            return trees
        states = [asks[i].text.hidden for i in ready]
        hidden = torch.stack([state for state in states if state is not None])
        logits = self._output(self.heads.states(hidden))  # B heads V
        for row, i in zip(logits, ready, strict=True):
            trees[i] = self._tree(asks[i], row)
        return trees

    def _tree(self, ask: Ask, logits: torch.Tensor) -> TokenTree:
        depth = min(ask.depth, self.depth)
        shape = self._shape(depth, ask.nodes)
        text = ask.text
        first = len(text.tokens)
        scores = text.sampler.guesses(logits[:depth], range(first, first + depth))
        ranks = 1 + max(shape.ranks, default=0)
        best = scores.log_softmax(1).topk(min(ranks, scores.shape[1]), dim=1)
        return shape.fill(best.indices.tolist(), best.values.exp().tolist())

    def _shape(self, depth: int, nodes: int) -> Shape:
        if (depth, nodes) not in self._shapes:
            known = self.heads.accuracies[:depth]
            self._shapes[depth, nodes] = Shape.sparse(known, nodes)
        return self._shapes[depth, nodes]


def _like(heads: MedusaHeads, model: PreTrainedModel) -> MedusaHeads:
    parameters = list(heads.parameters())
    if all(one.device == model.device and one.dtype == model.dtype for one in parameters):
        return heads
    return copy.deepcopy(heads).to(model.device, model.dtype)

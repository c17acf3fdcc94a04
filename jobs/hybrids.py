"""Decoding with one softmax layer in four, plain and drafted, against the softmax model: a part of
jobs.bench_models. Knows engines and states; knows nothing of tables.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import linearized
from jobs.measure import Run, Timing, in_turns
from linearized.models import new_parameters
from linearized.speculative import Engine, NgramDrafter, Sampling, Text
from linearized.speculative.drafters import Drafter
from linearized.step import step
from linearized.tree import Tree

EVERY = 4
"""One layer in so many keeps softmax, the last of each."""
NEW = 32
"""Tokens that a text goes on by."""
PERIOD = 16
"""Tokens after which a text repeats itself, so that there is something to guess."""


def hybrid_of(softmax: PreTrainedModel) -> PreTrainedModel:
    """A copy with one softmax layer in four."""
    number: int = softmax.config.num_hidden_layers
    every = min(EVERY, number)
    layers = tuple(layer for layer in range(number) if layer % every != every - 1)
    model = copy.deepcopy(softmax)
    linearized.linearize(model, linearized.LinearConfig(attention="grouped", layers=layers))
    for parameter in new_parameters(model):
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def state_of(model: PreTrainedModel, context: int) -> linearized.DecodeState:
    """Of a text of this length, with random numbers in it."""
    state = linearized.new_state(model)
    tensors = state.layers.tensors()
    tensors["memory"].normal_()
    tensors["tail"].normal_()
    tensors["length"].fill_(context)
    held = state.layers.near.held(state.length)[0] >= 0
    for name in ("keys", "values"):
        tensors[name].normal_().mul_(held[:, None])
    history = state.history
    if history is not None and history.filled is not None:
        history.reserve(context + 4 * NEW)
        history.keys[:, :, :, :context].normal_()
        history.values[:, :, :, :context].normal_()
        history.filled.fill_(context)
    return state


def steps(
    model: PreTrainedModel, context: int, nodes: tuple[int, ...], **settings: Any
) -> dict[str, Timing]:
    """A step of some nodes on top of `context` tokens, by their number."""
    state = state_of(model, context)

    @torch.no_grad()
    def run(tree: Tree) -> Tensor:
        return step(model, tree, state).logits

    ones = {n: torch.ones(1, n, dtype=torch.int64, device=model.device) for n in nodes}
    trees = {n: Tree.chain(tokens) for n, tokens in ones.items()}
    runs: dict[str, Run] = {str(n): functools.partial(run, tree) for n, tree in trees.items()}
    return in_turns(runs, **settings)


def texts(model: PreTrainedModel, context: int, **settings: Any) -> dict[str, Timing]:
    """Texts that go on by 32 tokens from `context` of them: plain, and with drafts out of the text
    itself."""
    tokens = [7 + n % PERIOD for n in range(context + 1)]
    begin = state_of(model, context)
    drafters: dict[str, list[Drafter]] = {"plain": [], "drafted": [NgramDrafter()]}
    engines = {name: Engine(model, drafters=given, rows=1) for name, given in drafters.items()}

    def run(engine: Engine) -> list[int]:
        text = Text(tokens, sampling=Sampling(), max_new_tokens=NEW)
        engine.add(text, begin)
        while engine.busy:
            engine.step()
        return text.new_tokens

    said = [run(engine) for engine in engines.values()]
    assert said[0] == said[1], "drafts changed a text"
    runs: dict[str, Run] = {name: functools.partial(run, one) for name, one in engines.items()}
    return in_turns(runs, **settings)

"""Greedy speculative texts are the plain ones: over random models, prompts, drafters, trees, rows,
offsets in the group, evictions, and ends of text. In float32; where that shows a tie, in float64.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import linearized
from linearized.attention import VARIANTS
from linearized.medusa import MedusaHeads
from linearized.models import new_parameters
from linearized.speculative import (
    Drafter,
    Engine,
    LayersDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
    Sampling,
    Text,
    TokenTree,
)

MODELS = 208
SHARES = 8
VOCAB = 31


class Half(Drafter):
    """Knows the text, and says it in some rounds only, among wrong branches, or not to its end."""

    depth = 9

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.plain: dict[tuple[int, ...], list[int]] = {}

    def propose(self, asks):
        return [self._tree(ask.text) for ask in asks]

    def _tree(self, text: Text) -> TokenTree:
        draw = self.draw
        prompt = tuple(text.tokens[: text.num_prompt])
        plain = self.plain.get(prompt, [])  # of a rehearsal it knows nothing
        rest = plain[len(text.new_tokens) :][: draw.randrange(10)]
        kind = draw.randrange(4)
        if kind == 0:
            return TokenTree.empty
        if kind == 1:
            return TokenTree.chain([*rest, draw.randrange(VOCAB)])
        tokens, parents, last = [], [], -1
        for token in rest:
            wrong = draw.randrange(3) if kind == 2 else 0
            tokens += [draw.randrange(VOCAB) for _ in range(wrong)] + [token]
            parents += [last] * (wrong + 1)
            last = len(tokens) - 1
        return TokenTree(tuple(tokens), tuple(parents))


def a_model(draw: random.Random, seed: int, llama) -> linearized.LinearConfig:
    layers = draw.choice([1, 2, 3])
    model = llama(vocab=VOCAB, layers=layers, seed=seed)
    kept = tuple(sorted(draw.sample(range(layers), layers - 1))) if draw.random() < 0.15 else None
    config = linearized.LinearConfig(
        attention=draw.choice(["grouped"] * 5 + sorted(VARIANTS)),
        augment=draw.random() < 0.8,
        group=draw.choice([1, 2, 3, 5, 8, 16]),
        taps=draw.choice([1, 2, 5, 9]),
        features=16,
        bits=2,
        hashes=2,
        layers=kept,
    )
    linearized.linearize(model, config)
    for parameter in new_parameters(model):
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def drafters(draw: random.Random, model, seed: int, llama, half: Half) -> list[Drafter]:
    layers = model.config.num_hidden_layers
    other = a_model(draw, seed + 1000, llama).to(model.dtype)
    heads = MedusaHeads.on(model, 3, linearized.fingerprint(model))
    for block in heads.blocks:
        torch.nn.init.normal_(block.weight, std=0.2)
    choices = [
        half,
        half,
        NgramDrafter(shortest=1),
        ModelDrafter(model, depth=draw.choice([1, 4]), width=draw.choice([1, 3])),
        ModelDrafter(other, depth=3, width=2, floor=draw.choice([0.0, 0.1])),
        ModelDrafter(llama(vocab=VOCAB, layers=1, seed=seed + 7).to(model.dtype), depth=2),
        MedusaDrafter(model, heads.to(model.dtype)),
        LayersDrafter(draw.sample(range(layers), draw.randint(1, layers))),
    ]
    return draw.sample(choices, draw.choice([1, 1, 2, 3]))


def said(model, prompts, stops) -> list[list[int]]:
    """Each alone, without drafts."""
    found = []
    for prompt in prompts:
        engine = Engine(model, rows=1)
        text = Text(prompt, sampling=Sampling(stop_ids=stops), max_new_tokens=25)
        engine.add(text)
        while engine.busy:
            engine.step()
        found.append(text.new_tokens)
    return found


def compare(seed: int, llama, dtype: torch.dtype) -> list[float]:
    """Of each text that is not the plain one: how far apart the model's two best tokens lie where
    they part, in standard deviations of its logits."""
    draw = random.Random(seed)
    model = a_model(draw, seed, llama).to(dtype)
    lengths = [1, *draw.sample(range(1, 20), 3)]
    prompts = [[draw.randrange(VOCAB) for _ in range(n)] for n in lengths]
    whole = said(model, prompts, frozenset())
    stops = frozenset(draw.sample(whole[0], 1)) if draw.random() < 0.5 else frozenset()
    want = [cut(tokens, stops) for tokens in whole]
    half = Half(draw)
    half.plain = {tuple(p): tokens for p, tokens in zip(prompts, whole, strict=True)}
    engine = Engine(
        model,
        drafters=drafters(draw, model, seed, llama, half),
        rows=draw.choice([1, 2, 4]),
        chunk=draw.choice([3, 512]),
    )
    if draw.random() < 0.3:
        engine.plan(engine.measure())
    texts = [Text(p, sampling=Sampling(stop_ids=stops), max_new_tokens=25) for p in prompts]
    for text in texts:
        engine.add(text)
    away: list[tuple] = []
    while engine.busy or away:
        if engine.texts and draw.random() < 0.1:
            text = draw.choice(engine.texts)
            state = engine.remove(text)
            away.append((text, state if draw.random() < 0.5 else None))
        if away and (draw.random() < 0.3 or not engine.busy):
            engine.add(*away.pop())
        engine.step()
    found = zip(texts, want, strict=True)
    return [margin(model, text, plain) for text, plain in found if text.new_tokens != plain]


@torch.no_grad()
def margin(model, text: Text, plain: list[int]) -> float:
    pairs = itertools.zip_longest(text.new_tokens, plain)
    parted = next(i for i, (mine, its) in enumerate(pairs) if mine != its)
    before = torch.tensor([text.tokens[: text.num_prompt + parted]])
    logits = model(input_ids=before, use_cache=False).logits[0, -1]
    best = logits.topk(2).values
    return float((best[0] - best[1]) / logits.std())


def cut(tokens: list[int], stops: frozenset[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize(
    "share",
    [pytest.param(share, marks=[pytest.mark.slow] * (share % 2)) for share in range(SHARES)],
)
def test_greedy_texts_are_the_plain_ones(llama, share):
    """But for ties within rounding, which are few, and none in float64. (vllm#52942: a round
    without a draft, after one whose guesses were right, reads a stale state.)"""
    ties = 0
    for seed in range(share, MODELS, SHARES):
        margins = compare(seed, llama, torch.float32)
        if margins:
            assert max(margins) < 1e-4, seed
            assert not compare(seed, llama, torch.float64), seed
        ties += len(margins)
    assert ties <= 4

"""Sampled speculative texts have the target's distribution, and are the plain ones token by token.

Thousands of texts of three tokens, drafted for by another model with branching trees, against the
probabilities that the target's logits and the words of each filter give.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from linearized.speculative import Engine, ModelDrafter, Sampling, Text

DRAWS = [5_000, pytest.param(20_000, marks=pytest.mark.slow)]
LENGTH = 3
VOCAB = 7
PROMPT = [3]
FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.3, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.15},
    {"temperature": 1.0, "repetition_penalty": 1.7},
    {"temperature": 1.0, "presence_penalty": 1.2},
    {"temperature": 1.0, "frequency_penalty": 0.9},
    {"temperature": 1.0, "logit_bias": {0: 1.5, 4: -2.0}},
    {"temperature": 1.0, "min_tokens": 1, "stop_ids": frozenset({2, 5})},
]


def probabilities(logits: torch.Tensor, text: list[int], settings: dict) -> torch.Tensor:
    """Of the next token after PROMPT and `text`, by the words of each parameter."""
    adjusted = logits.clone()
    for token, bias in settings.get("logit_bias", {}).items():
        adjusted[token] += bias
    if len(text) < settings.get("min_tokens", 0):
        adjusted[list(settings["stop_ids"])] = -math.inf
    for token in {*PROMPT, *text}:
        penalty = settings.get("repetition_penalty", 1.0)
        adjusted[token] = adjusted[token] / penalty if adjusted[token] > 0 else (
            adjusted[token] * penalty
        )  # fmt: skip
    for token in set(text):
        adjusted[token] -= settings.get("presence_penalty", 0.0)
        adjusted[token] -= settings.get("frequency_penalty", 0.0) * text.count(token)
    p = (adjusted / settings["temperature"]).softmax(0)
    order = p.argsort(descending=True).tolist()
    kept = order[: settings.get("top_k", VOCAB)]
    reached, nucleus = 0.0, []
    total = sum(float(p[i]) for i in kept)
    for i in kept:
        if reached < settings.get("top_p", 1.0):
            nucleus.append(i)
        reached += float(p[i]) / total
    least = settings.get("min_p", 0.0) * float(p[order[0]])
    result = torch.zeros_like(p)
    for i in nucleus:
        if p[i] >= least:
            result[i] = p[i]
    return result / result.sum()


def every(model, settings: dict) -> torch.Tensor:
    """[V, V, V], of the first three tokens."""
    found = torch.ones((VOCAB,) * LENGTH, dtype=torch.float64)
    for length in range(LENGTH):
        for text in itertools.product(range(VOCAB), repeat=length):
            ids = torch.tensor([[*PROMPT, *text]])
            logits = model(input_ids=ids, use_cache=False).logits[0, -1]
            after = probabilities(logits, list(text), settings)
            found[text] *= after.view(-1, *[1] * (LENGTH - length - 1))
    return found


@torch.no_grad()
@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_texts_are_distributed_as_the_targets(linear, settings, draws):
    model, draft = linear(vocab=VOCAB, layers=1), linear(vocab=VOCAB, layers=1, seed=2)
    engine = Engine(model, drafters=[ModelDrafter(draft, depth=2, width=2, floor=0.0)], rows=128)
    texts = []
    for seed in range(draws):
        sampling = Sampling(**settings, seed=seed // 4, choice=seed % 4)
        texts.append(Text(PROMPT, sampling=sampling, max_new_tokens=LENGTH))
        engine.add(texts[-1])
    while engine.busy:
        engine.step()
    stops = settings.get("stop_ids", frozenset())
    counts = torch.zeros((VOCAB,) * LENGTH, dtype=torch.float64)
    for text in texts:
        said = text.new_tokens
        assert len(said) == LENGTH or said[-1] in stops
        counts[tuple(said + [0] * (LENGTH - len(said)))] += 1
    want = every(model, settings)
    for stop in stops:  # such a text is over, whatever might have followed
        total = want[:, stop].sum(1)
        want[:, stop] = 0
        want[:, stop, 0] = total
    assert counts[want == 0].sum() == 0
    check(counts.flatten(), draws * want.flatten())
    accepted = sum(text.accepted.total() for text in texts)
    assert 0.1 * draws < accepted < 1.9 * draws  # both ways to a further token were gone
    for text in texts[:: draws // 200]:
        plain = Text(PROMPT, sampling=text.sampling, max_new_tokens=LENGTH)
        alone = Engine(model)
        alone.add(plain)
        while alone.busy:
            alone.step()
        assert text.new_tokens == plain.new_tokens


def check(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-square, beyond the 99.99 % point; rare pairs are counted as one."""
    rare = expected < 10
    cells = [(counts[rare].sum(), expected[rare].sum())] if expected[rare].sum() > 0 else []
    cells += zip(counts[~rare], expected[~rare], strict=True)
    chi_square = sum(float((c - e) ** 2 / e) for c, e in cells)
    freedom = len(cells) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8

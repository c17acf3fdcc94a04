"""Perplexity against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from linearized.errors import ConfigError
from linearized.evaluation import logits
from linearized.evaluation.perplexity import (
    bits,
    negative_log_likelihood,
    perplexity,
    strided,
    token_losses,
)


def logs(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits.log_softmax(-1)


def test_it_is_exp_of_the_mean_negative_log_likelihood(llama):
    model = llama().train()
    tokens = torch.randint(1, 61, (5, 30))
    with torch.no_grad():
        found = model(input_ids=tokens).logits.log_softmax(-1)
    want = -sum(float(found[b, t, tokens[b, t + 1]]) for b in range(5) for t in range(29))
    total, count = negative_log_likelihood(model, tokens.split(2))
    assert count == 5 * 29
    assert total == pytest.approx(want, rel=1e-5)
    assert perplexity(model, tokens.split(3)) == pytest.approx(math.exp(want / count), rel=1e-5)
    assert model.training


def test_a_model_that_knows_nothing_has_the_vocabularys_size(llama):
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, [torch.randint(1, 61, (2, 20))]) == pytest.approx(61, rel=1e-5)


def test_a_large_vocabulary_needs_little_memory(llama, monkeypatch):
    """Evaluation that runs out of memory on logits of all tokens (transformers#12878)."""
    monkeypatch.setattr(logits, "CHUNK_BYTES", 4 * 4 * 61)
    model, tokens, most = llama(), torch.randint(1, 61, (3, 20)), [0]
    want = logs(model, tokens)
    want = -want[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    hook = model.lm_head.register_forward_hook(
        lambda _, __, output: most.append(output.numel() // 61)
    )
    torch.testing.assert_close(token_losses(model, tokens), want, rtol=1e-4, atol=1e-5)
    hook.remove()
    assert max(most) == 4 and sum(most) == 3 * 19


def test_documents_in_a_row_are_told_apart(linear):
    model = linear(dtype=torch.float32)
    tokens = torch.randint(1, 61, (1, 24))
    segments = torch.tensor([[0] * 10 + [1] * 14])
    found = token_losses(model, tokens, segment_ids=segments)
    torch.testing.assert_close(
        found[:, 10:], token_losses(model, tokens[:, 10:]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size,length,stride", [(50, 16, 5), (50, 16, 16), (64, 16, 8), (9, 16, 4)])
def test_strided_windows(llama, size, length, stride):
    """Each token is scored once, with as much before it as the windows allow for."""
    model, text = llama(), torch.randint(1, 61, (size,))
    want, seen = 0.0, set()
    for first in range(0, size, stride):
        window = text[first : first + length]
        found = logs(model, window[None])[0]
        for t in range(1, len(window)):
            if first + t not in seen:
                seen.add(first + t)
                want -= float(found[t - 1, window[t]])
        if first + length >= size:
            break
    windows = list(strided(model, text, length=length, stride=stride))
    assert sum(count for _, count in windows) == len(seen)
    if stride < length:
        assert len(seen) == size - 1
    assert sum(nats for nats, _ in windows) == pytest.approx(want, rel=1e-5)


def test_a_stride_that_leaves_tokens_out_is_refused(llama):
    for length, stride in ((8, 9), (8, 0), (1, 1)):
        with pytest.raises(ConfigError, match=f"stride={stride}, length={length}"):
            list(strided(llama(), torch.ones(20, dtype=torch.int64), length=length, stride=stride))


def test_bits():
    assert bits(8 * math.log(2), 4) == pytest.approx(2.0)

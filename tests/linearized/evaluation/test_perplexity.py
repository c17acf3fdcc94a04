"""Perplexity against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from linearized.evaluation.perplexity import negative_log_likelihood, perplexity


def test_it_is_exp_of_the_mean_negative_log_likelihood(llama):
    model = llama().train()
    tokens = torch.randint(1, 61, (5, 30))
    with torch.no_grad():
        logs = model(input_ids=tokens).logits.log_softmax(-1)
    want = -sum(float(logs[b, t, tokens[b, t + 1]]) for b in range(5) for t in range(29))
    total, count = negative_log_likelihood(model, tokens.split(2))
    assert count == 5 * 29
    assert total == pytest.approx(want, rel=1e-5)
    assert perplexity(model, tokens.split(3)) == pytest.approx(math.exp(want / count), rel=1e-5)
    assert model.training


def test_a_model_that_knows_nothing_has_the_vocabularys_size(llama):
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, [torch.randint(1, 61, (2, 20))]) == pytest.approx(61, rel=1e-5)

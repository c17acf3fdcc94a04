"""Agreement against its definition."""

from __future__ import annotations

import pytest
import torch

from linearized.errors import ModelError
from linearized.evaluation import logits
from linearized.evaluation.agreement import agreement


def test_it_is_the_divergence_and_the_share_of_equal_guesses(llama, monkeypatch):
    monkeypatch.setattr(logits, "CHUNK_BYTES", 4 * 61 * 5)
    student, teacher = llama(seed=1), llama(seed=2)
    tokens = torch.randint(1, 61, (4, 12))
    with torch.no_grad():
        q, p = (m(input_ids=tokens).logits.log_softmax(-1) for m in (student, teacher))
    found = agreement(student, teacher, tokens.split(3))
    assert found.count == 48
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean()
    assert found.top1 == pytest.approx(float(same))
    itself = agreement(teacher, teacher, [tokens])
    assert itself.divergence == pytest.approx(0, abs=1e-6) and itself.top1 == 1


def test_another_vocabulary_is_refused(llama):
    with pytest.raises(ModelError, match="61 tokens cannot be compared with one of 62"):
        agreement(llama(), llama(vocab=62), [torch.ones(1, 4, dtype=torch.int64)])

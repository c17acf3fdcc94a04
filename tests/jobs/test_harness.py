"""lm-evaluation-harness asks our models, and gets what they say."""

from __future__ import annotations

import json

import pytest
import torch

import linearized
from jobs import harness
from linearized.errors import ConfigError

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc"""
ROLLING = """doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity"""
WRITTEN = """doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match"""
DOCUMENTS = [
    {"question": "the quick brown", "choices": ["fox", "dog", "größe"], "answer": 0},
    {"question": "def add(a, b):\n    return", "choices": ["a + b", "lazy"], "answer": 0},
    {"question": "日本語", "choices": ["のテキスト", "emoji", "over"], "answer": 1},
]


def test_without_the_harness_the_remedy_is_named(llama, tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        harness.run(llama(), tokenizer, ["hellaswag"])


@pytest.fixture
def tasks(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    kinds = {"choose": ("multiple_choice", CHOICE), "roll": ("loglikelihood_rolling", ROLLING),
             "write": ("generate_until", WRITTEN)}  # fmt: skip
    for name, (kind, more) in kinds.items():
        text = TASK.format(name=name, data=data, kind=kind, more=more)
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("near", [None, "", "hedgehog"])
def test_its_tasks(tasks, llama, linear, tokenizer, near):
    size = {"vocab": len(tokenizer)}
    model = llama(**size) if near is None else linear(dtype=torch.float32, near=near, **size)
    model.config.max_position_embeddings = 20
    found = harness.run(model, tokenizer, ["choose", "roll", "write"], folder=tasks)
    right = 0
    for one in DOCUMENTS:
        nats = [_nats(model, tokenizer, one["question"], f" {c}") for c in one["choices"]]
        right += nats.index(max(nats)) == one["answer"]
    assert found["choose"]["acc,none"] == pytest.approx(right / 3, abs=1e-4)
    assert found["roll"]["word_perplexity,none"] > 1
    assert found["write"]["exact_match,none"] >= 0
    with pytest.raises(ConfigError, match="knows no task 'gone'"):
        harness.run(model, tokenizer, ["gone"], folder=tasks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_texts_are_scored_and_written_together(tasks, linear, tokenizer):
    """A model in Python that is asked one text after the other (lm-evaluation-harness#3207)."""
    from lm_eval.api.instance import Instance

    from jobs.harness_model import HarnessModel

    model = linear(dtype=torch.float32, vocab=len(tokenizer))
    asked, calls = HarnessModel(model, tokenizer, batch_tokens=4096), []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))

    def instances(*arguments):
        return [Instance("loglikelihood", {}, one, i) for i, one in enumerate(arguments)]

    pairs = [("the quick", " fox"), ("", "the lazy"), ("a ", "dog"), ("def add", "(a, b)")]
    found = asked.loglikelihood(instances(*pairs), disable_tqdm=True)
    assert len(calls) == 1
    for (context, continuation), (nats, _) in zip(pairs, found, strict=True):
        before = context.rstrip()
        after = context[len(before) :] + continuation
        assert nats == pytest.approx(_nats(model, tokenizer, before, after), abs=1e-3)
    hook.remove()
    long = "the quick brown fox jumps over the lazy dog " * 3
    asked.max_length = 16
    (rolled,) = asked.loglikelihood_rolling(instances((long,)), disable_tqdm=True)
    ids = tokenizer(long)["input_ids"]
    want, width = 0.0, 16
    for first in range(0, len(ids), width):  # the last one looks back as far as it can
        part = ids[first : first + width]
        earliest = first + len(part) - width - 1
        before = ids[earliest:first] if first else [tokenizer.eos_token_id]
        want += _of(model, before, part)
    assert rolled == pytest.approx(want, rel=1e-3)
    how = {"until": ["fox"], "max_gen_toks": 6}
    written = asked.generate_until(instances(("the quick", how), ("a lazy", how)))
    for context, text in zip(("the quick", "a lazy"), written, strict=True):
        ids = linearized.generate(model, tokenizer(context)["input_ids"], max_new_tokens=6)
        assert text == tokenizer.decode(ids, skip_special_tokens=True).partition("fox")[0]


def _nats(model, tokenizer, context, continuation):
    whole = tokenizer(context + continuation)["input_ids"]
    size = len(tokenizer(context)["input_ids"])
    before = whole[:size] or [tokenizer.eos_token_id]
    return _of(model, before, whole[size:])


@torch.no_grad()
def _of(model, before, after):
    tokens = torch.tensor([[*before, *after]])
    logs = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logs[len(before) - 1 + i, one]) for i, one in enumerate(after))

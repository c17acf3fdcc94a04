"""lm-evaluation-harness asks the app for log-probabilities, and gets the model's own."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import linearized

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytest.importorskip("tenacity", reason="lm_eval is not installed with its api extra")

TASK = """
task: words
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
DOCUMENTS = [
    {"question": "the quick brown", "choices": ["fox", "dog", "größe"], "answer": 0},
    {"question": "def add(a, b):\n    return", "choices": ["a + b", "lazy"], "answer": 0},
    {"question": "日本語", "choices": ["のテキスト", "emoji", "over"], "answer": 1},
    {"question": "jumps over the", "choices": ["lazy dog", "quick fox"], "answer": 1},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_local_completions(served, chat_folder, folders, tmp_path):
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (tmp_path / "words.yaml").write_text(TASK.format(data=data))
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{served.url}/v1/completions",
            "tokenizer": chat_folder,
            "num_concurrent": 2,
        },
        tasks=["words"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
    )
    model = linearized.load(folders["target"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_folder)
    right = 0
    for sample in found["samples"]["words"]:
        document = sample["doc"]
        want = [_logprob(model, tokenizer, document["question"], c) for c in document["choices"]]
        got = [float(one[0][0]) for one in sample["resps"]]
        assert got == pytest.approx(want, abs=1e-2)
        right += want.index(max(want)) == document["answer"]
    assert found["results"]["words"]["acc,none"] == right / len(DOCUMENTS)


@torch.no_grad()
def _logprob(model, tokenizer, question: str, choice: str) -> float:
    """Of the choice behind the question."""
    start = tokenizer(question)["input_ids"]
    tokens = tokenizer(f"{question} {choice}")["input_ids"]
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    chosen = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens)[1:, None])
    return float(chosen[len(start) - 1 :].sum())

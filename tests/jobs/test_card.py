"""Model cards say what was done, and nothing of the machine it was done on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs import card
from jobs.run import Run, Shape, Stage, Workers
from linearized.config import LinearConfig
from linearized.training.optim import Optim

DONE = {
    "name": "linearize", "key": "abc", "seconds": 12.5,
    "parameters": 3_000_000, "tokens": 1_000_000,
    "perplexity": {"teacher": 40.0, "before": 200.0, "after": 42.0, "far part off": 50.0},
    "losses": [[0, 0, 9.0, 1e-3, 100], [0, 10, 5.0, 1e-3, 100], [1, 0, 4.0, 1e-3, 100]],
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    made = {
        "key": "k",
        "source": str(tmp_path / "books"),
        "block": 256,
        "train": {"tokens": 12_345},
    }
    (data / "data.json").write_text(json.dumps(made))
    (tmp_path / "target").mkdir()
    optim = Optim(lr=1e-4)
    return Run(
        name="linearize", data=data, out=tmp_path / "target", student=tmp_path / "SmolLM",
        linear=LinearConfig.named("anchored"), teacher=tmp_path / "SmolLM",
        stages=(Stage(objective="transfer", steps=5, optim=optim),
                Stage(objective="distillation", steps=7, optim=optim)),
        workers=Workers(),
    )  # fmt: skip


def test_a_card_says_what_was_done(run, tmp_path):
    card.write(run.out, run, DONE)
    text = (run.out / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "SmolLM" and front["library_name"] == "transformers"
    assert "hedgehog" in front["tags"]
    for words in (
        "| after training | 42.0000 | 1.0500 |", "| far part off | 50.0000 | 1.2500 |",
        "| transfer | 5 | 16 |", "lr 0.0001", "| transfer | 9.0 | 5.0 |", "1,000,000 tokens",
        "12,345 tokens", "source: books", "Commit ", "window 3",
    ):  # fmt: skip
        assert words in text, words
    assert str(tmp_path) not in text


def test_a_model_from_scratch_has_a_card(run):
    shape = Shape(hidden=32, layers=2, heads=2, intermediate=64)
    alone = replace(run, student=shape, linear=None, teacher=None, data=Path("gone"))
    text = card.card(alone, {"perplexity": {"after": 40.0}, "losses": []})
    assert "Trained with" in text and "| after training | 40.0000 |  |" in text
    assert "base_model" not in text and "## Data" not in text and "## Losses" not in text


def test_scores_take_the_place_of_earlier_ones(run):
    card.write(run.out, run, DONE)
    result = {
        "teacher": "SmolLM", "date": "2026-11-27T01:02:03", "commit": "abc",
        "machine": {"device": "a processor"},
        "scores": {"perplexity: book": {"teacher": {"perplexity": 10.0},
                                        "model": {"perplexity": 11.0}}},
    }  # fmt: skip
    card.add_scores(run.out, result)
    result["scores"]["perplexity: book"]["model"]["perplexity"] = 12.0
    card.add_scores(run.out, result)
    text = (run.out / "README.md").read_text()
    assert (
        text.count("## Scores") == 1 and "| perplexity: book | 10.000 | 12.000 (1.200 ×) |" in text
    )
    assert "| after training | 42.0000 | 1.0500 |" in text


def test_somebody_elses_card_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    result = {"teacher": None, "date": "", "commit": "", "machine": {"device": ""}, "scores": {}}
    card.add_scores(tmp_path, result)
    card.add_scores(tmp_path / "gone", result)
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "gone").exists()

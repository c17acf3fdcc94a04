"""The evaluation: a model and its teacher in; one table, a picture and a line of JSON out."""

from __future__ import annotations

import json

import pytest
import torch

import linearized
from jobs import cli, evaluate, evaluation_report, measure, scores
from linearized.errors import ConfigError, DataError
from linearized.models import new_parameters


@pytest.fixture
def folder(tmp_path, llama, tokenizer):
    """A softmax model, a linear one made of it, a text and two tasks."""
    model = llama(vocab=len(tokenizer))
    model.save_pretrained(tmp_path / "teacher")
    linearized.linearize(model, linearized.LinearConfig.named("anchored", group=8, taps=4))
    for parameter in new_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    for name in ("teacher", "model"):
        tokenizer.save_pretrained(tmp_path / name)
    words = ["the quick brown fox", "jumps over", "a lazy dog", "and runs", "größer"]
    text = " ".join(words[(i * 3 + i // 7) % 5] for i in range(600))
    (tmp_path / "held.txt").write_text(text)
    lines = [
        {"query": "the quick", "choices": ["brown fox", "dog"], "gold": i % 2} for i in range(4)
    ]
    (tmp_path / "animals.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "sst2.tsv").write_text("sentence\tlabel\na lazy dog\t0\nthe fox\t1\n")
    return tmp_path


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """What a machine can do is measured elsewhere."""
    known = measure.Machine(
        device="a processor", instructions=(), threads=1, cores=1, version="", load=0.0, copy=1.0,
        flops=1.0,
    )  # fmt: skip
    monkeypatch.setattr(measure.Machine, "measure", lambda device, dtype: known)


def small(folder, *assignments: str) -> evaluate.EvaluateConfig:
    base = [
        f"model={folder / 'model'}", f"teacher={folder / 'teacher'}",
        f"texts=[{folder / 'held.txt'}]", "tokens=200", "length=40", "stride=20", "positions=128",
        "rows=1", f"tasks=[{folder / 'animals.jsonl'}, {folder / 'sst2.tsv'}]", "recall=[100]",
        "keys=2", "pairs=1", "speed=[64]", "autocast=false", f"out={folder / 'out'}",
    ]  # fmt: skip
    return cli.override(evaluate.quick(), [*base, *assignments])


def test_it_measures_a_model_beside_its_teacher(folder, capsys, monkeypatch):
    monkeypatch.setattr(scores, "_words", lambda sources, ids: sorted(set(ids.tolist()))[:20])
    evaluate.main(small(folder, "card=true"))
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert json.loads((folder / "out" / "evaluation.json").read_text()) == last
    assert (folder / "out" / "evaluation.png").stat().st_size > 10_000
    found = last["scores"]
    everybody = ["teacher", "model", "far part off", "convolution off"]
    assert list(found) == [
        "perplexity: held", "agreement: held", "by position: held", "task: animals", "task: sst2",
        "pass key at 100", "MQAR at 100", "decoding at 64",
    ]  # fmt: skip
    for name, cells in found.items():
        wanted = everybody[1:] if name.startswith("agreement") else everybody
        assert list(cells) == (everybody[:2] if name.startswith("decoding") else wanted), name
    whole = found["perplexity: held"]
    assert whole["model"]["tokens"] == 199 and whole["model"]["bits_per_byte"] > 0
    assert whole["far part off"]["perplexity"] != whole["model"]["perplexity"]
    assert list(found["by position: held"]["model"]["ranges"]) == ["0–128"]
    assert found["task: sst2"]["teacher"]["count"] == 2
    assert found["decoding at 64"]["model"]["bytes"] > 0
    for words in (
        "perplexity: held",
        "× )".replace(" ", ""),
        "far part off",
        "b/B",
        "bytes of state",
    ):
        assert words in out
    card = (folder / "model" / "README.md").read_text()
    assert "| perplexity: held |" in card and "## Scores" in card


def test_what_was_measured_is_not_measured_again(folder, monkeypatch):
    config = small(folder, "recall=[]", "speed=[]", "positions=0", "tasks=[]", "parts=false")
    asked = []
    measure = scores._perplexity
    monkeypatch.setattr(scores, "_perplexity", lambda *given: asked.append(1) or measure(*given))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(scores, "_agreement", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(config)
    assert len(asked) == 2 and not (folder / "out" / "evaluation.json").exists()
    evaluate.main(config)
    assert len(asked) == 2
    first = json.loads((folder / "out" / "evaluation.json").read_text())["scores"]
    evaluate.main(cli.override(config, ["fresh=true"]))
    assert len(asked) == 4
    assert json.loads((folder / "out" / "evaluation.json").read_text())["scores"] == first
    evaluate.main(cli.override(config, ["tokens=100"]))
    assert len(asked) == 6


def test_a_softmax_model_is_measured_alone(folder, capsys):
    evaluate.main(small(folder, f"model={folder / 'teacher'}", "teacher=null", "recall=[]",
                        "positions=0", "speed=[64]"))  # fmt: skip
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(list(cells) == [str(folder / "teacher")] for cells in last["scores"].values())
    assert not any(name.startswith("agreement") for name in last["scores"])


def test_bits_are_of_the_bytes_that_are_scored(tokenizer):
    text = "the größer 🙂 fox"
    whole = scores._text(tokenizer, None, text, 1000)
    assert int(whole.sizes.sum()) == len(text.encode())
    begun = scores._text(tokenizer, 0, text, 1000)
    assert begun.ids[0] == 0 and begun.sizes[0] == 0
    assert int(begun.sizes.sum()) == len(text.encode())
    short = scores._text(tokenizer, None, text, 3)
    assert len(short.ids) == len(short.sizes) == 3
    with pytest.raises(DataError, match="less than two tokens"):
        scores._text(tokenizer, None, "", 10)


def test_a_range_that_the_teacher_cannot_read_is_left_out():
    cells = {
        "teacher": {"ranges": {"0–1024": 10.0}, "rows": 1},
        "model": {"ranges": {"0–1024": 11.0, "1024–2048": 12.0}, "rows": 1},
    }
    rows = evaluation_report.rows({"by position: book": cells})
    assert rows == [
        ["by position: book, 0–1024", "10.000", "11.000 (1.100 ×)"],
        ["by position: book, 1024–2048", "–", "12.000"],
    ]


def test_differences_of_tasks_are_of_the_same_questions():
    cell = {"accuracy": 0.5, "error": 0.25, "right": "0101"}
    better = {"accuracy": 0.75, "error": 0.2, "right": "0111"}
    ((_, teacher, model),) = evaluation_report.rows({"task: x": {"teacher": cell, "model": better}})
    assert teacher == "50.0% ± 25.0%"
    assert model == "75.0% ± 20.0% (+25.0 ± 25.0)"


@pytest.mark.parametrize(
    "assignment,message",
    [
        ("stride=41", "stride=41 is longer than a window of length=40"),
        ("tokens=1", "tokens must be at least 2, got 1"),
        ("limit=0", "limit must be at least 1, got 0"),
        ("recall=[0]", "recall must be numbers of tokens"),
        ("dtype=float8", "dtype"),
    ],
)
def test_what_cannot_work_is_named(folder, assignment, message):
    with pytest.raises(ConfigError, match=message):
        small(folder, assignment)


def test_what_is_not_there_is_named(folder, llama, tokenizer):
    with pytest.raises(DataError, match=r"there is no file .*gone.jsonl"):
        evaluate.main(small(folder, "tasks=[gone.jsonl]"))
    with pytest.raises(ConfigError, match="unknown task glue:sst; choose from glue:cola"):
        evaluate.main(small(folder, "tasks=[glue:sst]"))
    with pytest.raises(ConfigError, match="texts must name every text once"):
        evaluate.main(small(folder, f"texts=[{folder / 'held.txt'}, {folder / 'held.txt'}]"))
    llama(vocab=len(tokenizer) + 1).save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    with pytest.raises(ConfigError, match="has 321 tokens, the model 320; name the softmax"):
        evaluate.main(small(folder, f"teacher={folder / 'other'}"))

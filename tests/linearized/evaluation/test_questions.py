"""Questions out of files, and what counts as right."""

from __future__ import annotations

import json
import math

import pytest

from linearized.errors import DataError
from linearized.evaluation import questions
from linearized.evaluation.continuations import Score
from linearized.evaluation.questions import GLUE, Question, ask, difference, glue, labelled, read


def written(folder, name, *lines):
    file = folder / name
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return file


def test_multiple_choice_and_last_words(tmp_path):
    file = written(
        tmp_path, "a.jsonl",
        {"query": "Question: dresser\n", "choices": ["wood", "finish"], "gold": 1},
        {"query": "The girl slept, therefore", "choices": ["a", "b"], "gold": 0},
        "",
        {"context": "I don't care about", "continuation": " signs"},
    )  # fmt: skip
    assert read(file) == [
        Question("Question: dresser\nAnswer:", ("wood", "finish"), 1),
        Question("The girl slept, therefore", ("a", "b"), 0),
        Question("I don't care about", ("signs",)),
    ]


def test_tables_of_glue(tmp_path):
    table = ["sentence\tlabel", 'it \'s "charming" \t1', "bleak \t0"]
    found = read(written(tmp_path, "sst2-dev.tsv", *table))
    assert [one.gold for one in found] == [1, 0]
    assert found[0].context.startswith('it \'s "charming"\nQuestion:')
    assert found[0].choices == ("negative", "positive")
    assert read(written(tmp_path, "dev.tsv", *table), task="sst2") == found
    rows = [{"sentence1": "a", "sentence2": "b", "label": 1}]
    assert glue("rte", rows, "rte")[0].choices[1] == "False"
    for form in GLUE.values():
        assert all("{" + column + "}" in form.prompt for column in form.columns)


def test_sentences_and_labels(tmp_path):
    file = written(tmp_path, "a.tsv", "sentence1\tsentence2\tlabel", "a \tb\t2")
    assert labelled(file) == [("a\nb", 2)]
    file = written(tmp_path, "b.jsonl", {"sentence": "a", "label": 1})
    assert labelled(file) == [("a", 1)]
    with pytest.raises(DataError, match="line 1: a row has a label from 0"):
        labelled(written(tmp_path, "c.jsonl", {"sentence": "a", "label": -1}))


@pytest.mark.parametrize(
    "name,line,message",
    [
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is no JSON object"),
        ("a.jsonl", "", "holds no questions"),
        ("a.jsonl", {"query": "q", "choices": ["a"], "gold": 0}, "at least two texts"),
        ("a.jsonl", {"query": "q", "choices": ["a", "b"], "gold": 2}, "gold must be from 0 to 1"),
        ("a.jsonl", {"query": "q", "choices": ["a", "b"]}, "gold must be from 0 to 1, got None"),
        ("a.jsonl", {"query": "q", "choices": ["a", 3], "gold": 0}, "a list of at least two texts"),
        ("a.jsonl", {"context": "q", "continuation": " "}, "must be texts"),
        ("a.jsonl", {"text": "q"}, "line 1 has text; a question has query, choices and gold"),
        ("sst2.tsv", "sentence\tlabel\nfine\t2", "label must be from 0 to 1, got '2'"),
        ("sst2.tsv", "text\tlabel\nfine\t1", "sst2 has a column sentence of texts; there are text"),
    ],
)
def test_what_is_no_question_is_named(tmp_path, name, line, message):
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, name, line))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        read(tmp_path / "gone.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"query": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read(tmp_path / "latin.jsonl")
    (tmp_path / "sst2.tsv").write_text("sentence\tlabel\n" + "x" * 200_000 + "\t1")
    with pytest.raises(DataError, match="is no table of short texts"):
        read(tmp_path / "sst2.tsv")


def test_right_answers_are_counted():
    asked = [Question("q", ("aa", "b"), 0), Question("q", ("aaaa", "b"), 0), Question("q", ("w",))]
    nats = {" aa": -1.0, " b": -1.5, " aaaa": -2.0, " w": -0.5}
    texts: list[str] = []

    def encode(text: str) -> list[int]:
        return list(text.encode())

    def score(pairs):
        said = [bytes(after).decode() for _, after in pairs]
        texts.extend(said)
        return [Score(nats[one], one == " w") for one in said]

    found = ask(asked, encode, score)
    assert texts == [" aa", " b", " aaaa", " b", " w"]
    assert found.right == (True, False, True) and found.count == 3
    assert found.accuracy == pytest.approx(2 / 3) and found.normalized == 1
    assert found.error == pytest.approx(math.sqrt(2 / 9 / 3))
    assert found.perplexity == pytest.approx(math.exp(3.5 / 10))


def test_a_text_begins_as_the_tokenizer_says():
    seen = []

    def score(pairs):
        seen.extend(before for before, _ in pairs)
        return [Score(0.0, True)] * len(pairs)

    encode = lambda text: [ord(x) for x in text]  # noqa: E731
    ask([Question("", ("a",)), Question("q", ("a",)), Question("\x01q", ("a",))], encode, score,
        begin=1)  # fmt: skip
    assert seen == [[1], [1, ord("q")], [1, ord("q")]]


def test_differences_are_of_pairs():
    mean, error = difference([True, True, False, True], [True, False, False, False])
    assert mean == 0.5 and error == pytest.approx(math.sqrt(1 / 3 / 4))
    assert difference([True] * 5, [True] * 5) == (0.0, 0.0)
    assert questions.difference([True], [False])[0] == 1

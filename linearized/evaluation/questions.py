"""Tasks out of files: multiple choice and last words, from JSON Lines, and GLUE's sentences, from
its own tables. Knows text; knows models as something that scores continuations.

A line of JSON is one of

    {"query": "…", "choices": ["…", "…"], "gold": 0}
    {"context": "…", "continuation": "…"}

the formats of MosaicML's evaluation sets (ARC, PIQA, COPA, HellaSwag, LAMBADA and others). A query
that begins with "Question:" is followed by "Answer:" in a line of its own, as there. A GLUE table
is a file with tabs whose first line names the columns, or JSON Lines with these names; its task is
that whose columns and labels these are (`sst2.tsv` says so by its name, too)."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearized.errors import DataError
from linearized.evaluation.continuations import Score, split

ASKED = "Question:"
ANSWERED = "\nAnswer:"


@dataclass(frozen=True, slots=True)
class Question:
    """A text and ways to go on, of which one is right. With one choice only, it is asked whether
    the model would say just that."""

    context: str
    choices: tuple[str, ...]
    gold: int = 0


@dataclass(frozen=True, slots=True)
class Glue:
    """How one of GLUE's tasks is asked of a language model."""

    columns: tuple[str, ...]
    prompt: str
    answers: tuple[str, ...]
    """In the order of its labels."""


GLUE = {
    "cola": Glue(
        ("sentence",),
        "{sentence}\nQuestion: Does this sentence make sense?\nAnswer:",
        ("no", "yes"),
    ),
    "mnli": Glue(
        ("premise", "hypothesis"),
        "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:",
        ("True", "Neither", "False"),
    ),
    "mrpc": Glue(
        ("sentence1", "sentence2"),
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
        "Question: Do both sentences mean the same thing?\nAnswer:",
        ("no", "yes"),
    ),
    "qnli": Glue(
        ("question", "sentence"),
        "{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:",
        ("yes", "no"),
    ),
    "qqp": Glue(
        ("question1", "question2"),
        "Question 1: {question1}\nQuestion 2: {question2}\n"
        "Question: Do both questions ask the same thing?\nAnswer:",
        ("no", "yes"),
    ),
    "rte": Glue(
        ("sentence1", "sentence2"),
        "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        ("True", "False"),
    ),
    "sst2": Glue(
        ("sentence",),
        "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("negative", "positive"),
    ),
    "wnli": Glue(
        ("sentence1", "sentence2"),
        "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        ("False", "True"),
    ),
}
"""GLUE's classification tasks (Wang et al., 2018), asked as in lm-evaluation-harness."""
COLUMNS = tuple(dict.fromkeys(name for form in GLUE.values() for name in form.columns))


def read(file: Path | str, *, task: str | None = None) -> list[Question]:
    """The questions of a file. `task` names the GLUE task of a table; None: the one that its file
    name begins with (`sst2-dev.tsv`).

    Raises:
        DataError: a file that is none of these, and what is wrong with which line.
    """
    path = Path(file)
    rows = _lines(path)
    first = rows[0][1]
    if task is None and not ({"query", "choices"} <= set(first) or "continuation" in first):
        task = next((name for name in GLUE if path.name.lower().startswith(name)), None)
        if task is None:
            raise DataError(
                f"{path}, line {rows[0][0]} has {', '.join(first)}; a question has query, choices "
                "and gold, or context and continuation; names of GLUE's tables begin with their "
                f"task's, one of {', '.join(GLUE)}"
            )
    return [_question(values, task, f"{path}, line {number}") for number, values in rows]


def glue(task: str, rows: Iterable[Mapping[str, Any]], name: str) -> list[Question]:
    """Questions of rows with the columns of a GLUE task and `label`."""
    return [_question(row, task, f"{name}, row {number}") for number, row in enumerate(rows)]


def labelled(file: Path | str) -> list[tuple[str, int]]:
    """Sentences and labels of one of GLUE's tables, for training; of two sentences, one behind the
    other. Its name need not say which task it is of.

    Raises:
        DataError: it is no table, or has no sentences or labels.
    """
    path, found = Path(file), []
    for number, values in _lines(path):
        texts = [values[name] for name in COLUMNS if isinstance(values.get(name), str)]
        label = str(values.get("label")).strip()
        if not texts or not label.isdigit():
            raise DataError(
                f"{path}, line {number}: a row has a label from 0, and one or two of the columns "
                f"{', '.join(COLUMNS)}; there are {', '.join(values)}"
            )
        found.append(("\n".join(text.strip() for text in texts), int(label)))
    return found


@dataclass(frozen=True, slots=True)
class Result:
    """Of one task. Rates are shares of the questions."""

    accuracy: float
    """How often the right choice has the highest log-likelihood; with one choice, how often the
    model would say just that."""
    normalized: float
    """The same with log-likelihoods divided by the choices' lengths in characters."""
    perplexity: float
    """A token of the right choices."""
    count: int
    error: float
    """Standard error of `accuracy`."""
    right: tuple[bool, ...]
    """Of each question, for comparing two models on the same ones."""


def ask(
    questions: Sequence[Question],
    encode: Callable[[str], list[int]],
    score: Callable[[Sequence[tuple[list[int], list[int]]]], list[Score]],
    *,
    begin: int | None = None,
) -> Result:
    """Let a model answer. `encode` gives the ids of a text, and `score` what
    `continuations.scores` does. `begin`: a token before every text, and the context of those that
    have none."""
    pairs, counts = [], []
    for question in questions:
        for choice in question.choices:
            context, continuation = split(encode, question.context, f" {choice}")
            before = [] if begin is None or context[:1] == [begin] else [begin]
            pairs.append(([*before, *context], continuation))
        counts.append(len(question.choices))
    found = iter(zip(score(pairs), [len(ids) for _, ids in pairs], strict=True))
    right, normal, nats, tokens = [], [], 0.0, 0
    for question, count in zip(questions, counts, strict=True):
        answers = [next(found) for _ in range(count)]
        gold, size = answers[question.gold]
        if count == 1:
            right.append(gold.greedy)
            normal.append(gold.greedy)
        else:
            plain = [one.nats for one, _ in answers]
            lengths = [max(len(choice), 1) for choice in question.choices]
            scaled = [x / n for x, n in zip(plain, lengths, strict=True)]
            right.append(plain.index(max(plain)) == question.gold)
            normal.append(scaled.index(max(scaled)) == question.gold)
        nats, tokens = nats - gold.nats, tokens + size
    accuracy, count = sum(right) / len(right), len(right)
    return Result(
        accuracy=accuracy,
        normalized=sum(normal) / count,
        perplexity=math.exp(min(nats / tokens, 700.0)),
        count=count,
        error=math.sqrt(accuracy * (1 - accuracy) / count),
        right=tuple(right),
    )


def difference(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, float]:
    """By how much the first model is right more often than the other on the same questions, and the
    standard error of that, which is smaller than those of the two."""
    gaps = [int(a) - int(b) for a, b in zip(one, other, strict=True)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / max(len(gaps) - 1, 1)
    return mean, math.sqrt(variance / len(gaps))


def _lines(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Rows of a table, or of JSON Lines, and the numbers of their lines."""
    if not path.is_file():
        raise DataError(f"there is no file {path}; name a file of questions")
    try:
        rows = list(_table(path) if path.suffix in (".tsv", ".csv") else _json_lines(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise DataError(f"{path} is no table of short texts: {error}") from None
    if not rows:
        raise DataError(f"{path} holds no questions")
    return rows


def _table(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    # GLUE's tables have tabs and do not quote: a quotation mark is one.
    csv.register_dialect("glue", csv.excel_tab, quoting=csv.QUOTE_NONE)
    with path.open(encoding="utf-8", newline="") as opened:
        rows = csv.DictReader(opened, dialect="glue" if path.suffix == ".tsv" else "excel")
        for row in rows:
            yield rows.line_num, {str(name): value for name, value in row.items()}


def _json_lines(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(values, dict):
                raise DataError(f"{path}, line {number} is no JSON object")
            yield number, values


def _question(values: Mapping[str, Any], task: str | None, where: str) -> Question:
    if task is not None:
        return _glue(values, task, where)
    if "continuation" in values:
        context, said = values.get("context"), values["continuation"]
        if not isinstance(context, str) or not isinstance(said, str) or not said.strip():
            raise DataError(f"{where}: context and continuation must be texts")
        return Question(_before(context), (said.strip(),))
    query, choices, gold = (values.get(name) for name in ("query", "choices", "gold"))
    good = isinstance(query, str) and isinstance(choices, list) and len(choices) > 1
    if not good or not all(isinstance(choice, str) for choice in choices or ()):
        raise DataError(f"{where}: query must be a text and choices a list of at least two texts")
    assert isinstance(query, str) and isinstance(choices, list)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise DataError(f"{where}: gold must be from 0 to {len(choices) - 1}, got {gold!r}")
    return Question(_before(query), tuple(choices), gold)


def _before(text: str) -> str:
    text = text.rstrip()
    return text + ANSWERED if text.startswith(ASKED) else text


def _glue(values: Mapping[str, Any], task: str, where: str) -> Question:
    if task not in GLUE:
        raise DataError(f"unknown GLUE task {task!r}; choose from {', '.join(GLUE)}")
    form = GLUE[task]
    texts = {name: values.get(name) for name in form.columns}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{where}: {task} has a column {name} of texts; there are "
                            f"{', '.join(values)}")  # fmt: skip
    label = str(values.get("label")).strip()
    if not label.isdigit() or int(label) >= len(form.answers):
        raise DataError(
            f"{where}: label must be from 0 to {len(form.answers) - 1}, got {values.get('label')!r}"
        )
    filled = form.prompt.format(**{name: str(text).strip() for name, text in texts.items()})
    return Question(filled, form.answers, int(label))

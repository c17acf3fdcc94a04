"""What jobs.evaluate measures, score by score: each a function of a contestant that gives numbers,
or None where the contestant cannot be asked. Knows texts, questions and models; knows no tables.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs import harness, hybrids
from jobs.contestants import TEACHER, Contestant, writer
from linearized.allocation import state_bytes
from linearized.errors import ConfigError, DataError
from linearized.evaluation import continuations, questions, recall
from linearized.evaluation.agreement import Agreement, agreement
from linearized.evaluation.perplexity import bits, strided, token_losses
from linearized.evaluation.questions import Question

if TYPE_CHECKING:
    from jobs.evaluate import EvaluateConfig

Numbers = dict[str, Any]
Measure = Callable[[Contestant], Numbers | None]
LETTERS = 16
"""Characters of a token, at most on the average: so much text is tokenized for it."""
SHORTEST = 1024
"""Positions of the first range."""
HUB = "nyu-mll/glue"


@dataclass(frozen=True, slots=True)
class Text:
    """The beginning of a text."""

    ids: Tensor
    """[N]."""
    sizes: Tensor
    """[N], bytes that each token stands for."""


@dataclass(frozen=True, slots=True)
class Sources:
    """All that is asked, in the model's tokens."""

    tokenizer: Any
    begin: int | None
    """The token that the tokenizer puts before a text."""
    texts: dict[str, Text]
    tasks: dict[str, list[Question]] = field(default_factory=dict)

    @classmethod
    def read(cls, config: EvaluateConfig) -> Sources:
        """
        Raises:
            DataError: a text or a task that cannot be read.
        """
        from linearized.training.tokenizer import load

        tokenizer = load(config.teacher or config.model)
        alone = tokenizer("", verbose=False)["input_ids"]
        begin = alone[0] if alone and alone[0] != tokenizer.eos_token_id else None
        wanted = max(config.tokens, config.rows * config.positions)
        texts = {
            name: _text(tokenizer, begin, text, wanted)
            for name, text in _documents(config, LETTERS * wanted).items()
        }
        tasks = {_task_name(task): _questions(task, config.limit) for task in config.tasks}
        return cls(tokenizer, begin, texts, tasks)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def measures(
    config: EvaluateConfig, sources: Sources, models: Sequence[Contestant]
) -> dict[str, Measure]:
    """By the names of rows in a table. Asking for one measures nothing."""
    teacher = next((one for one in models if one.name == TEACHER), None)
    found: dict[str, Measure] = {}
    for name, text in sources.texts.items():
        found[f"perplexity: {name}"] = functools.partial(_perplexity, config, text)
    for name, text in sources.texts.items():
        if teacher is not None:
            found[f"agreement: {name}"] = functools.partial(_agreement, config, text, teacher)
    for name, text in sources.texts.items():
        if config.positions:
            found[f"by position: {name}"] = functools.partial(_positions, config, text)
    for name, asked in sources.tasks.items():
        found[f"task: {name}"] = functools.partial(_task, config, sources, asked)
    for name in config.harness:
        found[f"harness: {name}"] = functools.partial(_harness, config, sources, name)
    first = next(iter(sources.texts.values()))
    for length in config.recall:
        found[f"pass key at {length}"] = functools.partial(
            _passkeys, config, sources, first, length
        )
    for length in config.recall:
        found[f"MQAR at {length}"] = functools.partial(_mqar, config, sources, first, length)
    for context in config.speed:
        found[f"decoding at {context}"] = functools.partial(_speed, context)
    return found


def _perplexity(config: EvaluateConfig, text: Text, who: Contestant) -> Numbers:
    ids = text.ids[: config.tokens]
    length = min(config.length, who.longest or config.length)
    stride = min(config.stride, length)
    windows = list(strided(who.model, ids, length=length, stride=stride))
    nats, count = sum(x for x, _ in windows), sum(n for _, n in windows)
    num_bytes = float(text.sizes[1 : len(ids)].sum()) * count / (len(ids) - 1)
    return {
        "perplexity": round(math.exp(nats / count), 4),
        "bits_per_byte": round(bits(nats, max(round(num_bytes), 1)), 5),
        "tokens": count,
        "length": length,
        "stride": stride,
    }


def _agreement(
    config: EvaluateConfig, text: Text, teacher: Contestant, who: Contestant
) -> Numbers | None:
    if who.name == TEACHER:
        return None
    length = min(config.length, who.longest or config.length, teacher.longest or config.length)
    rows = _rows(text.ids[: config.tokens], length)
    found: Agreement = agreement(who.model, teacher.model, list(rows[:, None]))
    return {
        "divergence": round(found.divergence, 5),
        "top1": round(found.top1, 5),
        "tokens": found.count,
    }


def _positions(config: EvaluateConfig, text: Text, who: Contestant) -> Numbers:
    """Perplexity by ranges of positions that double, those that are read whole."""
    length = min(config.positions, who.longest or config.positions)
    rows = _rows(text.ids, config.positions)[: config.rows, :length]
    losses = torch.cat([token_losses(who.model, row[None]).cpu().double() for row in rows])
    ranges: dict[str, float] = {}
    first = 0
    while first < config.positions:
        last = min(max(2 * first, SHORTEST), config.positions)
        if last <= length:
            nats = float(losses[:, first:last].mean())
            ranges[f"{first}–{last}"] = round(math.exp(nats), 4)
        first = last
    return {"ranges": ranges, "rows": len(rows)}


def _task(
    config: EvaluateConfig, sources: Sources, asked: Sequence[Question], who: Contestant
) -> Numbers:
    score = functools.partial(
        continuations.scores, who.model, batch_tokens=config.batch_tokens, longest=who.longest
    )
    found = questions.ask(asked, sources.encode, score, begin=sources.begin)
    return {
        "accuracy": round(found.accuracy, 5),
        "error": round(found.error, 5),
        "normalized": round(found.normalized, 5),
        "perplexity": round(found.perplexity, 4),
        "count": found.count,
        "right": "".join("01"[one] for one in found.right),
    }


def _harness(config: EvaluateConfig, sources: Sources, task: str, who: Contestant) -> Numbers:
    found = harness.run(
        who.model, sources.tokenizer, [task], limit=config.limit, shots=config.shots,
        batch_tokens=config.batch_tokens, folder=config.harness_tasks,
    )  # fmt: skip
    return {"tasks": found}


def _passkeys(
    config: EvaluateConfig, sources: Sources, text: Text, length: int, who: Contestant
) -> Numbers | None:
    """At depths that are spread evenly, the end left out."""
    if who.longest is not None and length > who.longest:
        return None
    generator = torch.Generator().manual_seed(config.seed)
    filler = _repeated(text.ids, config.keys * length).view(config.keys, length)
    nats, right = 0.0, 0
    for number, row in enumerate(filler):
        depth = 0.9 * number / config.keys
        tokens, size = recall.passkey(sources.encode, row, depth=depth, generator=generator)
        lost, said = recall.answer(who.model, tokens, size)
        nats, right = nats + lost, right + said
    return {"right": right / config.keys, "nats": round(nats / config.keys, 4)}


def _mqar(
    config: EvaluateConfig, sources: Sources, text: Text, length: int, who: Contestant
) -> Numbers | None:
    """Pairs of the text's own words, with line ends between the questions."""
    if who.longest is not None and length > who.longest:
        return None
    generator = torch.Generator().manual_seed(config.seed)
    words = _words(sources, text.ids)
    if len(words) < 2 * config.pairs + 2:
        raise ConfigError(
            f"pairs={config.pairs} need {2 * config.pairs + 2} words of one token, and the first "
            f"text has {len(words)}; choose fewer, or another text"
        )
    filler = (sources.encode("\n") or [words[0]])[0]
    right, nats, asked = 0, 0.0, 0
    for _ in range(config.keys):
        plain = recall.mqar(
            1, length, pairs=config.pairs, vocab=len(words) + 1, generator=generator
        )
        found = recall.answers(who.model, *recall.spoken(*plain, words, filler))
        right, nats, asked = right + found[0], nats + found[1], asked + found[2]
    return {"right": round(right / asked, 4), "nats": round(nats / asked, 4)}


def _speed(context: int, who: Contestant) -> Numbers | None:
    """A step of one token on top of a state of random numbers, and the bytes of that state."""
    if who.is_part:
        return None
    model = writer(who)
    if who.longest is not None and who.linear is not None and context >= who.longest:
        return None
    settings = {"turns": 15, "budget": 10.0, "device": model.device}
    timing = hybrids.steps(model, context, (1,), **settings)["1"]
    return {
        "seconds": timing.median,
        "low": timing.low,
        "high": timing.high,
        "bytes": state_bytes(model, context),
    }


def _rows(ids: Tensor, length: int) -> Tensor:
    """[R, length], as many as there are.

    Raises:
        ConfigError: there is none.
    """
    if len(ids) < length:
        raise ConfigError(
            f"the text has {len(ids)} tokens, less than a row of {length}; choose a smaller length "
            "or positions, or a longer text"
        )
    return ids[: len(ids) // length * length].view(-1, length)


def _repeated(ids: Tensor, count: int) -> Tensor:
    return ids.repeat(-(-count // len(ids)))[:count]


def _words(sources: Sources, ids: Tensor) -> list[int]:
    """Tokens that are words with a space before them, the most frequent ones of the text first."""
    counted = Counter(ids.tolist())
    texts = {one: sources.tokenizer.decode([one]) for one in counted}
    words = [
        one for one, _ in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))
        if texts[one][:1] == " " and texts[one][1:].isalpha()
    ]  # fmt: skip
    return words[:512]


def _documents(config: EvaluateConfig, letters: int) -> dict[str, str]:
    """The beginning of each text, its documents joined by empty lines."""
    from linearized.training import corpus

    if config.texts:
        names = _short(config.texts)
        tables = [corpus.read(one, text_column=config.text_column) for one in config.texts]
    else:
        names, table = ["held out"], corpus.read("stdlib")
        _, kept = corpus.split_documents(table["document"].to_pylist(), 0.05)
        tables = [table.take(kept)]
    found = {}
    for name, table in zip(names, tables, strict=True):
        parts, size = [], 0
        for text in table["text"]:
            parts.append(text.as_py()[: letters - size])
            size += len(parts[-1])
            if size >= letters:
                break
        found[name] = "\n\n".join(parts)
    return found


def _short(sources: Sequence[str]) -> list[str]:
    if len(set(sources)) < len(sources):
        raise ConfigError(f"texts must name every text once, got {list(sources)}")
    short = [Path(source).stem if Path(source).exists() else source for source in sources]
    return short if len(set(short)) == len(short) else list(sources)


def _text(tokenizer: Any, begin: int | None, text: str, wanted: int) -> Text:
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    before = [] if begin is None else [begin]
    ids = [*before, *encoded["input_ids"]][:wanted]
    if len(ids) < 2:
        raise DataError("a text to measure on has less than two tokens; bring a longer one")
    ends = [0, *(end for _, end in encoded["offset_mapping"])][: len(ids) - len(before) + 1]
    sizes = [len(text[a:b].encode()) for a, b in itertools.pairwise(ends)]
    return Text(torch.tensor(ids), torch.tensor([0] * len(before) + sizes))


def _task_name(task: str) -> str:
    return task if task.startswith("glue:") else Path(task).stem


def _questions(task: str, limit: int | None) -> list[Question]:
    if not task.startswith("glue:"):
        return questions.read(task)[:limit]
    name = task.removeprefix("glue:")
    if name not in questions.GLUE:
        raise ConfigError(
            f"unknown task {task}; choose from {', '.join(f'glue:{x}' for x in questions.GLUE)}"
        )
    import datasets

    try:
        split = "validation_matched" if name == "mnli" else "validation"
        rows: Any = datasets.load_dataset(HUB, name, split=split)
    except Exception as error:  # of any kind: the hub's client, its file systems, its parsers
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"cannot fetch {task} from the hub ({reason}); name a local table, such as sst2-dev.tsv"
        ) from error
    return questions.glue(name, rows, task)[:limit]

"""The token rows of jobs.probe: some to fit on, some to measure on. Knows sources of text and a
tokenizer; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearized.errors import ConfigError, DataError
from linearized.evaluation.recall import passkey

if TYPE_CHECKING:
    import pyarrow as pa

LETTERS = 16
"""Characters of a token, at most on the average: so much text is tokenized for it."""
ASIDE = 4
"""Rows that are set aside."""


@dataclass(frozen=True, slots=True)
class Texts:
    fit: Tensor
    """[rows, T]."""
    distil: Tensor
    """[rows, T], others, to distil on."""
    aside: Tensor
    """[rows, T], more like them, to choose layers by."""
    held_out: dict[str, Tensor]
    """[rows, T] of each text, by its name."""
    passkeys: list[tuple[Tensor, int]]
    """Rows [T] of the first of these texts that end with a pass key, and its number of tokens."""


def read(
    tokenizer: str,
    source: str,
    held_out: Sequence[str] = (),
    *,
    text_column: str | None = None,
    tokens: int,
    distil: int = 0,
    row: int,
    rows: int,
    length: int,
    passkeys: int = 0,
    seed: int,
) -> Texts:
    """Rows of tokens that follow each other in one document; documents that are shorter than a row
    are joined, if there are no others. Those to fit on, `tokens` in rows of `row`, and those to
    distil on, `distil` tokens, are spread over all documents of `source`; those to measure on,
    `rows` rows of `length`, are the first ones of each text of `held_out`, or of documents of
    `source` that are held out.
    `passkeys` rows of the same length ask for a pass key.

    Raises:
        DataError: there is too little text.
    """
    from linearized.training import corpus
    from linearized.training.tokenizer import load

    encode = load(tokenizer)
    table = corpus.read(source, text_column=text_column)
    if held_out:
        documents = table["text"]
        names = _names(held_out)
        found = [corpus.read(one, text_column=text_column)["text"] for one in held_out]
        held = dict(zip(names, found, strict=True))
    else:
        train, kept = corpus.split_documents(table["document"].to_pylist(), 0.05)
        documents, held = table["text"].take(train), {"held out": table["text"].take(kept)}
    wanted = tokens // row + distil // row + ASIDE
    fit = _spread(encode, documents, row, wanted, seed)
    if len(fit) < wanted:
        raise DataError(
            f"{source!r} fills {len(fit)} rows of {row} tokens, not {wanted} ({tokens} tokens to "
            f"fit on, {distil} to distil on, and {ASIDE} rows aside); bring more text, or choose a "
            "smaller row or fewer tokens"
        )
    measured = {n: _first(encode, texts, length, rows, n) for n, texts in held.items()}
    keys = _passkeys(encode, next(iter(measured.values())), passkeys, seed)
    aside, fit, others = fit.split([ASIDE, tokens // row, distil // row])
    return Texts(fit, others, aside, measured, keys)


def _names(sources: Sequence[str]) -> list[str]:
    """Short ones, if these differ."""
    if len(set(sources)) < len(sources):
        raise ConfigError(f"held_out must name every text once, got {list(sources)}")
    short = [Path(source).stem if Path(source).exists() else source for source in sources]
    return short if len(set(short)) == len(short) else list(sources)


def _spread(encode: Any, documents: pa.ChunkedArray, length: int, count: int, seed: int) -> Tensor:
    """Up to `count` rows, of documents in an order of the seed; an equal share of each, and more of
    some where others are short."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    share = -(-count // len(order))
    rows: list[Tensor] = []
    for most in (share, count):
        for index in order:
            if len(rows) >= count:
                break
            text = documents[index].as_py()
            start = 0 if most == share else LETTERS * share * length
            rows += _rows(encode, text[start:], length, min(most, count - len(rows)))
    if not rows:
        rows = _rows(encode, _joined(encode, documents, LETTERS * length * count), length, count)
    mixed = torch.randperm(len(rows), generator=generator)
    return torch.stack(rows)[mixed] if rows else torch.zeros(0, length, dtype=torch.int64)


def _first(encode: Any, documents: Sequence[Any], length: int, count: int, name: str) -> Tensor:
    rows: list[Tensor] = []
    for document in documents:
        rows += _rows(encode, document.as_py(), length, count - len(rows))
        if len(rows) >= count:
            break
    if not rows:
        rows = _rows(encode, _joined(encode, documents, LETTERS * length * count), length, count)
    if rows:
        return torch.stack(rows[:count])
    raise DataError(
        f"{name!r} has less than {length} tokens; choose a smaller row or length, or another "
        "text to measure on"
    )


def _joined(encode: Any, documents: Sequence[Any], letters: int) -> str:
    """Documents one after the other, each ended as in training; about so many letters of them."""
    texts, size = [], 0
    for document in documents:
        if size >= letters:
            break
        texts.append(document.as_py())
        size += len(texts[-1])
    return (encode.eos_token or "\n\n").join(texts)


def _passkeys(encode: Any, rows: Tensor, count: int, seed: int) -> list[tuple[Tensor, int]]:
    """At depths that are spread evenly, the end left out."""
    generator = torch.Generator().manual_seed(seed)

    def ids(text: str) -> list[int]:
        return list(encode(text, add_special_tokens=False)["input_ids"])

    return [
        passkey(ids, rows[i % len(rows)], depth=0.9 * i / count, generator=generator)
        for i in range(count)
    ]


def _rows(encode: Any, text: str, length: int, count: int) -> list[Tensor]:
    """The first rows of a text."""
    ids = encode(text[: LETTERS * length * count], verbose=False)["input_ids"]
    whole = min(len(ids) // length, count)
    return list(torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length))

"""Conversations: to ids through a tokenizer's template, with what the model is to learn of them.
Knows roles and templates; knows nothing of files or blocks.

A conversation is `messages`, a list of role and content as chat models' tokenizers take it, or a
`prompt` and a `completion`, each such a list or a text. What an assistant says is learned with the
token that ends its turn; what others say is read only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from linearized.errors import DataError
from linearized.training.blocks import Document
from linearized.training.tokenizer import Edges, load

Message = dict[str, Any]
Span = tuple[int, int]
"""From a character to another."""


class Refused(Exception):
    """A conversation cannot be learned from. Its message says why."""


class ChatEncoder:
    """Turns conversations into documents."""

    def __init__(self, folder: Path | str, edges: Edges) -> None:
        self._tokenizer: Any = load(folder)
        self._edges = edges
        added = self._tokenizer.added_tokens_decoder.values()
        self._special = sorted({str(token.content) for token in added if token.special})

    def __call__(self, conversation: str) -> Document:
        """`conversation` is JSON: an object of `messages`, or of `prompt` and `completion`, or of
        any other name that holds messages.

        Raises:
            Refused: it has no such form, spells out a special token, or the template does not take
                it.
        """
        row: dict[str, Any] = json.loads(conversation)
        if {"prompt", "completion"} <= row.keys():
            prompt, completion = row["prompt"], row["completion"]
            if self._tokenizer.chat_template is None:
                return self._plain(prompt, completion)
            told = _messages(prompt, "user"), _messages(completion, "assistant")
            return self._through_template(*told)
        [messages] = row.values()
        return self._through_template([], _messages(messages, "user"))

    def _plain(self, prompt: Any, completion: Any) -> Document:
        """One text after the other, where there is no template."""
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise Refused("holds messages, and the tokenizer has no chat template")
        self._check(prompt + completion)
        text = prompt + completion
        ids, trained = self._encode(text, [(len(prompt), len(text))])
        before, after = self._edges
        return Document(
            np.array([*before, *ids, *after], np.int32),
            np.array([False] * len(before) + trained + [True] * len(after), bool),
        )

    def _through_template(self, given: list[Message], told: list[Message]) -> Document:
        messages = [*given, *told]
        for message in messages:
            self._check(_content(message))
        text = self._render(messages)
        turns = range(len(given), len(messages))
        spans = list(self._spans(messages, turns, text))
        if not spans:
            raise Refused("holds nothing that an assistant answers")
        ids, trained = self._encode(text, spans)
        return Document(np.array(ids, np.int32), np.array(trained, bool))

    def _spans(self, messages: list[Message], turns: range, text: str) -> Iterator[Span]:
        """Where the assistant speaks: from where a reply is asked for to where its turn ends. Turns
        that the template shows otherwise in a longer conversation, as some do with thoughts, are
        read only."""
        for turn in turns:
            if messages[turn].get("role") != "assistant" or turn == 0:
                continue
            asked = self._render(messages[:turn], add_generation_prompt=True)
            said = self._render(messages[: turn + 1])
            if text.startswith(said) and said.startswith(asked):
                yield len(asked), len(said.rstrip())

    def _render(self, messages: list[Message], **settings: Any) -> str:
        import jinja2

        try:
            shown = self._tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise Refused(f"is refused by the chat template ({error})") from error
        return str(shown)

    def _check(self, text: str) -> None:
        """A text must not be able to end a turn, or to speak for another."""
        for token in self._special:
            if token in text:
                raise Refused(f"spells out the special token {token}")

    def _encode(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        """Ids, and whether each begins in one of the spans."""
        found = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        learned = np.zeros(len(text) + 1, bool)
        for start, stop in spans:
            learned[start:stop] = True
        return found["input_ids"], [bool(learned[at]) for at, _ in found["offset_mapping"]]


def check_template(folder: Path | str) -> None:
    """
    Raises:
        DataError: the tokenizer has no template for conversations.
    """
    if load(folder).chat_template is None:
        raise DataError(
            f"tokenizer {str(folder)!r} has no chat template, which conversations need; name the "
            "tokenizer of a chat model, or bring rows of prompt and completion"
        )


def _messages(given: Any, role: str) -> list[Message]:
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    if not isinstance(given, list) or not all(isinstance(m, dict) for m in given) or not given:
        raise Refused("holds no list of messages")
    return [{name: value for name, value in m.items() if value is not None} for m in given]


def _content(message: Message) -> str:
    """All that a message says, to look for what it must not say."""
    return json.dumps(message, ensure_ascii=False)

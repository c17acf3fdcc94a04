"""Prompts that are read piece by piece, several side by side where that is faster. Knows rows of
states; knows nothing of what is chosen after them.
"""

from __future__ import annotations

import logging
from collections import deque

import torch
from transformers import PreTrainedModel

from linearized.models import extend
from linearized.speculative.pool import Pool
from linearized.speculative.text import Text
from linearized.state import DecodeState

log = logging.getLogger(__name__)


class Reading:
    """The line of texts whose prompts have not been read, but for their last tokens: those are the
    roots of their first trees."""

    def __init__(self, model: PreTrainedModel, pool: Pool[Text]) -> None:
        self._model = model
        self._pool = pool
        self._line: deque[Text] = deque()
        self._read: dict[Text, int] = {}
        """Tokens of each prompt that are in its state."""
        self._alone: set[Text] = set()
        """Prompts that are read by themselves, as one beside them could not be read."""

    @property
    def texts(self) -> list[Text]:
        return list(self._line)

    def add(self, text: Text, num_read: int) -> None:
        """To the end of the line. Its row in the pool holds so many of its tokens."""
        self._line.append(text)
        self._read[text] = num_read

    def drop(self, text: Text) -> None:
        """Out of the line, wherever it stands."""
        if text in self._read:
            self._line = deque(one for one in self._line if one is not text)
            del self._read[text]
            self._alone.discard(text)

    def go_on(self, num_tokens: int, *, behind: int) -> tuple[list[Text], dict[Text, Exception]]:
        """Read so many tokens, in rows of the pool behind the first `behind`. Returns the texts
        whose prompts have been read, and those that could not be, with the reasons."""
        read: list[Text] = []
        failed: dict[Text, Exception] = {}
        while self._line and num_tokens > 0:
            texts, width = self._next(num_tokens)
            first = behind + len(read)
            texts = self._pool.arrange(texts, start=first)
            try:
                self._take(texts, width, self._pool.rows(first, first + len(texts)))
            except Exception as error:
                if len(texts) > 1:  # alone, only those at fault will fail again
                    log.exception("could not read %d prompts at once", len(texts))
                    self._alone.update(texts)
                else:
                    failed[texts[0]] = error
                    self.drop(texts[0])
                continue
            num_tokens -= max(width * len(texts), 1)
            done = [text for text in texts if self._read[text] == _goal(text)]
            for text in done:
                self.drop(text)
            read += self._pool.arrange(done, start=first)
        return read, failed

    def _next(self, num_tokens: int) -> tuple[list[Text], int]:
        """The first in line, and how many of its tokens are read now. Beside it those behind it
        that are at their end with it: rows side by side take less time than one after the other."""
        first = self._line[0]
        width = min(_goal(first) - self._read[first], num_tokens)
        texts = [first]
        if width and first not in self._alone:
            for text in list(self._line)[1:]:
                left = _goal(text) - self._read[text]
                fits = (len(texts) + 1) * width <= num_tokens
                if fits and width // 2 < left <= width and text not in self._alone:
                    texts.append(text)
        return texts, width

    def _take(self, texts: list[Text], width: int, state: DecodeState) -> None:
        """`width` tokens of each prompt, or what is left of it, into rows of the state."""
        spans = [(self._read[text], min(self._read[text] + width, _goal(text))) for text in texts]
        parts = [text.tokens[start:stop] for text, (start, stop) in zip(texts, spans, strict=True)]
        if width:
            device = self._model.device
            padded = [[*part, *[part[-1]] * (width - len(part))] for part in parts]
            counts = [len(part) for part in parts]
            mask = None
            if min(counts) < width:
                mask = torch.arange(width) < torch.tensor(counts)[:, None]
                mask = mask.to(device)
            ids = torch.tensor(padded, device=device)
            extend(self._model, ids, state, mask=mask, counts=counts, logits_to_keep=1)
        for text, (_, stop) in zip(texts, spans, strict=True):
            self._read[text] = stop


def _goal(text: Text) -> int:
    return len(text.tokens) - 1

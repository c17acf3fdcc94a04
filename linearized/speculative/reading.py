"""Prompts that are read piece by piece, several side by side where that is faster, from the longest
prefix that is known. Knows rows of states; knows nothing of what is chosen after them.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearized.models import extend
from linearized.speculative.costs import Now
from linearized.speculative.pace import LEAST, MOST, START, Pace
from linearized.speculative.pool import Pool
from linearized.speculative.prefixes import SPARED, Prefixes
from linearized.speculative.text import Text
from linearized.state import DecodeState

log = logging.getLogger(__name__)

LOGITS = 1 << 24
"""Numbers at most that the logits of a piece of a prompt have, where all of them are looked at."""


@dataclass(slots=True)
class _Progress:
    read: int
    """Tokens of the prompt that are in its state."""
    stops: list[int] | None = None
    """Where its state is to be kept, the next one last; None: nobody has looked what is known."""
    alone: bool = False
    """It is read by itself, as a prompt beside it could not be read."""


class Reading:
    """The line of texts whose prompts have not been read, but for their last tokens: those are the
    roots of their first trees."""

    def __init__(
        self,
        model: PreTrainedModel,
        pool: Pool[Text],
        *,
        prefixes: Prefixes | None = None,
        now: Now = time.perf_counter,
    ) -> None:
        self.prefixes = prefixes
        """What is known; None: nothing, and nothing is kept."""
        self._model = model
        self._pool = pool
        self._now = now
        grows = pool.first(1).history is not None  # and so does what many tokens look at
        self._pace = Pace(most=START if grows else MOST)
        self._scored = max(LOGITS // model.config.vocab_size, 1)
        self._line: deque[Text] = deque()
        self._progress: dict[Text, _Progress] = {}

    @property
    def texts(self) -> list[Text]:
        return list(self._line)

    def add(self, text: Text, num_read: int) -> None:
        """To the end of the line. Its row in the pool holds so many of its tokens."""
        self._line.append(text)
        self._progress[text] = _Progress(num_read)

    def drop(self, text: Text) -> None:
        """Out of the line, wherever it stands."""
        if text in self._progress:
            self._line = deque(one for one in self._line if one is not text)
            del self._progress[text]

    def go_on(
        self, num_tokens: int | None = None, *, behind: int, seconds: float | None = None
    ) -> tuple[list[Text], dict[Text, Exception]]:
        """Read so many tokens, in rows of the pool behind the first `behind`; no more than can be
        read in so many seconds, but at least a few. None and None: as many as are read fastest at
        once. Returns the texts whose prompts have been read, and those that could not be, with the
        reasons."""
        read: list[Text] = []
        failed: dict[Text, Exception] = {}
        if num_tokens is None:
            num_tokens = self._pace.fastest() if seconds is None else sys.maxsize
        ends = None if seconds is None else self._now() + seconds
        begun = False
        while self._line and num_tokens > 0:
            size = min(num_tokens, self._size(ends, begun=begun))
            if not size:
                break
            texts, width = self._next(size)
            first = behind + len(read)
            texts = self._pool.arrange(texts, start=first)
            try:
                logits = self._take(texts, width, self._pool.rows(first, first + len(texts)))
            except Exception as error:
                if len(texts) > 1:  # alone, only those at fault will fail again
                    log.exception("could not read %d prompts at once", len(texts))
                    for text in texts:
                        self._progress[text].alone = True
                else:
                    failed[texts[0]] = error
                    self.drop(texts[0])
                continue
            begun |= width > 0
            num_tokens -= max(width * len(texts), 1)
            unscored = self._settle(texts, width, logits)
            failed.update(unscored)
            for text in unscored:
                self.drop(text)
            texts = [text for text in texts if text in self._progress]
            done = [text for text in texts if self._progress[text].read == _goal(text)]
            for text in done:
                self.drop(text)
            read += self._pool.arrange(done, start=first)
        return read, failed

    def keep(self, text: Text, num_tokens: int) -> None:
        """The state in its row, which has read the first so many of its tokens, for other texts to
        go on from."""
        if self.prefixes is None or not num_tokens:
            return
        try:
            self.prefixes.put(text.tokens[:num_tokens], self._pool.row(text), owner=text.owner)
        except Exception:  # the text itself can do without
            log.exception("could not keep the state behind %d tokens", num_tokens)

    def _size(self, ends: float | None, *, begun: bool) -> int:
        """Tokens of the next piece; 0: there is no time for one."""
        fastest = self._pace.fastest()
        if ends is None:
            return fastest
        size = self._pace.within(ends - self._now())
        if size < LEAST and begun:
            return 0
        return min(max(size or self._pace.fewest(), LEAST), fastest)

    def _next(self, num_tokens: int) -> tuple[list[Text], int]:
        """The first in line, and how many of its tokens are read now. Beside it those behind it
        that are at a stop with it: rows side by side take less time than one after the other."""
        first = self._line[0]
        self._begin(first)
        if first.is_unscored:
            num_tokens = min(num_tokens, self._scored)
        width = min(self._left(first), num_tokens)
        texts = [first]
        if width and not self._progress[first].alone:
            for text in list(self._line)[1:]:
                if (len(texts) + 1) * width > num_tokens:
                    break
                if self._goes_beside(text, first, width):
                    self._begin(text)
                    if self._goes_beside(text, first, width):
                        texts.append(text)
        return texts, width

    def _goes_beside(self, text: Text, first: Text, width: int) -> bool:
        return (
            width // 2 < self._left(text) <= width
            and not self._progress[text].alone
            and text.is_unscored == first.is_unscored
            and not self._awaits(text, first)
        )

    def _awaits(self, text: Text, first: Text) -> bool:
        """Will it go on from what is kept of the first?"""
        if self.prefixes is None or self._progress[text].stops is not None or text.is_unscored:
            return False
        stop, read = self._stop(first), self._progress[text].read
        alike = text.owner == first.owner and read < stop <= _goal(text)
        return alike and text.tokens[:stop] == first.tokens[:stop]

    def _begin(self, text: Text) -> None:
        """Go on from what is known of it by now, and say where its state is to be kept."""
        progress, goal = self._progress[text], _goal(text)
        if progress.stops is not None:
            return
        progress.stops = []
        if self.prefixes is None:
            return
        try:
            known = self._restore(text, self.prefixes)
        except Exception:
            log.exception("could not go on from a known prefix; its text is read from the start")
            self._pool.clear(text)
            progress.read = known = 0
        every = self.prefixes.every
        stops = {*range(progress.read // every * every + every, goal, every), goal}
        if progress.read + SPARED <= known < goal:
            stops.add(known)
        progress.stops = sorted((stop for stop in stops if stop > progress.read), reverse=True)

    def _restore(self, text: Text, prefixes: Prefixes) -> int:
        """How far it is like a known text."""
        progress = self._progress[text]
        found = prefixes.find(text.tokens[: _goal(text)], owner=text.owner)
        if found.state is not None and found.length > progress.read and not text.is_unscored:
            self._pool.row(text).copy_(found.state)
            progress.read = found.length
            text.cached_tokens = min(found.length, text.num_prompt)
        return found.known

    def _take(self, texts: list[Text], width: int, state: DecodeState) -> Tensor | None:
        """`width` tokens of each prompt, or what is left of it to its next stop, into rows of the
        state. Logits [B, T, V], or [B, 1, V] where nobody looks at them."""
        if not width:
            return None
        counts = [min(width, self._left(text)) for text in texts]
        starts = [self._progress[text].read for text in texts]
        parts = [
            text.tokens[start : start + count]
            for text, start, count in zip(texts, starts, counts, strict=True)
        ]
        device = self._model.device
        padded = [[*part, *[part[-1]] * (width - len(part))] for part in parts]
        mask = None
        if min(counts) < width:
            mask = torch.arange(width) < torch.tensor(counts)[:, None]
            mask = mask.to(device)
        ids = torch.tensor(padded, device=device)
        kept = 0 if texts[0].is_unscored else 1
        began = self._now()
        logits = extend(self._model, ids, state, mask=mask, counts=counts, logits_to_keep=kept)
        self._pace.took(ids.numel(), self._now() - began)
        return logits

    def _settle(
        self, texts: list[Text], width: int, logits: Tensor | None
    ) -> dict[Text, Exception]:
        """What follows from tokens that are in their states now. Returns what could not be
        scored."""
        failed: dict[Text, Exception] = {}
        for row, text in enumerate(texts):
            progress = self._progress[text]
            start, count = progress.read, min(width, self._left(text))
            progress.read += count
            if text.is_unscored and logits is not None:
                try:
                    text.score(logits[row, :count], start)
                except Exception as error:
                    failed[text] = error
                    continue
            if progress.stops and progress.read == progress.stops[-1]:
                progress.stops.pop()
                self.keep(text, progress.read)
        return failed

    def _stop(self, text: Text) -> int:
        """Where reading it is interrupted next, or ends."""
        stops = self._progress[text].stops
        return stops[-1] if stops else _goal(text)

    def _left(self, text: Text) -> int:
        """Tokens to its next stop."""
        return self._stop(text) - self._progress[text].read


def _goal(text: Text) -> int:
    return len(text.tokens) - 1

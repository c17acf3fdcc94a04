"""One text of a target, as its draft replica sees it: how far it has come, what is foreseen of it,
and what the target was told of that. Knows no socket and no model.
"""

from __future__ import annotations

from linearized.speculative import Foresight, Text
from linearized.speculative.record import Record
from serve_apps.link.protocol import Open

PUSH = 4
"""Looks ahead after which a target is told what came of them."""


class Session:
    def __init__(self, message: Open, *, most: int, deepest: int, record: Record) -> None:
        """`most`: guesses that are kept; `deepest`: levels that are answered with; `record`: how
        often guesses turn out right, also for other texts."""
        self.epoch = message.epoch
        self.text = Text(
            message.tokens,
            sampling=message.sampling,
            max_new_tokens=0,
            num_prompt=message.num_prompt,
        )
        """As far as it is drafted for; the forward thread reads it."""
        self.foresight = Foresight(self.text, most, shared=record)
        self.owed = True
        """The target waits for a tree on top of the text as it is."""
        self.failed = False
        """Nothing can be drafted for it."""
        self._deepest = deepest
        self._depth = min(message.depth, deepest)
        self._ahead: list[int] = []
        """Tokens that have come since."""
        self._untold = 0
        """Looks ahead since the target was told."""

    @property
    def length(self) -> int:
        return len(self.text.tokens) + len(self._ahead)

    @property
    def unanswered(self) -> bool:
        """Was a tree asked for that the target was not told?"""
        return self.owed or bool(self._ahead)

    @property
    def waits(self) -> bool:
        """Is there anything to do for it?"""
        return bool(self._ahead) or self.owed or self.due or not self.done

    @property
    def depth(self) -> int:
        """How far to look ahead: once the target has its tree, to where a tree as deep would end
        that stood on top of it."""
        return self._depth if self.owed else 2 * self._depth + 1

    @property
    def done(self) -> bool:
        """Is there nothing more to be foreseen of it?"""
        return self.failed or not self.foresight.frontier(self.depth, 1)

    @property
    def due(self) -> bool:
        """Is the target to be told what is foreseen?"""
        if self.failed or self._ahead:
            return False
        if self.owed:
            return self.foresight.seen(self._depth)
        return self._untold >= PUSH or (self._untold > 0 and self.done)

    def extend(self, tokens: tuple[int, ...], depth: int) -> None:
        self._ahead += tokens
        self._depth = min(depth, self._deepest)

    def go_on(self) -> None:
        """Be where the target is."""
        if self._ahead:
            self.text.tokens += self._ahead
            self._ahead = []
            self.foresight.go_on()
            self.owed, self._untold = True, 0

    def looked(self) -> None:
        """A look ahead was taken."""
        self._untold += 1

    def told(self) -> None:
        self.owed, self._untold = False, 0

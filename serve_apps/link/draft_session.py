"""One text's side of the link to a draft replica: what the draft was told of it, and what it has
answered. Knows tokens and messages; knows no socket.

`order`, `receive` and what follows them are called on the event loop; the engine's thread reads
`open`, `ordered`, `tree` and `awaited`.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from linearized.speculative import Text, TokenTree
from serve_apps.link import protocol
from serve_apps.link.protocol import Close, Commit, Draft, Error, Open

if TYPE_CHECKING:
    from serve_apps.link.draft_peer import DraftPeer
    from serve_apps.link.drafts import DraftLinks

LATE_S = 0.25
"""Seconds after which a draft that has not answered counts as failing, …"""
READING_S = 30.0
"""… and if it has to read much of the text first: …"""
MUCH = 32
"""… more tokens than these."""
MAX_REOPENED = 8
"""How often a session is opened again before the draft is left alone with it."""

log = logging.getLogger(__name__)


class DraftSession:
    def __init__(self, links: DraftLinks, number: int, text: Text) -> None:
        self.number = number
        self.peer: DraftPeer | None = None
        """Where it is open."""
        self._links = links
        self._text = text
        self._epoch = 0
        self._known = 0
        """Tokens that the draft was told."""
        self._depth = 0
        self._owed: dict[int, tuple[float, bool]] = {}
        """By the length of the text on top of which a tree was asked for: when, and whether the
        draft had to read much."""
        self._refused = False
        self._found = (0, TokenTree.empty)
        """The last tree, and how many tokens it stands on."""
        self._seen = (self._found, 0, TokenTree.empty)
        """What was found below the text when the tree was that, and the text had so many tokens."""

    @property
    def open(self) -> bool:
        """Is there anybody to ask?"""
        peer = self.peer
        usable = peer.usable if peer is not None else False
        return not self._refused and (usable or self._links.usable)

    @property
    def ordered(self) -> int:
        """Levels of the tree that was asked for on top of the text as it is now; 0: none was."""
        asked = self.peer is not None and self._known == len(self._text.tokens)
        return self._depth if asked else 0

    @property
    def tree(self) -> TokenTree:
        """What is known to be drafted on top of the text as it is now."""
        found, length = self._found, len(self._text.tokens)
        if self._seen[0] is not found or self._seen[1] != length:
            base, tree = found
            self._seen = found, length, tree.below(self._text.tokens[base:])
        return self._seen[2]

    def awaited(self, now: float) -> bool:
        """Is a tree for the text as it is now owed, and may it well come yet?"""
        peer, owed = self.peer, self._owed.get(len(self._text.tokens))
        if peer is None or owed is None or not peer.usable:
            return False
        since, reads = owed
        return now - since < (READING_S if reads else peer.patience_s)

    def order(self, depth: int) -> None:
        """Ask for a tree of so many levels on top of the text as it is now."""
        if self._refused:
            return
        self._complain()
        peer = self.peer
        if peer is None or not peer.usable:
            self._move(depth)
        elif self._known < len(self._text.tokens):
            base, new = self._known, tuple(self._text.tokens[self._known :])
            self._ask(base + len(new), depth, reads=len(new) > MUCH)
            peer.send(Commit(self.number, self._epoch, base, new, depth))

    def receive(self, draft: Draft) -> None:
        if self.peer is None or draft.epoch != self._epoch or draft.base < self._found[0]:
            return
        self._found = draft.base, draft.tree
        owed = self._owed.pop(draft.base, None)
        for length in [length for length in self._owed if length < draft.base]:
            del self._owed[length]  # it went on before it came to them
        if owed is not None:
            since, reads = owed
            late = draft.base < len(self._text.tokens)
            self.peer.answered(None if reads else time.monotonic() - since, late=late)

    def fail(self, error: Error) -> None:
        if self.peer is None or error.epoch != self._epoch:
            return
        if error.code == protocol.UNKNOWN_SESSION and self._epoch < MAX_REOPENED:
            self._open(self.peer, self._depth)
            return
        log.info("the draft replica gives up on a text: %s", error.message)
        self._refused = True
        self.lose()

    def lose(self) -> None:
        """Nobody will answer; whoever waits may go on."""
        if self.peer is not None:
            self.peer.sessions.pop(self.number, None)
        self.peer = None
        self._owed.clear()

    def close(self) -> None:
        self._refused = True
        self._leave()
        self._links.closed(self)

    def _leave(self) -> None:
        if self.peer is not None:
            self.peer.send(Close(self.number))
        self.lose()

    def _complain(self) -> None:
        """If an answer is long overdue: once."""
        now = time.monotonic()
        late = [
            length
            for length, (since, reads) in self._owed.items()
            if now - since > (READING_S if reads else LATE_S)
        ]
        for length in late:
            del self._owed[length]
        if late and self.peer is not None:
            self.peer.failed()

    def _move(self, depth: int) -> None:
        """To another replica, or back to the former one after its connection was lost."""
        self._leave()
        peer = self._links.choose(self)
        if peer is not None:
            self._open(peer, depth)

    def _open(self, peer: DraftPeer, depth: int) -> None:
        self.lose()
        self.peer, peer.sessions[self.number] = peer, self
        self._epoch += 1
        tokens = tuple(self._text.tokens)
        self._ask(len(tokens), depth, reads=True)
        prompt, sampling = self._text.num_prompt, self._text.sampling
        try:
            peer.send(Open(self.number, self._epoch, tokens, prompt, sampling, depth))
        except protocol.ProtocolError:  # too long for a frame
            self._refused = True
            self.lose()

    def _ask(self, length: int, depth: int, *, reads: bool) -> None:
        self._known, self._depth = length, depth
        self._owed[length] = time.monotonic(), reads

"""The texts of a target replica, round by round, and the pieces that each gains.

One engine goes on with all of them in the one forward thread; whoever reads a text waits for its
pieces on the event loop. A text that nobody reads gives up its place, and takes it again later.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from enum import Enum, auto
from functools import partial

from linearized.errors import LinearizedError
from linearized.speculative import Engine, Piece, Text
from linearized.state import DecodeState
from serve_apps.forward import Forward
from serve_apps.target.watch import Watch

READ_AHEAD = 64
"""Pieces of a text that wait for who reads it. Then the text waits, without a place among those
that are gone on with."""

log = logging.getLogger(__name__)


class Mark(Enum):
    """Between the pieces of a text that is to go on elsewhere."""

    LEAVE = auto()
    """It was asked to."""
    LEFT = auto()
    """No piece comes any more, unless one ends the text."""


class Pieces(asyncio.Queue[Piece | Exception | Mark]):
    """Of one text, on the way to who reads it."""

    def __init__(self, pause: Callable[[], None]) -> None:
        """`pause` is called when too many wait."""
        super().__init__()
        self._pause = pause

    @property
    def few(self) -> bool:
        """Is there room for a text that waits to go on?"""
        return self.qsize() < READ_AHEAD // 2

    def put_nowait(self, item: Piece | Exception | Mark) -> None:
        super().put_nowait(item)
        if self.qsize() >= READ_AHEAD:
            self._pause()

    def mark(self, mark: Mark) -> None:
        super().put_nowait(mark)


class Rounds:
    """`start` it and `close` it on one event loop."""

    def __init__(
        self, engine: Engine, forward: Forward, watch: Watch, advance: Callable[[Text], None]
    ) -> None:
        """The engine is touched in `forward`'s thread only. `advance` is told of each text that a
        round went on with, before who reads it is."""
        self._engine = engine
        self._forward = forward
        self._watch = watch
        self._advance = advance
        self._pieces: dict[Text, Pieces] = {}
        """Of the texts in the engine."""
        self._paused: dict[Text, asyncio.Task[DecodeState | None]] = {}
        """Texts that nobody reads, with what they need to go on."""
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self._task is None or self._task.done()

    def held(self) -> dict[str, int]:
        """What there is of texts, by where. All of it is 0 once they have ended."""
        return {
            "rows": len(self._engine.texts),
            "pieces": len(self._pieces),
            "paused": len(self._paused),
        }

    def start(self) -> None:
        self._task = asyncio.create_task(self._go_on())

    def check(self) -> None:
        """Raises what they ended with, if they did."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def pieces(self, text: Text) -> Pieces:
        """Where those of a text will be read."""
        return Pieces(partial(self.pause, text))

    async def enter(self, text: Text, pieces: Pieces, state: DecodeState | None) -> None:
        """Go on with a text, from a state that has read some of it, or from its start.

        Raises:
            LinearizedError: this replica does not go on with texts any more.
        """
        if self.ended:
            raise LinearizedError("this replica no longer goes on with its texts")
        self._pieces[text] = pieces
        await self._forward.run(self._watch.add, text, state, time.monotonic())
        self._wake.set()

    def drop(self, text: Text) -> None:
        """It has ended, or nobody wants it any more."""
        self._paused.pop(text, None)
        if self._pieces.pop(text, None) is not None:
            self._forward.submit(self._engine.drop, text)
        self._watch.end(text)

    def pause(self, text: Text) -> None:
        """Nobody reads what it gets: make room for others, and keep its state."""
        if text not in self._paused and text.finished is None:
            self._paused[text] = asyncio.create_task(self._leave(text))

    def is_paused(self, text: Text) -> bool:
        return text in self._paused

    async def state(self, text: Text) -> DecodeState | None:
        """Of a text that is paused. None: it has not been read at all."""
        return await self._paused[text]

    async def resume(self, text: Text, pieces: Pieces) -> None:
        state = await self._paused[text]
        del self._paused[text]
        if text.finished is None:
            await self.enter(text, pieces, state)

    async def _leave(self, text: Text) -> DecodeState | None:
        state = await self._forward.run(self._engine.remove, text)
        self._pieces.pop(text, None)  # only now: a round was going on
        return state

    async def _go_on(self) -> None:
        """Round after round while there are texts. If that ends, so do they."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._pieces:
                    await self._round()
        except Exception as error:
            await self._fail(error)
            raise

    async def _round(self) -> None:
        try:
            found = await self._forward.run(self._watch.step)
        except Exception as error:
            log.exception("a round failed; its texts end here")
            await self._fail(error)
            return
        mine = [(text, piece) for text, piece in found if text in self._pieces]
        for text, _ in mine:  # drafts first, who have work to do with it
            if text.finished is None:
                self._advance(text)
        for text, piece in mine:
            self._pieces[text].put_nowait(text.error or piece)
            if text.finished is not None:
                del self._pieces[text]

    async def _fail(self, error: Exception) -> None:
        """Nobody knows what state the engine is in: all its texts end."""
        failed, self._pieces = self._pieces, {}
        for pieces in failed.values():
            pieces.put_nowait(error)
        for text in failed:
            await self._forward.run(self._engine.drop, text)

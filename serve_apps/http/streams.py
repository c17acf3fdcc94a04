"""What a target's answers look like from the HTTP side: event streams, one for each text.

Knows how to run them side by side and that none is left running. Knows no HTTP server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Protocol

from linearized.errors import LinearizedError
from serve_apps.generation import Description, Event, Generation, Refused
from serve_apps.http.errors import ApiError, refusal

PATIENCE_S = 0.05
"""Seconds that the first text that starts waits for the others. A target refuses at once; a text
that says nothing for so long waits for its turn."""
QUEUED = 64
"""Events of one request that wait for its client, beyond which its texts wait."""


class TargetLost(LinearizedError):
    """Says that a text ends here because its target has gone, and that no other goes on with it."""


class Target(Protocol):
    """Something that completes texts: a target replica, or all of them."""

    def complete(self, job: Generation) -> AsyncGenerator[Event, None]: ...

    async def ready(self) -> Description: ...

    async def close(self) -> None: ...


class Texts:
    """The event streams of one request's texts, side by side."""

    def __init__(self, target: Target, jobs: list[Generation], *, deadline: float) -> None:
        """`deadline`: when, by the event loop's clock, all of them must have ended."""
        self._streams = [target.complete(job) for job in jobs]
        self._deadline = deadline
        self._firsts: list[asyncio.Task[Event]] = []

    async def start(self) -> None:
        """Wait until one of them has started, before anything is answered.

        Raises:
            ApiError: one of them is refused, or the deadline has passed. Anything else: what one of
                them has raised.
        """
        self._firsts = [asyncio.create_task(_first(stream)) for stream in self._streams]
        async with self._in_time():
            await asyncio.wait(self._firsts, return_when=asyncio.FIRST_COMPLETED)
        waiting = [first for first in self._firsts if not first.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=PATIENCE_S, return_when=asyncio.ALL_COMPLETED)
        for first in self._firsts:
            if first.done():
                _accept(first.result())

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """All events, as they come, each with its text's index.

        Raises:
            ApiError: a text is refused after all, or the deadline has passed.
        """
        if len(self._streams) == 1:
            async for one in self._one():
                yield 0, one
            return
        queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(QUEUED)

        async def pump(index: int) -> None:
            try:
                await queue.put((index, _accept(await self._firsts[index])))
                async for event in self._streams[index]:
                    await queue.put((index, event))
                await queue.put((index, None))
            except Exception as error:
                await queue.put((index, error))

        tasks = [asyncio.create_task(pump(index)) for index in range(len(self._streams))]
        try:
            running = len(tasks)
            while running:
                async with self._in_time():
                    index, event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    running -= 1
                else:
                    yield index, event
        finally:
            await _cancel(tasks)

    async def close(self) -> None:
        """End the streams that still run."""
        await _cancel(self._firsts)  # a stream can be closed only while nobody waits for it
        async with AsyncExitStack() as stack:
            for stream in self._streams:
                stack.push_async_callback(stream.aclose)

    async def _one(self) -> AsyncGenerator[Event, None]:
        async with self._in_time():
            event = await self._firsts[0]
        yield _accept(event)
        while True:
            try:
                async with self._in_time():
                    event = await anext(self._streams[0])
            except StopAsyncIteration:
                return
            yield event

    def _in_time(self) -> _Deadline:
        return _Deadline(self._deadline)


class _Deadline:
    """`asyncio.timeout_at`, with an error for the user."""

    def __init__(self, when: float) -> None:
        self._timeout = asyncio.timeout_at(when)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        try:
            await self._timeout.__aexit__(*error)  # type: ignore[arg-type]
        except TimeoutError:
            message = "the answer took too long; ask for less at a time, or try again later"
            raise ApiError(504, message, code="deadline_exceeded") from None


async def _first(stream: AsyncGenerator[Event, None]) -> Event:
    return await anext(stream)


def _accept(event: Event) -> Event:
    if isinstance(event, Refused):
        raise refusal(event)
    return event


async def _cancel(tasks: list[asyncio.Task[Event]] | list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

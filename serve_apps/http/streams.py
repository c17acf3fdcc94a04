"""What a target's answers look like from the HTTP side: event streams, one for each prompt.

Knows how to run them side by side and that none is left running. Knows no HTTP server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Protocol

from serve_apps.generation import Description, Event, Generation, Refused, Started
from serve_apps.http.api import ApiError


class Target(Protocol):
    """Something that completes texts: a target replica, or Serve's handle to all of them."""

    def complete(self, job: Generation) -> AsyncGenerator[Event, None]: ...

    async def ready(self) -> Description: ...


class Texts:
    """The event streams of one request's prompts, side by side."""

    def __init__(self, target: Target, jobs: list[Generation]) -> None:
        self._streams = [target.complete(job) for job in jobs]

    async def start(self) -> list[Started]:
        """Each stream's first event, before anything is answered.

        Raises:
            ApiError: one of the prompts is refused.
        """
        # All of them, whatever one says: a stream can be closed only while nobody waits for it.
        waiting = (anext(stream) for stream in self._streams)
        firsts = await asyncio.gather(*waiting, return_exceptions=True)
        for first in firsts:
            if isinstance(first, BaseException):
                raise first
            if isinstance(first, Refused):
                raise _refusal(first)
        return [first for first in firsts if isinstance(first, Started)]

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """The events that follow, as they come, each with its prompt's index."""
        queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(64)

        async def pump(index: int, stream: AsyncGenerator[Event, None]) -> None:
            try:
                async for event in stream:
                    await queue.put((index, event))
                await queue.put((index, None))
            except Exception as error:
                await queue.put((index, error))

        tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(self._streams)]
        try:
            open_streams = len(tasks)
            while open_streams:
                index, event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    open_streams -= 1
                else:
                    yield index, event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """End the streams that still run."""
        async with AsyncExitStack() as stack:
            for stream in self._streams:
                stack.push_async_callback(stream.aclose)


def _refusal(refused: Refused) -> ApiError:
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    return ApiError(
        refused.status, refused.message, code=refused.code, param=refused.param, headers=headers
    )

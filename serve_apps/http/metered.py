"""Counts and times texts as they pass. Knows events and a meter."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from serve_apps import metrics
from serve_apps.generation import Delta, Description, Event, Finished, Generation, Refused, Started
from serve_apps.http.streams import Target
from serve_apps.metrics import Meter


class Metered:
    """A `Target` that does what another one does, and tells the meter."""

    def __init__(
        self, target: Target, meter: Meter, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._target = target
        self._meter = meter
        self._now = now

    async def ready(self) -> Description:
        return await self._target.ready()

    async def close(self) -> None:
        await self._target.close()

    async def complete(self, job: Generation) -> AsyncGenerator[Event, None]:
        text = _Text(self._meter, self._now)
        try:
            async with aclosing(self._target.complete(job)) as events:
                async for event in events:
                    text.take(event, job)
                    yield event
        finally:
            if not text.ended:
                self._meter.add(metrics.ABANDONED)


class _Text:
    def __init__(self, meter: Meter, now: Callable[[], float]) -> None:
        self.ended = False
        self._meter = meter
        self._now = now
        self._began = now()
        self._first = self._last = 0.0
        """When its first token came, and its last."""
        self._tokens = 0

    def take(self, event: Event, job: Generation) -> None:
        match event:
            case Started():
                self._meter.add(metrics.PROMPT_TOKENS, len(job.prompt))
                self._meter.add(metrics.CACHED_TOKENS, event.cached_tokens)
            case Delta():
                self._go_on(len(event.tokens))
            case Finished():
                self._finish(event.reason)
            case Refused():
                self.ended = True
                self._meter.add(metrics.REFUSED, code=event.code)

    def _go_on(self, tokens: int) -> None:
        if not tokens:
            return
        now = self._now()
        if not self._tokens:
            self._first = now
            self._meter.observe(metrics.FIRST_TOKEN, now - self._began)
        else:
            self._meter.observe(metrics.INTER_TOKEN, now - self._last)
        self._last = now
        self._tokens += tokens
        self._meter.add(metrics.GENERATED_TOKENS, tokens)

    def _finish(self, reason: str) -> None:
        self.ended = True
        self._meter.add(metrics.ENDED, finished_reason=reason)
        self._meter.observe(metrics.WHOLE, self._now() - self._began)
        if self._tokens > 1:
            each = (self._last - self._first) / (self._tokens - 1)
            self._meter.observe(metrics.PER_TOKEN, each)

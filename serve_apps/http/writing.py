"""Writes the answer to one request while its texts come: whole, or event by event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from serve_apps.generation import Delta, Event, Finished, Generation, Started
from serve_apps.http.answers import Answer, Usage, event
from serve_apps.http.choices import Choice, Part
from serve_apps.http.errors import ApiError
from serve_apps.http.guard import explain
from serve_apps.http.streams import Texts
from serve_apps.http.tokens import Tokenizer

LONG = 256
"""Log-probabilities from which on they are written in a thread: others may go on meanwhile."""


class Writing:
    def __init__(
        self,
        answer: Answer,
        texts: Texts,
        jobs: Sequence[Generation],
        *,
        tokenizer: Tokenizer,
        echoes: Sequence[str],
        name: str,
    ) -> None:
        """`echoes`: for each prompt its text, if it is shown. `name`: the request's."""
        self._answer = answer
        self._texts = texts
        self._name = name
        self._each = len(jobs) // len(echoes)
        """Choices of a prompt."""
        self._choices = [
            Choice(i, job, tokenizer, echo=echoes[i // self._each]) for i, job in enumerate(jobs)
        ]
        self._code: str | None = None
        """Of the error with which the stream has ended."""
        self._usage = Usage(prompt=sum(len(job.prompt) for job in jobs[:: self._each]))

    def notes(self) -> dict[str, Any]:
        """For the log."""
        usage = self._usage
        return {
            **({"code": self._code} if self._code is not None else {}),
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.completion,
            "rounds": usage.rounds,
        }

    async def whole(self) -> str:
        """JSON.

        Raises:
            ApiError: a text is refused, or ends with an error, or the deadline has passed.
        """
        parts: list[list[Part]] = [[] for _ in self._choices]
        async with aclosing(self._texts.events()) as events:
            async for index, found in events:
                parts[index].append(await self._part(index, found))
        whole = [Part.join(one) for one in parts]
        if sum(len(part.entries) for part in whole) > LONG:
            return await asyncio.to_thread(self._answer.body, whole, self._usage)
        return self._answer.body(whole, self._usage)

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events. If something goes wrong, the last one says so: the status is out
        already. [DONE] is then missing."""
        try:
            for one in self._answer.opening(len(self._choices)):
                yield one
            async with aclosing(self._texts.events()) as events:
                async for index, found in events:
                    part = await self._part(index, found)
                    told = part.round is not None or part.read is not None
                    if len(part.entries) > LONG:
                        yield await asyncio.to_thread(self._answer.long_chunk, part)
                    elif told or part.text or part.entries or part.reason:
                        yield self._answer.chunk(part)
            for one in self._answer.ending(self._usage):
                yield one
        except Exception as error:
            said = explain(error, self._name)
            self._code = said.code
            yield event(said.body(self._name))

    async def _part(self, index: int, found: Event) -> Part:
        choice = self._choices[index]
        match found:
            case Started():
                if index % self._each == 0:
                    self._usage.start(found)
                if len(found.prompt_logprobs) > LONG:
                    return await asyncio.to_thread(choice.start, found)
                return choice.start(found)
            case Delta():
                self._usage.add(found)
                return choice.add(found)
            case Finished():
                if found.error:
                    raise ApiError(500, found.error, code="generation_failed")
                self._usage.finish(found)
                return choice.finish(found)
        raise AssertionError(f"a target says {found!r} in the middle of a text")

"""Guides of texts, compiled beside the event loop and the model. Knows what to tell the user of one
that cannot be had.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import transformers

from linearized import speculative
from linearized.errors import ConfigError, RequestError
from serve_apps.generation import Guide

PARAMS = {"json": "response_format", "json_schema": "response_format"}
"""Where a request gives a guide of this kind; others in `guided`."""
WAITING = 8
"""Texts that may wait for their guides at a time; further ones wait until one of those has its
own."""

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)


class Guiding:
    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        vocab_size: int,
        stop_ids: Iterable[int],
    ) -> None:
        self._given = tokenizer, vocab_size, frozenset(stop_ids)
        self._threads = ThreadPoolExecutor(WAITING, thread_name_prefix="guides")
        self._guides: speculative.Guides | None = None
        self._refusal = "guides are not ready yet"

    async def start(self) -> None:
        """Lay out the vocabulary. Where that cannot be done, texts without a guide go on."""
        try:
            self._guides = await self._run(speculative.Guides, *self._given)
        except ConfigError as error:
            log.warning("no guided decoding here: %s", error)
            self._refusal = str(error)

    async def compile(self, guide: Guide) -> speculative.Guide:
        """
        Raises:
            RequestError: it cannot be had; names the request's parameter.
        """
        param = PARAMS.get(guide.kind, "guided")
        if self._guides is None:
            raise RequestError(self._refusal, param=param)
        try:
            return await self._run(self._guides.compile, guide.kind, guide.source)
        except (ConfigError, RequestError) as error:
            raise RequestError(str(error), param=param) from None

    def close(self) -> None:
        if self._guides is not None:
            self._guides.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))

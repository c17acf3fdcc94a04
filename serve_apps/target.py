"""A target replica: owns requests, their states and their sampling.

A plain class; `serve_apps.app` makes a deployment of it. Each text is a coroutine that asks the one
forward thread for one chunk of its prompt or one round at a time, so texts take turns. Knows
nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import transformers

import linearized
from linearized.errors import ConfigError
from linearized.speculative import NgramDrafter, Sampling, Sequence, TokenTree
from serve_apps.forward import Forward
from serve_apps.generation import (
    Delta,
    Description,
    Event,
    Finished,
    Generation,
    Refused,
    Started,
)
from serve_apps.link import DraftLink
from serve_apps.protocol import Endpoint
from serve_apps.speculator import Speculator
from serve_apps.text import TextStream

STUCK_S = 120.0
LINK_S = 60.0
"""How long the first link to a draft may take before the replica counts as ready without."""

FindDraft = Callable[[], Awaitable[Endpoint]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    path: str
    """Hugging Face folder of the linearized model, tokenizer included."""
    max_context: int = 32768
    """Prompt and completion together, in tokens. The state does not grow with it; a request's time
    does."""
    max_sessions: int = 16
    """Texts in progress at a time."""
    max_waiting: int = 64
    """Texts that wait for one of those to end; more are refused."""
    deadline_ms: float = 50.0
    """How long a round waits for the draft replica."""
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("max_context", "max_sessions", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_waiting", "deadline_ms"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")


class TargetReplica:
    def __init__(self, config: TargetConfig, find_draft: FindDraft | None = None) -> None:
        """`find_draft` names a draft replica; None: there are none."""
        self._config = config
        self._forward = Forward(threads=config.threads, name="target")
        self._texts = Forward(name="tokenizer")
        """Its own thread: a long prompt takes a while to tokenize."""
        self._model = linearized.load(config.path)
        linearized.models.check_decoder(self._model)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(config.path)
        self._vocab_size = self._model.config.vocab_size
        self._fingerprint = linearized.fingerprint(self._model)
        self._stop_ids = _stop_ids(self._model, self._tokenizer)
        self._link = DraftLink(find_draft, vocab_size=self._vocab_size) if find_draft else None
        self._slots = asyncio.Semaphore(config.max_sessions)
        self._num_texts = 0
        self._seconds = 1.0
        """What a text takes, averaged over the last ones."""
        self._ready: asyncio.Task[None] | None = None

    async def ready(self) -> Description:
        """Waits until the model is warm and, the first time, the draft linked."""
        if self._ready is None:
            self._ready = asyncio.create_task(self._start())
        await asyncio.shield(self._ready)
        draft = "none"
        if self._link is not None:
            draft = "connected" if self._link.connected else "away"
        return Description(fingerprint=self._fingerprint, vocab_size=self._vocab_size, draft=draft)

    async def check_health(self) -> None:
        """Also gets the replica ready, before anybody asks for a text.

        Raises:
            StuckError: the model hangs. Anything else: it could not be started.
        """
        if self._ready is None:
            self._ready = asyncio.create_task(self._start())
        if self._ready.done():
            self._ready.result()
        self._forward.check(STUCK_S)

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()
        self._forward.close()
        self._texts.close()

    async def complete(self, job: Generation) -> AsyncGenerator[Event, None]:
        """Events of one text, up to Finished or Refused. Whoever closes it early ends the text."""
        if self._num_texts >= self._config.max_sessions + self._config.max_waiting:
            yield self._overloaded()
            return
        self._num_texts += 1
        began = time.monotonic()
        try:
            await self.ready()
            prompt = await self._tokenize(job.prompt)
            refused = self._refuse(job, prompt)
            if refused is not None:
                yield refused
                return
            echo = await self._echo(job, prompt) if job.echo else ""
            yield Started(prompt_tokens=len(prompt), prompt_text=echo)
            async with self._slots, aclosing(self._generate(job, prompt)) as events:
                async for event in events:
                    yield event
            self._seconds = 0.8 * self._seconds + 0.2 * (time.monotonic() - began)
        finally:
            self._num_texts -= 1

    async def _generate(self, job: Generation, prompt: list[int]) -> AsyncGenerator[Event, None]:
        speculator = self._speculator(job)
        try:
            speculator.advance(prompt)  # the draft reads the prompt while the target does
            text = await self._forward.run(self._sequence, job, prompt)
            while text.finished is None and not await self._forward.run(text.prefill):
                pass
            stream = TextStream(self._decode, prompt=prompt, stop=job.stop)
            while text.finished is None and not stream.stopped:
                tree = await speculator.tree()
                new = await self._forward.run(_round, text, tree, speculator.ngram)
                if text.finished is None:
                    speculator.advance(text.tokens)
                before = stream.num_tokens
                delta = stream.push(new)
                kept = new[: stream.num_tokens - before]
                yield Delta(text=delta, tokens=tuple(kept))
            rest = stream.flush()
        finally:
            speculator.close()
        # A stop string may be found in the middle of a round, or in what was held back.
        accepted = min(text.accepted, stream.num_tokens)
        yield Finished(
            reason="stop" if stream.stopped else text.finished or "stop",
            text=rest,
            completion_tokens=stream.num_tokens,
            accepted=accepted,
            rejected=text.drafted - accepted,
            rounds=text.rounds,
        )

    def _sequence(self, job: Generation, prompt: list[int]) -> Sequence:
        return Sequence(
            self._model,
            prompt,
            sampling=job.sampling,
            max_new_tokens=job.max_tokens,
            stop_ids=self._stop_ids,
        )

    def _speculator(self, job: Generation) -> Speculator:
        mode = job.speculate or ("ngram" if self._link is None else "model")
        if mode == "none":
            return Speculator()
        if mode == "ngram" or self._link is None:
            return Speculator(ngram=NgramDrafter())
        return Speculator(
            session=self._link.session(job.sampling),
            ngram=NgramDrafter(),
            deadline_s=self._config.deadline_ms / 1000,
        )

    async def _tokenize(self, prompt: str | tuple[int, ...]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        return list((await self._texts.run(self._tokenizer, prompt))["input_ids"])

    async def _echo(self, job: Generation, prompt: list[int]) -> str:
        if isinstance(job.prompt, str):
            return job.prompt
        return await self._texts.run(self._decode, prompt)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _refuse(self, job: Generation, prompt: list[int]) -> Refused | None:
        def invalid(message: str, param: str, code: str = "invalid_value") -> Refused:
            return Refused(status=400, message=message, param=param, code=code)

        if not prompt:
            return invalid("the prompt is empty; give at least one token", "prompt")
        wrong = next((token for token in prompt if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            outside = f"token id {wrong} is outside the vocabulary of {self._vocab_size}"
            return invalid(outside, "prompt")
        limit = self._config.max_context
        if len(prompt) + job.max_tokens > limit:
            return invalid(
                f"at most {limit} tokens are served in one request; the prompt has {len(prompt)} "
                f"and max_tokens is {job.max_tokens}: shorten one of them",
                "prompt" if len(prompt) > limit else "max_tokens",
                "context_length_exceeded",
            )
        if job.speculate == "model" and self._link is None:
            return invalid("there is no draft model here; choose ngram or none", "speculate")
        return None

    def _overloaded(self) -> Refused:
        config = self._config
        turns = self._num_texts / config.max_sessions
        return Refused(
            status=503,
            message=f"{self._num_texts} texts are in progress or waiting already; try again later",
            code="overloaded",
            retry_after=min(max(1, math.ceil(turns * self._seconds)), 60),
        )

    async def _start(self) -> None:
        if self._link is not None:
            self._link.start()
        await self._forward.run(self._warm_up)
        if self._link is not None and not await self._link.wait_connected(LINK_S):
            log.warning("no draft replica within %.0f s; going on without", LINK_S)

    def _warm_up(self) -> None:
        """The first calls of every shape are slow."""
        text = Sequence(self._model, [0] * 64, sampling=Sampling(), max_new_tokens=64)
        while not text.prefill():
            pass
        for nodes in (0, 4, 8, 0, 4, 8):
            text.step(TokenTree.chain([0] * nodes))


def _round(text: Sequence, tree: TokenTree | None, ngram: NgramDrafter | None) -> list[int]:
    if not tree and ngram is not None:
        tree = ngram.propose(text.tokens, text.sampling)
    return text.step(tree or TokenTree.empty)


def _stop_ids(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> frozenset[int]:
    """What ends a text, as the model and its tokenizer have it."""
    ids: set[int] = set()
    for end in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        if end is not None:
            ids.update([end] if isinstance(end, int) else end)
    return frozenset(ids)

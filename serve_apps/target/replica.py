"""A target replica: owns requests, their states and their sampling.

A plain class; `serve_apps.app` makes a deployment of it. One engine, in the one forward thread,
goes on with all texts round by round; each text is a coroutine that waits for its pieces. Knows
nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

import transformers

import linearized
from linearized.errors import ConfigError, LinearizedError
from linearized.speculative import Engine, ModelDrafter, Piece, Text
from linearized.speculative.generate import decoding, end_of_text
from serve_apps import weights
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
from serve_apps.link.drafts import DraftLinks, FindDrafts
from serve_apps.link.protocol import MAX_DEPTH
from serve_apps.target.speculator import Speculator

STUCK_S = 120.0
START_S = 900.0
"""Seconds that a forward pass may take at the start, when steps may have to be compiled."""
MAX_NODES = 16
"""Largest number of nodes of a tree that is verified."""
LINK_S = 60.0
"""Seconds that the first link to a draft may take. After that the replica is ready without it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    path: str
    """Hugging Face folder of the linearized model, tokenizer included."""
    max_context: int = 32768
    """Largest number of tokens of prompt and completion together. It does not make the state
    larger, but requests may take longer."""
    max_sessions: int = 16
    """Largest number of texts in progress at a time."""
    max_waiting: int = 64
    """Largest number of texts that wait for one of those to end. Further ones are refused."""
    draft: str | None = None
    """Hugging Face folder of a draft model that drafts here, beside the target, and not in replicas
    of its own; it shares the target's tokenizer."""
    depth: int = 8
    """Largest number of levels of a drafted tree."""
    width: int = 4
    """Number of guesses that a draft model here follows on each level."""
    pack: bool = True
    """Whether to lay out the weights a second time for the CPU. See `linearized.pack`."""
    compile: bool = False
    """Whether to compile the steps. See `linearized.compile`."""
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("max_context", "max_sessions", "depth", "width", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"depth must be at most {MAX_DEPTH}, got {self.depth}")
        if self.max_waiting < 0:
            raise ConfigError(f"max_waiting must be at least 0, got {self.max_waiting}")


class TargetReplica:
    def __init__(self, config: TargetConfig, find_drafts: FindDrafts | None = None) -> None:
        """`find_drafts` names draft replicas. None means that there are none.

        Raises:
            ConfigError: the draft model here has another vocabulary.
        """
        self._config = config
        self._forward = Forward(threads=config.threads, name="target")
        self._texts = Forward(name="tokenizer")
        """Its own thread: a long prompt takes a while to tokenize."""
        self._model = weights.load(config.path, pack=config.pack, compile=config.compile)
        linearized.models.check_decoder(self._model)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(config.path)
        self._vocab_size = self._model.config.vocab_size
        self._fingerprint = linearized.fingerprint(self._model)
        self._stop_ids = _stop_ids(self._model, self._tokenizer)
        self._links = DraftLinks(find_drafts, vocab_size=self._vocab_size) if find_drafts else None
        self._decode = decoding(self._tokenizer)
        self._speculator = Speculator(
            links=self._links, model=_local_draft(config), depth=config.depth
        )
        self._engine = Engine(
            self._model,
            drafters=self._speculator.drafters,
            rows=config.max_sessions,
            max_nodes=MAX_NODES,
        )
        """Touched in the forward thread only."""
        self._pieces: dict[Text, asyncio.Queue[Piece | Exception]] = {}
        """Of the texts in the engine."""
        self._wake = asyncio.Event()
        self._rounds: asyncio.Task[None] | None = None
        self._num_texts = 0
        self._seconds = 1.0
        """What a text takes, averaged over the last ones."""
        self._ready: asyncio.Task[None] | None = None

    async def ready(self) -> Description:
        """Wait until the model is warm and, the first time, the draft is linked."""
        if self._ready is None:
            self._ready = asyncio.create_task(self._start())
        await asyncio.shield(self._ready)
        draft = "connected" if self._speculator.has_model else "none"
        if self._links is not None and not self._links.connected:
            draft = "away"
        return Description(fingerprint=self._fingerprint, vocab_size=self._vocab_size, draft=draft)

    async def check_health(self) -> None:
        """Also gets the replica ready, before anybody asks for a text.

        Raises:
            StuckError: the model hangs. Anything else: it could not be started, or it no longer
                goes on with its texts.
        """
        if self._ready is None:
            self._ready = asyncio.create_task(self._start())
        for task in (self._ready, self._rounds):
            if task is not None and task.done() and not task.cancelled():
                task.result()
        self._forward.check(STUCK_S if self._ready.done() else START_S)

    async def close(self) -> None:
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.gather(self._rounds, return_exceptions=True)
        if self._links is not None:
            await self._links.close()
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
            async with aclosing(self._generate(job, prompt)) as events:
                async for event in events:
                    yield event
            self._seconds = 0.8 * self._seconds + 0.2 * (time.monotonic() - began)
        finally:
            self._num_texts -= 1

    async def _generate(self, job: Generation, prompt: list[int]) -> AsyncGenerator[Event, None]:
        text = self._text(job, prompt)
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        try:
            if text.finished is None:
                self._pieces[text] = pieces
                self._speculator.open(text, job.speculate)
                if self._rounds is None or self._rounds.done():
                    raise LinearizedError("this replica no longer goes on with its texts")
                await self._forward.run(self._engine.add, text)
                self._wake.set()
            done = text.finished is not None
            while not done:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise LinearizedError("the model failed in the middle of a text") from piece
                done = piece.finished is not None
                yield Delta(text=piece.text, tokens=piece.tokens)
        finally:
            if self._pieces.pop(text, None) is not None:
                self._forward.submit(self._engine.drop, text)
            self._speculator.close(text)
        accepted = text.accepted.total()
        yield Finished(
            reason=text.finished or "stop",
            completion_tokens=len(text.new_tokens),
            accepted=accepted,
            rejected=text.drafted.total() - accepted,
            rounds=text.rounds,
        )

    async def _go_on(self) -> None:
        """Round after round while there are texts. If that ends, so do they."""
        try:
            await self._rounds_of_all()
        except Exception as error:
            await self._fail(error)
            raise

    async def _rounds_of_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pieces:
                try:
                    found = await self._forward.run(self._engine.step)
                except Exception as error:
                    log.exception("a round failed; its texts end here")
                    await self._fail(error)
                    continue
                self._pass_on(found)

    def _pass_on(self, found: list[tuple[Text, Piece]]) -> None:
        """What each text gained: to its draft first, who has work to do with it."""
        mine = [(text, piece) for text, piece in found if text in self._pieces]
        for text, _ in mine:
            if text.finished is None:
                self._speculator.advance(text)
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

    def _text(self, job: Generation, prompt: list[int]) -> Text:
        return Text(
            prompt,
            sampling=replace(job.sampling, stop_ids=job.sampling.stop_ids | self._stop_ids),
            max_new_tokens=job.max_tokens,
            stop=job.stop,
            decode=self._decode,
        )

    async def _tokenize(self, prompt: str | tuple[int, ...]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        return list((await self._texts.run(self._tokenizer, prompt))["input_ids"])

    async def _echo(self, job: Generation, prompt: list[int]) -> str:
        if isinstance(job.prompt, str):
            return job.prompt
        return await self._texts.run(self._decode, prompt)

    def _refuse(self, job: Generation, prompt: list[int]) -> Refused | None:
        def invalid(message: str, param: str, code: str = "invalid_value") -> Refused:
            return Refused(status=400, message=message, param=param, code=code)

        if not prompt:
            return invalid("the prompt is empty; give at least one token", "prompt")
        wrong = next((token for token in prompt if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            outside = f"token id {wrong} is outside the vocabulary of {self._vocab_size}"
            return invalid(outside, "prompt")
        unknown = [token for token in job.sampling.stop_ids if not 0 <= token < self._vocab_size]
        if unknown:
            outside = f"token id {min(unknown)} is outside the vocabulary of {self._vocab_size}"
            return invalid(f"stop_token_ids: {outside}", "stop_token_ids")
        limit = self._config.max_context
        if len(prompt) + job.max_tokens > limit:
            return invalid(
                f"at most {limit} tokens are served in one request; the prompt has {len(prompt)} "
                f"and max_tokens is {job.max_tokens}: shorten one of them",
                "prompt" if len(prompt) > limit else "max_tokens",
                "context_length_exceeded",
            )
        if job.speculate == "model" and not self._speculator.has_model:
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

    def _plan(self) -> None:
        """Find out what forwards take, which also gets all sizes warm, and plan drafts by it."""
        self._engine.plan(self._engine.measure())

    async def _start(self) -> None:
        if self._links is not None:
            self._links.start()
        await self._forward.run(self._plan)
        self._rounds = asyncio.create_task(self._go_on())
        if self._links is not None and not await self._links.wait_connected(LINK_S):
            log.warning("no draft replica within %.0f s; going on without", LINK_S)


def _local_draft(config: TargetConfig) -> ModelDrafter | None:
    if config.draft is None:
        return None
    model = weights.load(config.draft, pack=config.pack, compile=config.compile)
    return ModelDrafter(model, depth=config.depth, width=config.width)


def _stop_ids(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> frozenset[int]:
    """The tokens that end a text, by the model and its tokenizer."""
    own = tokenizer.eos_token_id
    return frozenset(end_of_text(model)) | ({own} if own is not None else set())

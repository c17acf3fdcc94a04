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
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import transformers

import linearized
from linearized.errors import LinearizedError, RequestError, StateError
from linearized.speculative import Engine, Guide, Prefixes, Text, TokenTree
from linearized.speculative.generate import decoding
from linearized.state import DecodeState
from serve_apps import metrics, weights
from serve_apps.forward import Forward
from serve_apps.generation import (
    Delta,
    Description,
    Event,
    Finished,
    Generation,
    Left,
    Refused,
    Started,
)
from serve_apps.link.discovery import Find
from serve_apps.link.drafts import DraftLinks, Wake
from serve_apps.link.protocol import Endpoint
from serve_apps.link.text_server import TextServer
from serve_apps.metrics import Meter
from serve_apps.target.config import TargetConfig
from serve_apps.target.guiding import Guiding
from serve_apps.target.model import local_draft, sizes, stop_ids
from serve_apps.target.rounds import Mark, Pieces, Rounds
from serve_apps.target.speculator import Speculator
from serve_apps.target.watch import Watch
from serve_apps.tokenizers import tokenizer_hash

START_S = 900.0
"""Seconds that a forward pass may take at the start, when steps may have to be compiled."""
MAX_NODES = 16
"""Largest number of nodes of a tree that is verified."""
LINK_S = 60.0
"""Seconds that the first link to a draft may take. After that the replica is ready without it."""

log = logging.getLogger(__name__)


class TargetReplica:
    def __init__(
        self,
        config: TargetConfig,
        find_drafts: Find | None = None,
        wake_draft: Wake | None = None,
        *,
        host: str = "127.0.0.1",
        meter: Meter | None = None,
    ) -> None:
        """`find_drafts` names draft replicas; None means that there are none. `wake_draft` has one
        started while there is none and a text is to be drafted for. `host` is the address at which
        ingresses reach this machine.

        Raises:
            ConfigError: the draft model here has another vocabulary, or a token that ends a text is
                outside the target's.
        """
        self._config = config
        self._meter = meter = meter or Meter()
        self._forward = Forward(threads=config.threads, name="target")
        # In its thread: packing chooses by what is fastest with as many threads as that has.
        self._model = self._forward.wait(
            weights.load,
            config.path,
            pack=config.pack,
            compile=config.compile,
            dtype=config.dtype,
            device=config.device,
        )
        linearized.models.check_decoder(self._model)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(config.path)
        self._vocab_size = self._model.config.vocab_size
        self._fingerprint = linearized.fingerprint(self._model)
        self._stop_ids = stop_ids(self._model, self._tokenizer)
        self._links: DraftLinks | None = None
        if find_drafts is not None:
            self._links = DraftLinks(
                find_drafts,
                wake_draft,
                vocab_size=self._vocab_size,
                tokenizer=tokenizer_hash(self._tokenizer),
                heartbeat_s=config.heartbeat_s,
                meter=meter,
            )
        self._decode = decoding(self._tokenizer)
        self._guiding = Guiding(self._tokenizer, self._vocab_size, self._stop_ids)
        self._speculator = Speculator(
            links=self._links,
            model=self._forward.wait(local_draft, config, self._vocab_size, self._tokenizer),
            depth=config.depth,
        )
        self._prefixes = Prefixes(config.prefix_bytes) if config.prefix_bytes else None
        self._engine = Engine(
            self._model,
            drafters=self._speculator.drafters,
            rows=config.max_sessions,
            max_nodes=MAX_NODES,
            prefixes=self._prefixes,
            patience=config.read_ms / 1000,
        )
        """Touched in the forward thread only."""
        self._bytes = sizes(self._model)
        self._watch = Watch(self._engine, self._prefixes, meter)
        self._rounds = Rounds(self._engine, self._forward, self._watch, self._speculator.advance)
        self._running: dict[Text, tuple[Generation, Pieces]] = {}
        """Texts that are being completed."""
        self._num_texts = 0
        self._seconds = 1.0
        """What a text takes, averaged over the last ones."""
        self._ready: asyncio.Task[None] | None = None
        self._server = TextServer(
            self, host=host, ports=config.ports, heartbeat_s=config.heartbeat_s
        )

    @property
    def num_texts(self) -> int:
        """In progress or waiting."""
        return self._num_texts

    @property
    def seconds(self) -> dict[str, float]:
        """What the engine has spent so far, by what; see `Engine.seconds`."""
        return dict(self._engine.seconds)

    def held(self) -> dict[str, int]:
        """What there is of texts here, by where. All of it is 0 once they have ended."""
        return {
            "texts": self._num_texts,
            **self._rounds.held(),
            "sessions": self._links.num_sessions if self._links is not None else 0,
        }

    async def endpoint(self) -> Endpoint:
        """Where ingresses connect to. The first call waits until the replica is ready."""
        return await self._server.endpoint()

    async def ready(self) -> Description:
        """Wait until the model is warm and, the first time, the draft is linked."""
        if self._ready is None:
            self._ready = asyncio.create_task(self._start())
        await asyncio.shield(self._ready)
        draft = "connected" if self._speculator.has_model else "none"
        if self._links is not None and not self._links.connected:
            draft = "away"
        return Description(
            fingerprint=self._fingerprint,
            vocab_size=self._vocab_size,
            max_context=self._config.max_context,
            draft=draft,
            texts=self._num_texts,
            room=self._config.max_sessions,
            **self._bytes,
        )

    async def check_health(self) -> None:
        """Also gets the replica ready, before anybody asks for a text.

        Raises:
            StuckError: the model hangs. Anything else: it could not be started, or it no longer
                goes on with its texts.
        """
        if self._ready is None:
            self._ready = asyncio.create_task(self._start())
        if self._ready.done() and not self._ready.cancelled():
            self._ready.result()
        self._rounds.check()
        self._forward.check(self._config.stuck_s if self._ready.done() else START_S)
        self._watch.tell()

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Let ingresses go on elsewhere with their texts, for so long, and end."""
        await self._server.drain(drain_s)
        await self._server.close()
        await self._rounds.close()
        if self._links is not None:
            await self._links.close()
        self._forward.close()
        self._guiding.close()

    async def complete(self, job: Generation) -> AsyncGenerator[Event, None]:
        """Events of one text, up to Finished or Refused. Whoever closes it early ends the text."""
        if self._num_texts >= self._config.max_sessions + self._config.max_waiting:
            yield self._overloaded()
            return
        self._num_texts += 1
        began = time.monotonic()
        try:
            await self.ready()
            refused = self._refuse(job)
            if refused is not None:
                yield refused
                return
            guide = None if job.guide is None else await self._guiding.compile(job.guide)
            async with aclosing(self._generate(job, guide)) as events:
                async for event in events:
                    yield event
            self._seconds = 0.8 * self._seconds + 0.2 * (time.monotonic() - began)
        except RequestError as error:  # no other replica would say anything else
            yield Refused(status=400, message=str(error), param=error.param, code="invalid_value")
        finally:
            self._num_texts -= 1

    def leave(self, job: Generation) -> None:
        """Stop with this text, which is being completed: its last event is Left, with its state.
        Nothing happens if it has not begun, or has ended."""
        for own, pieces in self._running.values():
            if own is job:
                pieces.mark(Mark.LEAVE)

    async def _generate(self, job: Generation, guide: Guide | None) -> AsyncGenerator[Event, None]:
        text = self._text(job, guide)
        pieces = self._rounds.pieces(text)
        started = leaving = False
        state: DecodeState | None = None
        try:
            if text.finished is None:
                self._speculator.open(text, job.speculate)
                await self._rounds.enter(text, pieces, await self._state(job))
                self._running[text] = job, pieces
            done = text.finished is not None
            while not done:
                if self._rounds.is_paused(text) and not leaving and pieces.few:
                    await self._rounds.resume(text, pieces)
                piece = await pieces.get()
                if piece is Mark.LEAVE:
                    leaving = True
                    self._rounds.pause(text)
                    if self._rounds.is_paused(text):
                        state = await self._rounds.state(text)
                    pieces.mark(Mark.LEFT)  # behind what a round that was going on has given
                    continue
                if piece is Mark.LEFT:
                    if text.finished is None:
                        yield Left(state=b"" if state is None else await _bytes(state))
                        return
                    continue
                if isinstance(piece, Exception) and text.error is piece:
                    log.warning("a text ends with an error: %s", piece)
                    break
                if isinstance(piece, Exception):
                    raise LinearizedError("the model failed in the middle of a text") from piece
                done = piece.finished is not None
                if not started:
                    started = True
                    yield _started(text)
                yield Delta(
                    text=piece.text,
                    tokens=piece.tokens,
                    accepted=piece.accepted,
                    logprobs=piece.logprobs,
                    tree=piece.tree if job.trees else TokenTree.empty,
                )
        finally:
            self._running.pop(text, None)
            self._rounds.drop(text)
            self._speculator.close(text)
        if not started:
            yield _started(text)
        yield _finished(text)

    async def lend(self, tokens: Sequence[int], owner: str) -> bytes:
        """The state behind the longest prefix of a text that this replica knows of the owner's, for
        another one's `Generation.lent`. Empty: it knows none."""
        if self._prefixes is None:
            return b""
        return await asyncio.to_thread(self._prefixes.export, tokens, owner=owner) or b""

    async def _borrow(self, job: Generation) -> None:
        """Keep a prefix that another replica lent, for the engine to find it."""
        if self._prefixes is None:
            return
        tokens = job.prompt + job.text
        try:
            spared = await asyncio.to_thread(self._prefixes.load, job.lent, tokens, owner=job.owner)
            self._meter.add(metrics.LENT, spared)
        except StateError as error:
            log.warning("a prefix that another replica lent is of no use here: %s", error)

    async def _state(self, job: Generation) -> DecodeState | None:
        """What another replica handed over, if it is of use here."""
        if job.lent:
            await self._borrow(job)
        if not job.state:
            return None
        try:
            state = await asyncio.to_thread(
                DecodeState.from_bytes, job.state, device=self._model.device
            )
            linearized.models.check_state(self._model, state)
            if state.layers.keys.dtype != self._model.dtype or state.batch_size != 1:
                raise StateError(f"a state of {state.batch_size} rows in {state.layers.keys.dtype}")
            if int(state.length[0]) >= len(job.prompt) + len(job.text):
                raise StateError("a state that has read more than there is of the text")
        except StateError as error:
            log.warning("a text is read again, as its state is of no use here: %s", error)
            return None
        return state

    def _text(self, job: Generation, guide: Guide | None) -> Text:
        return Text(
            job.prompt + job.text,
            sampling=replace(job.sampling, stop_ids=job.sampling.stop_ids | self._stop_ids),
            max_new_tokens=job.max_tokens,
            stop=job.stop,
            decode=self._decode,
            logprobs=job.logprobs,
            prompt_logprobs=job.prompt_logprobs,
            num_prompt=len(job.prompt),
            guide=guide,
            owner=job.owner,
        )

    def _refuse(self, job: Generation) -> Refused | None:
        def invalid(message: str, param: str, code: str = "invalid_value") -> Refused:
            return Refused(status=400, message=message, param=param, code=code)

        if not job.prompt:
            return invalid("the prompt is empty; give at least one token", "prompt")
        named = {
            "prompt": job.prompt + job.text,
            "stop_token_ids": job.sampling.stop_ids,
            "logit_bias": [token for token, _ in job.sampling.logit_bias],
        }
        for param, tokens in named.items():
            wrong = next((token for token in tokens if not 0 <= token < self._vocab_size), None)
            if wrong is not None:
                outside = f"token id {wrong} is outside the vocabulary of {self._vocab_size}"
                return invalid(f"{param}: {outside}", param)
        limit = self._config.max_context
        if len(job.prompt) + job.max_tokens > limit:
            return invalid(
                f"at most {limit} tokens are served in one request; the prompt has "
                f"{len(job.prompt)} and max_tokens is {job.max_tokens}: shorten one of them",
                "prompt" if len(job.prompt) > limit else "max_tokens",
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
        await self._guiding.start()
        await self._forward.run(self._plan)
        self._rounds.start()
        waits = self._config.expects_draft
        if waits and self._links is not None and not await self._links.wait_connected(LINK_S):
            log.warning("no draft replica within %.0f s; going on without", LINK_S)


async def _bytes(state: DecodeState) -> bytes:
    return await asyncio.to_thread(state.to_bytes)


def _started(text: Text) -> Started:
    return Started(
        cached_tokens=text.cached_tokens, prompt_logprobs=tuple(text.prompt_alternatives)
    )


def _finished(text: Text) -> Finished:
    depth = max(text.drafted, default=0)
    return Finished(
        reason=text.finished or "stop",
        drafted=tuple(text.drafted[level] for level in range(1, depth + 1)),
        accepted=tuple(text.accepted[level] for level in range(1, depth + 1)),
        rounds=text.rounds,
        error=str(text.error) if text.error is not None else "",
    )

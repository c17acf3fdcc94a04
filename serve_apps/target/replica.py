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
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial

import transformers

import linearized
from linearized.errors import ConfigError, LinearizedError, RequestError, StateError
from linearized.speculative import Engine, Guide, ModelDrafter, Piece, Prefixes, Text, TokenTree
from linearized.speculative.generate import decoding, end_of_text
from linearized.state import DecodeState
from serve_apps import weights
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
from serve_apps.link.connection import HEARTBEAT_S
from serve_apps.link.discovery import Find
from serve_apps.link.drafts import DraftLinks, Wake
from serve_apps.link.listener import ANY_PORT
from serve_apps.link.protocol import MAX_DEPTH, Endpoint
from serve_apps.link.text_server import TextServer
from serve_apps.metrics import Meter
from serve_apps.target.guiding import Guiding
from serve_apps.target.speculator import Speculator
from serve_apps.target.watch import Watch
from serve_apps.tokenizers import tokenizer_hash

START_S = 900.0
"""Seconds that a forward pass may take at the start, when steps may have to be compiled."""
MAX_NODES = 16
"""Largest number of nodes of a tree that is verified."""
READ_AHEAD = 64
"""Pieces of a text that wait for who reads it. Then the text waits, without a place among those
that are gone on with."""
LONG = 2**14
"""Tokens over which it is averaged what one adds to a state."""
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
    read_ms: float = 200.0
    """Milliseconds that texts in progress wait, between two of their rounds, for prompts to be
    read."""
    prefix_bytes: int = 2**28
    """Bytes of states that are kept of prompts and answers, for texts that begin alike; 0: none."""
    draft: str | None = None
    """Hugging Face folder of a draft model that drafts here, beside the target, and not in replicas
    of its own; it shares the target's tokenizer."""
    expects_draft: bool = True
    """Whether draft replicas run from the start. Then this one is ready with a link to one."""
    depth: int = 8
    """Largest number of levels of a drafted tree."""
    width: int = 4
    """Number of guesses that a draft model here follows on each level."""
    pack: bool = True
    """Whether to lay out the weights a second time for the CPU. See `linearized.pack`."""
    compile: bool = False
    """Whether to compile the steps. See `linearized.compile`."""
    dtype: str = "float32"
    """Of weights and states: one of `weights.DTYPES`."""
    device: str = "cpu"
    """One of `weights.DEVICES`."""
    draft_dtype: str = "float32"
    """Of a draft model here."""
    draft_device: str = "cpu"
    threads: int = 1
    ports: tuple[int, int] = ANY_PORT
    """First and last of the ports at which ingresses may be waited for; (0, 0): any."""
    heartbeat_s: float = HEARTBEAT_S
    """Seconds between two signs of life to an ingress. It takes three without one for gone."""
    stuck_s: float = 60.0
    """Seconds that a forward pass may take. Beyond that the replica is ill: its texts go on on
    others, and Serve replaces it."""

    def __post_init__(self) -> None:
        for name in ("max_context", "max_sessions", "depth", "width", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"depth must be at most {MAX_DEPTH}, got {self.depth}")
        for name in ("max_waiting", "prefix_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("heartbeat_s", "stuck_s", "read_ms"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")


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
        meter = meter or Meter()
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
        self._stop_ids = _stop_ids(self._model, self._tokenizer)
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
            model=self._forward.wait(_local_draft, config, self._vocab_size, self._tokenizer),
            depth=config.depth,
        )
        prefixes = Prefixes(config.prefix_bytes) if config.prefix_bytes else None
        self._engine = Engine(
            self._model,
            drafters=self._speculator.drafters,
            rows=config.max_sessions,
            max_nodes=MAX_NODES,
            prefixes=prefixes,
            patience=config.read_ms / 1000,
        )
        """Touched in the forward thread only."""
        self._bytes = _sizes(self._model)
        self._watch = Watch(self._engine, prefixes, meter)
        self._pieces: dict[Text, _Pieces] = {}
        """Of the texts in the engine."""
        self._paused: dict[Text, asyncio.Task[DecodeState | None]] = {}
        """Texts that nobody reads, with what they need to go on."""
        self._running: dict[Text, tuple[Generation, _Pieces]] = {}
        """Texts that are being completed."""
        self._wake = asyncio.Event()
        self._rounds: asyncio.Task[None] | None = None
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
            "rows": len(self._engine.texts),
            "pieces": len(self._pieces),
            "paused": len(self._paused),
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
        for task in (self._ready, self._rounds):
            if task is not None and task.done() and not task.cancelled():
                task.result()
        self._forward.check(self._config.stuck_s if self._ready.done() else START_S)
        self._watch.tell()

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Let ingresses go on elsewhere with their texts, for so long, and end."""
        await self._server.drain(drain_s)
        await self._server.close()
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.gather(self._rounds, return_exceptions=True)
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
                pieces.mark(_Mark.LEAVE)

    async def _generate(self, job: Generation, guide: Guide | None) -> AsyncGenerator[Event, None]:
        text = self._text(job, guide)
        pieces = _Pieces(partial(self._pause, text))
        started = leaving = False
        state: DecodeState | None = None
        try:
            if text.finished is None:
                self._pieces[text] = pieces
                self._speculator.open(text, job.speculate)
                await self._enter(text, await self._state(job))
                self._running[text] = job, pieces
            done = text.finished is not None
            while not done:
                if text in self._paused and not leaving and pieces.qsize() < READ_AHEAD // 2:
                    await self._unpause(text, pieces)
                piece = await pieces.get()
                if piece is _Mark.LEAVE:
                    leaving = True
                    self._pause(text)
                    if text in self._paused:
                        state = await self._paused[text]
                    pieces.mark(_Mark.LEFT)  # behind what a round that was going on has given
                    continue
                if piece is _Mark.LEFT:
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
            self._paused.pop(text, None)
            if self._pieces.pop(text, None) is not None:
                self._forward.submit(self._engine.drop, text)
            self._speculator.close(text)
            self._watch.end(text)
        if not started:
            yield _started(text)
        yield _finished(text)

    async def _state(self, job: Generation) -> DecodeState | None:
        """What another replica handed over, if it is of use here."""
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

    async def _enter(self, text: Text, state: DecodeState | None) -> None:
        """The engine goes on with it."""
        if self._rounds is None or self._rounds.done():
            raise LinearizedError("this replica no longer goes on with its texts")
        await self._forward.run(self._watch.add, text, state, time.monotonic())
        self._wake.set()

    def _pause(self, text: Text) -> None:
        """Nobody reads what it gets: make room for others, and keep its state."""
        if text not in self._paused and text.finished is None:
            self._paused[text] = asyncio.create_task(self._leave(text))

    async def _leave(self, text: Text) -> DecodeState | None:
        state = await self._forward.run(self._engine.remove, text)
        self._pieces.pop(text, None)  # only now: a round was going on
        return state

    async def _unpause(self, text: Text, pieces: _Pieces) -> None:
        state = await self._paused[text]
        del self._paused[text]
        if text.finished is None:
            self._pieces[text] = pieces
            await self._enter(text, state)

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
                    found = await self._forward.run(self._watch.step)
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
        self._rounds = asyncio.create_task(self._go_on())
        waits = self._config.expects_draft
        if waits and self._links is not None and not await self._links.wait_connected(LINK_S):
            log.warning("no draft replica within %.0f s; going on without", LINK_S)


class _Mark(Enum):
    """Between the pieces of a text that is to go on elsewhere."""

    LEAVE = auto()
    """It was asked to."""
    LEFT = auto()
    """No piece comes any more, unless one ends the text."""


class _Pieces(asyncio.Queue[Piece | Exception | _Mark]):
    """Of one text, on the way to who reads it."""

    def __init__(self, pause: Callable[[], None]) -> None:
        """`pause` is called when too many wait."""
        super().__init__()
        self._pause = pause

    def put_nowait(self, item: Piece | Exception | _Mark) -> None:
        super().put_nowait(item)
        if self.qsize() >= READ_AHEAD:
            self._pause()

    def mark(self, mark: _Mark) -> None:
        super().put_nowait(mark)


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


def _sizes(model: transformers.PreTrainedModel) -> dict[str, int]:
    """What the state of a text takes here, and its cache with softmax in all layers."""
    state, config = linearized.new_state(model), model.config
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    heads = getattr(config, "num_key_value_heads", None) or heads
    grown = state.history.bytes_at(LONG) // LONG if state.history is not None else 0
    return {
        "state_bytes": state.nbytes,
        "state_token_bytes": grown,
        "cache_token_bytes": 2 * state.num_layers * heads * width * model.dtype.itemsize,
    }


def _local_draft(
    config: TargetConfig, vocab_size: int, tokenizer: transformers.PreTrainedTokenizerBase
) -> ModelDrafter | None:
    """
    Raises:
        ConfigError: it has fewer rows than the tokenizer has tokens.
    """
    if config.draft is None:
        return None
    model = weights.load(
        config.draft,
        pack=config.pack,
        compile=config.compile,
        dtype=config.draft_dtype,
        device=config.draft_device,
    )
    shared = None
    if model.config.vocab_size != vocab_size:  # one of them is padded
        shared = 1 + max(tokenizer.get_vocab().values())
    return ModelDrafter(model, depth=config.depth, width=config.width, num_tokens=shared)


def _stop_ids(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> frozenset[int]:
    """The tokens that end a text, by the model and its tokenizer.

    Raises:
        ConfigError: one of them is outside the vocabulary.
    """
    own = tokenizer.eos_token_id
    found = frozenset(end_of_text(model)) | ({own} if own is not None else set())
    vocab_size = model.config.vocab_size
    outside = [token for token in found if not 0 <= token < vocab_size]
    if outside:
        raise ConfigError(
            f"token id {outside[0]}, which ends a text, is outside the model's vocabulary of "
            f"{vocab_size}; check eos_token_id in generation_config.json and the tokenizer"
        )
    return found

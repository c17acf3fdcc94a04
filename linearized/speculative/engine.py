"""Many texts at once on one model: each round reads a piece of the prompts that wait, then verifies
a tree for every text in one forward and commits what is right.

Plain and synchronous. Texts come and go between rounds; what one of them says depends on none of
the others, nor on what is drafted.

    engine = Engine(model, drafters=[NgramDrafter()])
    engine.add(Text(prompt, sampling=Sampling(), max_new_tokens=64))
    while engine.busy:
        for text, piece in engine.step():
            ...
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearized.config import is_whole
from linearized.errors import ConfigError, RequestError, StateError
from linearized.fold import accept
from linearized.models import check_decoder, check_state, context_limit, new_state
from linearized.speculative.chooser import Choice, choose
from linearized.speculative.costs import Clock, Costs, clock_of
from linearized.speculative.drafters.base import Drafter
from linearized.speculative.drafting import Draft, Drafting
from linearized.speculative.experience import Experience
from linearized.speculative.pool import Pool
from linearized.speculative.prefixes import Prefixes
from linearized.speculative.reading import Reading
from linearized.speculative.sampling import NO_TOKEN, Sampling
from linearized.speculative.text import Piece, Text
from linearized.speculative.tree import TokenTree
from linearized.state import DecodeState, Fresh
from linearized.step import step
from linearized.tree import Tree

log = logging.getLogger(__name__)

PATIENCE = 0.75
"""Seconds that texts wait between two of their rounds while prompts are read."""
REHEARSED = 12
"""Tokens of texts that nobody reads."""

Pieces = list[tuple[Text, Piece]]


@dataclass(slots=True)
class _Verified:
    """Texts whose trees were verified in one forward."""

    texts: list[Text]
    trees: list[TokenTree]
    state: DecodeState
    logits: Tensor
    fresh: Fresh
    hidden: Tensor | None


class Engine:
    def __init__(
        self,
        model: PreTrainedModel,
        *,
        drafters: Sequence[Drafter] = (),
        rows: int = 8,
        memory: int | None = None,
        max_nodes: int = 16,
        chunk: int | None = None,
        patience: float = PATIENCE,
        prefixes: Prefixes | None = None,
    ) -> None:
        """`drafters` are asked in this order, each for the texts that those before it had nothing
        for. `rows`: texts at a time, fewer if their states would take more than `memory` bytes (of
        the target; drafters have their own); further texts wait. `max_nodes`: of a tree.
        `patience`: texts wait no longer than so many seconds for prompts to be read between two of
        their rounds, as far as that takes at least a few tokens; `chunk`: nor for more tokens.
        Where nobody waits, prompts are read as fast as possible. `prefixes`: texts go on from what
        is known there, and add to it.

        Raises:
            ConfigError: not one state fits the memory, or another model's prefixes. ModelError:
                the model decodes no text.
        """
        check_decoder(model)
        sizes = {"rows": rows, "max_nodes": max_nodes, "chunk": 1 if chunk is None else chunk}
        for name, value in sizes.items():
            if not is_whole(value) or value < 1:
                raise ConfigError(f"{name} must be at least 1, and whole, got {value!r}")
        if not patience > 0:
            raise ConfigError(f"patience must be above 0, in seconds, got {patience!r}")
        self.model = model
        self.max_nodes = max_nodes
        self._memory = memory
        self.pool: Pool[Text] = Pool(model, _rows(model, rows, memory))
        self._clock: Clock | None = None
        self._now = clock_of(model.device)
        self._longest = context_limit(model) or sys.maxsize
        self._drafting = [
            Drafting(drafter, max_nodes, vocab_size=model.config.vocab_size, now=self._now)
            for drafter in drafters
        ]
        self._chunk = chunk
        self._patience = patience
        self._waiting: dict[Text, DecodeState | None] = {}
        self._reading = Reading(model, self.pool, prefixes=prefixes, now=self._now)
        self._decoding: list[Text] = []
        self._needs_hidden = any(drafter.needs_hidden for drafter in drafters)
        self.seconds: dict[str, float] = defaultdict(float)
        """Spent so far, by what: `read`, `draft`, `verify`, `commit`, and `rest`."""
        if prefixes is not None:
            prefixes.join(new_state(model))
        for drafter in drafters:
            drafter.join(model, self.pool)

    @property
    def texts(self) -> list[Text]:
        """All that have not ended."""
        return [*self._decoding, *self._reading.texts, *self._waiting]

    @property
    def decoding(self) -> list[Text]:
        """Whose prompts have been read: the next round adds to each."""
        return list(self._decoding)

    @property
    def waiting(self) -> list[Text]:
        """For which there has been no room."""
        return list(self._waiting)

    @property
    def reading(self) -> bool:
        """Is there a prompt that has not been read?"""
        return bool(self._reading.texts or self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._decoding) or self.reading

    def measure(self) -> Costs:
        """What forwards take here, before there is any text; also gets all sizes warm.

        Raises:
            ConfigError: there is a text.
        """
        self._check_idle("measure")
        return Costs.measure(
            self._forward,
            max_batch=self.pool.num_rows,
            max_nodes=1 + self.max_nodes,
            now=self._now,
        )

    def plan(self, known: Costs | Experience) -> None:
        """From now on draft and verify what pays; until then, all that drafters propose. `known`:
        what `measure` gave, here or in another engine for the same model, rows and nodes; or the
        experience of such an engine, which is added to.

        Raises:
            ConfigError: there is a text.
        """
        self._check_idle("plan")
        experience = Experience(known) if isinstance(known, Costs) else known
        fresh = not all(experience.knows(drafting.drafter) for drafting in self._drafting)
        for drafting in self._drafting:
            drafting.planner = experience.planner(drafting.drafter, self.max_nodes)
        if fresh:
            self._rehearse()
        self._clock = experience.clock

    def _rehearse(self) -> None:
        """A few rounds of texts that are not asked for: drafters set up on their first calls what
        they need, which would look like the price of drafting; then it is seen what they take. Of
        all rows, of two, whose states lie apart in memory, and of one: where steps are compiled,
        each has programs of its own."""
        rows = self.pool.num_rows
        self._clock = None
        prefixes, self._reading.prefixes = self._reading.prefixes, None
        for drafting in self._drafting:
            drafting.rehearses = True
        try:
            for batch in sorted({rows, min(rows, 2), 1}, reverse=True):
                prompt = [token % self.model.config.vocab_size for token in range(8)]
                texts = [
                    Text(prompt, sampling=Sampling(), max_new_tokens=REHEARSED)
                    for _ in range(batch)
                ]
                for text in texts:
                    if self._fits(text) and not self._is_too_long(text):
                        self.add(text)
                while self.busy:
                    self.step()
        finally:
            self._drop(self.texts)
            self._reading.prefixes = prefixes
            for drafting in self._drafting:
                drafting.rehearses = False
            self.seconds.clear()

    def add(self, text: Text, state: DecodeState | None = None) -> None:
        """Go on with a text: its next pieces come from `step`, once there is room for it. `state`
        is what `remove` gave for it; without, all its tokens are read.

        Raises:
            RequestError, ConfigError: it cannot be generated; says why.
        """
        text.check(self.model.config.vocab_size)
        if text in self.pool or text in self._waiting:
            raise ConfigError("this text is in the engine already; add it once")
        if self._is_too_long(text):
            raise RequestError(
                f"{type(self.model).__name__} has positions for {self._longest} tokens, this text "
                f"has a prompt of {text.num_prompt} and may get {text.max_new_tokens} more; "
                "shorten one of them",
                param="prompt" if text.num_prompt > self._longest else "max_tokens",
            )
        if not self._fits(text):
            needed = self.pool.bytes_at(self._final(text))
            fewer = ", or give the engine fewer rows" if self.pool.num_rows > 1 else ""
            raise RequestError(
                f"a text of up to {self._final(text)} tokens takes {needed:,} bytes of state here, "
                f"{self._memory:,} are allowed; ask for fewer tokens{fewer}",
                param="max_tokens",
            )
        if state is not None:
            check_state(self.model, state)
            if state.batch_size != 1 or int(state.length[0]) >= len(text.tokens):
                raise StateError(
                    f"a text of {len(text.tokens)} tokens cannot go on from a state of "
                    f"{state.batch_size} rows that has read {state.length.tolist()}"
                )
            if text.is_unscored and len(text.prompt_alternatives) <= int(state.length[0]):
                state = None  # what the prompt's own tokens are worth is seen as they are read
        if text.finished is None:
            self._waiting[text] = state

    def remove(self, text: Text) -> DecodeState | None:
        """Stop going on with a text. Its state, for `add`; None if nothing of it was read."""
        state = self._waiting.get(text)
        if text in self.pool:
            state = self.pool.row(text).clone()
        self.drop(text)
        return state

    def drop(self, text: Text) -> None:
        """Stop going on with a text, for good."""
        self._drop([text])

    def _drop(self, texts: Sequence[Text]) -> None:
        """All of them, even if a drafter fails to forget one."""
        for text in texts:
            if text in self.pool:
                self.pool.remove(text)
                self._decoding = [one for one in self._decoding if one is not text]
            self._reading.drop(text)
            self._waiting.pop(text, None)
            text.rest()
        for text in texts:
            for drafting in self._drafting:
                drafting.forget(text)

    @torch.no_grad()
    def step(self) -> Pieces:
        """One round: what each text gained. Texts that have ended are gone afterwards. A text
        whose prompt cannot be read, whose tokens cannot be verified or decoded, or whose logits
        are no numbers ends by itself, with `error`; the others go on."""
        began, known = time.perf_counter(), sum(self.seconds.values())
        pieces = self._admit()
        with self._timed("read"):
            pieces += self._read()
        if self._decoding:
            pieces += self._round()
        spent = time.perf_counter() - began
        self.seconds["rest"] += spent - (sum(self.seconds.values()) - known)
        return pieces

    def _round(self) -> Pieces:
        with self._timed("draft"):
            drafts = self._draft(self._decoding)
        began = self._now() if self._clock is not None else 0.0
        texts = self._decoding = self.pool.arrange(self._decoding)
        trees = [drafts[text][-1].tree for text in texts]
        with self._timed("verify"):
            verified, pieces = self._verify_all(texts, trees)
        for batch in verified:
            pieces += self._take(batch, drafts)
        ended = [text for text in texts if text.finished is not None]
        self._keep(ended)
        self._drop(ended)
        if self._clock is not None and len(verified) == 1:
            seconds, nodes = self._now() - began, max(map(len, trees))
            drafted = any(draft.depth for asked in drafts.values() for draft in asked)
            self._clock.took(len(texts), nodes, seconds, drafted=drafted)
            for drafting in self._drafting:
                drafting.settle(len(texts), nodes, seconds)
        return pieces

    def _verify_all(
        self, texts: list[Text], trees: list[TokenTree]
    ) -> tuple[list[_Verified], Pieces]:
        """All in one forward. If that fails, each text in one of its own, without its tree: no
        state has been written, so only those that fail again are at fault, and end."""
        try:
            return [self._verify(texts, trees, self.pool.first(len(texts)))], []
        except Exception:
            log.exception("could not verify %d texts at once; trying one by one", len(texts))
        return self._verify_alone(texts)

    def _verify_alone(self, texts: list[Text]) -> tuple[list[_Verified], Pieces]:
        """Each in a forward of its own, without its tree."""
        verified: list[_Verified] = []
        pieces: Pieces = []
        for text in texts:
            try:
                verified.append(self._verify([text], [TokenTree.empty], self.pool.row(text)))
            except Exception as error:
                pieces.append((text, text.fail(error)))
        return verified, pieces

    def _take(self, batch: _Verified, drafts: dict[Text, list[Draft]]) -> Pieces:
        """Commit what is right, and let each text go on by it."""
        choices = _choices(batch)
        # A guess whose numbers are none spoils its whole tree: such a text goes on without one.
        again = [
            text
            for text, tree, choice in zip(batch.texts, batch.trees, choices, strict=True)
            if tree and NO_TOKEN in choice.new
        ]
        paths = [
            [] if text in again else [0, *(1 + node for node in _up_to_stop(text, choice))]
            for text, choice in zip(batch.texts, choices, strict=True)
        ]
        try:
            with self._timed("commit"):
                accept(batch.state, batch.fresh, paths)
        except Exception as error:  # nobody knows what of it is in their states
            return [(text, text.fail(error)) for text in batch.texts]
        pieces: Pieces = []
        for i, (text, tree, choice) in enumerate(
            zip(batch.texts, batch.trees, choices, strict=True)
        ):
            if text in again:
                continue
            if choice.error is not None:
                pieces.append((text, text.fail(choice.error)))
                continue
            if batch.hidden is not None:
                text.hidden = batch.hidden[i, paths[i][-1]].clone()
            pieces.append((text, text.take(choice.new, tree, choice.path, batch.logits[i])))
            if tree is drafts[text][-1].tree:
                self._observe(text, drafts[text], choice)
        verified, failed = self._verify_alone(again)
        for alone in verified:
            failed += self._take(alone, drafts)
        return pieces + failed

    def _observe(self, text: Text, drafts: list[Draft], choice: Choice) -> None:
        for drafting, draft in zip(self._drafting, drafts, strict=False):
            drafting.observe(text, draft, choice.new)

    def _admit(self) -> Pieces:
        """First come, first served: one that does not fit yet holds up those behind it."""
        pieces: Pieces = []
        while self._waiting and len(self.pool) < self.pool.num_rows:
            text, state = next(iter(self._waiting.items()))
            longest = max(map(self._final, (*self.pool.keys, text)))
            if self._memory is not None and self.pool.bytes_at(longest) > self._memory:
                break
            try:
                self.pool.reserve(longest)
                self.pool.add(text, state)
            except Exception as error:
                pieces.append((text, text.fail(error)))
                self._drop([text])
            else:
                self._reading.add(text, 0 if state is None else int(state.length[0]))
                del self._waiting[text]
        return pieces

    def _read(self) -> Pieces:
        """A piece of the prompts. The last token of each stays out: it is its first tree's root."""
        self._decoding = self.pool.arrange(self._decoding)
        read, failed = self._reading.go_on(
            self._chunk,
            behind=len(self._decoding),
            seconds=self._patience if self._decoding else None,
        )
        self._decoding += read
        pieces = [(text, text.fail(error)) for text, error in failed.items()]
        pieces += [(text, text.end()) for text in read if text.num_left <= 0]
        self._drop([text for text, _ in pieces])
        return pieces

    def _keep(self, texts: Sequence[Text]) -> None:
        """The states behind answers, with which the next turns of chats begin. One that holds
        guesses beyond its text, which ended amid them, is of no use."""
        for text in texts if self._reading.prefixes is not None else ():
            behind = len(text.tokens) - 1
            if text.finished != "error" and int(self.pool.row(text).length[0]) == behind:
                self._reading.keep(text, behind)

    def _draft(self, texts: list[Text]) -> dict[Text, list[Draft]]:
        """What the drafters had for each text, one after the other, up to the first who had
        something."""
        drafts: dict[Text, list[Draft]] = {text: [] for text in texts}
        for drafting in self._drafting:
            free = [text for text, known in drafts.items() if not (known and known[-1].tree)]
            found = drafting.draft(free, len(texts))
            for text, draft in zip(free, found, strict=True):
                drafts[text].append(draft)
        return {text: known or [Draft()] for text, known in drafts.items()}

    def _verify(self, texts: list[Text], trees: list[TokenTree], state: DecodeState) -> _Verified:
        """Side by side: what is beyond a tree is nobody's parent."""
        nodes = [
            ((text.tokens[-1], *tree.tokens), (-1, *(parent + 1 for parent in tree.parents)))
            for text, tree in zip(texts, trees, strict=True)
        ]
        found = step(
            self.model,
            Tree.side_by_side(nodes, self.model.device),
            state,
            hidden=self._needs_hidden,
        )
        assert found.fresh is not None
        return _Verified(texts, trees, state, found.logits, found.fresh, found.hidden)

    @torch.no_grad()
    def _forward(self, batch: int, nodes: int) -> object:
        tokens = torch.zeros(batch, nodes, dtype=torch.int64, device=self.model.device)
        state = self.pool.first(batch)
        return step(self.model, Tree.chain(tokens), state, hidden=self._needs_hidden)

    def _check_idle(self, what: str) -> None:
        if self.busy:
            raise ConfigError(
                f"{what} needs an engine without texts, there are {len(self.texts)}; call it first"
            )

    def _fits(self, text: Text) -> bool:
        """Into the memory, with nobody beside it."""
        return self._memory is None or self.pool.bytes_at(self._final(text)) <= self._memory

    def _is_too_long(self, text: Text) -> bool:
        """For the model's table of positions."""
        return _length(text) > self._longest

    def _final(self, text: Text) -> int:
        """Tokens that it may have at the end, and a tree on top."""
        return _length(text) + 1 + self.max_nodes

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began


def _choices(batch: _Verified) -> list[Choice]:
    """All at once; one by one if that fails, so that only those at fault have an error."""
    try:
        return choose(batch.logits, batch.texts, batch.trees)
    except Exception as error:
        if len(batch.texts) == 1:
            return [Choice([], [], error)]
        log.exception("could not choose for %d texts at once; trying one by one", len(batch.texts))
    found: list[Choice] = []
    for i, (text, tree) in enumerate(zip(batch.texts, batch.trees, strict=True)):
        alone = replace(batch, texts=[text], trees=[tree], logits=batch.logits[i : i + 1])
        found += _choices(alone)
    return found


def _up_to_stop(text: Text, choice: Choice) -> list[int]:
    """The accepted nodes before one with a stop token: the text's state holds all but its last
    token, as ever."""
    stops = text.sampling.stop_ids
    tokens = zip(choice.path, choice.new, strict=False)
    return [node for node, _ in itertools.takewhile(lambda pair: pair[1] not in stops, tokens)]


def _length(text: Text) -> int:
    """Tokens that it may have at the end."""
    return text.num_prompt + text.max_new_tokens


def _rows(model: PreTrainedModel, rows: int, memory: int | None) -> int:
    if memory is None:
        return rows
    each = new_state(model).nbytes
    if memory < each:
        raise ConfigError(f"one text's state takes {each:,} bytes, {memory:,} are allowed")
    return min(rows, memory // each)

"""Guided decoding: texts that obey a grammar. Knows token ids and xgrammar, which is imported with
the first `Guides`; knows nothing of models.

A guide says, of any text so far, which tokens may follow. It is asked at each node of a tree for
the node's own path, so a guided text does not depend on what is drafted.

    guides = Guides(tokenizer, model.config.vocab_size, end_of_text(model))
    guide = guides.compile("regex", r"[0-9]{4}-[0-9]{2}")
    engine.add(Text(prompt, sampling=sampling, max_new_tokens=16, guide=guide))

N places, V vocabulary, W words of 32 bits, one for each token.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from linearized.errors import ConfigError, RequestError
from linearized.speculative.compiling import Compiler
from linearized.speculative.regex import portable
from linearized.speculative.schema import enforceable
from linearized.speculative.vocabulary import spellings

KINDS = ("json", "json_schema", "regex", "grammar", "choice")
"""`json`: an object with anything in it. `json_schema`: a value that fits a schema. `regex`: a text
that fits an expression as a whole. `grammar`: one that a grammar in GBNF derives from its rule
`root`. `choice`: one of the texts of a JSON array."""
MAX_BYTES = 1 << 16
"""Of a guide's source."""
WHITESPACE = 16
"""Spaces and line ends side by side in JSON, outside of strings. Without a bound, a text may have
nothing else from some place on."""
SECONDS = 30.0
"""Of a processor, for compiling a guide. Most take a twentieth of one; strings of a limited length,
many."""
CACHE_BYTES = 1 << 28
PATIENCE_S, PLACE_S = 2.0, 0.02
"""A text may take so much of a processor for its guide, and so much more for each place that the
guide is asked for; most take a hundredth. Ambiguous grammars may take more the longer a text is."""

Words = NDArray[np.int32]


class Guides:
    """Compiles guides for one vocabulary. May be called from several threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        stop_ids: Iterable[int] = (),
        *,
        seconds: float = SECONDS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`vocab_size`: the model's; it may have more tokens than the tokenizer, or fewer.
        `stop_ids`: tokens that end a text, so never part of one. `seconds`: of a processor, that
        one guide may take to compile. `cache_bytes`: what guides may take that are kept for the
        next text.

        Raises:
            ConfigError: xgrammar is missing, or cannot guide this tokenizer.
        """
        self._xgrammar = _xgrammar()
        self._vocabulary = Vocabulary.of(spellings(tokenizer, vocab_size, stop_ids))
        self._info = self._xgrammar.TokenizerInfo(
            self._vocabulary.spelled, vocab_size=vocab_size, stop_token_ids=[]
        )
        self._seconds = seconds
        self._compiler = Compiler(
            self._info.serialize_json(), seconds=seconds, cache_bytes=cache_bytes
        )
        self._cache_bytes = cache_bytes
        self._known: OrderedDict[tuple[str, str], Guide] = OrderedDict()
        """Those asked for last are the last."""
        self._lock = threading.Lock()

    def compile(self, kind: str, source: str = "") -> Guide:
        """
        Args:
            kind: one of KINDS.
            source: the schema, the expression, the grammar, or the JSON array of texts.

        Raises:
            ConfigError: an unknown kind. RequestError: a source that cannot be compiled.
        """
        if kind not in KINDS:
            raise ConfigError(f"unknown kind of guide {kind!r}; choose from {', '.join(KINDS)}")
        with self._lock:
            guide = self._known.get((kind, source))
            if guide is not None:
                self._known.move_to_end((kind, source))
                return guide
        _check_source(kind, source)
        try:
            compiled = self._xgrammar.CompiledGrammar.deserialize_json(
                self._compile(kind, source), self._info
            )
        except TimeoutError:
            raise RequestError(
                f"the {_NAMES[kind]} takes more than {self._seconds:g} s to compile; make it "
                "smaller, above all its bounded repetitions"
            ) from None
        except (RuntimeError, ValueError) as error:
            raise RequestError(f"the {_NAMES[kind]} cannot be compiled: {_reason(error)}") from None
        guide = Guide(kind, self._vocabulary, compiled, self._xgrammar.GrammarMatcher)
        self._keep((kind, source), guide)
        return guide

    def close(self) -> None:
        """End the process that compiles. Guides are of use beyond that."""
        self._compiler.close()

    def _compile(self, kind: str, source: str) -> str:
        if kind in _JSON:
            schema = enforceable(source) if kind == "json_schema" else '{"type": "object"}'
            return self._compiler.compile("schema", schema, max_whitespace_cnt=WHITESPACE)
        if kind == "regex":
            return self._compiler.compile("regex", portable(source))
        return self._compiler.compile("grammar", source if kind == "grammar" else _choices(source))

    def _keep(self, key: tuple[str, str], guide: Guide) -> None:
        with self._lock:
            self._known[key] = guide
            while sum(map(_size, self._known.items())) > self._cache_bytes:
                self._known.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What tokens spell, and which of them may be in a text."""

    spelled: list[bytes]
    """Empty for tokens that are never in one."""
    text: Words
    """[W], tokens that spell something, but no half of a surrogate pair: that is no character,
    although xgrammar takes it for one where nearly all are allowed."""
    json: Words
    """[W], those of them without control characters but the end of line: in JSON no other can
    stand, although xgrammar allows it in strings of a limited length."""
    after_half: Words
    """[W], tokens that may follow one whose last byte is _HALF, as they complete no such half."""

    @classmethod
    def of(cls, spelled: list[bytes]) -> Vocabulary:
        controls = set(range(0x20)) - {0x0A}
        text = np.array([bool(one) and not _SURROGATE.search(one) for one in spelled])
        json_ = text & np.array([controls.isdisjoint(one) for one in spelled])
        after = np.array([not _SURROGATE.match(_HALF + one) for one in spelled])
        return cls(spelled, _words(text), _words(json_), _words(after))

    def __len__(self) -> int:
        return len(self.spelled)

    def joins(self, before: int | None, token: int) -> bool:
        """May a text have this token, after that one?"""
        if not 0 <= token < len(self) or not self.spelled[token]:
            return False
        ending = b"" if before is None else self.spelled[before][-1:]
        return not _SURROGATE.search(ending + self.spelled[token])

    def ends_in_half(self, token: int | None) -> bool:
        return token is not None and self.spelled[token].endswith(_HALF)

    def some(self, tokens: Iterable[int]) -> Words:
        """[W], these tokens."""
        flags = np.zeros(len(self), dtype=bool)
        flags[list(tokens)] = True
        return _words(flags)


@dataclass(frozen=True, eq=False, slots=True)
class Guide:
    """What a text must obey. May be shared by many."""

    kind: str
    vocabulary: Vocabulary
    compiled: Any
    _matcher: Any

    def follower(self, stop_ids: Iterable[int]) -> Follower:
        """For one text, which ends with any of these tokens."""
        return Follower(self, stop_ids)

    def matcher(self) -> Any:
        return self._matcher(self.compiled)


class Follower:
    """Follows one text, and paths on top of it, through the text's guide."""

    def __init__(self, guide: Guide, stop_ids: Iterable[int]) -> None:
        spelled = guide.vocabulary.spelled
        ends = [token for token in stop_ids if token < len(spelled) and not spelled[token]]
        self._guide = guide
        self._text_bits = guide.vocabulary.json if guide.kind in _JSON else guide.vocabulary.text
        self._end_bits = guide.vocabulary.some(ends)
        self._matcher: Any = None
        self._num_tokens = 0
        """How many tokens of the text the matcher has taken, below `_path`."""
        self._last: int | None = None
        """The last of these tokens."""
        self._path: tuple[int, ...] = ()
        self._known: dict[tuple[int, ...], Words | None] = {}
        """What `_allowed` has found, since the text has grown."""
        self._seconds_left = PATIENCE_S

    def follow(self, text: Sequence[int]) -> bool:
        """Is this text complete, so that nothing can follow it? It begins like the text of the call
        before.

        Raises:
            RequestError: it does not obey the guide.
        """
        with self._spending(len(text) - self._num_tokens):
            self._catch_up(text)
            self._go_to(())
            return bool(self._matcher.is_completed()) and self._allowed(()) is None

    def mask(self, logits: Tensor, text: Sequence[int], paths: Sequence[tuple[int, ...]]) -> Tensor:
        """Logits [N, V] with -inf for what must not follow `text` and then `paths[n]`. All may
        follow where a path has left the guide or come to its end, as the text does not go there."""
        with self._spending(len(paths)):
            self._catch_up(text)
            words = [self._allowed(path) for path in paths]
        if all(one is None for one in words):
            return logits
        every = np.full_like(self._text_bits, -1)
        bits = np.stack([every if one is None else one for one in words])
        return torch.minimum(logits, _caps(bits, logits))

    def allows(self, text: Sequence[int], path: tuple[int, ...], token: int) -> bool:
        """May it follow `text` and then `path`? It costs little of what `mask` costs there, which
        need not be worked out again.

        Raises:
            RequestError: the guide takes too long.
        """
        with self._spending(1):
            self._catch_up(text)
            words = self._allowed(path)
        return words is not None and bool(words[token // 32] >> token % 32 & 1)

    def forget(self) -> None:
        """Let go of what can be worked out again."""
        self._matcher = None
        self._num_tokens = 0
        self._last = None
        self._path = ()
        self._known.clear()

    def _allowed(self, path: tuple[int, ...]) -> Words | None:
        """[W], what may follow text and path; None: all."""
        if path not in self._known:
            self._known[path] = self._find(path)
        return self._known[path]

    def _find(self, path: tuple[int, ...]) -> Words | None:
        if not self._go_to(path):
            return None
        found = torch.empty(1, len(self._text_bits), dtype=torch.int32)
        self._matcher.fill_next_token_bitmask(found)
        words: Words = found.numpy()[0] & self._text_bits
        if self._guide.vocabulary.ends_in_half(self._before()):
            words = words & self._guide.vocabulary.after_half
        if self._matcher.is_completed():
            return words | self._end_bits if words.any() else None
        return words

    @contextmanager
    def _spending(self, places: int) -> Iterator[None]:
        """
        Raises:
            RequestError: the guide takes too long.
        """
        began = time.thread_time()
        yield
        self._seconds_left += PLACE_S * max(places, 0) - (time.thread_time() - began)
        self._seconds_left = min(self._seconds_left, PATIENCE_S)
        if self._seconds_left < 0:
            raise RequestError(
                f"the {_NAMES[self._guide.kind]} takes too long to follow; make it less ambiguous"
            )

    def _catch_up(self, text: Sequence[int]) -> None:
        if self._matcher is None or len(text) < self._num_tokens:
            self.forget()
            self._matcher = self._guide.matcher()
        if len(text) == self._num_tokens:
            return
        self._known.clear()
        self._go_to(())
        for token in text[self._num_tokens :]:
            if not self._accepts(token):
                raise RequestError(
                    f"token {token} at position {self._num_tokens} of the text does not obey its "
                    f"guide, a {_NAMES[self._guide.kind]}"
                )
            self._num_tokens, self._last = self._num_tokens + 1, token

    def _go_to(self, path: tuple[int, ...]) -> bool:
        """Whether the guide allows this path; if so, the matcher stands at its end."""
        shared = 0
        for old, new in zip(self._path, path, strict=False):
            if old != new:
                break
            shared += 1
        if len(self._path) > shared:
            self._matcher.rollback(len(self._path) - shared)
            self._path = path[:shared]
        for token in path[shared:]:
            if not self._accepts(token):
                return False
            self._path = (*self._path, token)
        return True

    def _accepts(self, token: int) -> bool:
        joins = self._guide.vocabulary.joins(self._before(), token)
        return joins and self._matcher.accept_token(token)

    def _before(self) -> int | None:
        """The token behind which the matcher stands."""
        return self._path[-1] if self._path else self._last


_HALF = b"\xed"
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")
"""How UTF-8 would write half of a surrogate pair, if it could be written: U+D800 to U+DFFF."""
_JSON = ("json", "json_schema")
_INFINITY = 0x7F800000
"""Of 32 bits, without its sign."""
_NAMES = {
    "json": "JSON object",
    "json_schema": "schema",
    "regex": "regular expression",
    "grammar": "grammar",
    "choice": "choice of texts",
}


def _size(kept: tuple[tuple[str, str], Guide]) -> int:
    """In bytes, about."""
    (_, source), guide = kept
    return len(source) + int(guide.compiled.memory_size_bytes)


def _xgrammar() -> ModuleType:
    try:
        import xgrammar
    except ImportError:
        raise ConfigError("guided decoding needs xgrammar; pip install xgrammar") from None
    return xgrammar  # type: ignore[no-any-return]


def _check_source(kind: str, source: str) -> None:
    try:
        size = len(source.encode())
    except UnicodeEncodeError:
        raise RequestError(f"the {_NAMES[kind]} has half of a surrogate pair") from None
    if size > MAX_BYTES:
        raise RequestError(
            f"the {_NAMES[kind]} has {size:,} bytes, {MAX_BYTES:,} are allowed; make it smaller"
        )
    if "\0" in source:
        raise RequestError(f"the {_NAMES[kind]} has the character NUL; leave it out")


def _choices(source: str) -> str:
    """A grammar for texts in a JSON array."""
    try:
        texts = json.loads(source)
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
        raise RequestError(f"a choice is a JSON array of texts, at least one, got {source:.60}")
    for text in texts:
        _check_source("choice", text)
    return "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _reason(error: Exception) -> str:
    """What xgrammar says, without the place in its own source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^.*?\.(?:cc|h):\d+: ", "", lines[-1])[:300]


def _words(flags: NDArray[np.bool_]) -> Words:
    """[W], from [V]."""
    padded = np.zeros(-(-len(flags) // 32) * 32, dtype=bool)
    padded[: len(flags)] = flags
    return np.packbits(padded, bitorder="little").view(np.int32)


def _caps(bits: Words, like: Tensor) -> Tensor:
    """[N, V], inf where a bit of words [N, W] is set and -inf elsewhere, as logits are. The lesser
    of logits and caps is what may be chosen; that takes an eighth of the time of a masked fill,
    which decides token by token."""
    forbidden = ~bits
    if like.device.type == "cpu":
        flags = np.unpackbits(
            forbidden.view(np.uint8), axis=1, count=like.shape[1], bitorder="little"
        )
        signs = torch.from_numpy(flags).to(torch.int32)
    else:
        words = torch.from_numpy(forbidden).to(like.device)
        places = torch.arange(32, dtype=torch.int32, device=like.device)
        signs = ((words[:, :, None] >> places) & 1).flatten(1)[:, : like.shape[1]].contiguous()
    caps = signs.bitwise_left_shift_(31).bitwise_or_(_INFINITY).view(torch.float32)
    return caps.to(like.dtype)

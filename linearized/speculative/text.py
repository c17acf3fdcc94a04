"""One text in the making: its prompt, what follows so far, and when it ends. Knows no model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linearized.config import is_whole
from linearized.errors import ConfigError, ModelError, RequestError
from linearized.speculative.detokenizer import TextStream
from linearized.speculative.guide import Guide
from linearized.speculative.sampling import NO_TOKEN, Sampler, Sampling, pick
from linearized.speculative.tree import TokenTree

BLOCK = 1 << 22
"""Numbers at most whose log-probabilities are worked out at once, in float64."""


@dataclass(frozen=True, slots=True)
class Alternatives:
    """How probable the model itself found a token, before bias, penalties and temperature."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most probable tokens there, best first, with their log-probabilities."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one round adds to a text."""

    tokens: tuple[int, ...]
    text: str = ""
    """What is certain now; empty without a `decode`."""
    logprobs: tuple[Alternatives, ...] = ()
    """One a token, where they were asked for."""
    finished: str | None = None
    """Why the text ends here, if it does."""
    accepted: int = 0
    """How many of the tokens, from the first on, were drafted."""
    tree: TokenTree = TokenTree.empty
    """What was drafted, as far as it was verified."""


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """
    Raises:
        RequestError: there are none, or one that the vocabulary does not have.
    """
    if not tokens:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    for token in tokens:
        if not 0 <= token < vocab_size:
            outside = f"token id {token} is outside the vocabulary of {vocab_size}"
            raise RequestError(outside, param="prompt")


class Text:
    """Grows by `take` until `finished` is set."""

    def __init__(
        self,
        prompt: Iterable[int],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        logprobs: int | None = None,
        num_prompt: int | None = None,
        guide: Guide | None = None,
        prompt_logprobs: int | None = None,
        owner: str = "",
    ) -> None:
        """`stop`: the text ends before the first of these strings; not looked for among the first
        `sampling.min_tokens` tokens. They need `decode`, token ids to text; if that is a `Decoder`,
        they may name special tokens, which the text does not show. `logprobs`: how many
        alternatives to name for each token; None: and no log-probabilities either. `num_prompt`:
        how much of `prompt` is one, and what follows it the text so far; None: all. `guide`: what
        the text obeys; it ends where the guide lets nothing follow. `prompt_logprobs`: the same as
        `logprobs`, for the prompt's own tokens. `owner`: it goes on from what an engine knows of
        this owner's texts only.

        Raises:
            RequestError: max_new_tokens is no number, or the text so far does not obey the guide.
        """
        self.tokens = list(prompt)
        """Prompt and text."""
        self.num_prompt = len(self.tokens) if num_prompt is None else num_prompt
        self.sampling = sampling
        self.guide = guide
        follower = guide.follower(sampling.stop_ids) if guide is not None else None
        self.sampler = Sampler(sampling, num_prompt=self.num_prompt, guide=follower)
        if not is_whole(max_new_tokens):
            problem = f"max_new_tokens must be a whole number, got {max_new_tokens!r}"
            raise RequestError(problem, param="max_tokens")
        self.max_new_tokens = int(max_new_tokens)
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.prompt_alternatives: list[Alternatives | None] = []
        """One for each token of the prompt that has been read, if they were asked for; nothing is
        said of the first, which follows none."""
        if prompt_logprobs is not None:
            self.prompt_alternatives.append(None)
        self.owner = owner
        self.cached_tokens = 0
        """Tokens of the prompt that did not have to be read, as their state was known."""
        self.finished: str | None = None
        """`stop`: a stop token or string, or all that its guide allows; `length`: as long as it may
        be; `error`: see there."""
        self.error: Exception | None = None
        """What its prompt, its logits or `decode` raised."""
        self.hidden: Tensor | None = None
        """[C], of the model's last layer, from which the last token was chosen; for drafters that
        need it."""
        self.rounds = 0
        """Verifications so far; each gave at least one token."""
        self.drafted: Counter[int] = Counter()
        """Drafted tokens by depth."""
        self.accepted: Counter[int] = Counter()
        """Those of them that are in the text."""
        if stop and decode is None:
            raise ConfigError("stop strings need a tokenizer's decode, to see text in token ids")
        self._stream: TextStream | None = None
        if decode is not None:
            known = self.tokens[: self.num_prompt]
            self._stream = TextStream(
                decode, prompt=known, stop=stop, min_tokens=sampling.min_tokens
            )
            self._stream.push(self.new_tokens)
        stopped = self._stream is not None and self._stream.stopped
        ended = bool(self.new_tokens) and self.tokens[-1] in sampling.stop_ids
        is_over = follower is not None and follower.follow(
            self.tokens[self.num_prompt : len(self.tokens) - ended]
        )
        if stopped or ended or is_over:
            self.finished = "stop"
        elif self.num_left <= 0 and not self.is_unscored:
            self.finished = "length"

    @property
    def is_unscored(self) -> bool:
        """Have log-probabilities of its prompt been asked for, and not all been worked out?"""
        asked = self.prompt_logprobs is not None
        return asked and len(self.prompt_alternatives) < self.num_prompt

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that it may still get."""
        return self.max_new_tokens - self.num_new

    def check(self, vocab_size: int) -> None:
        """
        Raises:
            RequestError: an empty prompt, a token that the vocabulary does not have, a length below
                0. ConfigError: a sampling that names such a token.
        """
        check_tokens(self.tokens, vocab_size)
        if not 0 < self.num_prompt <= len(self.tokens):
            problem = f"num_prompt must lie between 1 and {len(self.tokens)}, got {self.num_prompt}"
            raise RequestError(problem, param="prompt")
        if self.max_new_tokens < 0:
            problem = f"max_new_tokens must be at least 0, got {self.max_new_tokens}"
            raise RequestError(problem, param="max_tokens")
        if self.num_left < 0:
            problem = f"the text has {self.num_new} tokens, up to {self.max_new_tokens} fit"
            raise RequestError(problem, param="max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not (is_whole(count) and 0 <= count <= vocab_size):
                problem = f"{name} must lie between 0 and {vocab_size}, and be whole, got {count!r}"
                raise RequestError(problem, param=name)
        self.sampling.check(vocab_size)
        if self.guide is not None and len(self.guide.vocabulary) != vocab_size:
            raise ConfigError(
                f"the guide is for {len(self.guide.vocabulary)} tokens, the model has "
                f"{vocab_size}; make Guides with the model's vocab_size"
            )

    def possible(self, tree: TokenTree, vocab_size: int, most: int) -> TokenTree:
        """Of guesses for this text the `most` most probable ones that may come true: tokens that
        the vocabulary has, and that its guide allows where they stand."""
        guide = self.sampler.guide
        if guide is None and all(0 <= token < vocab_size for token in tree.tokens):
            return tree.best(most)
        new, paths = self.new_tokens, tree.paths()

        def may(node: int) -> bool:
            *above, token = paths[node]
            if not 0 <= token < vocab_size:
                return False
            return guide is None or guide.allows(new, tuple(above), token)

        try:
            return tree.that(may, most)
        except RequestError:  # it is raised again where the next token is chosen
            return TokenTree.empty

    def choose(self, logits: Tensor, tree: TokenTree) -> tuple[list[int], list[int]]:
        """Walk down the tree: logits [1 + N, V] behind the last token and behind each node, to the
        accepted nodes and the tokens that follow: theirs, then one more, which is NO_TOKEN where
        the logits are NaN or infinite."""
        if self.sampler.is_plain:
            return tree.walk(pick(logits).tolist())
        paths = [(), *tree.paths()]
        chosen = pick(self.sampler.scores(logits, self.tokens, paths)).tolist()
        if not self.sampling.typical or not len(tree):
            return tree.walk(chosen)
        allowed = self.sampler.typical(logits, self.tokens, paths)
        behind = torch.tensor(tree.parents, device=logits.device) + 1
        drafted = torch.tensor(tree.tokens, device=logits.device)
        taken = zip(allowed[behind, drafted].tolist(), tree.parents, tree.tokens, strict=True)
        path = tree.deepest(
            [likely or chosen[1 + above] == token for likely, above, token in taken]
        )
        return path, [*(tree.tokens[i] for i in path), chosen[1 + path[-1] if path else 0]]

    def take(
        self, new: Sequence[int], tree: TokenTree, path: Sequence[int], logits: Tensor
    ) -> Piece:
        """Go on by what `choose` has said, as far as the text goes on. It ends with `error` if
        `decode` raises, then without any of it; and before a NO_TOKEN."""
        new = list(new[: self.num_left])
        chosen = [token for token in new if token != NO_TOKEN]
        try:
            said, text = self._say(chosen, ends=len(chosen) < len(new))
        except Exception as error:
            return self.fail(error)
        if self.finished == "error":
            behind = [0, *(1 + node for node in path)][len(said)]
            self.error = _no_token(logits[behind], len(self.tokens) + len(said))
        self.tokens += said
        self.rounds += 1
        self.drafted.update(tree.depths)
        accepted = min(len(path), len(said))
        self.accepted.update(range(1, accepted + 1))
        known = self._alternatives(said, path, logits)
        return Piece(tuple(said), text, known, self.finished, accepted, tree)

    def score(self, logits: Tensor, start: int) -> None:
        """Take up what logits [T, V] behind the tokens from `start` on say of those that follow
        them in the prompt; of each token once.

        Raises:
            ModelError: they are no numbers.
        """
        assert self.prompt_logprobs is not None
        done = len(self.prompt_alternatives)
        assert start < done, "a part of the prompt was left out"
        stop = min(start + 1 + len(logits), self.num_prompt)
        size = max(BLOCK // logits.shape[1], 1)
        for first in range(done, stop, size):
            tokens = self.tokens[first : min(first + size, stop)]
            rows = logits[first - 1 - start :][: len(tokens)]
            found = _alternatives(rows, tokens, self.prompt_logprobs)
            for i, row in enumerate(found):
                if math.isnan(row.logprob):
                    raise _no_token(rows[i], first + i)
            self.prompt_alternatives += found

    def end(self) -> Piece:
        """End at its length: its prompt has been read, and no more was asked for."""
        self.finished = "length"
        return Piece((), self._stream.flush() if self._stream is not None else "", (), "length")

    def fail(self, error: Exception) -> Piece:
        """End here, because of this."""
        self.finished, self.error = "error", error
        return Piece((), finished="error")

    def rest(self) -> None:
        """Let go of what only the next round needs. It can do without."""
        self.sampler.forget()
        self.hidden = None

    def _say(self, new: list[int], *, ends: bool) -> tuple[list[int], str]:
        """Those of the new tokens that belong to the text, and what is certain of it now. `ends`:
        no token can be chosen after them."""
        text = ""
        for i, token in enumerate(new):
            stops = token in self.sampling.stop_ids
            if self._stream is not None and not stops:  # a stop token is no text
                text += self._stream.push([token])
                stops = self._stream.stopped
            if self.sampler.guide is not None and not stops:
                stops = self.sampler.guide.follow([*self.new_tokens, *new[: i + 1]])
            if stops:
                self.finished = "stop"
                new = new[: i + 1]
                break
        if self.finished is None and len(new) == self.num_left:
            self.finished = "length"
        elif self.finished is None and ends:
            self.finished = "error"
        if self.finished is not None and self._stream is not None:
            text += self._stream.flush()
            if self._stream.stopped:
                self.finished = "stop"
        return new, text

    def _alternatives(
        self, new: Sequence[int], path: Sequence[int], logits: Tensor
    ) -> tuple[Alternatives, ...]:
        if self.logprobs is None:
            return ()
        behind = [0, *(1 + node for node in path)][: len(new)]
        return _alternatives(logits[behind], new, self.logprobs)


def _alternatives(logits: Tensor, tokens: Sequence[int], count: int) -> tuple[Alternatives, ...]:
    """Of tokens, by the logits [T, V] that each was chosen from."""
    log_p = logits.double().log_softmax(1)
    best = log_p.topk(count, dim=1)
    taken = torch.tensor(tokens, dtype=torch.int64, device=log_p.device)[:, None]
    columns = torch.cat([log_p.gather(1, taken), best.values, best.indices.double()], dim=1)
    return tuple(
        Alternatives(
            row[0], tuple(zip(map(int, row[1 + count :]), row[1 : 1 + count], strict=True))
        )
        for row in columns.tolist()  # one transfer
    )


def _no_token(logits: Tensor, position: int) -> ModelError:
    """Why no token can be chosen from logits [V]."""
    if bool(logits.isfinite().any()) and not bool(logits.isnan().any() or logits.isposinf().any()):
        return ModelError(
            f"the sampling settings leave no token with a finite score for position {position} of "
            "the text, prompt included; check min_tokens, the stop tokens, the penalties and the "
            "guide"
        )
    kind = "NaN" if bool(logits.isnan().any()) else "infinite"
    return ModelError(
        f"the model gave {kind} logits for position {position} of the text, prompt included, so no "
        "token can be chosen; check its weights, or load it in a wider dtype"
    )

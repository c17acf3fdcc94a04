"""One text in the making: its prompt, what follows so far, and when it ends. Knows no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linearized.config import is_whole
from linearized.errors import ConfigError, ModelError, RequestError
from linearized.speculative.detokenizer import TextStream
from linearized.speculative.sampling import NO_TOKEN, Sampler, Sampling, pick
from linearized.speculative.tree import TokenTree


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
    ) -> None:
        """`stop`: the text ends before the first of these strings; not looked for among the first
        `sampling.min_tokens` tokens. They need `decode`, token ids to text; if that is a `Decoder`,
        they may name special tokens, which the text does not show. `logprobs`: how many
        alternatives to name for each token; None: and no log-probabilities either. `num_prompt`:
        how much of `prompt` is one, and what follows it the text so far; None: all."""
        self.tokens = list(prompt)
        """Prompt and text."""
        self.num_prompt = len(self.tokens) if num_prompt is None else num_prompt
        self.sampling = sampling
        self.sampler = Sampler(sampling, num_prompt=self.num_prompt)
        if not is_whole(max_new_tokens):
            problem = f"max_new_tokens must be a whole number, got {max_new_tokens!r}"
            raise RequestError(problem, param="max_tokens")
        self.max_new_tokens = int(max_new_tokens)
        self.logprobs = logprobs
        self.finished: str | None = None
        """`stop`: a stop token or string; `length`: as long as it may be; `error`: see there."""
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
        if stopped or (self.new_tokens[-1:] and self.tokens[-1] in sampling.stop_ids):
            self.finished = "stop"
        elif self.num_left <= 0:
            self.finished = "length"

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
        if self.logprobs is not None and not 0 <= self.logprobs <= vocab_size:
            problem = f"logprobs must lie between 0 and {vocab_size}, got {self.logprobs}"
            raise RequestError(problem, param="logprobs")
        self.sampling.check(vocab_size)

    def choose(self, logits: Tensor, tree: TokenTree) -> tuple[list[int], list[int]]:
        """Walk down the tree: logits [1 + N, V] behind the last token and behind each node, to the
        accepted nodes and the tokens that follow: theirs, then one more, which is NO_TOKEN where
        the logits are NaN or infinite."""
        if self.sampling.is_plain:
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
        logprobs = self._alternatives(said, path, logits)
        return Piece(tuple(said), text, logprobs, self.finished, accepted)

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
        log_p = logits[behind].double().log_softmax(1)
        best = log_p.topk(self.logprobs, dim=1)
        taken = torch.tensor(new, dtype=torch.int64, device=log_p.device)[:, None]
        columns = torch.cat([log_p.gather(1, taken), best.values, best.indices.double()], dim=1)
        return tuple(
            Alternatives(row[0], tuple(zip(map(int, row[1 + k :]), row[1 : 1 + k], strict=True)))
            for k, row in ((self.logprobs, row) for row in columns.tolist())  # one transfer
        )


def _no_token(logits: Tensor, position: int) -> ModelError:
    """Why no token can be chosen from logits [V]."""
    if bool(logits.isfinite().any()) and not bool(logits.isnan().any() or logits.isposinf().any()):
        return ModelError(
            f"the sampling settings leave no token with a finite score for position {position} of "
            "the text, prompt included; check min_tokens, the stop tokens and the penalties"
        )
    kind = "NaN" if bool(logits.isnan().any()) else "infinite"
    return ModelError(
        f"the model gave {kind} logits for position {position} of the text, prompt included, so no "
        "token can be chosen; check its weights, or load it in a wider dtype"
    )

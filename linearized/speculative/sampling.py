"""Which token follows, given logits: penalties, filters, temperature, noise. One rule for target
and draft.

The token at position p is argmax(filtered logits / temperature + noise(seed, choice, p));
temperature 0 has no noise. So a text depends on model, prompt, parameters and seed only. What
depends on the text so far is worked out for each node of a tree along its own path, as it would be
without speculation.

In this order: guide, logit_bias, min_tokens, repetition, presence and frequency penalties,
temperature, top_k, top_p, min_p, noise. What a guide forbids is -inf from the first on, so no bias
brings it back, and filters count allowed tokens only. min_tokens forbids the end of the text where
the guide lets it go on; where the guide does not, the text is over without a stop token.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from linearized.config import is_whole
from linearized.errors import ConfigError
from linearized.speculative.guide import Follower
from linearized.speculative.noise import gumbel_of

AHEAD = 4
"""Positions whose noise is worked out at once; that is twice as fast as one after the other."""
PREFIXES = (512, 4096)
"""Most probable tokens among which the nucleus of top_p is looked for first, one after the other;
sorting all tokens takes far longer."""
NO_TOKEN = -1
"""Stands for the token that cannot be chosen, because the best score is no finite number."""
UNIT = 2.0**44
"""The best token's share of a nucleus, as a whole number: sums of whole numbers are exact in any
order, and 2^18 tokens fit 64 bits."""
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    temperature: float = 0.0
    """0: the most probable token. 1: the model's own distribution."""
    top_k: int = 0
    """Keep the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach p."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, below 0) the logits of tokens in prompt and text (Keskar et al., CTRL,
    2019); 1: none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the text, as OpenAI has it."""
    frequency_penalty: float = 0.0
    """The same, times how often they are in it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens; a mapping will do."""
    min_tokens: int = 0
    """No stop token before the text has so many tokens."""
    stop_ids: frozenset[int] = frozenset()
    """The text ends with one of them."""
    seed: int = 0
    choice: int = 0
    """Which of several texts with the same seed. Texts that are asked for together are numbered
    through, so that equal prompts get different texts."""
    typical: float = 0.0
    """Above 0, **lossy**: a drafted token is also taken if its probability is above the smaller of
    this and √this · e^(-entropy), Medusa's typical acceptance (Cai et al., ICML 2024, 2.3.1; their
    value is 0.09). The text then depends on the drafts, and is not distributed as the target's."""

    def __post_init__(self) -> None:
        for name in ("top_k", "min_tokens", "choice", "seed"):
            if not is_whole(value := getattr(self, name)):
                raise ConfigError(f"{name} must be a whole number, got {value!r}")
            object.__setattr__(self, name, int(value))
        for name in ("temperature", "top_p", "min_p", "typical", *_PENALTIES):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        object.__setattr__(self, "stop_ids", _token_ids(self.stop_ids))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be at least 0, got {self.temperature}")
        for name, least in (("top_k", 0), ("min_tokens", 0), ("choice", 0)):
            if getattr(self, name) < least:
                hint = " (0: all tokens)" if name == "top_k" else ""
                value = getattr(self, name)
                raise ConfigError(f"{name} must be at least {least}{hint}, got {value}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie between 0 and 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, got {getattr(self, name)}")
        if not 0 <= self.typical <= 1:
            raise ConfigError(f"typical must lie between 0 and 1, got {self.typical}")
        if self.typical and not self.temperature:
            raise ConfigError("typical acceptance needs a temperature above 0")

    def check(self, vocab_size: int) -> None:
        """Raises ConfigError for a token that the vocabulary does not have."""
        named = {"logit_bias": [token for token, _ in self.logit_bias], "stop_ids": self.stop_ids}
        for name, tokens in named.items():
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise ConfigError(
                        f"{name} names token id {token}, outside the vocabulary of {vocab_size}"
                    )

    @property
    def penalizes(self) -> bool:
        """Do scores depend on which tokens the text has?"""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def is_plain(self) -> bool:
        """Is the token the argmax of the model's own logits?"""
        ends_late = bool(self.min_tokens and self.stop_ids)
        return not (self.temperature or self.penalizes or ends_late or self.logit_bias)

    def filter(self, logits: Tensor) -> Tensor:
        """-inf for every token that top_k, top_p and min_p leave out; applied in that order, to
        logits [N, V] that temperature has scaled."""
        return filtered(logits, [self] * len(logits))


def filtered(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """`Sampling.filter` of logits [N, V], where each row has its own sampling. What a row keeps
    does not depend on the other rows."""
    vocabulary = logits.shape[1]
    limits = [row.top_k if 0 < row.top_k < vocabulary else 0 for row in rows]
    if any(limits):
        best = logits.topk(max(limits), dim=1).values
        last = _column([max(limit - 1, 0) for limit in limits], logits, torch.int64)
        least = best.gather(1, last)
        least = least.masked_fill(_column([not limit for limit in limits], logits), -math.inf)
        logits = logits.masked_fill(logits < least, -math.inf)
    if any(row.top_p < 1 for row in rows):
        logits = _nucleus(logits, _column([row.top_p for row in rows], logits, torch.float64))
    if any(row.min_p > 0 for row in rows):
        bounds = [math.log(row.min_p) if row.min_p else -math.inf for row in rows]
        least = logits.amax(1, keepdim=True) + _column(bounds, logits, logits.dtype)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def tempered(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Filtered logits over temperature, [N, V] in float64. They are relative to the best, so that
    no temperature, however small, makes them infinite above."""
    relative = logits.double() - logits.amax(1, keepdim=True)
    temperatures = _column([row.temperature for row in rows], logits, torch.float64)
    return filtered(relative / temperatures, rows)


def pick(scores: Tensor) -> Tensor:
    """The token with the best score in each row of [..., V], the first of equal ones; NO_TOKEN
    where there is none. All stays on the device: reading the result is one transfer."""
    best = scores.argmax(-1, keepdim=True)  # a NaN counts as the best
    return checked(best, scores.gather(-1, best)).squeeze(-1)


def checked(tokens: Tensor, scores: Tensor) -> Tensor:
    """The best tokens, given their scores; NO_TOKEN where that is NaN or infinite. A model whose
    best logit is infinite has overflown, so what it prefers is no choice either."""
    return tokens.masked_fill(~scores.isfinite(), NO_TOKEN)


class Sampler:
    """Scores the tokens of one text. Remembers what the text holds, and follows it as it grows."""

    def __init__(
        self, sampling: Sampling, *, num_prompt: int, guide: Follower | None = None
    ) -> None:
        self.sampling = sampling
        self.num_prompt = num_prompt
        self.guide = guide
        self._counts: dict[torch.device, tuple[int, Tensor]] = {}
        """How many tokens are counted, and [2, V], how often each is in the prompt and in the
        text; a draft may live on another device than its target."""
        self._noise: dict[torch.device, dict[int, Tensor]] = defaultdict(dict)

    @property
    def is_plain(self) -> bool:
        """Is the token the argmax of the model's own logits?"""
        return self.guide is None and self.sampling.is_plain

    def scores(
        self, logits: Tensor, tokens: Sequence[int], paths: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """What the next token is the argmax of, [N, V], from logits [N, V] at N places: behind
        `tokens`, prompt and text so far, and then `paths[n]`."""
        sampling = self.sampling
        if self.is_plain:
            return logits
        logits = self.adjusted(logits, tokens, paths)
        if sampling.temperature == 0:
            return logits
        spots = [(self, len(tokens), len(path)) for path in paths]
        return tempered(logits, [sampling] * len(paths)) + noise(spots, logits)

    def guesses(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        """Scores [N, V] of tokens at these positions, from logits [N, V], where nobody knows what
        stands before them: without guide and penalties."""
        sampling = self.sampling
        logits = self._biased(logits)
        if sampling.temperature == 0:
            return logits
        first = min(positions)
        spots = [(self, first, position - first) for position in positions]
        return tempered(logits, [sampling] * len(logits)) + noise(spots, logits)

    def typical(
        self, logits: Tensor, tokens: Sequence[int], paths: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """[N, V], which tokens typical acceptance would take at each place."""
        sampling = self.sampling
        logits = self.adjusted(logits, tokens, paths)
        log_p = tempered(logits, [sampling] * len(paths)).log_softmax(1)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(1, keepdim=True)
        bound = (0.5 * math.log(sampling.typical) - entropy).clamp(max=math.log(sampling.typical))
        return log_p > bound

    def forget(self) -> None:
        """Let go of what can be worked out again."""
        self._counts.clear()
        self._noise.clear()
        if self.guide is not None:
            self.guide.forget()

    def adjusted(
        self, logits: Tensor, tokens: Sequence[int], paths: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """With guide, bias and penalties; in float32 at least, but for the guide alone."""
        sampling = self.sampling
        if self.guide is not None:
            logits = self.guide.mask(logits, tokens[self.num_prompt :], paths)
        logits = self._biased(logits)
        lengths = [len(tokens) + len(path) - self.num_prompt for path in paths]
        early = [row for row, length in enumerate(lengths) if length < sampling.min_tokens]
        if not sampling.penalizes and not (early and sampling.stop_ids):
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        for row in early:
            logits[row, _ids(sampling.stop_ids, logits)] = -math.inf
        if sampling.penalizes:
            self._penalize(logits, tokens, paths)
        return logits

    def _penalize(
        self, logits: Tensor, tokens: Sequence[int], paths: Sequence[tuple[int, ...]]
    ) -> None:
        """In place, and only the tokens that prompt, text and paths have: few of a vocabulary."""
        sampling = self.sampling
        prompt, text = self._follow(tokens, logits)
        new = _ids((token for path in paths for token in path), logits)
        present = (prompt + text).index_fill_(0, new, 1) > 0  # V
        ids = present.nonzero()[:, 0]  # U
        counts = text[ids].repeat(len(paths), 1)  # N U
        if len(new):
            rows = _ids((row for row, path in enumerate(paths) for _ in path), logits)
            columns = (present.cumsum(0) - 1)[new]
            counts.index_put_((rows, columns), counts.new_ones(()), accumulate=True)
        found = logits[:, ids]
        penalty = sampling.repetition_penalty
        if penalty != 1:
            penalized = torch.where(found > 0, found / penalty, found * penalty)
            found = torch.where((counts > 0) | (prompt[ids] > 0), penalized, found)
        if sampling.frequency_penalty:
            found -= sampling.frequency_penalty * counts.to(found.dtype)
        if sampling.presence_penalty:
            found -= sampling.presence_penalty * (counts > 0)
        logits[:, ids] = found

    def _biased(self, logits: Tensor) -> Tensor:
        if not self.sampling.logit_bias:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids, biases = zip(*self.sampling.logit_bias, strict=True)
        bias = torch.tensor(biases, dtype=logits.dtype, device=logits.device)
        return logits.index_add(1, _ids(ids, logits), bias.expand(len(logits), -1))

    @torch.inference_mode(False)
    def _follow(self, tokens: Sequence[int], like: Tensor) -> Tensor:
        """[2, V], integers, counts of prompt and text."""
        counted, counts = self._counts.get(like.device, (0, None))
        if counts is None or counted > len(tokens):
            counted = 0
            counts = like.new_zeros(2, like.shape[1], dtype=torch.int64)
        if counted < len(tokens):
            place = [int(i >= self.num_prompt) for i in range(counted, len(tokens))]
            index = (_ids(place, like), _ids(tokens[counted:], like))
            counts.index_put_(index, counts.new_ones(()), accumulate=True)
        self._counts[like.device] = len(tokens), counts
        return counts

    def missing(self, positions: set[int], device: torch.device, *, since: int) -> list[int]:
        """Of these positions and a few behind them, those whose noise has not been worked out.
        Those before `since` are not asked for again."""
        known = self._noise[device]
        new = positions - known.keys()
        if not new:
            return []
        for position in [position for position in known if position < since]:
            del known[position]
        ahead = range(min(new), max(max(new) + 1, min(new) + AHEAD))
        return [position for position in ahead if position not in known]

    def noise_at(self, position: int, device: torch.device) -> Tensor:
        return self._noise[device][position]

    def remember(self, position: int, row: Tensor) -> None:
        self._noise[row.device][position] = row


Spot = tuple[Sampler, int, int]
"""Where noise is asked for: behind so many tokens of the text that the sampler is for, and so many
more."""


def noise(spots: Sequence[Spot], like: Tensor) -> Tensor:
    """[N, V] at these spots, from one hash of all that are not known yet. Of a position it is
    worked out once, for draft and target."""
    device = like.device
    asked: dict[tuple[Sampler, int], set[int]] = defaultdict(set)
    for sampler, since, more in spots:
        asked[sampler, since].add(since + more)
    new = [
        (sampler, position)
        for (sampler, since), positions in asked.items()
        for position in sampler.missing(positions, device, since=since)
    ]
    if new:
        keys = [(s.sampling.seed, s.sampling.choice, position) for s, position in new]
        rows = gumbel_of(keys, like.shape[1], device=device)
        for (sampler, position), row in zip(new, rows, strict=True):
            sampler.remember(position, row)
    return torch.stack([sampler.noise_at(since + more, device) for sampler, since, more in spots])


def _nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """-inf for all but the fewest tokens of each row of [N, V] whose probabilities reach `top_p`
    [N, 1]; of equal ones the first. Probabilities are whole numbers here, so that a row's sum is
    the same in whatever company and on whatever device it is taken."""
    masses = ((logits - logits.amax(1, keepdim=True)).exp() * UNIT).long()
    all_kept = top_p >= 1
    goal = (masses.sum(1, keepdim=True).double() * top_p).masked_fill(all_kept, 0.5)
    sizes = (*(size for size in PREFIXES if size < logits.shape[1]), logits.shape[1])
    for size in sizes:
        ordered, order = logits.topk(size, dim=1)
        found = masses.gather(1, order)
        reached = found.cumsum(1)
        if size == logits.shape[1] or bool((reached[:, -1:] >= goal).all()):
            break
    kept = reached - found < goal
    least = ordered.masked_fill(~kept, math.inf).amin(1, keepdim=True)
    ties = (kept & (ordered == least)).sum(1, keepdim=True)
    level = logits == least
    kept_ties = level & (level.cumsum(1, dtype=torch.int32) <= ties)
    return logits.masked_fill(~((logits > least) | kept_ties | all_kept), -math.inf)


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    """[N, 1], a value for each row."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _token_ids(ids: object) -> frozenset[int]:
    try:
        found = list(ids)  # type: ignore[call-overload]
    except TypeError:
        found = [None]
    if not all(map(is_whole, found)):
        raise ConfigError(f"stop_ids must be token ids, got {ids!r}")
    return frozenset(map(int, found))


def _pairs(bias: object) -> tuple[tuple[int, float], ...]:
    if not bias:
        return ()
    given = bias.items() if isinstance(bias, Mapping) else bias
    pairs = []
    try:
        for token, value in given:  # type: ignore[attr-defined]
            if isinstance(token, bool) or int(token) != float(token):
                raise ValueError
            pairs.append((int(token), float(value)))
            if not math.isfinite(pairs[-1][1]):
                raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(f"logit_bias must give token ids finite numbers, got {bias!r}") from None
    return tuple(sorted(pairs))


def _ids(values: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=like.device)

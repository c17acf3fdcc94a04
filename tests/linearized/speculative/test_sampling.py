"""Noise and filters: the one rule by which target and draft choose tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearized.errors import ConfigError
from linearized.speculative import Sampler, Sampling, TokenTree
from linearized.speculative.noise import gumbel, gumbel_of
from linearized.speculative.sampling import NO_TOKEN, pick


def test_noise_is_a_pure_function_of_its_key():
    positions = [0, 5, 17]
    whole = gumbel(7, positions, 100)
    assert torch.equal(whole, gumbel(7, positions, 100))
    assert torch.equal(whole[1:2], gumbel(7, [5], 100))
    assert torch.equal(whole[:, :60], gumbel(7, positions, 60))
    for other in (gumbel(8, positions, 100), gumbel(7, positions, 100, choice=1)):
        assert not torch.isclose(whole, other).any()
    assert whole.isfinite().all()


def test_noise_is_the_hash_it_says_it_is():
    """Against plain Python integers: a change of the hash would change every sampled text."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for seed, choice, position, token in [(0, 0, 0, 0), (1234, 0, 3, 5), (-7, 2, 10**6, 99)]:
        key = mix(mix(seed & mask) ^ ((choice + 1) * golden & mask))
        key = mix((key + position * golden) & mask)
        bits = mix(mix((key + (token + 1) * golden) & mask))
        want = -math.log(-math.log(((bits >> 11) + 0.5) / 2**53))
        noise = gumbel(seed, [position], 100, choice=choice)
        assert float(noise[0, token]) == pytest.approx(want, abs=1e-12)


def test_seeds_of_any_size_are_taken():
    for seed in (0, -1, 2**63, 2**64 + 5, -(2**70)):
        assert gumbel(seed, [0], 3).isfinite().all()


def test_noise_is_gumbel():
    """Moments and Kolmogorov distance of a large sample, and no correlation along either key."""
    noise = gumbel(0, range(400), 500)
    assert noise.mean() == pytest.approx(0.5772156649, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)
    ordered = noise.flatten().sort().values
    exact = torch.exp(-torch.exp(-ordered))
    empirical = torch.arange(1, ordered.numel() + 1) / ordered.numel()
    assert (exact - empirical).abs().max() < 1.63 / math.sqrt(ordered.numel())
    for a, b in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 0.01


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
]


def scores(sampling: Sampling, logits: torch.Tensor, tokens=(0,), paths=((),), num_prompt=1):
    return Sampler(sampling, num_prompt=num_prompt).scores(logits, list(tokens), list(paths))


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_sampled_tokens_have_the_filtered_distribution(settings):
    logits = torch.tensor([2.0, 1.5, 1.0, 0.2, 0.0, -0.5, -1.0, -3.0], dtype=torch.float64)
    want = expected(logits, **settings)
    draws = 20_000
    filtered = Sampling(**settings).filter((logits / settings["temperature"]).expand(draws, -1))
    chosen = (filtered + gumbel(11, range(draws), 8)).argmax(1)
    check_counts(torch.bincount(chosen, minlength=8), want)


def check_counts(counts: torch.Tensor, want: torch.Tensor) -> None:
    """Chi-square, far beyond the 99.9 % point."""
    draws = int(counts.sum())
    assert counts[want == 0].sum() == 0
    kept = want > 0
    chi_square = ((counts - draws * want)[kept] ** 2 / (draws * want[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 6


def expected(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution by its words, one token at a time."""
    probabilities = (logits / temperature).softmax(0)
    order = probabilities.argsort(descending=True).tolist()
    kept = order[:top_k] if top_k else order
    total = sum(probabilities[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        if reached < top_p:
            nucleus.append(i)
        reached += probabilities[i] / total
    best = probabilities[order[0]]
    result = torch.zeros_like(probabilities)
    for i in nucleus:
        if probabilities[i] >= min_p * best:
            result[i] = probabilities[i]
    return result / result.sum()


def test_temperature_zero_is_the_best_token():
    logits = torch.randn(5, 40)
    paths = [()] * 5
    assert torch.equal(scores(Sampling(seed=3), logits, paths=paths).argmax(1), logits.argmax(1))


@pytest.mark.parametrize("temperature", [1e-4, 1e-300, 5e-324])
def test_a_tiny_temperature_is_almost_zero(temperature):
    logits = torch.randn(5, 40)
    sampling = Sampling(temperature=temperature, seed=3)
    found = scores(sampling, logits, paths=[()] * 5)
    assert torch.equal(found.argmax(1), logits.argmax(1))


def test_a_nucleus_wider_than_its_prefix(monkeypatch):
    """Sorted whole or in part, the same tokens are kept."""
    logits = torch.randn(3, 300)
    whole = Sampling(temperature=1.0, top_p=0.9).filter(logits)
    monkeypatch.setattr("linearized.speculative.sampling.PREFIXES", (5, 9))
    assert torch.equal(Sampling(temperature=1.0, top_p=0.9).filter(logits), whole)
    for row, kept in zip(logits, whole.isfinite(), strict=True):
        assert torch.equal(expected(row.double(), 1.0, top_p=0.9) > 0, kept)


def penalized(logits, tokens, num_prompt, sampling):
    """By the words of each parameter, one token at a time."""
    out = logits.clone()
    text = tokens[num_prompt:]
    for token, bias in sampling.logit_bias:
        out[token] += bias
    if len(text) < sampling.min_tokens:
        for token in sampling.stop_ids:
            out[token] = -math.inf
    for token in set(tokens):
        penalty = sampling.repetition_penalty
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token in set(text):
        out[token] -= sampling.presence_penalty
        out[token] -= sampling.frequency_penalty * text.count(token)
    return out


@given(st.data())
def test_each_node_is_penalized_along_its_own_path(data):
    vocab = 7
    sampling = Sampling(
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3, 0.8])),
        presence_penalty=data.draw(st.sampled_from([0.0, 0.4, -1.0])),
        frequency_penalty=data.draw(st.sampled_from([0.0, 0.7])),
        logit_bias=data.draw(st.dictionaries(st.integers(0, 6), st.floats(-3, 3), max_size=3)),
        min_tokens=data.draw(st.integers(0, 6)),
        stop_ids=data.draw(st.frozensets(st.integers(0, 6), max_size=2)),
    )
    token = st.integers(0, vocab - 1)
    prompt = data.draw(st.lists(token, min_size=1, max_size=5))
    sampler = Sampler(sampling, num_prompt=len(prompt))
    text = list(prompt)
    for _ in range(3):  # it follows the text as it grows
        text += data.draw(st.lists(token, max_size=3))
        size = data.draw(st.integers(0, 6))
        tree = TokenTree(
            tuple(data.draw(token) for _ in range(size)),
            tuple(data.draw(st.integers(-1, n - 1)) for n in range(size)),
        )
        logits = torch.randn(size + 1, vocab, dtype=torch.float64)
        paths = [(), *tree.paths()]
        found = sampler.scores(logits, text, paths)
        for row, path, got in zip(logits, paths, found, strict=True):
            want = penalized(row, [*text, *path], len(prompt), sampling)
            torch.testing.assert_close(got, want)


def test_noise_is_worked_out_once_for_draft_and_target(monkeypatch):
    """Whichever level of a tree asks first."""
    rows = []

    def counted(keys, *args, **settings):
        rows.extend(position for _, _, position in keys)
        return gumbel_of(keys, *args, **settings)

    monkeypatch.setattr("linearized.speculative.sampling.gumbel_of", counted)
    sampler = Sampler(Sampling(temperature=1.0), num_prompt=1)
    text = [1]
    while len(text) < 60:
        for level in range(6):
            sampler.scores(torch.zeros(1, 5), text, [(0,) * level])
        sampler.scores(torch.zeros(3, 5), text, [(), (1,), (1, 2)])
        text += [1, 2, 3]
    assert rows == list(range(1, rows[-1] + 1))
    assert len(sampler._noise[torch.device("cpu")]) < 20


def test_once_min_tokens_are_there_scores_are_the_logits():
    sampler = Sampler(Sampling(min_tokens=2, stop_ids=frozenset({0})), num_prompt=1)
    logits = torch.randn(2, 5)
    assert sampler.scores(logits, [1, 2, 3], [(), (4,)]) is logits
    early = sampler.scores(logits, [1, 2], [(), (4,)])
    assert early[0, 0] == -math.inf and torch.equal(early[1], logits[1])


def test_a_draft_of_another_type_changes_no_score():
    """Draft and target share a sampler; 256 and one is 256 in bfloat16."""
    sampling = Sampling(frequency_penalty=0.3, repetition_penalty=1.1, logit_bias={2: 0.1})
    logits, tokens = torch.randn(2, 7), [1] * 600
    paths = [(), (1,)]
    want = Sampler(sampling, num_prompt=1).scores(logits, tokens, paths)
    shared = Sampler(sampling, num_prompt=1)
    rough = shared.scores(logits.bfloat16(), tokens, paths)
    assert torch.equal(shared.scores(logits, tokens, paths), want)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, want, atol=0.1, rtol=0)


def test_noise_depends_on_seed_choice_and_position_alone():
    logits = torch.zeros(2, 50)
    sampling = Sampling(temperature=1.0, seed=5)
    found = scores(sampling, logits, tokens=range(9), paths=[(), (3, 4)])
    longer = scores(sampling, logits, tokens=range(11), paths=[(), (1,)])
    assert torch.equal(found[1], longer[0]) and not torch.equal(found[0], found[1])
    other = Sampling(temperature=1.0, seed=5, choice=1)
    assert not torch.isclose(scores(other, logits, paths=[(), ()]), found).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_best_token_or_none(dtype):
    scores = torch.tensor([[1.0, 3, 3], [math.nan, 1, 2], [2, math.inf, 0], [-math.inf] * 3])
    for rows, want in (
        (scores, [1, NO_TOKEN, NO_TOKEN, NO_TOKEN]),
        (scores[None, :1], [[1]]),
        (torch.tensor([[-math.inf, -5, -math.inf]]), [1]),
    ):
        assert pick(rows.to(dtype)).tolist() == want


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"temperature": -1}, "temperature.*-1"),
        ({"temperature": float("nan")}, "temperature.*nan"),
        ({"top_p": 0}, "top_p.*0"),
        ({"top_p": 1.2}, "top_p.*1.2"),
        ({"top_k": -4}, "top_k.*-4"),
        ({"min_p": 2}, "min_p.*2"),
        ({"repetition_penalty": 0}, "repetition_penalty.*0"),
        ({"presence_penalty": float("inf")}, "presence_penalty.*inf"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty.*nan"),
        ({"min_tokens": -1}, "min_tokens.*-1"),
        ({"choice": -1}, "choice.*-1"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias.*nan"),
        ({"logit_bias": {"a": 1}}, "logit_bias.*'a'"),
        ({"logit_bias": 5}, "logit_bias.*5"),
        ({"typical": 1.5}, "typical.*1.5"),
        ({"typical": 0.1}, "needs a temperature"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
        ({"min_tokens": 2.5}, "min_tokens must be a whole number, got 2.5"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"presence_penalty": "a"}, "presence_penalty must be a number, got 'a'"),
        ({"stop_ids": 5}, "stop_ids must be token ids, got 5"),
        ({"stop_ids": ["a"]}, "stop_ids must be token ids, got \\['a'\\]"),
    ],
)
def test_settings_out_of_range_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**settings)

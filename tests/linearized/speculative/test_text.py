"""One text: which drafted tokens it takes, where it ends, and what it says about them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tokenizers import decoders

from linearized.errors import ConfigError, ModelError
from linearized.speculative import Engine, Sampling, Text, TokenTree
from linearized.speculative.decoder import Decoder

TREE = TokenTree(tokens=(0, 1, 2, 1, 3), parents=(-1, -1, 1, 2, 0))
"""1 2 1 is its longest path."""


def logits(places: int, size: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(places, size, generator=torch.Generator().manual_seed(seed)) * 2


def text(sampling: Sampling = Sampling(), **settings) -> Text:  # noqa: B008
    return Text([4, 0], sampling=sampling, **{"max_new_tokens": 20, **settings})


def takes(row: torch.Tensor, token: int, threshold: float, temperature: float) -> bool:
    """Medusa's rule, written out."""
    p = (row.double() / temperature).softmax(0).tolist()
    entropy = -sum(x * math.log(x) for x in p)
    return p[token] > min(threshold, math.sqrt(threshold) * math.exp(-entropy))


@pytest.mark.parametrize("seed", range(30))
def test_typical_acceptance_is_medusas(seed):
    sampling = Sampling(temperature=0.7, typical=0.3, seed=seed)
    given = logits(1 + len(TREE), seed=seed)

    def sampled(behind: int, depth: int) -> int:
        """As ever, there."""
        alone = Text([4] * (2 + depth), sampling=sampling, max_new_tokens=1)
        return alone.choose(given[behind : behind + 1], TokenTree.empty)[1][0]

    accepted = [
        takes(given[parent + 1], token, 0.3, 0.7) or sampled(parent + 1, depth - 1) == token
        for token, parent, depth in zip(TREE.tokens, TREE.parents, TREE.depths, strict=True)
    ]
    path, new = text(sampling).choose(given, TREE)
    assert path == TREE.deepest(accepted)
    assert new[:-1] == [TREE.tokens[node] for node in path]
    assert new[-1] == sampled(path[-1] + 1 if path else 0, len(path))


@pytest.mark.parametrize("typical", [0.05, 0.3, 1.0])
def test_typical_acceptance_takes_more_than_exact_sampling(typical):
    """Never less of a tree, whatever the threshold."""
    more = 0
    for seed in range(50):
        given = logits(1 + len(TREE), seed=seed)
        exact, lossy = (
            len(text(Sampling(temperature=1.0, typical=one, seed=seed)).choose(given, TREE)[0])
            for one in (0.0, typical)
        )
        assert lossy >= exact
        more += lossy > exact
    assert more


def test_log_probabilities_are_the_models_own():
    """Whatever temperature and bias say; behind the root first, then behind each accepted node."""
    given = logits(1 + len(TREE))
    one = text(Sampling(temperature=2.0, logit_bias={1: 5.0}), logprobs=2)
    piece = one.take([1, 2, 3], TREE, [1, 2], given)
    log_p = given.double().log_softmax(1)
    for place, token, said in zip((0, 2, 3), piece.tokens, piece.logprobs, strict=True):
        assert said.logprob == pytest.approx(float(log_p[place, token]))
        best = log_p[place].topk(2)
        assert [token for token, _ in said.top] == best.indices.tolist()
        assert [value for _, value in said.top] == pytest.approx(best.values.tolist())


def test_a_text_ends_where_it_must():
    given = logits(1 + len(TREE))
    short = text(max_new_tokens=2)
    piece = short.take([1, 2, 3], TREE, [1, 2], given)
    assert (piece.tokens, piece.finished, short.finished) == ((1, 2), "length", "length")
    assert short.accepted.total() == 2 and short.drafted == {1: 2, 2: 2, 3: 1}
    stopping = text(Sampling(stop_ids=frozenset({2})))
    piece = stopping.take([1, 2, 3], TREE, [1, 2], given)
    assert (piece.tokens, piece.finished, stopping.new_tokens) == ((1, 2), "stop", [1, 2])
    going_on = text()
    assert going_on.take([1], TREE, [], given).finished is None and going_on.finished is None


def letters(tokens: list[int]) -> str:
    return "".join("abcde"[token] for token in tokens)


def test_a_text_goes_on_where_another_stopped():
    """What is there counts: towards stop strings, min_tokens, the length."""
    empty, given = TokenTree.empty, logits(1)
    for min_tokens, finished in ((0, "stop"), (1, "stop"), (2, None)):
        one = Text(
            [0, 1, 2], num_prompt=1, sampling=Sampling(min_tokens=min_tokens), max_new_tokens=9,
            stop=["cd"], decode=letters,
        )  # fmt: skip
        piece = one.take([3], empty, [], given)
        assert piece.finished == finished, min_tokens
    whole = Text([0], sampling=Sampling(), max_new_tokens=9, stop=["cd"], decode=letters)
    said = [whole.take([token], empty, [], given).text for token in (1, 2, 3)]
    assert said == ["b", "", ""] and whole.finished == "stop"
    rest = {"num_prompt": 1, "sampling": Sampling(stop_ids={3})}
    assert Text([0, 1, 3], max_new_tokens=9, **rest).finished == "stop"
    assert Text([3], max_new_tokens=9, sampling=Sampling(stop_ids={3})).finished is None
    assert Text([0, 1, 2], max_new_tokens=2, **rest).finished == "length"
    known = Text([0, 2, 3], **{**rest, "sampling": Sampling()}, max_new_tokens=9, stop=["cd"],
                 decode=letters)  # fmt: skip
    assert known.finished == "stop"


def test_a_text_that_cannot_be_decoded_ends():
    def decode(tokens: list[int]) -> str:
        if 3 in tokens:
            raise ValueError("no such letter")
        return letters(tokens)

    one = text(decode=decode)
    assert one.take([1], TokenTree.empty, [], logits(1)).text == "b"
    piece = one.take([2, 3], TREE, [1], logits(1 + len(TREE)))
    assert (piece.tokens, piece.finished, one.finished) == ((), "error", "error")
    assert one.tokens == [4, 0, 1] and "no such letter" in str(one.error)


def test_stop_strings_are_not_empty():
    with pytest.raises(ConfigError, match="must not be empty"):
        text(stop=["a", ""], decode=letters)


NAN, INF = float("nan"), float("inf")
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7, seed=3),
    Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.05),
    Sampling(temperature=0.7, typical=0.3),
    Sampling(frequency_penalty=0.5, repetition_penalty=1.2),
    Sampling(logit_bias={1: 2.0}, min_tokens=9, stop_ids={3}),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("value, kind", [(NAN, "NaN"), (INF, "infinite"), (-INF, "infinite")])
def test_logits_that_are_no_numbers_end_a_text(sampling, value, kind):
    """After the tokens that were chosen from numbers, drafted or not."""
    given = logits(1 + len(TREE))
    one = text(sampling, decode=letters, stop=["zz"])
    one.take(*_chosen(one, given[:1], TokenTree.empty), given[:1])
    broken = given[:1].clone()
    broken[:, 2 if value != -INF else slice(None)] = value
    piece = one.take(*_chosen(one, broken, TokenTree.empty), broken)
    assert (piece.tokens, piece.finished, one.finished) == ((), "error", "error")
    assert isinstance(one.error, ModelError)
    assert f"the model gave {kind} logits for position 3 of the text" in str(one.error)


def _chosen(one: Text, given: torch.Tensor, tree: TokenTree):
    path, new = one.choose(given, tree)
    return new, tree, path


@pytest.mark.parametrize("sampling", SAMPLINGS[:3])
def test_only_what_the_text_needs_must_be_numbers(sampling):
    given = logits(4)
    first = text(sampling).choose(given[:1], TokenTree.empty)[1][0]
    tree = TokenTree((first, (first + 1) % 5), (-1, -1))
    given[2:] = NAN  # behind the wrong guess
    one = text(sampling, decode=letters, logprobs=1)
    piece = one.take(*_chosen(one, given[:3], tree), given[:3])
    assert len(piece.tokens) == 2 and one.error is None
    given[1] = NAN  # behind the right one
    one = text(sampling, decode=letters, logprobs=1)
    piece = one.take(*_chosen(one, given[:3], tree), given[:3])
    assert (piece.tokens, piece.finished, len(piece.logprobs)) == ((first,), "error", 1)
    assert "position 3" in str(one.error) and one.new_tokens == [first]
    ended = text(sampling, max_new_tokens=1)
    assert ended.take(*_chosen(ended, given[:3], tree), given[:3]).finished == "length"
    stopped = text(replace(sampling, stop_ids={first}))
    assert stopped.take(*_chosen(stopped, given[:3], tree), given[:3]).finished == "stop"


def test_minus_infinity_excludes_a_token():
    given = logits(1)
    given[0, :4] = -INF
    for sampling in SAMPLINGS:
        assert text(sampling).choose(given, TokenTree.empty)[1] == [4]


def test_settings_that_leave_no_token():
    one = text(Sampling(min_tokens=3, stop_ids=set(range(5))))
    one.take(*_chosen(one, logits(1), TokenTree.empty), logits(1))
    with pytest.raises(ModelError, match="settings leave no token.* position 2 .*min_tokens"):
        raise one.error


def test_what_was_held_back_comes_before_an_error():
    def decode(tokens: list[int]) -> str:
        return bytes(0xC3 if token == 1 else 97 for token in tokens).decode(errors="replace")

    one = text(decode=decode)
    assert one.take([2, 1], TREE, [1], logits(6)).text == "a"
    piece = one.take([-1], TokenTree.empty, [], torch.full((1, 5), NAN))
    assert (piece.text, piece.finished) == ("\ufffd", "error")


def test_others_go_on_beside_a_text_without_numbers(linear):
    """Also in its place."""
    model = linear()
    embedding = model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(embedding.detach().clone())
    with torch.no_grad():
        embedding[7] = NAN
        model.lm_head.weight[7] = 0  # nobody says it

    def add(engine: Engine, prompt: list[int]) -> Text:
        one = Text(prompt, sampling=Sampling(), max_new_tokens=12)
        engine.add(one)
        return one

    def run(engine: Engine, *prompts: list[int]) -> list[Text]:
        texts = [add(engine, prompt) for prompt in prompts]
        while engine.busy:
            engine.step()
        return texts

    good = [[1, 2, 3], [4, 5], [8, 9, 10, 11], [2, 2]]
    want = [run(Engine(model, rows=1), prompt)[0].new_tokens for prompt in good]
    assert all(len(one) == 12 for one in want)
    engine = Engine(model, rows=2)
    first, broken, *others = run(engine, good[0], [6, 7, 6], *good[1:])
    assert [one.new_tokens for one in (first, *others)] == want
    assert (broken.finished, broken.new_tokens) == ("error", [])
    assert "NaN logits for position 3" in str(broken.error)


def test_a_piece_says_how_many_of_its_tokens_were_drafted():
    one = text(max_new_tokens=6)
    assert one.take([3], TokenTree.empty, [], logits(1)).accepted == 0
    assert one.take([1, 2, 4], TREE, [1, 2], logits(6)).accepted == 2
    last = one.take([1, 2, 1, 4], TREE, [1, 2, 3], logits(6))
    assert last.tokens == (1, 2) and last.accepted == 2, "two more were allowed"
    stops = text(Sampling(stop_ids=frozenset([2])))
    assert stops.take([1, 2, 1, 4], TREE, [1, 2, 3], logits(6)).accepted == 2


def test_a_stop_string_that_names_a_special_token():
    """The last token may be what makes it certain that one is there."""
    decode = Decoder(lambda ids: letters([i for i in ids if i != 3]), hidden={3: "<end>"})
    one = text(decode=decode, stop=["<end>"])
    assert one.take([1, 3, 2], TREE, [1, 2], logits(6)).text == "b"
    assert (one.finished, one.new_tokens) == ("stop", [1, 3])
    again = Text([4, 1, 3], num_prompt=1, sampling=Sampling(), max_new_tokens=9, decode=decode,
                 stop=["<end>"])  # fmt: skip
    assert again.finished == "stop"


def test_a_stop_string_that_is_certain_only_at_the_end():
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    decode = Decoder(lambda ids: decoder.decode([names[i] for i in ids]), run=[0xC3, 0xA9])
    for max_new_tokens, tokens in ((2, [256, 10]), (9, [256, 10, 256])):
        one = Text([256], sampling=Sampling(), max_new_tokens=max_new_tokens, stop=["\n"],
                   decode=decode)  # fmt: skip
        said = [one.take([token], TokenTree.empty, [], logits(1)).text for token in tokens]
        assert ("".join(said), one.finished, one.new_tokens) == ("a", "stop", tokens)

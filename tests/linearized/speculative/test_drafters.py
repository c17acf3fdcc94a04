"""Medusa's heads and skipped layers: the target drafts for itself."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import linearized
from linearized.errors import ConfigError, ModelError
from linearized.medusa import MedusaHeads, output_matrix
from linearized.models import shortened, sketch
from linearized.speculative import (
    Ask,
    Engine,
    Foresight,
    LayersDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
    Sampling,
    Text,
    TokenTree,
)
from linearized.speculative.pool import Pool
from linearized.speculative.skipping import CHAIN, search, speed

PROMPT = [3, 14, 15, 9, 2, 6, 5, 3, 5, 8]
SAMPLINGS = [Sampling(), Sampling(temperature=0.9, top_p=0.95, seed=3)]


def texts(sampling: Sampling) -> list[Text]:
    return [Text((PROMPT * 3)[:n], sampling=sampling, max_new_tokens=30) for n in (1, 7, 8, 20)]


def said(model, sampling, drafters=(), rows=3, asked: list[Text] | None = None) -> list[list[int]]:
    engine = Engine(model, drafters=drafters, rows=rows)
    mine = texts(sampling)
    if asked is not None:
        asked += mine
    for text in mine:
        engine.add(text)
    while engine.busy:
        engine.step()
    return [text.new_tokens for text in mine]


def random_heads(model, count: int = 3) -> MedusaHeads:
    heads = MedusaHeads.on(model, count, linearized.fingerprint(model))
    for block in heads.blocks:
        torch.nn.init.normal_(block.weight, std=0.2)
    return heads.to(model.dtype).eval()


class Reads(LayersDrafter):
    """The target itself, but it wants to know what Medusa does."""

    needs_hidden = True


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_texts_are_those_of_plain_decoding(linear, sampling):
    model = linear(group=8, taps=5, layers=3)
    plain = said(model, sampling)
    for drafter in (
        MedusaDrafter(model, random_heads(model)),
        LayersDrafter([0]),
        LayersDrafter([2, 0], depth=3, width=2),
        LayersDrafter([0, 1, 2]),
    ):
        assert said(model, sampling, [drafter]) == plain
    several = [MedusaDrafter(model, random_heads(model)), LayersDrafter([1]), LayersDrafter([0, 2])]
    assert said(model, sampling, several, rows=2) == plain


def test_a_draft_has_rows_for_all_texts_of_its_target(linear):
    drafter = ModelDrafter(linear(layers=1, seed=3))
    for rows in (5, 2):
        drafter.join(linear(), Pool(linear(), rows))
        assert drafter._pool.num_rows == 5


def padded(linear, model, more: int):
    """The same, with more rows in its vocabulary. It likes them best."""
    rows = model.config.vocab_size
    wider = linear(group=8, taps=5, vocab=rows + more)
    weights = {
        name: torch.cat([x, 9 * x[:more]]) if len(x) == rows else x
        for name, x in model.state_dict().items()
    }
    wider.load_state_dict(weights)
    return wider


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_a_padded_vocabulary_of_the_draft_or_of_the_target(linear, sampling):
    model = linear(group=8, taps=5)
    shared = model.config.vocab_size
    wide, wider = (padded(linear, model, more) for more in (20, 30))
    for target, draft in ((model, wide), (wide, model), (wide, wider), (wider, wide)):
        plain = said(target, sampling)
        asked: list[Text] = []
        drafter = ModelDrafter(draft, num_tokens=shared, depth=3, floor=0.0)
        assert said(target, sampling, [drafter], asked=asked) == plain
        if target is model:  # its guesses are those of tokens that both have
            assert sum(sum(text.accepted.values()) for text in asked) > 2 / 3 * 30 * len(plain)
    unknown = Text([*PROMPT, shared + 3], sampling=sampling, max_new_tokens=40)
    assert not ModelDrafter(model, num_tokens=shared).serves(unknown)
    biased = Sampling(logit_bias={shared + 1: -9.0})
    named = Text(PROMPT, sampling=biased, max_new_tokens=40)
    assert not ModelDrafter(model, num_tokens=shared).serves(named)
    with pytest.raises(ConfigError, match="num_tokens is 99, more than the draft's vocabulary"):
        Engine(model, drafters=[ModelDrafter(wider, num_tokens=99)])


def test_hybrids_skip_layers_of_both_kinds(llama):
    model = llama(layers=4)
    config = linearized.LinearConfig(attention="grouped", group=8, layers=(1, 3))
    linearized.linearize(model, config)
    plain = said(model, Sampling())
    for layers in ([0, 1], [1, 3], [0, 2], [0, 1, 2, 3]):
        assert said(model, Sampling(), [LayersDrafter(layers)]) == plain


def test_all_layers_are_always_right(linear):
    model = linear(group=8, layers=3)
    for sampling in SAMPLINGS:
        engine = Engine(model, drafters=[LayersDrafter([0, 1, 2], depth=4, width=1, floor=0)])
        text = Text(PROMPT, sampling=sampling, max_new_tokens=40)
        engine.add(text)
        while engine.busy:
            engine.step()
        assert text.rounds == 8 and text.accepted.total() == 32


def test_a_shortened_model_is_the_model_without_those_layers(linear):
    model = linear(group=8, layers=3)
    tokens = torch.randint(1, 50, (2, 20))
    part = shortened(model, [0, 2])
    assert part is shortened(model, (0, 2))
    kept = model.model.layers
    model.model.layers = torch.nn.ModuleList([kept[0], kept[2]])
    model.config.num_hidden_layers = 2
    want = model(input_ids=tokens, use_cache=False).logits
    model.model.layers, model.config.num_hidden_layers = kept, 3
    assert torch.equal(part(input_ids=tokens, use_cache=False).logits, want)
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in part.parameters()} < own
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert not torch.equal(part(input_ids=tokens, use_cache=False).logits, want)


def test_a_sketch_reads_the_whole_models_state(linear):
    """From an empty state it is the shortened model; later it is not, and leaves the state."""
    model = linear(group=8, layers=3)
    tokens = torch.randint(1, 50, (2, 6))
    parents = torch.tensor([[-1, 0, 0, 1, 3, 4], [-1, -1, 0, 1, 2, 3]])
    state = linearized.new_state(model, 2)
    part = linearized.models.shortened(model, [0, 2])
    alone = linearized.new_state(model, 2)
    found = sketch(model, tokens, parents, state, layers=[0, 2])
    for row in range(2):
        for node in range(6):
            path = [node]
            while parents[row, path[0]] >= 0:
                path.insert(0, int(parents[row, path[0]]))
            want = part(input_ids=tokens[row, path][None], use_cache=False).logits[0, -1]
            torch.testing.assert_close(found[row, node], want)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            state.layers.tensors().values(), alone.layers.tensors().values(), strict=True
        )
    )


def test_layers_that_are_not_there(linear, tmp_path):
    model = linear(layers=2)
    for layers in ([2], [], [-1]):
        with pytest.raises(ModelError, match="has layers 0 to 1"):
            Engine(model, drafters=[LayersDrafter(layers)])
    with pytest.raises(ModelError, match="run jobs.layers first"):
        LayersDrafter.from_pretrained(tmp_path)
    (tmp_path / "layers.json").write_text(json.dumps({"format": "other", "layers": [1]}))
    with pytest.raises(ModelError, match="format 'other'"):
        LayersDrafter.from_pretrained(tmp_path)


def test_the_search_leaves_out_what_does_nothing(linear):
    """Layers 1 and 3 add nothing to the residual stream: without them all stays as it is."""
    model = linear(layers=4, group=8, dtype=torch.float32)
    with torch.no_grad():
        for idle in (1, 3):
            model.model.layers[idle].self_attn.o_proj.weight.zero_()
            model.model.layers[idle].mlp.down_proj.weight.zero_()
    seen = []
    found = search(model, torch.randint(1, 60, (4, 48)), progress=seen.append)
    assert seen[1].layers == (0, 2) and seen[1].agreement == 1.0
    assert set(found.layers) <= {0, 2} and found.speed == max(one.speed for one in seen)


def test_speed_is_that_of_the_best_chain():
    assert speed(0.0, 0.1) == 1.0
    assert speed(1.0, 0.5) == pytest.approx((1 + CHAIN) / (1 + CHAIN * 0.5))
    assert speed(0.5, 0.1) == pytest.approx(
        max((2 - 0.5**n) / (1 + 0.1 * n) for n in range(CHAIN + 1))
    )


def test_heads_survive_saving_and_know_their_target(linear, tmp_path):
    model = linear(dtype=torch.float32)
    heads = random_heads(model)
    heads.accuracies = [[0.5, 0.2], [0.3, 0.1], [0.2, 0.1]]
    heads.save_pretrained(tmp_path)
    loaded = MedusaHeads.from_pretrained(tmp_path)
    hidden = torch.randn(2, 5, model.config.hidden_size)
    matrix = output_matrix(model)
    for got, want in zip(loaded(hidden, matrix), heads(hidden, matrix), strict=True):
        assert torch.equal(got, want)
    assert loaded.accuracies == heads.accuracies
    with pytest.raises(ModelError, match="were trained on model"):
        MedusaDrafter(linear(dtype=torch.float32, seed=5), loaded)
    (tmp_path / "medusa.json").write_text("{}")
    with pytest.raises(ModelError, match="not of format"):
        MedusaHeads.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load"):
        MedusaHeads.from_pretrained(tmp_path / "nowhere")


def test_heads_keep_their_type_on_a_target_of_another(linear):
    model = linear(dtype=torch.float32)
    heads = random_heads(model)
    assert MedusaDrafter(model, heads).heads is heads
    double = linear(dtype=torch.float64)
    heads.target = linearized.fingerprint(double)
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    drafter = MedusaDrafter(double, heads)
    assert all(tensor.dtype == torch.float64 for tensor in drafter.heads.parameters())
    assert drafter.heads.accuracies == heads.accuracies
    for name, tensor in heads.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])


def test_untrained_heads_guess_what_the_target_does(linear):
    model = linear(dtype=torch.float32)
    heads = MedusaHeads.on(model, 2, linearized.fingerprint(model))
    output = model(input_ids=torch.tensor([PROMPT]), use_cache=False, output_hidden_states=True)
    for logits in heads(output.hidden_states[-1], output_matrix(model)):
        torch.testing.assert_close(logits, output.logits)


def test_accuracies_count_what_the_target_says(linear):
    """Against a loop over places."""
    model = linear(dtype=torch.float32)
    heads = random_heads(model, 2)
    tokens = torch.randint(1, 50, (2, 12))
    found = heads.right(model, tokens)
    output = model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    guesses = heads(output.hidden_states[-1], output_matrix(model))
    for head in range(2):
        assert found[head, -1] == 2 * (12 - 1 - head)
        for rank in range(3):
            count = 0
            for row in range(2):
                for place in range(12 - 1 - head):
                    guess = guesses[head][row, place].argsort(descending=True)[rank]
                    count += int(guess == output.logits[row, place + 1 + head].argmax())
            assert found[head, rank] == count


def test_medusa_waits_for_a_hidden_state(linear):
    model = linear()
    drafter = MedusaDrafter(model, random_heads(model))
    text = Text(PROMPT, sampling=Sampling(), max_new_tokens=9)
    assert len(drafter.propose([Ask(text, 3, 8)])[0]) == 0
    engine = Engine(model, drafters=[drafter])
    engine.add(text)
    engine.step()
    tree = drafter.propose([Ask(text, 3, 8)])[0]
    assert len(tree) == 8 and max(tree.depths) <= 3
    # The state is that from which the last token was chosen.
    whole = model(input_ids=torch.tensor([text.tokens]), use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(text.hidden, whole.hidden_states[-1][0, -2])


def test_the_hidden_state_is_that_of_the_last_accepted_node(linear):
    model = linear()
    engine = Engine(model, drafters=[Reads([0, 1])])
    text = Text(PROMPT, sampling=Sampling(), max_new_tokens=12)
    engine.add(text)
    while text.num_left > 3:
        engine.step()
        ids = torch.tensor([text.tokens])
        whole = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(text.hidden, whole.hidden_states[-1][0, -2])
        assert text.hidden._base is None  # it keeps no other node's alive
    assert text.accepted.total() > 4
    while engine.busy:
        engine.step()
    assert text.hidden is None


def test_a_draft_that_failed_while_reading_goes_on_where_it_was(linear, monkeypatch):
    model = linear(group=8)
    drafter = ModelDrafter(model, depth=4, width=1, floor=0.0)
    text = Text(list(range(40)), sampling=Sampling(), max_new_tokens=30)
    whole = ModelDrafter(model, depth=4, width=1, floor=0.0).propose([Ask(text, 4, 8)])
    calls = itertools.count()

    def extend(*args, **settings):
        if next(calls) == 1:
            raise MemoryError
        return linearized.extend(*args, **settings)

    monkeypatch.setattr("linearized.speculative.drafters.model.CHUNK", 8)
    monkeypatch.setattr("linearized.speculative.drafters.model.extend", extend)
    with pytest.raises(MemoryError):
        drafter.propose([Ask(text, 4, 8)])
    (tree,) = drafter.propose([Ask(text, 4, 8)])
    assert tree.tokens == whole[0].tokens


def test_a_text_that_ends_takes_nothing_from_the_others(linear):
    """What the draft has of their accepted tokens is committed all the same."""
    model = linear(group=8)
    drafter = ModelDrafter(model, depth=4, width=1, floor=0.0)
    engine = Engine(model, drafters=[drafter], rows=3)
    lengths = (5, 30, 30)
    texts = [Text(PROMPT, sampling=Sampling(), max_new_tokens=n) for n in lengths]
    for text in texts:
        engine.add(text)
    while texts[0].finished is None:
        engine.step()
    for text in texts[1:]:
        assert drafter._read[text] >= len(text.tokens) - 2


@torch.no_grad()
def check_scores(model, it: Foresight) -> None:
    """Each step is as probable as the model finds it when it reads all tokens at once, and no path
    is likelier right than the one above it."""
    tree = it.tree()
    for node, path in enumerate(tree.paths()):
        ids = torch.tensor([[*it.text.tokens, *path]])
        steps = model(input_ids=ids, use_cache=False).logits[0].softmax(1)
        assert it._steps[node] == pytest.approx(float(steps[-2, path[-1]]), rel=1e-3)
        above = tree.scores[tree.parents[node]] if tree.parents[node] >= 0 else 1.0
        assert 0 < tree.scores[node] <= above


def test_looking_ahead_while_texts_go_on(linear):
    model = linear(group=8)
    drafter = ModelDrafter(model, width=3)
    lengths = (3, 30, 11)
    mine = [
        Foresight(Text((PROMPT * 4)[:n], sampling=Sampling(), max_new_tokens=90), 40)
        for n in lengths
    ]
    foreseen = [0, 0]
    for turn in range(12):
        for look in range(1 + turn % 4):
            part = mine if look % 2 else mine[turn % 2 :]  # not always all of them
            drafter.foresee(part, [2 + turn] * len(part))
        for number, it in enumerate(mine):
            check_scores(model, it)
            paths = it.tree().paths()
            path = paths[(turn + number) % len(paths)] if paths and number != turn % 3 else (1, 2)
            it.text.tokens += path
            right = it.go_on()
            foreseen[right] += 1
            assert it.length == len(it.text.tokens)
            check_scores(model, it)
    assert min(foreseen) > 5
    drafter.forget(mine[0].text)
    drafter.foresee(mine[1:], [30, 30])
    check_scores(model, mine[1])


def test_what_is_foreseen_is_what_would_be_drafted(linear):
    """A chain of first guesses: step by step, as in one go."""
    model = linear(group=8)
    text = Text(list(range(40)), sampling=Sampling(), max_new_tokens=30)
    (whole,) = ModelDrafter(model, width=1, floor=0.0).propose([Ask(text, 6, 8)])
    drafter, it = ModelDrafter(model, width=1), Foresight(text, 40)
    while not it.seen(6):
        drafter.foresee([it], [6])
    found = it.tree().tokens
    assert found and found == whole.tokens[: len(found)]


def test_a_long_text_is_read_piece_by_piece(linear, monkeypatch):
    """So that others need not wait until all of it is read."""
    monkeypatch.setattr("linearized.speculative.drafters.model.GLANCE", 16)
    model = linear(group=8)
    drafter = ModelDrafter(model, width=2)
    long, short = (
        Foresight(Text([7] * n, sampling=Sampling(), max_new_tokens=9), 40) for n in (60, 4)
    )
    for looks in range(1, 4):
        drafter.foresee([long, short], [9, 9])
        assert drafter._read[long.text] == min(16 * looks, 59)
        assert max(short.tree().depths) == looks and not long.tree()
    while not long.tree():
        drafter.foresee([long, short], [9, 9])
    check_scores(model, long)


def test_a_table_of_positions_ends_looking_ahead(linear, monkeypatch):
    drafter = ModelDrafter(linear(), width=2)
    monkeypatch.setattr(drafter, "_longest", 12)
    it = Foresight(Text([7] * 10, sampling=Sampling(), max_new_tokens=9), 40)
    while not it.seen(9):
        drafter.foresee([it], [9])
    assert max(it.tree().depths) == 2  # what was foreseen within it stays
    it.text.tokens += [49, 49]
    it.go_on()
    drafter.foresee([it], [9])
    assert not it.tree() and it.seen(9)


def test_drafters_without_a_way_to_look_ahead_draft_at_once():
    it = Foresight(Text([1, 2, 3, 4, 1, 2], sampling=Sampling(), max_new_tokens=9), 40)
    drafter = NgramDrafter(depth=8)
    drafter.foresee([it], [2])
    assert it.tree() == TokenTree((3, 4), (-1, 0), (1.0, 1.0)) and it.seen(2)
    it.text.tokens += [3]
    it.go_on()
    drafter.foresee([it], [3])
    assert it.tree().tokens == (4, 1, 2)


def test_a_drafter_that_can_guess_nothing_is_refused(linear):
    model = linear()
    for make, words in (
        (lambda: ModelDrafter(model, depth=0), "depth must be at least 1, and whole, got 0"),
        (lambda: ModelDrafter(model, width=1.5), "width must be .* got 1.5"),
        (lambda: LayersDrafter([0], width=0), "width must be .* got 0"),
        (lambda: NgramDrafter(shortest=0), "shortest must be .* got 0"),
        (lambda: NgramDrafter(longest=1, shortest=2), "longest must be at least shortest=2, got 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            make()


def test_the_search_needs_texts_of_some_length(linear):
    with pytest.raises(ConfigError, match=r"at least 16 tokens, got \[4, 15\]"):
        search(linear(), torch.ones(4, 15, dtype=torch.int64))


def test_drafters_alike_have_one_identity(linear, llama):
    model, draft = linear(), llama(seed=3).double()
    heads = random_heads(model)
    made = [
        lambda: ModelDrafter(draft),
        lambda: ModelDrafter(draft, depth=3),
        lambda: ModelDrafter(llama(seed=3).double()),  # nobody else keeps it
        lambda: LayersDrafter([0]),
        lambda: LayersDrafter([1]),
        lambda: Reads([0]),
        lambda: NgramDrafter(),
        lambda: NgramDrafter(longest=5),
        lambda: MedusaDrafter(model, heads),
    ]
    first, second = [make() for make in made], [make() for make in made]
    assert len({one.identity for one in first}) == len(made)
    same = [a.identity == b.identity for a, b in zip(first, second, strict=True)]
    assert same == [True, True, False, True, True, True, True, True, True]

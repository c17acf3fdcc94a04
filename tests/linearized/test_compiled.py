"""A compiled step gives what the eager one gives."""

from __future__ import annotations

import copy
import functools
import shutil
import warnings

import pytest
import torch
import transformers

import linearized
from linearized import packing
from linearized.compiled import is_compiled
from linearized.errors import ConfigError, ModelError
from linearized.medusa import MedusaHeads
from linearized.models import shortened, sketch
from linearized.packing import unpack
from linearized.products import Choice, available
from linearized.speculative import LayersDrafter, MedusaDrafter, ModelDrafter, NgramDrafter
from linearized.speculative.pool import Pool
from linearized.step import step
from linearized.tree import Tree

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@pytest.fixture
def programs(monkeypatch):
    """Of torch's, as they are traced; they run as they are. For tests of when one is made: writing
    C++ for them takes longest."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return made


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch._dynamo.reset()


def decoded(model, batch, tokens):
    """Logits of an extension and of a tree on top of what was read; and the state after it."""
    state = linearized.new_state(model, batch_size=batch)
    linearized.extend(model, tokens, state)  # crosses a group
    few = linearized.extend(model, tokens[:, :1], state)
    trees = []
    for nodes in (1, 3, 9):
        parents = torch.tensor([[-1, *((n - 1) // 2 for n in range(1, nodes))]]).expand(batch, -1)
        logits, pending = linearized.verify(model, tokens[:, :nodes], parents, state)
        linearized.commit(state, pending, [[0, 2] if nodes > 1 else [0]] * batch)
        trees.append(logits)
    return few, trees, state


@needs_compiler
@pytest.mark.timeout(300)
def test_rows_and_nodes_of_any_number(linear):
    model = linear(dtype=torch.float32, layers=1)
    inputs = {batch: torch.randint(1, 50, (batch, 45)) for batch in (1, 2, 3)}
    want = {batch: decoded(model, batch, tokens) for batch, tokens in inputs.items()}
    linearized.compile(model)
    for batch, tokens in inputs.items():
        few, trees, state = decoded(model, batch, tokens)
        torch.testing.assert_close(few, want[batch][0], atol=1e-4, rtol=1e-4)
        for tree, expected in zip(trees, want[batch][1], strict=True):
            torch.testing.assert_close(tree, expected, atol=1e-4, rtol=1e-4)
        for name, tensor in state.layers.tensors().items():
            expected = want[batch][2].layers.tensors()[name]
            torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def layouts(monkeypatch):
    """Packing lays out every weight, whatever is fastest on this machine."""

    def always(layers, dtype, pack):
        return {tuple(one.weight.shape): Choice.always("onednn") for one in layers}

    monkeypatch.setattr(packing, "fastest", always)


@needs_compiler
@pytest.mark.skipif(not available(), reason="this torch has no oneDNN")
def test_with_packed_weights_and_in_copies(linear, layouts):
    model = linear(dtype=torch.float32, layers=1)
    tokens = torch.randint(1, 50, (1, 9))
    want = linearized.extend(model, tokens, linearized.new_state(model))
    linearized.pack(model)
    linearized.compile(model)
    twin = copy.deepcopy(model)
    assert is_compiled(twin)
    for one in (model, twin):
        got = linearized.extend(one, tokens, linearized.new_state(one))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)  # its copy keeps its own
    got = linearized.extend(twin, tokens, linearized.new_state(twin))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@needs_compiler
@pytest.mark.skipif(not available(), reason="this torch has no oneDNN")
def test_a_model_that_changes_afterwards(linear, programs, layouts):
    """New weights, packed ones, others of the same names: each is noticed."""
    model = linear(dtype=torch.float32, layers=1)
    tokens = torch.randint(1, 50, (1, 9))

    def said(one):
        return linearized.extend(one, tokens, linearized.new_state(one))

    plain = copy.deepcopy(model)
    linearized.compile(model)
    torch.testing.assert_close(said(model), said(plain), atol=1e-4, rtol=1e-4)

    def double(one):
        found = one.model.layers[0].mlp.up_proj
        changed = Doubled(found.in_features, found.out_features, bias=False)
        changed.weight = found.weight
        one.model.layers[0].mlp.up_proj = changed.eval()

    def scale(one):
        with torch.no_grad():
            one.lm_head.weight.mul_(3)

    for change in (linearized.pack, scale, unpack, double, linearized.pack):
        for one in (plain, model):
            change(one)
        torch.testing.assert_close(said(model), said(plain), atol=1e-4, rtol=1e-4)


@needs_compiler
def test_modes_and_hooks_that_change(linear, programs):
    model = linear(dtype=torch.float32, layers=1)
    model.model.norm.register_forward_hook(
        lambda module, args, out: out + 1 if module.training else out
    )
    tokens = torch.randint(1, 50, (1, 9))
    plain = copy.deepcopy(model)
    linearized.compile(model)

    def said(one):
        return linearized.extend(one, tokens, linearized.new_state(one))

    def hook(one):
        one.model.norm.register_forward_hook(lambda module, args, out: 2 * out)

    for change in (lambda one: one.train(), lambda one: one.eval(), hook):
        for one in (plain, model):
            change(one)
        torch.testing.assert_close(said(model), said(plain), atol=1e-4, rtol=1e-4)


@needs_compiler
def test_many_models_keep_to_their_own_programs(llama, programs):
    """Of the same class, with states of the same shapes."""
    models = []
    for width in (40, 40, 56):
        config = llama(layers=1).config
        config.intermediate_size = width
        model = transformers.LlamaForCausalLM(config).eval()
        models.append(linearized.linearize(model, linearized.LinearConfig(attention="grouped")))
    tokens = torch.randint(1, 50, (1, 9))
    inputs = [tokens, tokens[:, :1], tokens.expand(2, -1)]

    def said(model, x):
        return linearized.extend(model, x, linearized.new_state(model, batch_size=len(x)))

    want = [[said(model, x) for x in inputs] for model in models]
    for model in models:
        linearized.compile(model)
    for _ in range(2):
        for model, expected in zip(models, want, strict=True):
            for x, logits in zip(inputs, expected, strict=True):
                torch.testing.assert_close(said(model, x), logits, atol=1e-4, rtol=1e-4)
        assert len(programs) == len(models) * len(inputs)


@needs_compiler
def test_with_some_layers_only(linear):
    model = linear(dtype=torch.float32, layers=3)
    tokens = torch.randint(1, 50, (1, 9))
    state = linearized.new_state(model)
    linearized.extend(model, tokens, state)
    tree = tokens[:, :3], torch.tensor([[-1, 0, 0]]), state
    want = sketch(model, *tree, layers=[0, 2])
    linearized.compile(model)
    assert is_compiled(shortened(model, [0, 2]))
    torch.testing.assert_close(sketch(model, *tree, layers=[0, 2]), want, atol=1e-4, rtol=1e-4)


@needs_compiler
def test_a_hybrid(llama, programs):
    """Its history grows by pages; a program holds for all of them."""
    config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=(0,))
    model = linearized.linearize(llama(), config)
    tokens = torch.randint(1, 50, (2, 45))
    few, trees, state = decoded(model, 2, tokens)
    linearized.compile(model)
    got = decoded(model, 2, tokens)
    torch.testing.assert_close(got[0], few, atol=1e-4, rtol=1e-4)
    for tree, expected in zip(got[1], trees, strict=True):
        torch.testing.assert_close(tree, expected, atol=1e-4, rtol=1e-4)
    history = state.history.view()
    torch.testing.assert_close(got[2].history.view().keys, history.keys, atol=1e-4, rtol=1e-4)
    count = len(programs)
    longer = torch.randint(1, 50, (2, 600))
    decoded(model, 2, longer)
    assert len(programs) == count


@needs_compiler
@pytest.mark.parametrize("layers", [(), (0,)])
def test_rows_of_a_pool(llama, programs, layers):
    """Softmax layers alone, and beside linear ones: a kind of input has one program, whatever room
    the pool has, and however many rows, of which the texts have reached however much. Others would
    be compiled in the middle of texts."""
    config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=layers)
    model = linearized.linearize(llama(), config)
    linearized.compile(model)
    pool = Pool(model, 3)
    pool.reserve(100)
    for name in "ab":
        pool.add(name)

    def count(rows, num_tokens):
        before = len(programs)
        tokens = torch.ones(rows, num_tokens, dtype=torch.int64)
        with torch.no_grad():
            step(model, Tree.chain(tokens), pool.first(rows))
        return len(programs) - before

    def read(num_tokens):
        linearized.extend(model, torch.ones(2, num_tokens, dtype=torch.int64), pool.first(2))

    assert count(2, 4) == 1 and count(1, 4) == 1, "of some rows; of one"
    pool.add("c")
    assert count(3, 4) == 1, "of all"
    pool.remove("c")
    for change in (
        functools.partial(read, 300),
        functools.partial(pool.reserve, 1500),
        functools.partial(read, 500),
    ):
        change()
        assert count(2, 5) == 0 and count(1, 3) == 0


@needs_compiler
def test_a_window(linear, programs):
    """Where tokens are kept is a constant of a program; lengths are not."""
    model = linear(dtype=torch.float32, layers=1, near="hedgehog")
    tokens = torch.randint(1, 50, (2, 45))
    few, trees, state = decoded(model, 2, tokens)
    linearized.compile(model)
    got = decoded(model, 2, tokens)
    torch.testing.assert_close(got[0], few, atol=1e-4, rtol=1e-4)
    for tree, expected in zip(got[1], trees, strict=True):
        torch.testing.assert_close(tree, expected, atol=1e-4, rtol=1e-4)
    for name, tensor in got[2].layers.tensors().items():
        expected = state.layers.tensors()[name]
        torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-4)
    count = len(programs)
    decoded(model, 2, tokens[:, :9])  # begins in the sinks
    assert len(programs) == count


def test_what_cannot_be_compiled_says_why(linear, monkeypatch):
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of T5's position bias
        t5 = linearized.linearize(
            transformers.T5ForConditionalGeneration(config).eval(),
            linearized.LinearConfig(attention="grouped"),
        )
    with pytest.raises(ModelError, match="encoder-decoder"):
        linearized.compile(t5)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        linearized.compile(linear())


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rows", [1, 3])
def test_texts_of_fast_models_are_the_plain_ones(linear, layouts, rows):
    """What is served: packed, compiled, planned, several drafters, many texts, across groups."""
    model, draft = linear(dtype=torch.float32), linear(dtype=torch.float32, layers=1, seed=3)
    prompts = [[7, 3, 5], [1], [*range(2, 40)], [9] * 8]
    settings = [{}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}]
    want = [
        [linearized.generate(model, one, max_new_tokens=60, **given) for one in prompts]
        for given in settings
    ]
    heads = MedusaHeads.on(model, 3, linearized.fingerprint(model))
    for fast in (model, draft):
        linearized.pack(fast)
        linearized.compile(fast)
    drafters = {
        "model": lambda: ModelDrafter(draft),
        "ngram": lambda: NgramDrafter(shortest=1),
        "medusa": lambda: MedusaDrafter(model, heads),
        "layers": lambda: LayersDrafter([1]),
    }
    for name, make in drafters.items():
        for adaptive in (False, True):
            for given, texts in zip(settings, want, strict=True):
                found = linearized.generate(
                    model, prompts, max_new_tokens=60, drafter=make(), adaptive=adaptive,
                    rows=rows, **given,
                )  # fmt: skip
                assert found == texts, (name, adaptive, given)

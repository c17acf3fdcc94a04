"""Models on a GPU against the same models on the CPU in float32; the same functions run on the CPU
alone, with the Triton kernels interpreted."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    # Triton decides as a kernel is defined, and linearized defines its kernels on first use.
    os.environ["TRITON_INTERPRET"] = "1"

import linearized  # noqa: E402
from linearized.config import ATTENTIONS  # noqa: E402
from linearized.fold import fold  # noqa: E402
from linearized.models import new_parameters  # noqa: E402
from linearized.speculative import Engine, Sampling, Text  # noqa: E402
from linearized.speculative.noise import gumbel  # noqa: E402
from linearized.step import step  # noqa: E402
from linearized.tree import Tree  # noqa: E402

if not CUDA:
    linearized.ops.choose("triton")
    del os.environ["TRITON_INTERPRET"]

GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
HERE = pytest.mark.skipif(CUDA, reason="kernels are compiled here, not interpreted")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


def setup(device: str, dtype: torch.dtype, backend: str | None, marks=()):
    name = f"{device}-{dtype}-{backend or 'chosen'}".replace("torch.", "")
    return pytest.param(device, dtype, backend, marks=marks, id=name)


setups = pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        setup("cpu", torch.float32, None),
        setup("cpu", torch.float32, "triton", HERE),
        setup("cpu", torch.bfloat16, None),
        *(
            setup("cuda", dtype, backend, GPU)
            for dtype in (torch.float32, torch.bfloat16)
            for backend in (None, "triton")
        ),
    ],
)
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
"""Relative distance of logits and states by norm."""
TIED = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Logits, in standard deviations of a position's logits, that may be taken for equal."""
PARENTS = [[-1, 0, 0, 1, 3, 4, 2, 5, 7], [-1, -1, 1, 2, 3, 3, 5, 6, 7]]
PATHS = [[0, 1, 3, 4, 5, 7, 8], [1, 2, 3, 5]]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 means float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def twin(model, device: str, dtype: torch.dtype, backend: str | None = None):
    """The same model there."""
    made = copy.deepcopy(model).to(device, dtype)
    linearized.set_backend(made, backend)
    return made


def num_new(device: str, backend: str | None) -> int:
    """Tokens to generate; the interpreter is slow."""
    return 4 if device == "cpu" and backend == "triton" else 24


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 61, (rows, length), generator=generator)


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative, by norm."""
    assert found.shape == truth.shape
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


def assert_same_state(found, truth, within: float) -> None:
    assert torch.equal(found.length.cpu(), truth.length.cpu())
    wanted = truth.layers.tensors()
    far = {n: distance(x, wanted[n]) for n, x in found.layers.tensors().items() if n != "length"}
    assert all(value <= within for value in far.values()), far


@torch.no_grad()
def assert_likely(model, prompt: list[int], text: list[int], within: float) -> None:
    """Each token is the model's favourite, or as good as that."""
    logits = model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
    said = logits[len(prompt) - 1 : -1]
    lost = said.amax(-1) - said.gather(-1, torch.tensor(text)[:, None])[:, 0]
    assert bool((lost <= within * said.std(-1)).all()), (lost / said.std(-1)).max()


@torch.no_grad()
def assert_same_text(model, prompt: list[int], one: list[int], two: list[int], within: float):
    """Equal, or equal up to where the model has two favourites."""
    assert len(one) == len(two)
    shared = next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(one))
    for text in (one, two):
        assert_likely(model, prompt, text[: shared + 1], within)


@setups
@pytest.mark.parametrize("layers", [None, (0,)], ids=["linear", "hybrid"])
def test_extend_verify_commit(linear, llama, device, dtype, backend, layers) -> None:
    if layers is None:
        truth = linear(dtype=torch.float32, group=16)
    else:
        truth = llama()
        config = linearized.LinearConfig(attention="grouped", group=16, taps=5, layers=layers)
        linearized.linearize(truth, config)
        for parameter in new_parameters(truth):
            torch.nn.init.normal_(parameter)
    model = twin(truth, device, dtype, backend)
    found = []
    for one in (truth, model):
        where = one.device
        state = linearized.new_state(one, batch_size=2)
        logits = []
        for part in tokens_of(2, 75).split([50, 1, 24], dim=1):
            logits.append(linearized.extend(one, part.to(where), state))
        tree, parents = tokens_of(2, 9, seed=1).to(where), torch.tensor(PARENTS).to(where)
        nodes, pending = linearized.verify(one, tree, parents, state)
        linearized.commit(state, pending, PATHS)
        logits.append(nodes)
        logits.append(linearized.extend(one, tokens_of(2, 3, seed=2).to(where), state))
        found.append((logits, state))
    (wanted, truth_state), (logits, state) = found
    assert all(distance(x, y) <= CLOSE[dtype] for x, y in zip(logits, wanted, strict=True))
    assert_same_state(state, truth_state, CLOSE[dtype])


@setups
def test_plain_forward_and_gradients(linear, device, dtype, backend) -> None:
    truth = linear(dtype=torch.float32, group=16).requires_grad_(True)
    model = twin(truth, device, dtype, backend).requires_grad_(True)
    tokens = tokens_of(2, 50)
    losses = []
    for one in (truth, model):
        ids = tokens.to(one.device)
        logits = one(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=CLOSE[dtype])
    near = 20 * CLOSE[torch.float32] if dtype == torch.float32 else 0.3
    for (name, one), two in zip(truth.named_parameters(), model.parameters(), strict=True):
        assert distance(two.grad, one.grad) <= near, name


@setups
def test_generate(linear, device, dtype, backend) -> None:
    truth = linear(dtype=torch.float32, group=16)
    model = twin(truth, device, dtype, backend)
    prompts = [tokens_of(1, n, seed=n)[0].tolist() for n in (5, 20)]
    new = num_new(device, backend)
    texts = linearized.generate(model, prompts, max_new_tokens=new, stop_ids=[])
    for prompt, text in zip(prompts, texts, strict=True):
        assert_likely(truth, prompt, text, TIED[dtype])


@setups
def test_drafted_is_plain(linear, device, dtype, backend) -> None:
    truth = linear(dtype=torch.float32, group=16)
    model = twin(truth, device, dtype, backend)
    small = linear(dtype=torch.float32, layers=1, group=16)
    draft = twin(small, device, dtype, backend)
    prompts = [tokens_of(1, n, seed=n)[0].tolist() for n in (5, 20)]
    ask = {"max_new_tokens": num_new(device, backend), "stop_ids": []}
    plain = linearized.generate(model, prompts, **ask)
    for drafter in ("ngram", draft, model):
        drafted = linearized.generate(model, prompts, drafter=drafter, adaptive=False, **ask)
        for prompt, one, two in zip(prompts, drafted, plain, strict=True):
            assert_same_text(truth, prompt, one, two, TIED[dtype])


@devices
def test_noise_is_the_same_everywhere(device) -> None:
    for seed, choice in ((0, 0), (2**63 - 1, 0), (7, 3)):
        places = [0, 1, 17, 2**20]
        here = gumbel(seed, places, 5000, choice=choice)
        there = gumbel(seed, places, 5000, choice=choice, device=device).cpu()
        assert torch.allclose(here, there, rtol=1e-13, atol=1e-13)
        assert torch.equal(here.argmax(-1), there.argmax(-1))


@devices
def test_sampled_texts_of_an_engine_are_those_of_the_cpu(linear, device) -> None:
    """Alone on the CPU, or in company there: float32 logits differ by rounding, noise does not."""
    truth = linear(dtype=torch.float32, group=16)
    model = twin(truth, device, torch.float32)

    def texts(one, rows: int) -> list[list[int]]:
        engine = Engine(one, rows=rows)
        asked = [
            Text(
                tokens_of(1, 4 + 3 * i, seed=i)[0].tolist(),
                sampling=Sampling(temperature=0.9, top_p=0.95, seed=i),
                max_new_tokens=20,
            )
            for i in range(4)
        ]
        for text in asked:
            engine.add(text)
        while engine.busy:
            engine.step()
        return [text.new_tokens for text in asked]

    assert texts(model, 4) == texts(truth, 1)


@setups
def test_transformers_generate(linear, device, dtype, backend) -> None:
    truth = linear(dtype=torch.float32, group=16)
    model = twin(truth, device, dtype, backend)
    model.generation_config.eos_token_id = None
    prompt = tokens_of(1, 20)
    out = model.generate(
        prompt.to(device), attention_mask=torch.ones_like(prompt).to(device), do_sample=False,
        max_new_tokens=num_new(device, backend), pad_token_id=0,
    )  # fmt: skip
    assert_likely(truth, prompt[0].tolist(), out[0, 20:].tolist(), TIED[dtype])


@devices
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_variant(llama, device, attention) -> None:
    truth = llama()
    sizes = {"group": 8, "taps": 5, "features": 12, "hashes": 4, "bits": 3, "period": 11}
    linearized.linearize(truth, linearized.LinearConfig(attention=attention, **sizes))
    for parameter in new_parameters(truth):
        torch.nn.init.normal_(parameter, std=0.5)
    model = twin(truth, device, torch.float32)
    tokens = tokens_of(2, 30)
    with torch.no_grad():
        wanted = truth(input_ids=tokens, use_cache=False).logits
    state = linearized.new_state(model, batch_size=2)
    parts = [linearized.extend(model, x.to(device), state) for x in tokens.split([19, 11], dim=1)]
    assert distance(torch.cat(parts, dim=1), wanted) <= 1e-3


@devices
def test_t5_attends_across(device) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    truth = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.warns(UserWarning):
        linearized.linearize(truth, linearized.LinearConfig(attention="relu", taps=5))
    model = twin(truth, device, torch.float32)
    source, tokens = tokens_of(2, 21), tokens_of(2, 9, seed=1)
    found = []
    for one in (truth, model):
        state = linearized.encode(one, source.to(one.device))
        found.append(linearized.extend(one, tokens.to(one.device), state))
    assert distance(found[1], found[0]) <= 1e-3


@devices
def test_a_state_moves_between_devices(linear, device) -> None:
    truth = linear(dtype=torch.float32, group=16)
    model = twin(truth, device, torch.float32)
    tokens = tokens_of(2, 40)
    state = linearized.new_state(model, batch_size=2)
    linearized.extend(model, tokens[:, :30].to(device), state)
    there = linearized.DecodeState.from_bytes(state.to_bytes())
    there.check(linearized.fingerprint(truth))
    found = linearized.extend(truth, tokens[:, 30:], there)
    with torch.no_grad():
        wanted = truth(input_ids=tokens, use_cache=False).logits[:, 30:]
    assert distance(found, wanted) <= CLOSE[torch.float32]


@setups
def test_same_bits_twice(linear, device, dtype, backend) -> None:
    model = twin(linear(dtype=torch.float32, group=16), device, dtype, backend)
    found = []
    for _ in range(2):
        state = linearized.new_state(model, batch_size=2)
        linearized.extend(model, tokens_of(2, 50).to(device), state)
        tree, parents = tokens_of(2, 9, seed=1).to(device), torch.tensor(PARENTS).to(device)
        logits, pending = linearized.verify(model, tree, parents, state)
        linearized.commit(state, pending, PATHS)
        found.append([logits, *state.layers.tensors().values()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@setups
def test_a_step_never_waits_for_the_device(linear, device, dtype, backend) -> None:
    """Verifying tokens and folding them in, once kernels are compiled; a GPU says if it waits."""
    model = twin(linear(dtype=torch.float32, group=16), device, dtype, backend)
    state = linearized.new_state(model, batch_size=2)
    linearized.extend(model, tokens_of(2, 50).to(device), state)
    tree = Tree.chain(torch.ones(2, 3, dtype=torch.int64, device=device))

    @torch.no_grad()
    def advance() -> None:
        found = step(model, tree, state)
        assert found.fresh is not None
        fold(state, found.fresh)

    advance()
    if device == "cpu":
        advance()
    else:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert state.length.tolist() == [56, 56]


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_is_an_eager_one(linear, device, dtype) -> None:
    model = twin(linear(dtype=torch.float32, group=16), device, dtype)
    state = linearized.new_state(model, batch_size=2)
    linearized.extend(model, tokens_of(2, 50).to(device), state)
    tree, parents = tokens_of(2, 9, seed=1).to(device), torch.tensor(PARENTS).to(device)
    wanted, _ = linearized.verify(model, tree, parents, state)
    linearized.compile(model)
    found, pending = linearized.verify(model, tree, parents, state)
    assert distance(found, wanted) <= CLOSE[dtype]
    linearized.commit(state, pending, PATHS)

"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

import linearized

# One thread each, also of what tests start: they run side by side, and threads that wait for each
# other on processors that others use take many times as long.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")
# A shell starts background jobs with SIGINT ignored, and children would inherit that; tests of
# Ctrl-C need what a terminal gives.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests that start Ray take turns in one process; the others run beside them."""
    if item.get_closest_marker("ray"):
        item.add_marker(pytest.mark.xdist_group("ray"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray's, which take longest, come first."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Commands that tests run in this process may choose more, for all that come after them."""
    yield
    torch.set_num_threads(1)


def tiny_llama(
    *, vocab: int = 61, hidden: int = 32, layers: int = 2, kv_heads: int = 2, seed: int = 0
) -> transformers.LlamaForCausalLM:
    """A random softmax Llama, float32, eval mode."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_linear(
    *,
    dtype: torch.dtype = torch.float64,
    group: int = 8,
    taps: int = 5,
    near: str = "",
    linearize: tuple[int, ...] | None = None,
    **settings: int,
) -> transformers.PreTrainedModel:
    """A random linearized Llama whose new parameters are not zero. `near` names an attention that
    has a window, sinks and, if it takes one, a bound."""
    model = tiny_llama(**settings).to(dtype)
    extra: dict[str, Any] = {"window": 1, "sinks": min(3, group)} if near else {}
    if near == "hedgehog":
        extra["bound"] = 3.0
    config = linearized.LinearConfig(
        attention=near or "grouped", group=group, taps=taps, layers=linearize, **extra
    )
    linearized.linearize(model, config)
    for parameter in linearized.models.new_parameters(model):
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def llama() -> Callable[..., transformers.LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def linear() -> Callable[..., transformers.PreTrainedModel]:
    return tiny_linear


CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "def add(a, b):\n    return a + b\n",
    "größere Wörter, 日本語のテキスト, emoji 🙂🚀",
]


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level, with a few merges."""
    return tiny_tokenizer()

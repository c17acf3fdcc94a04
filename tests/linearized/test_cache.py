"""Every mode of transformers' `generate`, on linear models and hybrids: the plain text, or an error
that says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import linearized
from linearized.cache import CACHE, HELD, StateCache
from linearized.errors import ModelError, StateError
from linearized.models import new_parameters

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT = torch.arange(3, 15)[None]


ANCHORED = {"attention": "hedgehog", "window": 1, "sinks": 3, "bound": 4.0}
"""With a window, sinks and a bound."""


@pytest.fixture(
    params=[{}, {"layers": [0]}, {"layers": []}, ANCHORED],
    ids=["linear", "hybrid", "softmax", "anchored"],
)
def model(request, llama):
    made = llama().double()
    settings = {"attention": "grouped", "group": 8, "taps": 5, **request.param}
    linearized.linearize(made, linearized.LinearConfig(**settings))
    for parameter in new_parameters(made):
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def plain(model, ids: torch.Tensor, num_tokens: int = 24) -> torch.Tensor:
    text = ids
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = model(input_ids=text, use_cache=False).logits[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    return text


@pytest.mark.parametrize("settings", [
    {}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 5}, {"use_cache": False},
    {"cache_implementation": "static"}, {"cache_implementation": "offloaded"},
    {"num_beams": 1, "num_return_sequences": 1},
], ids=str)  # fmt: skip
def test_every_mode_gives_the_plain_text(model, settings):
    assert torch.equal(model.generate(PROMPT, max_new_tokens=24, **settings, **GREEDY),
                       plain(model, PROMPT))  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1], ids=["right drafts", "wrong drafts"])
def test_a_softmax_assistant(model, llama, seed):
    """Drafts that are taken back leave no trace."""
    found = model.generate(
        PROMPT, max_new_tokens=24, assistant_model=llama(seed=seed).double(), **GREEDY
    )
    assert torch.equal(found, plain(model, PROMPT))


def test_flash_takes_drafts_back(llama):
    """Channels that come from the token before go back with it."""
    torch.manual_seed(0)
    flash = linearized.FlashForCausalLM(
        linearized.FlashConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=2,
            head_dim=16,
            group=8,
            taps=5,
            initializer_range=0.3,
        )
    ).double()
    want = plain(flash.eval(), PROMPT)
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": llama().double()}):
        assert torch.equal(flash.generate(PROMPT, max_new_tokens=24, **drafts, **GREEDY), want)


def test_a_linear_assistant_cannot_take_back_several_forwards(model, llama):
    target = llama(seed=3).double()
    model.generation_config.assistant_confidence_threshold = 0.0
    with pytest.raises(ModelError, match=r"linearized\.generate\(target, prompt, drafter=model\)"):
        target.generate(PROMPT, max_new_tokens=24, assistant_model=model, **GREEDY)


@pytest.mark.parametrize("given", ["all", "new"])
def test_going_on_with_the_cache_of_an_earlier_call(model, given):
    """The next turn of a chat: its text after the one before, or alone with a mask for both."""
    kept = {"return_dict_in_generate": True, **GREEDY}
    first = model.generate(PROMPT, max_new_tokens=10, **kept)
    text = torch.cat([first.sequences, torch.arange(5, 12)[None]], dim=1)
    cache = first[CACHE]
    mask = torch.ones_like(text)
    ids = text if given == "all" else text[:, cache.get_seq_length() :]
    found = model.generate(ids, attention_mask=mask, max_new_tokens=20, **{CACHE: cache}, **GREEDY)
    assert torch.equal(found[:, -20:], plain(model, text, 20)[:, -20:])


def test_one_prefix_for_several_texts(model):
    """Copies of a cache go their own ways."""
    with torch.no_grad():
        kept = model(input_ids=PROMPT, **{CACHE: transformers.DynamicCache()})[CACHE]
    for own in (torch.tensor([[20, 21]]), torch.tensor([[30, 31, 32]])):
        text = torch.cat([PROMPT, own], dim=1)
        found = model.generate(text, max_new_tokens=9, **{CACHE: copy.deepcopy(kept)}, **GREEDY)
        assert torch.equal(found, plain(model, text, 9))
    assert kept.state.length.tolist() == [PROMPT.shape[1]]


def test_several_texts_of_one_prompt_and_beams(model):
    for settings in ({"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3},
                     {"num_beams": 3, "num_return_sequences": 2}):  # fmt: skip
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            settings = {**GREEDY, **settings, "use_cache": use_cache}
            found.append(model.generate(PROMPT, max_new_tokens=12, **settings))
        assert torch.equal(*found)


def test_embeddings_in_the_place_of_tokens(model):
    embedded = model.get_input_embeddings()(PROMPT)
    found = model.generate(inputs_embeds=embedded, max_new_tokens=24, **GREEDY)
    assert torch.equal(found, plain(model, PROMPT)[:, PROMPT.shape[1] :])


@torch.no_grad()
def test_cropping(model):
    """Any part of the last forward, however long it was; nothing before it."""
    tokens = torch.arange(HELD + 20)[None] % 50 + 3
    for kept in (HELD + 20, HELD + 19, 21, 20):
        cache = transformers.DynamicCache()
        cache = model(input_ids=tokens, **{CACHE: cache})[CACHE]
        cache.crop(kept - tokens.shape[1])
        assert cache.get_seq_length() == kept
        logits = model(input_ids=tokens[:, :3], **{CACHE: cache}).logits
        text = torch.cat([tokens[:, :kept], tokens[:, :3]], dim=1)
        want = model(input_ids=text, use_cache=False).logits[:, kept:]
        assert (logits - want).abs().max() < 1e-9
        with pytest.raises(ModelError, match="cannot take back 4 tokens"):
            cache.crop(-4)
    cache.crop(21)  # the size to be left, as before 5.24
    assert cache.get_seq_length() == cache.state.length.item() == 21


@torch.no_grad()
def test_rows_of_a_cache(model):
    tokens = torch.stack([torch.arange(3, 13), torch.arange(13, 23)])
    cache = model(input_ids=tokens, **{CACHE: transformers.DynamicCache()})[CACHE]
    assert cache.batch_size == 2
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    follow = torch.tensor([[7, 8], [9, 10]])
    logits = model(input_ids=follow, **{CACHE: cache}).logits
    text = torch.cat([tokens[[1, 0]], follow], dim=1)
    assert (logits - model(input_ids=text, use_cache=False).logits[:, 10:]).abs().max() < 1e-9


def test_what_does_not_follow_a_cache_is_refused(model, llama):
    with torch.no_grad():
        cache = model(input_ids=PROMPT, **{CACHE: transformers.DynamicCache()})[CACHE]
        with pytest.raises(ModelError, match="12 tokens.*attention_mask of the whole"):
            model(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), **{CACHE: cache})
        with pytest.raises(ModelError, match="1 rows, the input has 2"):
            model(input_ids=PROMPT.expand(2, -1), **{CACHE: cache})
        with pytest.raises(ModelError, match="several documents"):
            model(input_ids=PROMPT, segment_ids=torch.zeros_like(PROMPT), **{CACHE: cache})
        with pytest.raises(ModelError, match="new_state"):
            cache.reset()
    with pytest.raises(ModelError, match="no_grad"):
        model(input_ids=PROMPT, **{CACHE: cache})
    with torch.no_grad(), pytest.raises(StateError, match="belongs to model"):
        other = llama(seed=1).double()
        linearized.linearize(other, linearized.LinearConfig(attention="grouped", group=8, taps=5))
        model(input_ids=PROMPT, **{CACHE: StateCache(linearized.new_state(other))})

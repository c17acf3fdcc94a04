"""`linearized.generate`: text from a linearized model, with or without drafters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, overload
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearized.compiled import is_compiled
from linearized.errors import ConfigError, RequestError
from linearized.medusa import MedusaHeads
from linearized.packing import is_packed
from linearized.speculative.decoder import Decoder
from linearized.speculative.drafters import (
    Drafter,
    LayersDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
)
from linearized.speculative.engine import Engine
from linearized.speculative.experience import Experience
from linearized.speculative.guide import Guide
from linearized.speculative.sampling import Sampling
from linearized.speculative.text import Text

OnTokens = Callable[[int, list[int]], None]
Guesser = Drafter | PreTrainedModel | str
ROWS = 8


@overload
def generate(
    model: PreTrainedModel, prompt: Sequence[int], *, max_new_tokens: int, **settings: object
) -> list[int]: ...
@overload
def generate(
    model: PreTrainedModel,
    prompt: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    **settings: object,
) -> list[list[int]]: ...
def generate(  # type: ignore[misc]
    model: PreTrainedModel,
    prompt: Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    drafter: Guesser | Sequence[Guesser] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    min_tokens: int = 0,
    typical: float = 0.0,
    seed: int = 0,
    choice: int = 0,
    stop: str | Sequence[str] | None = None,
    stop_ids: Iterable[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    guide: Guide | None = None,
    rows: int = ROWS,
    adaptive: bool = True,
    on_tokens: OnTokens | None = None,
) -> list[int] | list[list[int]]:
    """Continue one prompt (token ids) or several (lists of them): the new ids, nested alike.
    Arrays and tensors will do.

    `drafter`: None, a smaller model with the same tokenizer, a `Drafter`, a name, or several of
    these in the order in which to ask them; it changes the speed and never the text. Names are
    "ngram", "layers" and "medusa": the latter two are looked for in the folder that the model was
    loaded from, where `jobs.layers` and `jobs.finetune medusa` leave them. `stop`: the text ends
    with the token after which the first of these strings is certain. That takes `tokenizer`; the
    strings may name special tokens. `stop_ids`: it ends after one of these tokens; by default the
    model's end of text. `seed`, `choice`: a sampled text is a function of both. Prompt i gets the
    choice number `choice` + i, so equal prompts get different texts, and `generate(model,
    prompts[i], choice=choice + i, …)` gives one of them again. `guide`: what the texts obey, from
    `Guides`. For the other parameters see `Sampling`.
    `rows`: prompts at a time. `adaptive`: verify only what pays, by times measured before the first
    token and by what drafts really gave; both are kept for the next call. Without it, verify all
    that is drafted. `on_tokens(index of the prompt, new
    ids)` is called as they come. On a CPU call `linearized.pack(model)` first, and maybe
    `linearized.compile(model)`: both make it faster.

    Raises:
        RequestError: a prompt that is no list of token ids, an empty one, an unknown token.
        ConfigError: a setting out of range. ModelError: the model gives NaN or infinite logits.
    """
    given = _plain(prompt)
    many = isinstance(given, list) and bool(given) and isinstance(given[0], list)
    prompts = [_ids(one) for one in (given if many else [given])]
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias or (),  # type: ignore[arg-type]
        min_tokens=min_tokens,
        stop_ids=end_of_text(model) if stop_ids is None else stop_ids,  # type: ignore[arg-type]
        seed=seed,
        choice=choice,
        typical=typical,
    )
    strings = [stop] if isinstance(stop, str) else list(stop or ())
    if strings and tokenizer is None:
        raise ConfigError("stop strings need the tokenizer, to see text in token ids")
    decode = decoding(tokenizer) if strings and tokenizer is not None else None
    texts = [
        Text(
            one,
            sampling=replace(sampling, choice=sampling.choice + i),
            max_new_tokens=max_new_tokens,
            stop=strings,
            decode=decode,
            guide=guide,
        )
        for i, one in enumerate(prompts)
    ]
    asked = drafters(drafter, model)
    engine = Engine(model, drafters=asked, rows=min(rows, max(len(texts), 1)))
    with _planned(engine, asked) if adaptive and asked else nullcontext():
        for text in texts:
            engine.add(text)
        index = {text: i for i, text in enumerate(texts)}
        while engine.busy:
            for text, piece in engine.step():
                if on_tokens is not None and piece.tokens:
                    on_tokens(index[text], list(piece.tokens))
                if text.error is not None:
                    raise text.error
    found = [text.new_tokens for text in texts]
    return found if many else found[0]


_known: WeakKeyDictionary[PreTrainedModel, dict[object, Experience]] = WeakKeyDictionary()


@contextmanager
def _planned(engine: Engine, asked: Sequence[Drafter]) -> Iterator[None]:
    """What is learnt is kept for the next call with the same model as it is, rows and nodes."""
    model, rows, nodes = engine.model, engine.pool.num_rows, engine.max_nodes
    fast = is_packed(model), is_compiled(model), torch.get_num_threads()
    hidden = any(one.needs_hidden for one in asked)
    key = rows, nodes, fast, hidden, model.device, model.dtype
    known = _known.setdefault(model, {})
    # Taken out meanwhile: a call in another thread learns by itself.
    experience = known.pop(key, None) or Experience(engine.measure())
    try:
        engine.plan(experience)
        yield
    finally:
        known[key] = experience


def _plain(value: Any) -> Any:
    """Lists and numbers, out of whatever holds them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(one) for one in value] if isinstance(value, (list, tuple, range)) else value


def _ids(prompt: Any) -> list[int]:
    """
    Raises:
        RequestError: this is no list of token ids.
    """
    wrong: list[Any] = [prompt]
    if isinstance(prompt, list):
        wrong = [one for one in prompt if type(one) is not int]
    if wrong:
        problem = f"a prompt is a list of token ids, got {type(wrong[0]).__name__} {wrong[0]!r:.80}"
        hint = '; tokenizer(text)["input_ids"] gives them' if isinstance(prompt, str) else ""
        raise RequestError(problem + hint, param="prompt")
    return list(prompt)


def drafters(given: Guesser | Sequence[Guesser] | None, model: PreTrainedModel) -> list[Drafter]:
    """
    Raises:
        ConfigError: an unknown name.
    """
    if given is None:
        return []
    if not isinstance(given, Sequence) or isinstance(given, str):
        given = [given]
    return [_drafter(one, model) for one in given]


def _drafter(given: Guesser, model: PreTrainedModel) -> Drafter:
    if isinstance(given, Drafter):
        return given
    if isinstance(given, str):
        if given not in NAMED:
            choices = ", ".join(NAMED)
            raise ConfigError(f"unknown drafter {given!r}; choose from {choices}, or give a model")
        return NAMED[given](model)
    if not isinstance(given, PreTrainedModel):
        raise ConfigError(f"a drafter is a name, a model or a Drafter, got {type(given).__name__}")
    return ModelDrafter(given)


def _medusa(model: PreTrainedModel) -> Drafter:
    heads = MedusaHeads.from_pretrained(Path(model.config._name_or_path) / "medusa")
    return MedusaDrafter(model, heads)


NAMED: dict[str, Callable[[PreTrainedModel], Drafter]] = {
    "ngram": lambda model: NgramDrafter(),
    "layers": lambda model: LayersDrafter.from_pretrained(model.config._name_or_path),
    "medusa": _medusa,
}
"""Drafters that need no more than the target."""


def decoding(tokenizer: PreTrainedTokenizerBase) -> Decoder:
    """Token ids to text, without special tokens. Spaces stay as the model wrote them, also where
    the tokenizer would clean them up: that changes text which a stream has sent already."""

    def decode(tokens: list[int]) -> str:
        return str(
            tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    added = tokenizer.added_tokens_decoder.items()
    hidden = {token: one.content for token, one in added if one.special and not decode([token])}
    names = ["<0xC3>", "<0xA9>"]  # é, where the vocabulary has a token for each byte
    run = [one for one in map(tokenizer.convert_tokens_to_ids, names) if isinstance(one, int)]
    known = tokenizer.convert_ids_to_tokens(run) == names
    return Decoder(decode, run=run if known else (), hidden=hidden)


def end_of_text(model: PreTrainedModel) -> list[int]:
    """Tokens that end a text, as the model has it."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)

"""`linearized.generate`: text from a linearized model, with or without a drafter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import overload

from transformers import PreTrainedModel

from linearized.errors import ConfigError
from linearized.speculative import sequence
from linearized.speculative.drafters import Drafter, ModelDrafter, NgramDrafter
from linearized.speculative.sampling import Sampling
from linearized.speculative.tree import TokenTree

OnTokens = Callable[[int, list[int]], None]


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
    drafter: Drafter | PreTrainedModel | str | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
    on_tokens: OnTokens | None = None,
) -> list[int] | list[list[int]]:
    """Continue one prompt (token ids) or several (lists of them): the new ids, nested alike.

    `drafter`: None, "ngram", a smaller linearized model, or a `Drafter`; it changes the speed and
    never the text. `stop_ids`: the text ends after one of them; by default the model's end of
    text. `on_tokens(index of the prompt, new ids)` is called as they come.

    Raises:
        RequestError: an empty prompt, an unknown token. ConfigError: a setting out of range.
    """
    many = bool(prompt) and not isinstance(prompt[0], int)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    stops = frozenset(_end_of_text(model) if stop_ids is None else stop_ids)
    guesser = _drafter(drafter, model)
    texts: list[list[int]] = []
    for index, one in enumerate(prompt if many else [prompt]):
        text = sequence.Sequence(
            model,
            one,  # type: ignore[arg-type]
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
        )
        while not text.prefill():
            pass
        while text.finished is None:
            tree = guesser.propose(text.tokens, sampling) if guesser else TokenTree.empty
            new = text.step(tree)
            if on_tokens is not None:
                on_tokens(index, new)
        texts.append(text.new_tokens)
    return texts if many else texts[0]


def _drafter(
    drafter: Drafter | PreTrainedModel | str | None, model: PreTrainedModel
) -> Drafter | None:
    if isinstance(drafter, str):
        if drafter != "ngram":
            raise ConfigError(f"unknown drafter {drafter!r}; choose from ngram, or give a model")
        return NgramDrafter()
    if isinstance(drafter, PreTrainedModel):
        if drafter.config.vocab_size != model.config.vocab_size:
            raise ConfigError(
                f"the draft's vocabulary has {drafter.config.vocab_size} tokens, the target's "
                f"{model.config.vocab_size}; they must share one tokenizer"
            )
        return ModelDrafter(drafter)
    return drafter


def _end_of_text(model: PreTrainedModel) -> list[int]:
    ids = model.generation_config.eos_token_id if model.generation_config else None
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)

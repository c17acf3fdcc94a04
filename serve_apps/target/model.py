"""What a target replica wants to know of its models."""

from __future__ import annotations

import transformers

import linearized
from linearized.errors import ConfigError
from linearized.speculative import ModelDrafter
from linearized.speculative.generate import end_of_text
from serve_apps import weights
from serve_apps.target.config import TargetConfig

LONG = 2**14
"""Tokens over which it is averaged what one adds to a state."""


def sizes(model: transformers.PreTrainedModel) -> dict[str, int]:
    """What the state of a text takes here, and its cache with softmax in all layers."""
    state, config = linearized.new_state(model), model.config
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    heads = getattr(config, "num_key_value_heads", None) or heads
    grown = state.history.bytes_at(LONG) // LONG if state.history is not None else 0
    return {
        "state_bytes": state.nbytes,
        "state_token_bytes": grown,
        "cache_token_bytes": 2 * state.num_layers * heads * width * model.dtype.itemsize,
    }


def local_draft(
    config: TargetConfig, vocab_size: int, tokenizer: transformers.PreTrainedTokenizerBase
) -> ModelDrafter | None:
    """
    Raises:
        ConfigError: it has fewer rows than the tokenizer has tokens.
    """
    if config.draft is None:
        return None
    model = weights.load(
        config.draft,
        pack=config.pack,
        compile=config.compile,
        dtype=config.draft_dtype,
        device=config.draft_device,
    )
    shared = None
    if model.config.vocab_size != vocab_size:  # one of them is padded
        shared = 1 + max(tokenizer.get_vocab().values())
    return ModelDrafter(model, depth=config.depth, width=config.width, num_tokens=shared)


def stop_ids(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> frozenset[int]:
    """The tokens that end a text, by the model and its tokenizer.

    Raises:
        ConfigError: one of them is outside the vocabulary.
    """
    own = tokenizer.eos_token_id
    found = frozenset(end_of_text(model)) | ({own} if own is not None else set())
    vocab_size = model.config.vocab_size
    outside = [token for token in found if not 0 <= token < vocab_size]
    if outside:
        raise ConfigError(
            f"token id {outside[0]}, which ends a text, is outside the model's vocabulary of "
            f"{vocab_size}; check eos_token_id in generation_config.json and the tokenizer"
        )
    return found

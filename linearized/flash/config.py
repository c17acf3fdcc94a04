"""The config of a FLASH model, as transformers keeps it in a folder's config.json."""

from __future__ import annotations

from typing import Any

import transformers

from linearized.config import FLASH, LinearConfig
from linearized.errors import ConfigError


class FlashConfig(transformers.PreTrainedConfig):
    """Sizes of a FLASH model. The defaults are the paper's base model, about 110M parameters."""

    model_type = "flash_linearized"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 24
    expansion: int = 2
    """How many times as wide as the hidden vectors the values are."""
    head_dim: int = 128
    """Width of the queries and keys of the one head."""
    group: int = 256
    """Number of tokens that are attended exactly before they are folded into the state."""
    augment: bool = True
    """Whether to add the masked depthwise convolution over the values."""
    taps: int = 32
    """Length of the convolution. Tap i weighs the value i tokens back."""
    rotary: float = 0.25
    """Share of the head's channels that rotary embedding turns with the position."""
    rotary_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "expansion", "head_dim", "group",
            "taps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % 2:
            raise ConfigError(
                f"hidden_size must be even, as half of the channels are shifted, got "
                f"{self.hidden_size}"
            )
        if not 0 <= self.rotary <= 1 or self.rotary_width % 2:
            raise ConfigError(
                f"rotary must be a share of the {self.head_dim} channels of the head, an even "
                f"number of them, got {self.rotary}"
            )
        super().__post_init__(**kwargs)

    @property
    def rotary_width(self) -> int:
        return round(self.head_dim * self.rotary)

    @property
    def linearized(self) -> dict[str, Any]:
        """The same settings in the form that every linearized model's config has them."""
        return LinearConfig(
            attention=FLASH, augment=self.augment, group=self.group, taps=self.taps
        ).to_dict()

"""Who is measured by jobs.evaluate: a teacher, a model, and the model with a part of it off. Knows
folders and models; knows no score.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

import linearized
from linearized.allocation import state_bytes
from linearized.config import LinearConfig
from linearized.errors import ConfigError, ModelError
from linearized.evaluation import ablation
from linearized.evaluation.weights import by_layer
from linearized.folder import load
from linearized.models import context_limit, linear_config
from linearized.slots import is_hybrid

if TYPE_CHECKING:
    from jobs.evaluate import EvaluateConfig

TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class Contestant:
    name: str
    model: PreTrainedModel
    part: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """Takes a part of the model out, for as long as that lasts."""
    is_part: bool = False

    @property
    def linear(self) -> LinearConfig | None:
        try:
            return linear_config(self.model)
        except ModelError:
            return None

    @property
    def longest(self) -> int | None:
        """Number of tokens that it can read, or that it was made for; None: any."""
        limit = context_limit(self.model)
        if limit is not None:
            return limit
        if self.linear is not None and not is_hybrid(self.model):
            return None
        made_for = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if made_for is None else int(made_for)

    def facts(self) -> dict[str, Any]:
        linear = self.linear
        facts: dict[str, Any] = {"parameters": sum(p.numel() for p in self.model.parameters())}
        if linear is not None:
            facts["linear"] = linear.to_dict()
            facts["state_bytes"] = state_bytes(self.model)
            facts["weights"] = by_layer(self.model)
        return facts


def contestants(config: EvaluateConfig, device: torch.device) -> list[Contestant]:
    """The teacher first, if there is one.

    Raises:
        ConfigError: teacher and model have other vocabularies.
    """
    dtype = getattr(torch, config.dtype)
    found = []
    model = load(config.model, dtype=dtype).to(device)  # type: ignore[arg-type]
    if config.teacher is not None:
        teacher = load(config.teacher, dtype=dtype).to(device)  # type: ignore[arg-type]
        sizes = [one.config.get_text_config().vocab_size for one in (teacher, model)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"teacher={config.teacher} has {sizes[0]} tokens, the model {sizes[1]}; name the "
                "softmax model that it was made from"
            )
        found.append(Contestant(TEACHER, teacher))
    name = "model" if config.teacher is not None else config.model
    found.append(Contestant(name, model))
    if config.parts and found[-1].linear is not None:
        for part, off in ablation.parts(model).items():
            found.append(Contestant(part, model, off, is_part=True))
    return found


def writer(contestant: Contestant) -> PreTrainedModel:
    """The model, or a softmax model's twin that decodes with the same weights."""
    return linearized.models.decoder(contestant.model)

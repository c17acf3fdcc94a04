"""A row of a sweep on recall: a tiny model with some attention is trained on associative recall
(MQAR) and asked in rows of that length and in longer ones. Knows models and rows of numbers; knows
nothing of Ray.

All attentions get a state of about the same size, by the number of their features or by their
groups: what a model can look up grows with what it can keep."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from jobs import recall
from jobs.recall import RecallConfig
from jobs.trial import SOFTMAX, Setting, Trial, facts
from linearized.allocation import state_bytes
from linearized.evaluation import ablation
from linearized.evaluation.recall import answers, mqar

LENGTHS = (256, 1024, 4096)
"""Tokens of a row. The first is what is trained on."""
PAIRS = 16
SIZES = {
    "linformer": "features", "performer": "features", "rfa": "features", "yoso": "hashes",
    "relu": None, "transnormer": None,
}  # fmt: skip
"""The setting that decides how large a state is; None: none does. Of all others it is `group`."""


def run(trial: Trial, setting: Setting) -> dict[str, Any]:
    """Train, and count right answers: the score is that of rows as long as those trained on."""
    torch.set_num_threads(setting.threads)
    config = config_of(trial)
    settings = matched(config, trial.attention, trial.state_bytes)
    config = replace(config, settings=settings)
    began = time.perf_counter()
    model = recall.model_of(config, trial.attention)
    losses = recall.train(config, trial.attention, model)
    model.eval()
    found = {
        **facts(trial, model),
        "settings": settings,
        "losses": losses,
        "seconds": round(time.perf_counter() - began, 1),
        "tokens": config.steps * config.batch * config.length,
        **{f"at {length}": _right(config, model, length) for length in LENGTHS},
    }
    found["score"] = found["accuracy"] = found[f"at {LENGTHS[0]}"]
    if trial.attention != SOFTMAX:
        found["state_bytes"] = state_bytes(model)
        for part, off in ablation.parts(model).items():
            with off():
                found[part] = _right(config, model, LENGTHS[0])
    return found


def config_of(trial: Trial) -> RecallConfig:
    return RecallConfig(
        candidates=(), settings=trial.settings, length=LENGTHS[0], pairs=PAIRS, vocab=128,
        steps=trial.steps, batch=trial.batch, lr=trial.lr, seed=trial.seed,
    )  # fmt: skip


def matched(config: RecallConfig, attention: str, most: int | None) -> dict[str, Any]:
    """The settings with which the state is as large as it can be without taking more than `most`
    bytes, or as small as it can be."""
    settings = dict(config.settings)
    name = SIZES.get(attention, "group")
    if attention == SOFTMAX or name is None or most is None:
        return settings
    best = None
    for size in (4, 8, 16, 32, 64, 128, 256, 512):
        tried = {**settings, name: size}
        model = recall.model_of(replace(config, settings=tried), attention)
        if best is not None and state_bytes(model) > most:
            break
        best = tried
    assert best is not None
    return best


def _right(config: RecallConfig, model: PreTrainedModel, length: int) -> float:
    """The share of right answers in rows that were not trained on, one after the other."""
    generator = torch.Generator().manual_seed(config.seed + 1_000_003)
    right = asked = 0
    for _ in range(64):
        tokens, labels = mqar(
            1, length, pairs=config.pairs, vocab=config.vocab, generator=generator
        )
        found = answers(model, tokens, labels)
        right, asked = right + found[0], asked + found[2]
    return round(right / asked, 4)

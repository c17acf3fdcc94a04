"""The grids of jobs.sweep: which rows they have, and what the paper claims of them (You et al.,
"When Linear Attention Meets Autoregressive Decoding", ICML 2024). Knows trials and their results as
data."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.trial import SOFTMAX, Trial

OTHERS = ("linformer", "performer", "relu", "rfa", "transnormer", "yoso")
"""Earlier linear attentions."""
PAPER = "the paper's recipe"
Scores = Mapping[str, list[float]]
"""Of each row, one a seed: perplexity after training over the teacher's, or accuracy."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What somebody says, and what our rows say to it."""

    text: str
    found: Callable[[Scores], str]


@dataclass(frozen=True, kw_only=True)
class Grid:
    rows: tuple[Trial, ...]
    claims: tuple[Claim, ...]
    task: str = "text"
    """What the rows learn: `text`, `sentences` or `recall`."""

    @property
    def accuracy(self) -> bool:
        """Is the score of a row its accuracy, and not perplexity over the teacher's?"""
        return self.task != "text"


def variants(base: Trial) -> Grid:
    """Every attention, plain and augmented, beside softmax."""
    rows = [replace(base, name=SOFTMAX, attention=SOFTMAX, settings={})]
    for name in ("local", "global", "grouped", *OTHERS):
        for augment in (False, True):
            rows.append(_row(base, name, augment=augment))
    hedgehog = [
        _row(base, "hedgehog", augment=True),
        _row(base, "anchored", augment=True),
        replace(_row(base, "anchored", augment=True), name="anchored, hybrid", hybrid=4),
        replace(
            _row(base, "grouped", augment=True), name="grouped, window 1",
            settings={**base.settings, "augment": True, "window": 1, "sinks": 4},
        ),
    ]  # fmt: skip
    claims = (
        Claim(
            text="Augmented grouped attention has a lower perplexity than all earlier linear "
            "attentions, by up to 6.67 on LLaMA-2-7B (abstract).",
            found=lambda of: _beside(of, "grouped + conv", OTHERS),
        ),
        Claim(
            text="Local and global attention together are better than either alone (ablations).",
            found=lambda of: _beside(of, "grouped + conv", ("local + conv", "global + conv")),
        ),
        Claim(
            text="The masked convolution improves every linear attention (ablations).",
            found=lambda of: _gains(of, ("local", "global", "grouped", *OTHERS)),
        ),
    )
    return Grid(rows=(*rows, *hedgehog), claims=claims)


def augmentation(base: Trial) -> Grid:
    """The convolution added to other linear attentions."""
    names = ("rfa", "performer", "linformer")
    rows = [_row(base, name, augment=augment) for name in names for augment in (False, True)]
    claim = Claim(
        text="Added to RFA, Performer and Linformer, the augmentation gains 5 to 8 % of accuracy "
        "(appendix; there on classification, here on perplexity).",
        found=lambda of: _gains(of, names),
    )
    return Grid(rows=tuple(rows), claims=(claim,))


def ablations(base: Trial) -> Grid:
    """Grouped attention with other sizes and recipes, one thing changed at a time."""
    usual = _row(base, "grouped", augment=True)
    rows = [replace(usual, name="as usual")]
    rows += [_changed(usual, f"group {n}", group=n) for n in (8, 16, 32, 128)]
    rows += [_changed(usual, f"taps {n}", taps=n) for n in (4, 8, 64)]
    rows += [_row(base, "grouped", augment=False)]
    rows += [replace(usual, name=f"new parameters at {rate:g}", new_lr=rate)
             for rate in (2e-5, 1e-3, 1e-1)]  # fmt: skip
    rows += [replace(usual, name=f"learning rate {rate:g}", lr=rate) for rate in (1e-4, 3e-3)]
    total = usual.transfer + usual.steps
    rows += [replace(usual, name=f"transfer {n}", transfer=n, steps=total - n)
             for n in (0, total // 2, total)]  # fmt: skip
    rows += [
        replace(usual, name="text alone", text=1.0),
        replace(usual, name="teacher alone", text=0.0),
        replace(usual, name=PAPER, lr=2e-5, new_lr=2e-5, transfer=0, steps=total, text=1.0),
    ]  # fmt: skip
    claims = (
        Claim(
            text="LLaMA-2-7B is linearized by 1,000 steps at a constant 2e-5 for all parameters, "
            "without transfer (training details). New parameters, which begin at zero, move by at "
            "most 0.02 in these.",
            found=lambda of: _beside(of, "as usual", (PAPER,)),
        ),
        Claim(
            text="Groups of 64 tokens and a kernel of 63, half of it masked, are a good choice "
            "(ablations).",
            found=lambda of: _best(of, [row.name for row in rows[:8]]),
        ),
        Claim(
            text="Attention transfer before anything else decides the quality (Zhang et al., "
            "LoLCATs: 9.4 with 1,800 steps of it, 61.3 without).",
            found=lambda of: _best(of, [x for x in of if x.startswith("transfer")] + ["as usual"]),
        ),
    )
    return Grid(rows=tuple(rows), claims=claims)


def sentences(base: Trial) -> Grid:
    """Classifiers of three shapes with softmax and each linear attention, trained from scratch."""
    rows = []
    for shape in ("gpt2", "t5", "bert"):
        usual = replace(base, shape=shape, transfer=0, batch=32)
        rows.append(replace(usual, name=f"{shape}: softmax", attention=SOFTMAX, settings={}))
        for attention in ("local", "global", *OTHERS):
            row = _row(usual, attention, augment=False)
            rows.append(replace(row, name=f"{shape}: {row.name}"))
        row = _row(usual, "grouped", augment=True)
        rows.append(replace(row, name=f"{shape}: {row.name}"))
    claims = tuple(
        Claim(
            text=f"On GLUE with {model}, augmented grouped attention is more accurate than earlier "
            "linear attentions (there pretrained models are fine-tuned).",
            found=functools.partial(_most_accurate, shape),
        )
        for shape, model in (("gpt2", "GPT-2"), ("t5", "T5"), ("bert", "BERT"))
    )
    return Grid(rows=tuple(rows), claims=claims, task="sentences")


def recall(base: Trial) -> Grid:
    """Associative recall at equal state bytes, trained from scratch."""
    base = replace(base, transfer=0, batch=64, lr=3e-3, settings={"taps": 4})
    rows = [replace(base, name=SOFTMAX, attention=SOFTMAX, settings={}, state_bytes=None)]
    rows += [_row(base, name, augment=True) for name in ("local", "global", "grouped", *OTHERS)]
    rows += [_row(base, name, augment=True) for name in ("hedgehog", "anchored")]
    claim = Claim(
        text="What a model with a state of fixed size can look up grows with that size, and "
        "softmax looks up everything (Arora et al., Zoology).",
        found=lambda of: _ranked(of, list(of)),
    )
    return Grid(rows=tuple(rows), claims=(claim,), task="recall")


GRIDS: dict[str, Callable[[Trial], Grid]] = {
    "variants": variants,
    "augmentation": augmentation,
    "ablations": ablations,
    "sentences": sentences,
    "recall": recall,
}


def _row(base: Trial, attention: str, *, augment: bool) -> Trial:
    settings = {**base.settings, "augment": augment}
    name = attention + (" + conv" if augment else "")
    return replace(base, name=name, attention=attention, settings=settings)


def _changed(usual: Trial, name: str, **settings: Any) -> Trial:
    return replace(usual, name=name, settings={**usual.settings, **settings})


def _mean(of: Scores, name: str) -> float | None:
    return statistics.fmean(of[name]) if of.get(name) else None


def _beside(of: Scores, name: str, others: Sequence[str]) -> str:
    """A row beside others, with and without the convolution."""
    mine = _mean(of, name)
    known = {one: _mean(of, one) for other in others for one in (other, f"{other} + conv")}
    theirs = {one: value for one, value in known.items() if value is not None}
    if mine is None or not theirs:
        return "not measured"
    better = [one for one, value in theirs.items() if value < mine]
    best = min(theirs, key=lambda one: theirs[one])
    text = (
        f"{name} {mine:.3f} × the teacher's perplexity, the best other {best} {theirs[best]:.3f} ×"
    )
    said = f"; better than it: {', '.join(better)}" if better else "; better than all of them"
    return text + said


def _gains(of: Scores, names: Sequence[str]) -> str:
    """What the convolution makes of each."""
    found = []
    for name in names:
        plain, augmented = _mean(of, name), _mean(of, f"{name} + conv")
        if plain is not None and augmented is not None:
            found.append(f"{name} {100 * (augmented / plain - 1):+.1f} %")
    return "perplexity with the convolution: " + ", ".join(found) if found else "not measured"


def _best(of: Scores, names: Sequence[str]) -> str:
    means = {name: _mean(of, name) for name in names}
    known = sorted((value, name) for name, value in means.items() if value is not None)
    if not known:
        return "not measured"
    return ", ".join(f"{name} {value:.3f} ×" for value, name in known)


def _most_accurate(shape: str, of: Scores) -> str:
    return _ranked(of, [name for name in of if name.startswith(f"{shape}: ")])


def _ranked(of: Scores, names: Sequence[str]) -> str:
    """The most accurate first."""
    means = {name: _mean(of, name) for name in names}
    known = sorted(((value, name) for name, value in means.items() if value is not None))[::-1]
    if not known:
        return "not measured"
    return ", ".join(f"{name.rpartition(': ')[2]} {value:.1%}" for value, name in known)

"""Does the far part remember? Trains tiny models from scratch on associative recall (MQAR), where
most questions ask for a pair that lies beyond the window, and counts right answers of the softmax
model, of each candidate, and of each candidate without its far part.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.progress import Progress
from jobs import cli, measure
from linearized.config import LinearConfig
from linearized.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    candidates: tuple[str, ...] = ("anchored", "grouped")
    """Names of attentions, or of combinations such as `anchored`."""
    settings: Mapping[str, Any] = field(default_factory=lambda: {"group": 4, "taps": 4})
    """Fields of LinearConfig that all candidates share."""
    length: int = 128
    """Number of tokens in a row."""
    pairs: int = 8
    vocab: int = 64
    hidden: int = 64
    heads: int = 4
    layers: int = 2
    steps: int = 600
    batch: int = 64
    lr: float = 3e-3
    rows: int = 256
    """Number of rows that answers are counted on."""
    threads: int = 0
    """Number of torch's threads; 0 leaves the choice to torch."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "pairs", "vocab", "hidden", "heads", "layers", "steps", "batch",
                     "rows"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % (2 * self.heads):
            raise ConfigError(
                f"hidden must be an even multiple of heads = {self.heads}, got {self.hidden}"
            )
        most = min(self.length // 4, self.vocab // 2 - 1)
        if self.pairs > most:
            raise ConfigError(
                f"pairs={self.pairs} do not fit; a length of {self.length} and a vocab of "
                f"{self.vocab} allow for {max(most, 0)}"
            )
        for name in self.candidates:
            LinearConfig.named(name, **self.settings)


def recall() -> RecallConfig:
    """Eight pairs in 128 tokens, of which the last 16 at most and the first 4 are near: a few
    minutes on two CPU cores."""
    return RecallConfig()


RECIPES = {"recall": recall}


def main(config: RecallConfig) -> None:
    import torch

    from linearized.evaluation import ablation

    if config.threads:
        torch.set_num_threads(config.threads)
    rows, results = [], {}
    for name in ("softmax", *config.candidates):
        began = time.perf_counter()
        model = model_of(config, name)
        train(config, name, model)
        found = {"answers": _right(config, model)}
        if name != "softmax" and ablation.has_far_part(model):
            with ablation.without_far_part(model):
                found["without far part"] = _right(config, model)
        results[name] = {**found, "seconds": round(time.perf_counter() - began, 1)}
        without = found.get("without far part")
        rows.append([name, f"{found['answers']:.3f}", "–" if without is None else f"{without:.3f}"])
    console = measure.console()
    title = f"{config.pairs} pairs in {config.length} tokens: share of right answers"
    measure.show(title, ["", "right", "its far part off"], rows, console)
    machine = measure.Machine.measure(torch.device("cpu"), torch.float32)
    console.print(machine)
    print(measure.last_line("jobs.recall", machine, results=results))


def model_of(config: RecallConfig, name: str) -> PreTrainedModel:
    """A tiny Llama with random weights and this attention; `softmax` leaves it as it is."""
    import torch
    import transformers

    import linearized

    torch.manual_seed(config.seed)
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=2 * config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.length,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: PreTrainedModel = transformers.LlamaForCausalLM(shape)
    if name != "softmax":
        linear = LinearConfig.named(name, **config.settings)
        model = linearized.linearize(model, linear)
    return model


def train(config: RecallConfig, name: str, model: PreTrainedModel) -> list[list[float]]:
    """Train it. The loss of every tenth step, as [step, loss]."""
    import torch
    from torch.nn import functional as F

    from linearized.training.optim import Descent, Optim

    generator = torch.Generator().manual_seed(config.seed)
    optim = Optim(lr=config.lr, new_lr=1e-2, weight_decay=0.0)
    descent = Descent(optim, model, config.steps, betas=(0.9, 0.999))
    losses: list[list[float]] = []
    with Progress(name, total=config.steps, unit="steps") as progress:
        for step in range(config.steps):
            tokens, labels = _rows(config, config.batch, generator)
            logits = model(tokens, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            descent.clip(model.parameters())
            descent.step()
            if step % 10 == 9 or step == config.steps - 1:
                losses.append([step, round(float(loss.detach()), 4)])
                progress.update(step + 1, loss=losses[-1][1])
    return losses


def _right(config: RecallConfig, model: PreTrainedModel) -> float:
    """The share of questions that a model answers, on rows that it was not trained on."""
    import torch

    from linearized.evaluation.recall import IGNORED

    generator = torch.Generator().manual_seed(config.seed + 1_000_003)
    tokens, labels = _rows(config, config.rows, generator)
    with torch.no_grad():
        guesses = model.eval()(tokens, use_cache=False).logits.argmax(-1)
    asked = labels != IGNORED
    return round(float((guesses == labels)[asked].float().mean()), 4)


def _rows(
    config: RecallConfig, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    from linearized.evaluation.recall import mqar

    return mqar(count, config.length, pairs=config.pairs, vocab=config.vocab, generator=generator)


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)

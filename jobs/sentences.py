"""A row of a sweep on sentences: a GPT-2-, T5- or BERT-shaped model gets some attention and learns
from scratch to tell what kind a sentence is of. Knows models and labelled sentences; knows nothing
of Ray.

The published experiments fine-tune pretrained models on GLUE. These are small ones without any
pretraining, all trained alike: they tell attentions apart, and say nothing of absolute accuracy.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

import linearized
from jobs.trial import SOFTMAX, Setting, Trial, check_loss, facts
from linearized.config import LinearConfig
from linearized.errors import ConfigError
from linearized.evaluation.questions import labelled
from linearized.training.optim import Descent, Optim
from linearized.training.tokenizer import Encoder

SHAPES = ("gpt2", "t5", "bert")
WIDTH, LAYERS, HEADS = 96, 3, 4
LENGTH = 64
"""Tokens of a sentence, its first ones."""
SMALLEST = 10
"""Tokens of the longest sentence of a batch, at least."""
VOCABULARY = 4096
Example = tuple[list[int], int]
Classify = Callable[[PreTrainedModel, Tensor, Tensor], Tensor]
"""Of tokens [B, T] and their mask, logits [B, kinds]."""


def run(trial: Trial, setting: Setting) -> dict[str, Any]:
    """Train, and measure accuracy on the sentences that are held out. `setting.data` holds a
    tokenizer, train and held_out, as `prepare` leaves them.

    Raises:
        DataError: a table without sentences; a loss that is not a number.
    """
    assert setting.data is not None
    torch.set_num_threads(setting.threads)
    torch.manual_seed(trial.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, held_out = (_examples(setting.data, name) for name in ("train", "held_out"))
    kinds = max(label for _, label in train) + 1
    model, classify = _model(trial, _size(setting.data), kinds)
    model.to(device)  # type: ignore[arg-type]
    began = time.perf_counter()
    losses = _train(trial, model, classify, train)
    seconds = round(time.perf_counter() - began, 1)
    accuracy = _accuracy(model, classify, held_out)
    tokens = trial.steps * trial.batch
    return {
        **facts(trial, model),
        "accuracy": accuracy,
        "score": accuracy,
        "losses": losses,
        "seconds": seconds,
        "tokens": tokens * sum(len(ids) for ids, _ in train) // len(train),
    }


def prepare(train: Path, held_out: Path, folder: Path) -> None:
    """Copy two tables of GLUE into a folder, with a tokenizer for the sentences to train on.

    Raises:
        DataError: tables without sentences and labels.
    """
    from linearized.training import tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(digest_size=8)
    for name, file in (("train", train), ("held_out", held_out)):
        labelled(file)
        content = file.read_bytes()
        digest.update(content)
        (folder / f"{name}{file.suffix}").write_bytes(content)
    (folder / "data.json").write_text(json.dumps({"key": digest.hexdigest()}))
    tokenizer.train((text for text, _ in labelled(train)), VOCABULARY, folder / "tokenizer")


def _model(trial: Trial, vocab: int, kinds: int) -> tuple[PreTrainedModel, Classify]:
    """The last two tokens of the vocabulary are padding and the end of a sentence."""
    made: Any
    t: Any = transformers
    pad, end = vocab - 2, vocab - 1
    if trial.shape == "gpt2":
        made = t.GPT2ForSequenceClassification(t.GPT2Config(
            vocab_size=vocab, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH + 2,
            num_labels=kinds, pad_token_id=pad, bos_token_id=end, eos_token_id=end,
        ))  # fmt: skip
    elif trial.shape == "bert":
        made = t.BertForSequenceClassification(t.BertConfig(
            vocab_size=vocab, hidden_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, intermediate_size=4 * WIDTH, num_labels=kinds,
            max_position_embeddings=LENGTH + 2, pad_token_id=pad,
        ))  # fmt: skip
    elif trial.shape == "t5":
        made = t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=vocab, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=4 * WIDTH, num_heads=HEADS,
            num_layers=LAYERS - 1, pad_token_id=pad, eos_token_id=end, decoder_start_token_id=pad,
        ))  # fmt: skip
    else:
        raise ConfigError(f"unknown shape {trial.shape!r}; choose from {', '.join(SHAPES)}")
    if trial.attention != SOFTMAX:
        with warnings.catch_warnings():  # that T5's relative positions are the convolution's now
            warnings.filterwarnings("ignore", message=".*relative position bias")
            linearized.linearize(made, LinearConfig.named(trial.attention, **trial.settings))
    return made, _first_word(kinds, pad) if trial.shape == "t5" else _head


def _head(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, attention_mask=mask).logits
    return logits


def _first_word(kinds: int, start: int) -> Classify:
    """A model that answers in text answers with one of the first tokens of its vocabulary."""

    def classify(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
        begin = torch.full((len(tokens), 1), start, device=tokens.device)
        logits: Tensor = model(
            input_ids=tokens, attention_mask=mask, decoder_input_ids=begin, use_cache=False
        ).logits
        return logits[:, 0, :kinds]

    return classify


def _train(
    trial: Trial, model: PreTrainedModel, classify: Classify, examples: Sequence[Example]
) -> list[list[float]]:
    optim = Optim(lr=trial.lr, new_lr=trial.new_lr, warmup=min(20, trial.steps // 5))
    descent = Descent(optim, model, trial.steps, betas=(0.9, 0.98))
    losses: list[list[float]] = []
    model.train()
    for step, chosen in zip(range(trial.steps), _order(len(examples), trial), strict=False):
        tokens, mask, labels = _batch(model, [examples[i] for i in chosen])
        loss = F.cross_entropy(classify(model, tokens, mask).float(), labels)
        loss.backward()
        value = check_loss(trial, step, loss)
        descent.clip(model.parameters())
        descent.step()
        if step % 10 == 0 or step == trial.steps - 1:
            losses.append([step, round(value, 4)])
    model.eval()
    return losses


@torch.no_grad()
def _accuracy(model: PreTrainedModel, classify: Classify, examples: Sequence[Example]) -> float:
    right = 0
    for first in range(0, len(examples), 64):
        tokens, mask, labels = _batch(model, examples[first : first + 64])
        right += int((classify(model, tokens, mask).argmax(-1) == labels).sum())
    return round(right / len(examples), 5)


def _batch(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded on the right."""
    pad, end = model.config.vocab_size - 2, model.config.vocab_size - 1
    rows = [torch.tensor([*ids, end]) for ids, _ in examples]
    tokens = pad_sequence(rows, batch_first=True, padding_value=pad)
    tokens = F.pad(tokens, (0, max(SMALLEST - tokens.shape[1], 0)), value=pad)
    labels = torch.tensor([label for _, label in examples])
    place = model.device
    return tokens.to(place), (tokens != pad).to(place), labels.to(place)


def _order(size: int, trial: Trial) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(trial.seed)
    while True:
        for part in torch.randperm(size, generator=generator).split(trial.batch):
            yield part.tolist()


def _examples(folder: Path, name: str) -> list[Example]:
    (file,) = sorted(folder.glob(f"{name}.*"))
    encode = Encoder(folder / "tokenizer")
    texts, labels = zip(*labelled(file), strict=True)
    return [(ids[:LENGTH], label) for ids, label in zip(encode(texts), labels, strict=True)]


def _size(folder: Path) -> int:
    """Of the vocabulary, with padding and the end of a sentence after the tokenizer's own."""
    return len(transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")) + 2

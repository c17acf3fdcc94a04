"""Students and teachers of a run, from folders or from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

import linearized
from jobs.run import FlashShape, Heads, Run, Shape
from jobs.train import engine
from linearized import FlashConfig
from linearized.errors import ConfigError, ModelError
from linearized.folder import outline
from linearized.medusa import MedusaHeads
from linearized.models import new_parameters
from linearized.slots import NAME
from linearized.support import refuse_unsupported, warn_of_losses
from linearized.training.batch import keep_apart


def build(run: Run, device: torch.device) -> tuple[nn.Module, PreTrainedModel | None]:
    """(student, teacher) on this worker's device. On a GPU the teacher is bfloat16, as the student
    is for DeepSpeed.

    Raises:
        ConfigError: student and teacher do not fit each other.
        ModelError: one of them cannot be loaded, linearized, or taught documents in a row.
    """
    dtype = torch.bfloat16 if run.workers.gpu else torch.float32
    teacher = None if run.teacher is None else linearized.load(run.teacher, dtype=dtype)
    if teacher is not None:
        module: nn.Module = teacher
        keep_apart(module.to(device))
    if isinstance(run.student, Heads):
        if teacher is None:
            raise ConfigError("Medusa's heads need a target, as the run's teacher")
        heads = MedusaHeads.on(teacher, run.student.count, linearized.fingerprint(teacher))
        return heads.train().to(device), teacher
    shared = run.workers.zero == 3 and isinstance(run.student, Path)
    if shared:
        assert isinstance(run.student, Path)
        student = _shared(run.student, run)
    else:
        student = _student(run, teacher)
        if run.linear is not None:
            linearized.linearize(student, run.linear)
    if teacher is not None and teacher.config.vocab_size != student.config.vocab_size:
        raise ConfigError(
            f"teacher {run.teacher} has a vocabulary of {teacher.config.vocab_size}, the student "
            f"of {student.config.vocab_size}; they must share one tokenizer"
        )
    if shared:  # nobody could call it yet
        return student.train(), teacher
    student = student.train().to(device)
    keep_apart(student)
    return student, teacher


def _shared(folder: Path, run: Run) -> PreTrainedModel:
    """A student whose weights are shared out over workers from the first on, so that none of them
    ever holds it whole. It is built as a linearized folder is opened."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if run.linear is not None:
        sketch = outline(folder)
        refuse_unsupported(sketch, run.linear)
        warn_of_losses(sketch)
        setattr(config, NAME, run.linear.to_dict())
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    kind = kind or transformers.AutoModelForCausalLM
    make = getattr(kind, "_from_config", None) or kind.from_config
    # Random weights would be made of what a worker has of each, and read from the folder anyway.
    with engine.shared_out(run.stages[0], run.workers), no_init_weights():
        student: PreTrainedModel = make(config, dtype=torch.float32)
    student.tie_weights()
    put: set[str] = set()
    engine.put(student, _weights(folder, student, put))
    new = {id(parameter) for parameter in new_parameters(student)}
    lacking = [n for n, p in student.named_parameters() if n not in put and id(p) not in new]
    if lacking:
        raise ModelError(
            f"{folder} lacks {len(lacking)} of the weights its config asks for, among "
            f"them {', '.join(sorted(lacking)[:3])}"
        )
    return student


def _weights(folder: Path, student: nn.Module, put: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of the folder's files that are parameters of the student; their names are added to
    `put`. Buffers are filled on the way."""
    parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
    prefix = f"{getattr(student, 'base_model_prefix', '')}."
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                found = [n for n in (name, prefix + name) if n in parameters or n in buffers]
                if not found:
                    continue
                if found[0] in buffers:
                    buffers[found[0]].copy_(opened.get_tensor(name))
                else:
                    put.add(found[0])
                    yield found[0], opened.get_tensor(name)


def _student(run: Run, teacher: PreTrainedModel | None) -> Any:
    shape = run.student
    if not isinstance(shape, Shape | FlashShape):
        assert not isinstance(shape, Heads)
        return linearized.load(shape)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.data / "tokenizer")
    vocab_size = len(tokenizer) if teacher is None else teacher.config.vocab_size
    config = (_flash if isinstance(shape, FlashShape) else _llama)(shape, tokenizer, vocab_size)
    return transformers.AutoModelForCausalLM.from_config(config)


def _llama(shape: Any, tokenizer: Any, vocab_size: int) -> Any:
    return transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.max_context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _flash(shape: Any, tokenizer: Any, vocab_size: int) -> Any:
    return FlashConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        head_dim=shape.head_dim,
        group=shape.group,
        augment=shape.augment,
        taps=shape.taps,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

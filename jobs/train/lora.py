"""Low-rank adapters put into a student, and taken out again: the one door to PEFT. (Hu et al.,
"LoRA: Low-Rank Adaptation of Large Language Models", 2021.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.run import Lora
from jobs.train import engine
from linearized.errors import ConfigError
from linearized.models import new_parameters
from linearized.slots import SUBMODULE

FOLDER = "adapter"
"""In the result's folder, for adapters that are not merged."""
_NAME = "default"


def put_in(student: nn.Module, lora: Lora) -> list[nn.Parameter]:
    """Give linear layers their adapters, in place. Returns what is then trained: adapters, and all
    that linearizing added.

    Raises:
        ConfigError: PEFT is not installed, or there are no such layers.
    """
    peft = _peft()
    names = _targets(student, lora.modules)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names)
    peft.inject_adapter_in_model(config, student, adapter_name=_NAME)
    adapters = [p for name, p in student.named_parameters() if "lora_" in name]
    for adapter in adapters:
        adapter.data = adapter.data.float()
    return adapters + new_parameters(student)


def take_out(student: nn.Module, *, merge: bool) -> dict[str, torch.Tensor]:
    """Put the layers back in their place, with the adapters' product added to their weights or
    without. Returns the adapters by the names that PEFT's files have for them."""
    kept: dict[str, torch.Tensor] = {}
    for name, layer in _layers(student):
        with engine.whole(layer, changed=merge):
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)[_NAME].weight
                kept[f"base_model.model.{name}.{part}.weight"] = weight.detach().cpu().clone()
            if merge:
                layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(parent), leaf, layer.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        student.__dict__.pop(attribute, None)
    return kept


def bases(student: nn.Module) -> set[int]:
    """Ids of the parameters into which adapters would be merged."""
    return {id(layer.get_base_layer().weight) for _, layer in _layers(student)}


def save(folder: Path, adapters: dict[str, torch.Tensor], lora: Lora, base: Path) -> None:
    """Write adapters as PEFT reads them."""
    import safetensors.torch

    peft = _peft()
    names = sorted({name.split(".lora_")[0] for name in adapters})
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=[name.removeprefix("base_model.model.") for name in names],
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in adapters.items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def _layers(student: nn.Module) -> list[tuple[str, Any]]:
    _peft()
    from peft.tuners.lora import LoraLayer

    return [(name, x) for name, x in student.named_modules() if isinstance(x, LoraLayer)]


def _targets(student: nn.Module, modules: str | tuple[str, ...]) -> list[str]:
    """Full names of the layers that get adapters."""
    linear = {
        name: layer
        for name, layer in student.named_modules()
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    }
    head: Any = getattr(student, "get_output_embeddings", lambda: None)()
    inner = [
        name
        for name, layer in linear.items()
        if layer is not head and f".{SUBMODULE}." not in f".{name}."
    ]
    if modules == "auto":
        return inner
    wanted = (modules,) if isinstance(modules, str) else modules
    found = [name for name in inner if name.rpartition(".")[2] in wanted]
    missing = set(wanted) - {name.rpartition(".")[2] for name in found}
    if missing:
        there = sorted({name.rpartition(".")[2] for name in inner})
        raise ConfigError(
            f"lora.modules names {', '.join(sorted(missing))}, which the model does not have; "
            f"there are {', '.join(there)}"
        )
    return found


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "lora needs PEFT, which is not installed: pip install 'peft>=0.18'"
        ) from error
    return peft

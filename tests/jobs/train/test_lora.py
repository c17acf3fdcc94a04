"""Adapters go in, learn, and come out; what linearizing added is trained beside them."""

from __future__ import annotations

import builtins

import pytest
import torch

from jobs.run import Lora
from jobs.train import lora
from linearized.errors import ConfigError
from linearized.models import new_parameters

peft = pytest.importorskip("peft")
TOKENS = torch.arange(3, 40)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture
def student(linear):
    return linear(dtype=torch.float32)


def learned(student, settings: Lora) -> list[torch.nn.Parameter]:
    """With adapters that do something."""
    trained = lora.put_in(student, settings)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return trained


def test_they_begin_as_nothing_and_merge_into_what_they_were(student):
    names, before = {name for name, _ in student.named_parameters()}, logits(student)
    lora.put_in(student, Lora(rank=2))
    assert torch.equal(logits(student), before)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned, bases = logits(student), lora.bases(student)
    lora.take_out(student, merge=True)
    assert {name for name, _ in student.named_parameters()} == names
    assert torch.allclose(logits(student), tuned, atol=1e-4)
    assert not torch.allclose(tuned, before, atol=1e-2)
    changed = {id(p) for name, p in student.named_parameters() if name.endswith("_proj.weight")}
    assert bases == changed
    assert not hasattr(student, "peft_config")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_without_merging_the_weights_are_what_they_were(student, tmp_path):
    before = logits(student)
    learned(student, Lora(rank=2, alpha=8.0))
    tuned = logits(student)
    adapters = lora.take_out(student, merge=False)
    assert torch.equal(logits(student), before)
    lora.save(tmp_path / "adapter", adapters, Lora(rank=2, alpha=8.0), tmp_path)
    again = peft.PeftModel.from_pretrained(student, tmp_path / "adapter")
    assert torch.allclose(logits(again), tuned, atol=1e-5)


def test_what_linearizing_added_is_trained_in_full(student):
    new = {id(p) for p in new_parameters(student)}
    trained = {id(p) for p in learned(student, Lora())}
    adapters = {id(p) for name, p in student.named_parameters() if "lora_" in name}
    assert new and adapters and trained == new | adapters


def test_only_the_layers_that_are_named_get_them(student):
    learned(student, Lora(modules=("q_proj", "down_proj")))
    found = {n.split(".lora_")[0] for n, _ in student.named_parameters() if ".lora_" in n}
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "down_proj"}


def test_layers_that_are_not_there_are_refused_with_those_that_are(student):
    with pytest.raises(ConfigError, match="names qproj, which .*there are .*q_proj"):
        lora.put_in(student, Lora(modules="qproj"))


def test_without_peft_it_is_said_how_to_get_it(student, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install"):
        lora.put_in(student, Lora())

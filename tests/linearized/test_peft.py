"""Linear attention that PEFT has wrapped is found inside, and called through its wrapper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import linearized
from linearized.models import linear_modules, new_parameters
from linearized.slots import SUBMODULE, variant_of

PROMPT = torch.arange(3, 15)[None]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 16}


class Wrapper(nn.Module):
    """In the shape of PEFT's ModulesToSaveWrapper: a copy for every adapter."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original)})
        self.active_adapter = "default"
        self.disable_adapters = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            return self.original_module(x, *args, **kwargs)
        return self.modules_to_save[self.active_adapter](x, *args, **kwargs)


def plain(model) -> torch.Tensor:
    text = PROMPT
    with torch.no_grad():
        for _ in range(16):
            logits = model(input_ids=text, use_cache=False).logits[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    return text


def test_a_wrapped_attention_is_called_through_its_wrapper(linear):
    model = linear(dtype=torch.float64)
    before = plain(model)
    for module in linear_modules(model).values():
        wrapper = Wrapper(getattr(module, SUBMODULE))
        setattr(module, SUBMODULE, wrapper)
        nn.init.normal_(wrapper.modules_to_save["default"].alpha, std=3.0)
        assert variant_of(module) is wrapper.modules_to_save["default"]
    want = plain(model)
    assert not torch.equal(want, before)
    assert torch.equal(model.generate(PROMPT, **GREEDY), want)
    spoken = linearized.generate(model, PROMPT[0].tolist(), max_new_tokens=16, drafter="ngram")
    assert spoken == want[0, 12:].tolist()
    linearized.set_backend(model, "reference")
    assert torch.equal(plain(model), want)
    for module in linear_modules(model).values():
        getattr(module, SUBMODULE).disable_adapters = True
        assert variant_of(module) is getattr(module, SUBMODULE).original_module
    assert torch.equal(model.generate(PROMPT, **GREEDY), before)
    assert new_parameters(model)


def test_lora_of_peft(linear):
    peft = pytest.importorskip("peft")
    model = linear(dtype=torch.float64)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[SUBMODULE])
    tuned = peft.get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter.data, std=2.0)
    assert torch.equal(tuned.generate(input_ids=PROMPT, **GREEDY), plain(tuned))

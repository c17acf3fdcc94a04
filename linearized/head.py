"""The last product of a model, in float32 also where its weights are not. Knows `nn.Linear`; knows
nothing of tokens.

Logits in bfloat16 are 0.06 apart around 10, so that the two most probable tokens are often equal,
and which of them a model says depends on how many rows were multiplied at once. The sums behind the
logits are float32 in any case: keeping them costs little and makes a tie as rare as in float32.

V vocabulary, C hidden width.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

HALF = (torch.bfloat16, torch.float16)
SAMPLES = 64


class OutputLinear(nn.Linear):
    """An output matrix [V, C]. Half-precision weights give float32 logits, where no gradient is
    needed."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        plain = weight.dtype not in HALF or torch.is_grad_enabled()
        if plain or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        logits: Tensor = torch.ops.linearized.wide_linear(x, weight)
        return logits if self.bias is None else logits + self.bias

    @classmethod
    def of(cls, linear: nn.Linear) -> OutputLinear:
        """The same parameters."""
        made = cls.__new__(cls)  # has no parameters of its own that could be made first
        made.__dict__.update(linear.__dict__)
        return made


def widen_head(model: PreTrainedModel) -> None:
    """Let the model's output matrix, if it has one of its own, give float32 logits."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(OutputLinear.of(head))


class _Wide:
    """Float32 copies of the weights that were used last. It is noticed when one is written, also
    through `.data`, if the write touches any of a few numbers spread over it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, weight: Tensor) -> Tensor:
        version = 0 if weight.is_inference() else weight._version
        spread = weight.detach().flatten()[:: max(weight.numel() // SAMPLES, 1)]
        key = (weight.data_ptr(), tuple(weight.shape), version, spread.float().numpy().tobytes())
        if key not in self._known:
            stale = [other for other in self._known if other[0] == key[0]]
            for other in stale or list(self._known)[: max(len(self._known) - self._most + 1, 0)]:
                del self._known[other]
            self._known[key] = weight.detach().float()
            weakref.finalize(weight, self._known.pop, key, None).atexit = False
        return self._known[key]


_wide = _Wide(most=4)

# An operator of its own, so that a compiled program asks for the copy anew each time.
_library = torch.library.Library("linearized", "FRAGMENT")
_library.define("wide_linear(Tensor x, Tensor weight) -> Tensor")


def _on_cpu(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), _wide.of(weight))


def _on_cuda(x: Tensor, weight: Tensor) -> Tensor:
    product: Any = torch.mm
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = product(rows, weight.t(), out_dtype=torch.float32)
    return out.view(*x.shape[:-1], len(weight))


_library.impl("wide_linear", _on_cpu, "CPU")
_library.impl("wide_linear", _on_cuda, "CUDA")


@torch.library.register_fake("linearized::wide_linear", lib=_library)
def _shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)

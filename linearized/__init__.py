"""Turn a softmax language model into a linear one, and decode with it.

    model = linearized.linearize(path, linearized.LinearConfig(attention="grouped", augment=True))
    out = linearized.generate(model, prompt, max_new_tokens=64, drafter="ngram")

Importing it registers linearized models with transformers' `from_pretrained`.
"""

from linearized import ops
from linearized.compiled import compile
from linearized.config import LinearConfig
from linearized.flash import FlashConfig, FlashForCausalLM
from linearized.models import (
    commit,
    encode,
    extend,
    fingerprint,
    linearize,
    load,
    new_state,
    set_backend,
    verify,
)
from linearized.packing import pack
from linearized.speculative import generate
from linearized.state import DecodeState

__all__ = [
    "DecodeState",
    "FlashConfig",
    "FlashForCausalLM",
    "LinearConfig",
    "commit",
    "compile",
    "encode",
    "extend",
    "fingerprint",
    "generate",
    "linearize",
    "load",
    "new_state",
    "ops",
    "pack",
    "set_backend",
    "verify",
]

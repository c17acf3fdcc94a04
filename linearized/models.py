"""Hugging Face models in and out, and the three verbs of decoding: extend, verify, commit.

Knows what users call; `callbacks.py` and `cache.py` know what transformers calls.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from linearized import compiled, ops
from linearized.allocation import check_state, new_state
from linearized.attach import attach, own_config
from linearized.attention import LinearAttention
from linearized.config import LinearConfig
from linearized.context import Context
from linearized.errors import ModelError, StateError
from linearized.fold import accept, fold
from linearized.folder import load
from linearized.head import widen_head
from linearized.identity import fingerprint, forget
from linearized.probe import probe, probe_softmax
from linearized.rope import fix_rope
from linearized.slots import (
    NAME,
    attention_modules,
    layer_number,
    linear_config,
    linear_modules,
    named_attention_modules,
    new_parameters,
)
from linearized.state import DecodeState, Pending
from linearized.step import PARTS, mark_part, read, set_stepper, step
from linearized.support import refuse_unsupported, warn_of_losses
from linearized.tables import check_length, context_limit
from linearized.tree import Tree

__all__ = [
    "attention_modules",
    "check_decoder",
    "check_state",
    "commit",
    "context_limit",
    "decoder",
    "encode",
    "extend",
    "fingerprint",
    "linear_config",
    "linear_modules",
    "linearize",
    "load",
    "new_parameters",
    "new_state",
    "set_backend",
    "shortened",
    "sketch",
    "verify",
]

SMALL = ops.FEW
"""Up to this many tokens `extend` goes the tree's way, which has less to set up."""


def linearize(model: PreTrainedModel | str | Path, config: LinearConfig) -> PreTrainedModel:
    """Replace softmax attention in every layer of a Hugging Face model, or in `config.layers`, in
    place. All its parameters are kept, new ones are added. Warns of what the softmax model does
    with its scores that has no counterpart here.

    Raises:
        ModelError: it cannot be linearized; says why.
        ConfigError: settings that are for models that read one way, and this one does not.
    """
    if isinstance(model, str | Path):
        model = load(model)
    refuse_unsupported(model, config)
    if config.layers != ():
        warn_of_losses(model)
    with contextlib.ExitStack() as undo:  # if it is refused
        undo.callback(forget, model)
        undo.enter_context(own_config(model))
        undo.callback(fix_rope(model))
        if config.layers is None:
            model.set_attn_implementation(NAME)
        else:
            probe_softmax(model)
        undo.enter_context(attach(cast(PreTrainedModel, model.base_model), config))
        probe(model, _decoded)
        forget(model)
        undo.pop_all()
    widen_head(model)
    return model


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """This model, if it is linearized. Else a twin that has the same weights in memory, keeps
    softmax in every layer, and decodes with `extend`, `verify` and `commit`; its state grows."""
    if getattr(model.config, NAME, None):
        return model
    weights = itertools.chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(weight): weight for weight in weights})
    return linearize(twin, LinearConfig(attention="grouped", layers=()))


def set_backend(model: PreTrainedModel, backend: str | None) -> None:
    """Who computes linear attention from now on: "cpu" (chunks, on every device), "triton" (on a
    GPU, and of causal attentions only, without `linformer`), "reference" (slow and plain), or None:
    the library chooses.

    Raises:
        ConfigError: there is no such backend, or not here.
    """
    ops.choose(backend)
    linear_config(model)
    for module in model.modules():
        if isinstance(module, LinearAttention):
            module.backend = backend


@torch.no_grad()
def extend(
    model: PreTrainedModel,
    tokens: Tensor,
    state: DecodeState,
    *,
    logits_to_keep: int = 0,
    mask: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Read `tokens` [B, T] and fold them into `state`, in place. Logits [B, T, V], of the last
    `logits_to_keep` columns only if that is above 0. `mask` [B, T] is False where a row has no
    token; `counts` [B] says how many it has, which spares a hybrid on a GPU the question."""
    _check(model, tokens, state)
    check_length(model, state, tokens.shape[1])
    if mask is None and tokens.shape[1] <= SMALL:
        found = step(model, Tree.chain(tokens), state)
    else:
        found = read(model, tokens, state, mask=mask, logits_to_keep=logits_to_keep)
    assert found.fresh is not None
    fold(state, found.fresh, mask, counts)
    return found.logits[:, -logits_to_keep:]


@torch.no_grad()
def verify(
    model: PreTrainedModel,
    tokens: Tensor,
    parents: Tensor,
    state: DecodeState,
    *,
    hidden: bool = False,
) -> tuple[Tensor, Pending]:
    """Logits [B, N, V] at every node of one token tree per row, each as decoding along its path
    would give. `parents` [B, N]: -1 for a child of the last committed token, else a smaller index.
    The state is untouched; hand `Pending` to `commit`. With `hidden` it holds what the last layer
    gave, too."""
    _check(model, tokens, state)
    tree = Tree.of(tokens, parents)
    if context_limit(model) is not None:
        check_length(model, state, int(tree.visible.sum(-1).max()))
    found = step(model, tree, state, hidden=hidden)
    assert found.fresh is not None
    return found.logits, Pending.of(found.fresh, parents, state, found.hidden)


@torch.no_grad()
def sketch(
    model: PreTrainedModel,
    tokens: Tensor,
    parents: Tensor,
    state: DecodeState,
    *,
    layers: Sequence[int],
) -> Tensor:
    """Logits [B, N, V] as `verify` has them, of the model with these layers only, on top of the
    whole model's state: a guess at what `verify` would say, which needs no state of its own."""
    _check(model, tokens, state)
    return step(shortened(model, layers), Tree.of(tokens, parents), state).logits


def shortened(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """The model with these of its layers only, which are shared with it.

    Raises:
        ModelError: it has no such list of layers.
    """
    parts: dict[object, PreTrainedModel] = model.__dict__.setdefault(PARTS, {})
    wanted = tuple(layers), compiled.is_compiled(model), id(model.get_output_embeddings())
    if wanted not in parts:
        parts[wanted] = _shortened(model, wanted[0])
    return parts[wanted]


@torch.no_grad()
def encode(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> DecodeState:
    """Let the encoder of an encoder-decoder model read `tokens` [B, T] (those that `mask` keeps):
    the state from which its decoder begins. Its size does not depend on T.

    Raises:
        ModelError: the model has no encoder.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} has no encoder: use new_state and extend")
    state = new_state(model, len(tokens))
    encoded = model.get_encoder()(input_ids=tokens, attention_mask=mask)
    context = Context(state=state, encoding=True)
    begin = torch.full((len(tokens), 1), model.config.decoder_start_token_id, device=tokens.device)
    model.get_decoder()(
        input_ids=begin,
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=mask,
        use_cache=False,
        linear_context=context,
    )
    context.remember()
    return state


@torch.no_grad()
def commit(state: DecodeState, pending: Pending, path: Sequence[Sequence[int]]) -> None:
    """Fold the accepted nodes into the state: for each row a path from a child of the last
    committed token downwards (it may be empty).

    Raises:
        StateError: not a path of that tree, or the state has moved on since.
    """
    pending.check(path, state)
    accept(state, pending.fresh, path)


def _shortened(model: PreTrainedModel, layers: tuple[int, ...]) -> PreTrainedModel:
    name = type(model).__name__
    names = [name for name, _ in named_attention_modules(model)]
    stacks = {name.partition(f".{layer_number(name)}.")[0] for name in names}
    stack = stacks.pop()
    found = model.get_submodule(stack)
    if stacks or not isinstance(found, torch.nn.ModuleList):
        raise ModelError(f"{name} has more than one list of layers; none can be left out")
    if not layers or not all(0 <= layer < len(found) for layer in layers):
        raise ModelError(f"{name} has layers 0 to {len(found) - 1}, got {list(layers)}")
    part = _shell(model)
    above = part
    for child in stack.split(".")[:-1]:
        below = _shell(above.get_submodule(child))
        setattr(above, child, below)
        above = below
    setattr(above, stack.rpartition(".")[2],
            torch.nn.ModuleList(found[layer] for layer in layers))  # fmt: skip
    kinds = getattr(model.config, "layer_types", None)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if kinds:
        config.layer_types = [kinds[layer] for layer in layers]
    for owner in {id(part): part, id(part.base_model): part.base_model}.values():
        owner.config = config
    set_stepper(part, None)
    mark_part(part)
    if compiled.is_compiled(model):
        compiled.compile(part)  # its program has fewer layers
    return part


def _shell(module: Any) -> Any:
    """The same module with the same weights and children, of which some may be replaced."""
    shell = copy.copy(module)
    shell._modules = dict(module._modules)
    for name in [name for name in shell.__dict__ if name.startswith("_linearized_")]:
        del shell.__dict__[name]
    return shell


def check_decoder(model: PreTrainedModel) -> None:
    """Raises ModelError unless the model continues a text, and does nothing else."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} answers one text by another: call model.generate, or encode "
            "and then extend, verify and commit"
        )


def _check(model: PreTrainedModel, tokens: Tensor, state: DecodeState) -> None:
    check_state(model, state)
    if tokens.ndim != 2 or tokens.shape[0] != state.batch_size or tokens.shape[1] == 0:
        raise StateError(
            f"tokens must be [{state.batch_size} rows, at least 1 token] for this state, got "
            f"{list(tokens.shape)}"
        )


def _decoded(model: PreTrainedModel, parts: Sequence[Tensor]) -> Tensor:
    """Logits of a text that comes in parts; an encoder has read the same text before."""
    if getattr(model.config, "is_encoder_decoder", False):
        state = encode(model, torch.cat(list(parts), dim=1))
    else:
        state = new_state(model)
    return torch.cat([extend(model, part, state) for part in parts], dim=1)

"""The forward of a decoding step, compiled once. Knows a model's tensors; knows nothing of trees.

Eager torch spends about as long on looking up what to do as on doing it, where a pass reads a few
tokens. `torch.compile` makes one program of the pass, for any number of rows and nodes. It takes
its inputs as they are: the state's tensors, the open group whole.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from linearized import ops
from linearized.attention.base import LinearAttention
from linearized.errors import ConfigError, ModelError
from linearized.interface import Pass, attention_modules, linear_modules, order
from linearized.state import DecodeState, GroupState

_KEY = "_linearized_step"


def can_compile(model: PreTrainedModel) -> bool:
    """Is all of its state of a fixed size?"""
    hybrid = len(linear_modules(model)) < len(attention_modules(model))
    return not (hybrid or getattr(model.config, "is_encoder_decoder", False))


def compile(model: PreTrainedModel) -> None:
    """Let `verify`, and `extend` by a few tokens, run as compiled programs from now on. The first
    calls of one row, of several, of one node and of several take tens of seconds each; torch keeps
    what they have made in a folder, and finds it again the next time. New weights are used, also
    packed ones and other modules; who changes Python code or globals must compile again.

    Raises:
        ModelError: a hybrid, whose state grows, or an encoder-decoder model. ConfigError: there is
            no C++ compiler, which programs for CPUs need.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; its steps cannot be compiled")
    if len(linear_modules(model)) < len(attention_modules(model)):
        raise ModelError(f"{name} keeps softmax in some layers; its steps cannot be compiled")
    if model.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError("compiling for a CPU needs a C++ compiler; install g++ or go without")
    model.__dict__[_KEY] = _Program(model)


def is_compiled(model: PreTrainedModel) -> bool:
    return _KEY in model.__dict__


def forward(model: PreTrainedModel, tokens: Tensor, parents: Tensor, step: Pass) -> Tensor:
    """Logits [B, N, V] at the nodes of a tree; `step` is left as an eager forward leaves it."""
    layers, shift = step.state.layers, step.state.shift
    trees = [tokens, ops.ancestors(parents)]
    states = [layers.memory, layers.keys, layers.values, layers.tail]
    for tensor in trees:
        _mark(tensor, range(tensor.ndim))
    for tensor in states:
        _mark(tensor, [1])
    _mark(layers.length, [0])
    if shift is not None:
        _mark(shift, [1])
    program: _Program = model.__dict__[_KEY]
    rows, num_nodes = tokens.shape
    run = program.of(rows == 1, num_nodes == 1, layers.memory.is_contiguous(), step.keeps_hidden)
    logits, step.stacked, shifts, step.hidden = run(
        *trees, *states, layers.length, shift, step.keeps_hidden
    )
    if shifts is not None:
        step.shifts.extend(shifts)
    out: Tensor = logits
    return out


def _mark(tensor: Tensor, dims: Iterable[int]) -> None:
    """As sizes that vary. A size of 1 makes a program of its own, which is faster."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)  # type: ignore[no-untyped-call]


class _Program:
    """For every kind of input one of its own: torch looks at all that it has compiled for a piece
    of code, and stops compiling once there are too many."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._parts: _Parts | None = None
        self._kinds: dict[tuple[bool, ...], Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles compile their own."""
        return _Program, (self.model,)

    def of(self, *kind: bool) -> Any:
        if self._parts is None or self._parts.changed:
            self._parts = _Parts(self.model)
            self._kinds.clear()
        if kind not in self._kinds:
            self._kinds[kind] = _compiled(self.model)
        return self._kinds[kind]


class _Parts:
    """A model's modules, who multiplies for them and who attends: what may change without a trace
    in the inputs. Torch would look at every attribute of every module before each step."""

    def __init__(self, model: nn.Module) -> None:
        self._where: list[tuple[dict[str, Any], str]] = []
        for module in model.modules():
            self._where += ((module._modules, name) for name in module._modules)
            if isinstance(module, nn.Linear):
                self._where.append((module.__dict__, "forward"))
            elif isinstance(module, LinearAttention):
                self._where.append((module.__dict__, "backend"))
        self._found = self._look()

    @property
    def changed(self) -> bool:
        return self._look() != self._found

    def _look(self) -> list[Any]:
        return [holder.get(name) for holder, name in self._where]


def _compiled(model: PreTrainedModel) -> Any:
    step = _Step(model)

    def run(*inputs: Any) -> Any:
        return step(*inputs)

    run.__code__ = run.__code__.replace(co_name=f"step_{next(_count)}")
    options: dict[str, Any] = {"guard_filter_fn": _of_inputs}
    return torch.compile(run, dynamic=False, options=options)


_count = itertools.count()


def _of_inputs(guards: Sequence[Any]) -> list[bool]:
    def is_models(guard: Any) -> bool:
        found: bool = guard.orig_guard.source.is_unspecialized_nn_module()
        return found

    return [not guard.is_global and not is_models(guard) for guard in guards]


class _Step(nn.Module):
    """Tensors in, tensors out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.order = order(model)

    def forward(
        self,
        tokens: Tensor,
        visible: Tensor,
        memory: Tensor,
        keys: Tensor,
        values: Tensor,
        tail: Tensor,
        length: Tensor,
        shift: Tensor | None,
        keeps_hidden: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None, Tensor | None]:
        layers = GroupState(memory, keys, values, tail, length)
        nodes = ops.Nodes.among(visible, length, group=layers.group, taps=layers.taps)
        step = Pass(state=DecodeState(layers, "", shift=shift), nodes=nodes, order=self.order)
        output = self.model(
            input_ids=tokens,
            position_ids=nodes.positions,
            use_cache=False,
            linear_pass=step,
            output_hidden_states=keeps_hidden,
        )
        hidden = output.hidden_states[-1] if keeps_hidden else None
        new_keys, new_values = zip(*step.layers, strict=True)
        new = torch.stack(new_keys), torch.stack(new_values)
        shifts = torch.stack(step.shifts) if step.shifts else None
        return output.logits, new, shifts, hidden

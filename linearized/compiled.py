"""A decoding step as a compiled program, in the place of the eager one. Knows a model's tensors;
knows nothing of texts.

Eager torch spends about as long on looking up what to do as on doing it, where a step reads a few
tokens. `torch.compile` makes one program of it, for any number of rows and nodes. It takes its
inputs as they are: the state's tensors, the open group whole.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from linearized.attention.base import LinearAttention
from linearized.context import Context
from linearized.errors import ConfigError, ModelError
from linearized.near import Near
from linearized.state import DecodeState, GroupState, History
from linearized.step import PARTS, Step, forward, layout_of, set_stepper, stepper_of
from linearized.tree import Tree


def can_compile(model: PreTrainedModel) -> bool:
    """Encoder-decoder models cannot."""
    return not getattr(model.config, "is_encoder_decoder", False)


def compile(model: PreTrainedModel) -> None:
    """Let `verify`, and `extend` by a few tokens, run as compiled programs from now on. The first
    calls of one row, of several, of one node and of several take tens of seconds each; torch keeps
    what they have made in a folder, and finds it again the next time. New weights are used, also
    packed ones and other modules. Whoever changes Python code or globals must compile again.

    Raises:
        ModelError: an encoder-decoder model. ConfigError: there is no C++ compiler, which programs
            for CPUs need.
    """
    if not can_compile(model):
        name = type(model).__name__
        raise ModelError(f"{name} is an encoder-decoder model; its steps cannot be compiled")
    if model.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError("compiling for a CPU needs a C++ compiler; install g++ or go without")
    set_stepper(model, CompiledStep(model))
    model.__dict__.pop(PARTS, None)  # theirs are compiled anew, too


def is_compiled(model: PreTrainedModel) -> bool:
    return isinstance(stepper_of(model), CompiledStep)


WATCHED = ("training", "disable_adapters", "_disable_adapters", "_active_adapter")
"""Attributes of modules, also those of PEFT's, upon which a forward may depend."""


class CompiledStep:
    """`linearized.step.step_eagerly` with the same arguments and results, compiled. Every kind of
    input has a program of its own: torch looks at all that it has compiled for a piece of code, and
    stops compiling once there are too many."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._parts: _Parts | None = None
        self._programs: dict[tuple[bool, ...], Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles compile their own."""
        return CompiledStep, (self.model,)

    def __call__(
        self, model: PreTrainedModel, tree: Tree, state: DecodeState, *, hidden: bool = False
    ) -> Step:
        assert model is self.model, "a program belongs to one model"
        inputs = _Inputs.of(tree, state)
        inputs.mark()
        rows, num_nodes = tree.shape
        kind = (rows == 1, num_nodes == 1, inputs.lie_whole, hidden)
        run = self._program(state.layers.near, *kind)
        found: Step = run(*inputs, hidden)
        return found

    def _program(self, near: Near, *kind: bool) -> Any:
        if self._parts is None or self._parts.changed:
            self._parts = _Parts(self.model)
            self._programs.clear()
        if kind not in self._programs:
            self._programs[kind] = _compiled(self.model, near)
        return self._programs[kind]


class _Inputs(NamedTuple):
    """A tree and a state as tensors one after the other, which is what a program takes."""

    tokens: Tensor
    visible: Tensor
    memory: Tensor
    keys: Tensor
    values: Tensor
    tail: Tensor
    length: Tensor
    shift: Tensor | None
    past_keys: Tensor | None
    past_values: Tensor | None

    @classmethod
    def of(cls, tree: Tree, state: DecodeState) -> _Inputs:
        layers, history = state.layers, state.history
        past = (None, None) if history is None else (history.view().keys, history.view().values)
        tree_ = _in_order(tree.tokens), _in_order(tree.visible)
        group = layers.memory, layers.keys, layers.values, layers.tail, layers.length
        return cls(*tree_, *group, state.shift, *past)

    @property
    def lie_whole(self) -> bool:
        """Are the rows of the state all that there are in memory? Not if they are some of a
        pool's. A program is for one of the two, as layers lie further apart than their sizes say
        in the other."""
        tensors = [x for x in (self.memory, self.past_keys) if x is not None and x.numel()]
        return all(x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)

    def mark(self) -> None:
        for name, tensor in self._asdict().items():
            if tensor is not None:
                _mark(tensor, _VARYING[name])


_VARYING = {
    "tokens": (0, 1), "visible": (0, 1, 2), "memory": (1,), "keys": (1,), "values": (1,),
    "tail": (1,), "length": (0,), "shift": (1,), "past_keys": (1, 3), "past_values": (1, 3),
}  # fmt: skip
"""Dimensions whose sizes vary from call to call."""


def _in_order(tensor: Tensor) -> Tensor:
    """The same numbers, one after the other in memory. A program is for strides, too, also those of
    dimensions of size 1, which `contiguous` leaves as they are: chains and trees would have one
    each."""
    return tensor.reshape(-1).view(tensor.shape)


def _mark(tensor: Tensor, dims: Iterable[int]) -> None:
    """As sizes that vary. A size of 1 makes a program of its own, which is faster."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)  # type: ignore[no-untyped-call]


def _compiled(model: PreTrainedModel, near: Near) -> Any:
    def run(
        tokens: Tensor,
        visible: Tensor,
        memory: Tensor,
        keys: Tensor,
        values: Tensor,
        tail: Tensor,
        length: Tensor,
        shift: Tensor | None,
        past_keys: Tensor | None,
        past_values: Tensor | None,
        hidden: bool,
    ) -> Step:
        history = None
        if past_keys is not None and past_values is not None:
            history = History(past_keys, past_values)
        layers = GroupState(memory, keys, values, tail, length, near)
        state = DecodeState(layers, "", history=history, shift=shift)
        context = Context(state=state, layout=layout_of(visible, state, trim=False))
        return forward(model, tokens, context, hidden=hidden)

    run.__code__ = run.__code__.replace(co_name=f"step_{next(_count)}")
    options: dict[str, Any] = {"guard_filter_fn": _of_inputs}
    return torch.compile(run, dynamic=False, fullgraph=True, options=options)


_count = itertools.count()


def _of_inputs(guards: Sequence[Any]) -> list[bool]:
    def is_models(guard: Any) -> bool:
        found: bool = guard.orig_guard.source.is_unspecialized_nn_module()
        return found

    return [not guard.is_global and not is_models(guard) for guard in guards]


class _Parts:
    """What may change in a model without a trace in the inputs: its modules, their modes and hooks,
    who multiplies for them and who attends, which adapters are in use. Torch would look at every
    attribute of every module before each step."""

    def __init__(self, model: nn.Module) -> None:
        self._where: list[tuple[dict[str, Any], str]] = []
        self._hooks: list[dict[int, Any]] = []
        for module in model.modules():
            own = module.__dict__
            self._where += ((module._modules, name) for name in module._modules)
            self._where += ((own, name) for name in WATCHED if name in own)
            self._hooks += (module._forward_hooks, module._forward_pre_hooks)
            if isinstance(module, nn.Linear):
                self._where.append((own, "forward"))
            elif isinstance(module, LinearAttention):
                self._where.append((own, "backend"))
        self._found = self._look()

    @property
    def changed(self) -> bool:
        return self._look() != self._found

    def _look(self) -> list[Any]:
        found = [holder.get(name) for holder, name in self._where]
        found += [tuple(hooks) for hooks in self._hooks if hooks]
        return found

"""Attention with a window and sinks beside the same without: a part of jobs.bench_ops and of
jobs.bench_models. Knows the operator, states and models; knows nothing of their rivals.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import linearized
from jobs.hybrids import state_of
from jobs.measure import Bar, Run, Timing, in_turns, show
from linearized import ops
from linearized.attention import VARIANTS, LinearAttention, Place
from linearized.models import new_parameters
from linearized.state import GroupState
from linearized.tree import ancestors

KINDS = ("grouped", "hedgehog")
PLAIN, WIDE = "window 0", "window 1, 4 sinks"
NEAR: dict[str, dict[str, Any]] = {PLAIN: {}, WIDE: {"window": 1, "sinks": 4}}
NODES = (1, 16)
CHUNK = 512
"""Tokens of a prompt that a model reads at once."""


class Case:
    """Queries, keys and values of some tokens, as one attention hands them to the operator."""

    def __init__(
        self, kind: str, near: str, *, heads: int, width: int, dtype: torch.dtype,
        device: torch.device, **sizes: Any,
    ) -> None:  # fmt: skip
        place = Place(
            layer=0, heads=heads, kv_heads=heads, width=width, value_width=width, dtype=dtype,
            device=device,
        )  # fmt: skip
        config = linearized.LinearConfig(attention=kind, **sizes, **NEAR[near])
        self.attention: LinearAttention = VARIANTS[kind](config, place)
        self.shape = heads, width
        for parameter in self.attention.parameters():
            torch.nn.init.normal_(parameter, std=0.1)

    @torch.no_grad()
    def draw(self, tokens: int) -> list[Tensor]:
        place, (heads, width) = self.attention.place, self.shape
        q, k, v = (
            torch.randn(1, heads, tokens, width, dtype=place.dtype, device=place.device)
            for _ in range(3)
        )
        positions = torch.arange(tokens, device=place.device)[None]
        keys, values = self.attention.tokens(k, v, width**-0.5, positions)
        return [self.attention.queries(q, width**-0.5, positions), keys, values]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **where: Any) -> Tensor:
        """The operator's sums, with the convolution where it is a part of them."""
        attention = self.attention
        taps = attention.taps if attention.fused else None
        return ops.linear_attention(
            q, k, v, form=attention.form, alpha=attention.scale(), taps=taps, **where
        )

    def state(self, context: int) -> GroupState:
        """Of so many tokens."""
        place = self.attention.place
        dtype = place.dtype or torch.get_default_dtype()
        device = torch.device(place.device or "cpu")
        state = self.attention.empty_state(1, dtype=dtype, device=device)
        for first in range(0, context, 4096):
            _, keys, values = self.draw(min(4096, context - first))
            ops.fold_(state, keys, values)
        return state


def operators(
    tokens: int, *, turns: int, budget: float, device: torch.device, **sizes: Any
) -> dict[str, Any]:
    """The operator over so many tokens, forwards and with its gradient; and steps on a state of as
    many, in the middle of a group."""
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {"turns": turns, "budget": budget, "device": device}
    for kind in KINDS:
        cases = {near: Case(kind, near, device=device, **sizes) for near in NEAR}
        parts = {near: case.draw(tokens) for near, case in cases.items()}
        forward: dict[str, Run] = {
            near: torch.no_grad()(functools.partial(case.attend, *parts[near]))
            for near, case in cases.items()
        }
        both: dict[str, Run] = {
            near: functools.partial(_with_gradient, case, parts[near])
            for near, case in cases.items()
        }
        states = {near: case.state(tokens + sizes["group"] // 2) for near, case in cases.items()}
        found[kind] = {
            "forward": in_turns(forward, **settings),
            "forward and backward": in_turns(both, **settings),
            **{
                _named(nodes): in_turns(
                    {near: _tree(case, states[near], nodes) for near, case in cases.items()},
                    **{**settings, "turns": 3 * turns},
                )
                for nodes in NODES
            },
            "bytes": {near: _bytes(state) for near, state in states.items()},
        }
    return found


def _with_gradient(case: Case, parts: list[Tensor]) -> None:
    inputs = [x.detach().requires_grad_() for x in parts]
    out = case.attend(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def _tree(case: Case, state: GroupState, nodes: int) -> Run:
    parts = case.draw(nodes)
    parents = torch.tensor([[-1, *((n - 1) // 2 for n in range(1, nodes))]])
    visible = ancestors(parents.to(state.length.device))
    trim = not state.length.is_cuda

    @torch.no_grad()
    def run() -> Tensor:
        layout = ops.Layout.of(visible, state.length, near=state.near, taps=state.taps, trim=trim)
        return case.attend(*parts, state=state, layout=layout)

    return run


def _bytes(state: GroupState) -> int:
    return sum(x.nbytes for x in state.tensors().values())


def models(
    softmax: PreTrainedModel, context: int, *, turns: int, budget: float, device: torch.device
) -> dict[str, Any]:
    """Whole models: trees on top of `context` tokens, and a prompt of as many."""
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {"turns": turns, "budget": budget, "device": device}
    prompt = torch.randint(softmax.config.vocab_size, (1, context), device=device)
    for kind in KINDS:
        twins = {near: _linear(softmax, kind, near) for near in NEAR}
        states = {near: state_of(model, context) for near, model in twins.items()}
        found[kind] = {
            "forward": in_turns(
                {near: functools.partial(_read, model, prompt) for near, model in twins.items()},
                **settings,
            ),
            **{
                _named(nodes): in_turns(
                    {near: _verify(model, states[near], nodes) for near, model in twins.items()},
                    **settings,
                )
                for nodes in NODES
            },
            "bytes": {near: state.nbytes for near, state in states.items()},
        }
    return found


def _linear(softmax: PreTrainedModel, kind: str, near: str) -> PreTrainedModel:
    model = copy.deepcopy(softmax)
    linearized.linearize(model, linearized.LinearConfig(attention=kind, **NEAR[near]))
    for parameter in new_parameters(model):
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def _read(model: PreTrainedModel, prompt: Tensor) -> None:
    state = linearized.new_state(model)
    for part in prompt.split(CHUNK, dim=1):
        linearized.extend(model, part, state, logits_to_keep=1)


def _verify(model: PreTrainedModel, state: linearized.DecodeState, nodes: int) -> Run:
    parents = torch.tensor([[-1, *((n - 1) // 2 for n in range(1, nodes))]], device=model.device)
    return functools.partial(linearized.verify, model, torch.ones_like(parents), parents, state)


def _named(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"


def show_windows(title: str, found: Mapping[int, Any], console: Console) -> None:
    rows = []
    for tokens, kinds in found.items():
        for kind, parts in kinds.items():
            sizes = parts["bytes"]
            for name, times in parts.items():
                if name == "bytes":
                    continue
                rows.append([
                    f"{tokens:,}", f"{kind}, {name}", str(times[PLAIN]), str(times[WIDE]),
                    f"{_ratio(times):.2f} ×", f"{sizes[PLAIN]:,}", f"{sizes[WIDE]:,}",
                ])  # fmt: skip
    columns = ["tokens", "", PLAIN, WIDE, "", "bytes of state", "with the window"]
    show(title, columns, rows, console)


def bars(found: Mapping[int, Any], tokens: int) -> list[Bar]:
    """For the time with a window over the time without, after so many tokens."""
    bounds = {"forward": 1.6, **{_named(nodes): 1.2 for nodes in NODES}}
    return [
        Bar(f"window 1 over window 0, {kind}, {name} at {tokens // 1024}K",
            _ratio(found[tokens][kind][name]) if tokens in found else None, bound, least=False)
        for kind in KINDS
        for name, bound in bounds.items()
    ]  # fmt: skip


def _ratio(times: Mapping[str, Timing]) -> float:
    return times[WIDE].median / times[PLAIN].median

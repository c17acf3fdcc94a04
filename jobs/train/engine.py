"""A student and its optimizer, shared out over workers by DeepSpeed ZeRO: the one door to it.

Knows parameters by their names in the student, whole and in float32, whatever the ZeRO stage and
the number of workers. Knows nothing of steps, files or Ray.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.run import Stage, Workers
from linearized.training.batch import Batch
from linearized.training.objective import Objective

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps for each parameter."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step of all workers came to."""

    loss: float
    """Per prediction."""
    norm: float | None
    """Of the gradient, before it is clipped. None: DeepSpeed does not say."""
    taken: bool
    """Whether the weights have changed."""
    objection: str = ""
    """Why they have not."""


class Engine:
    """One stage of training. All workers call the same methods in the same order."""

    def __init__(self, objective: Objective, stage: Stage, workers: Workers) -> None:
        self.objective = objective
        self._stage, self._workers = stage, workers
        self._parts = stage.parts(workers.count)
        groups = stage.optim.groups(objective)
        self._rates = [group["lr"] for group in groups]
        self._optimizer = _AdamW(groups, betas=(0.9, 0.95), fused=True)
        self._optimizer.checks = self._zero == 0
        self._engine = _initialize(_Call(objective), self._optimizer, stage, workers)
        self._forget_moments()

    def step(self, batch: Batch, scale: float, objection: Callable[[float], str | None]) -> Step:
        """One step on this worker's share of a batch, with learning rates multiplied with `scale`.
        It is left out if there is an objection to its loss, or its gradient is not finite."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * scale
        parts = batch.to(self._engine.device).split(self._parts)
        counts = sum(self.objective.count(part) for part in parts)
        total = max(_summed(counts, self._engine.device), 1.0)
        # DeepSpeed divides by the number of parts and of workers.
        factor = self._parts * self._workers.count / total
        found = 0.0
        for number, part in enumerate(parts):
            summed = self._engine(functools.partial(self.objective.summed, part))
            self._engine.backward(summed * factor)
            found += float(summed.detach())
            if number + 1 < self._parts:
                self._engine.step()
        loss = _summed(found, self._engine.device) / total
        reason = objection(loss)
        self._optimizer.idle, self._optimizer.refused = reason is not None, False
        self._engine.step()
        if reason is None and self._is_overflow():
            reason = "its gradient is not finite"
        norm = self._engine.get_global_grad_norm()
        norm = None if norm is None else float(norm)
        return Step(loss=loss, norm=norm, taken=reason is None, objection=reason or "")

    def rates(self) -> list[float]:
        """The learning rates of the last step, of `Optim.groups`."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def values(self, names: set[str]) -> Iterator[tuple[str, Tensor]]:
        """These parameters of the student, in float32. A tensor is good until the next is asked
        for."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.objective.student.named_parameters():
            if name not in names:
                continue
            if self._zero and parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            else:
                with _whole(parameter):
                    yield name, parameter.detach().float()

    def moments(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """One of MOMENTS of each parameter that is trained."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in self.trained():
            if self._zero:
                yield name, safe_get_full_optimizer_state(parameter, key)
            else:
                yield name, self._optimizer.state[parameter][key]

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained."""
        named = self.objective.student.named_parameters()
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def restore(
        self, *, steps: int, values: Iterator[tuple[str, Tensor]], moments: dict[str, Any]
    ) -> None:
        """Go on after `steps` steps that were taken. `moments` are those of each of MOMENTS.
        `values` matter where the student's own are less precise than the optimizer's."""
        parameters = dict(self.trained())
        for state in self._optimizer.state.values():
            state["step"].fill_(float(steps))
        for key, tensors in moments.items():
            for name, tensor in tensors:
                if self._zero:
                    self._put(parameters[name], tensor, key)
                else:
                    self._optimizer.state[parameters[name]][key].copy_(tensor)
        if self._workers.gpu:
            for name, tensor in values:
                if name in parameters:
                    self._put(parameters[name], tensor, None)

    def _put(self, parameter: nn.Parameter, tensor: Tensor, key: str | None) -> None:
        """Into what the optimizer has of a parameter: a moment, or its float32 value (None)."""
        from deepspeed import utils

        tensor = tensor.to(self._engine.device)
        if self._zero == 3:  # its own functions for whole tensors stumble over the smallest ones
            tensor = _share(tensor, parameter)
            if key is None:
                utils.safe_set_local_fp32_param(parameter, tensor)
            else:
                utils.safe_set_local_optimizer_state(parameter, tensor, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, tensor)
        else:
            utils.safe_set_full_optimizer_state(parameter, tensor, key)

    def close(self) -> None:
        self._engine.destroy()
        torch.distributed.barrier()

    @property
    def _zero(self) -> int:
        return zero_stage(self._workers)

    def _forget_moments(self) -> None:
        """Make Adam's moments, which are zero, before the first step: they must be there to be
        restored, and DeepSpeed looks for them once only."""
        for tensor in self._partitions():
            self._optimizer.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                **{key: torch.zeros_like(tensor) for key in MOMENTS},
            }
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _partitions(self) -> list[Tensor]:
        """The tensors that the optimizer updates: parameters, or flat pieces of several."""
        if self._zero == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self._optimizer.param_groups for tensor in group["params"]]

    def _is_overflow(self) -> bool:
        return self._optimizer.refused or bool(getattr(self._engine.optimizer, "overflow", False))


@contextlib.contextmanager
def reading(student: nn.Module, stage: Stage, workers: Workers) -> Iterator[Callable[..., Any]]:
    """A function that calls what it is given, in which the student can be used without being
    trained: its weights may be shared out over workers, who then call it equally often."""
    if not any(hasattr(parameter, "ds_id") for parameter in student.parameters()):
        yield lambda call: call()
        return
    engine = _initialize(_Call(student), None, stage, workers)
    try:
        yield engine
    finally:
        engine.destroy()


@contextlib.contextmanager
def shared_out(stage: Stage, workers: Workers) -> Iterator[None]:
    """Parameters of modules that are made meanwhile are shared out over workers at once."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=_config(stage, workers)):
        yield


def put(student: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Give parameters of the student other values. All workers have the same."""
    parameters = dict(student.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors:
            with _whole(parameters[name], changed=True):
                parameters[name].copy_(tensor)


def values(student: nn.Module, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """These parameters, outside of a stage. A tensor is good until the next is asked for."""
    for name, parameter in student.named_parameters():
        if name in names:
            with _whole(parameter):
                yield name, parameter.detach()


def whole(module: nn.Module, *, changed: bool = False) -> contextlib.AbstractContextManager[None]:
    """All parameters of a module, as if nobody shared them. `changed`: every worker changes them
    in the same way."""
    return _whole(*module.parameters(), changed=changed)


def zero_stage(workers: Workers) -> int:
    """The stage that DeepSpeed is told. On a GPU there are float32 copies of the weights, for which
    it has two optimizers without ZeRO and one with it: stage 1 computes the same as 0."""
    return max(workers.zero, 1) if workers.gpu else workers.zero


def prepare() -> None:
    """Keep DeepSpeed from compiling an extension at first use, which takes minutes without a word
    and would speed up inference on CPUs, and no training; and from warnings: that it has not tested
    our optimizer, and, at every step, that torch has changed names."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


@contextlib.contextmanager
def _whole(*parameters: nn.Parameter, changed: bool = False) -> Iterator[None]:
    shared = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shared:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shared, modifier_rank=0 if changed else None):
        yield


def _share(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """What this worker holds of a tensor under ZeRO-3: equally much as each other, with zeros where
    there is no more of it."""
    size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    flat = tensor.flatten()
    flat = F.pad(flat, (0, size * torch.distributed.get_world_size() - len(flat)))
    return flat[size * torch.distributed.get_rank() :][:size]


class _Call(nn.Module):
    """What DeepSpeed wraps: a root that calls anything beneath it, a loss as well as the student
    alone. ZeRO-3 counts on its root being called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Callable[[], Result]) -> Result:
        return call()


class _AdamW(torch.optim.AdamW):
    """AdamW that can be told to leave out a step, below whatever DeepSpeed wraps around it."""

    idle = False
    refused = False
    """Whether the last step was left out since its gradient was not finite."""

    checks = False
    """Whether to look at gradients. With ZeRO, DeepSpeed does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.refused = False
        if self.idle:
            return
        if self.checks and not self._is_finite():
            self.refused = True
            return
        super().step()

    def _is_finite(self) -> bool:
        found = [p.grad for group in self.param_groups for p in group["params"]]
        norms = torch._foreach_norm([grad for grad in found if grad is not None])
        return not norms or bool(torch.stack(norms).isfinite().all())


def _initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, stage: Stage, workers: Workers
) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=_config(stage, workers)
    )
    return engine


def _config(stage: Stage, workers: Workers) -> dict[str, Any]:
    """As DeepSpeed reads it."""
    parts = stage.parts(workers.count)
    return {
        "train_micro_batch_size_per_gpu": stage.batch // workers.count // parts,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": stage.optim.clip,
        "zero_optimization": {"stage": zero_stage(workers)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": workers.gpu},
        "torch_autocast": {"enabled": workers.autocast, "dtype": "bfloat16"},
        "steps_per_print": 1_000_000_000,
    }


def _summed(value: float, device: torch.device | str) -> float:
    """Over all workers."""
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return float(total)

"""Optimizer and checkpoints of the Megatron engine, with what megatron-core 0.16 leaves to its callers.

Without Apex and Transformer Engine megatron-core steps with torch's AdamW, whose state it does not save and load whole:
three corrections stand here, each where it is needed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

from distill.config import OptimConfig

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
"""Optimizer state by parameter of the model: any number of tensor, pipeline and data ranks can load it."""


def wrap(student: Any) -> DistributedDataParallel:
    """megatron-core's DDP: gradients in one fp32 buffer, summed over data ranks, each of which gets its part."""
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return DistributedDataParallel(student.config, config, student)


class Optimizer:
    """AdamW over fp32 master weights, dealt over the data ranks (distributed optimizer).

    Decoupled weight decay on matrices alone, the epsilon and the clipping are those of
    :func:`distill.optim.build_optimizer` and of torch.

    Args:
        wrapped: of :func:`wrap`.
        config: optimizer settings.
    """

    def __init__(self, wrapped: DistributedDataParallel, config: OptimConfig) -> None:
        self._student = wrapped.module
        self._wrapped = wrapped
        bf16 = next(wrapped.parameters()).dtype == torch.bfloat16
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=0.0,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=1e-8,
                clip_grad=config.grad_clip or math.inf,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
                use_distributed_optimizer=True,
            ),
            [wrapped],
        )
        # megatron-core leaves the product to a scheduler of its own.
        for group in self._optimizer.param_groups:
            group["weight_decay"] = config.weight_decay * group["wd_mult"]

    def clear(self) -> None:
        """Forget all gradients."""
        self._wrapped.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self, lr: float) -> float:
        """One step on gradients that are summed over all ranks. Waits for the device.

        Returns:
            The gradients' norm before clipping.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        successful, grad_norm, _ = self._optimizer.step()
        assert successful
        return float(grad_norm)

    def save(self, directory: Path) -> None:
        """Write model and optimizer into an empty ``directory``, every rank its part."""
        model = self._student.sharded_state_dict()
        optimizer = self._optimizer.sharded_state_dict(self._sharded_parameters(), metadata=_METADATA)
        dist_checkpointing.save({"model": model, "optimizer": optimizer}, str(directory))

    def load(self, directory: Path) -> None:
        """Undo of :meth:`save`, also of one by another number of tensor, pipeline and data ranks."""
        for part in self._parts():
            _fill_state(part.optimizer)
            _give_step(part)
        model = self._student.sharded_state_dict()
        optimizer = self._optimizer.sharded_state_dict(self._sharded_parameters(), is_loading=True, metadata=_METADATA)
        loaded = dist_checkpointing.load({"model": model, "optimizer": optimizer}, str(directory))
        self._student.load_state_dict(loaded["model"])
        self._optimizer.load_state_dict(loaded["optimizer"])
        for part in self._parts():
            for state in part.optimizer.state.values():
                # Loading shares one count between all parameters: each would count for all.
                state["step"] = state["step"].clone()

    def _sharded_parameters(self) -> dict[str, Any]:
        return self._student.sharded_state_dict()

    def _parts(self) -> list[Any]:
        return getattr(self._optimizer, "chained_optimizers", [self._optimizer])


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """State of no step: megatron-core loads into what is there, and torch's AdamW has nothing before its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _give_step(part: Any) -> None:
    """Have a parameter's loaded tensors include the count of steps, which is saved with its group."""
    original = part._set_main_param_and_optimizer_states

    def with_step(parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        group, position = part.model_param_group_index_map[parameter]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][position]]
        original(parameter, {"step": state["step"].clone(), **tensors})

    part._set_main_param_and_optimizer_states = with_step

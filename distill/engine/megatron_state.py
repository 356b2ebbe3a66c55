"""Optimizer of the Megatron engine: fp32 master weights and moments, each rank's part of them.

megatron-core 0.16's own formats of this state either gather all of it on one data rank or load at one layout alone.
:mod:`distill.engine.megatron_checkpoint` keeps it by parameter instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, distributed, nn

from distill.config import OptimConfig
from distill.distributed import barrier

BUCKET_PARAMETERS = 40_000_000
"""Least number of parameters whose gradients, or whose weights, travel in one message beside the computation."""
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


def wrap(student: Any, *, overlap: bool) -> DistributedDataParallel:
    """megatron-core's DDP: gradients in one fp32 buffer, summed over data ranks, each of which gets its part.

    Args:
        student: a stage on its device.
        overlap: have gradients travel during the backward pass of the last micro-batch, and new weights during the
            next forward pass. All of the student's parameters need a gradient in every step then.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=BUCKET_PARAMETERS,
    )
    wrapped = DistributedDataParallel(student.config, config, student)
    if overlap:
        student.config.no_sync_func = wrapped.no_sync
    return wrapped


def wait_for_weight(wrapped: DistributedDataParallel, weight: Tensor) -> Tensor:
    """``weight``, as the last optimizer step left it on all data ranks: for one that is used outside of its module."""
    bucket = wrapped.param_to_bucket_group.get(weight)
    if bucket is not None and wrapped.ddp_config.overlap_param_gather:
        bucket.finish_param_sync()
    return weight


@dataclass(frozen=True, kw_only=True)
class OwnPart:
    """What this data rank keeps of one parameter."""

    start: int
    """First of its elements, in this tensor rank's shard as it lies in memory."""
    tensors: dict[str, Tensor]
    """fp32 [elements] by name: the master weight and the moments, themselves."""

    @property
    def end(self) -> int:
        """Element after the last one."""
        return self.start + self.tensors[MASTER].numel()


class Optimizer:
    """AdamW over fp32 master weights, dealt over the data ranks (distributed optimizer).

    Decoupled weight decay on matrices alone, the epsilon and the clipping are those of
    :func:`distill.optim.build_optimizer` and of torch. Its moments exist from the beginning on.

    Args:
        wrapped: of :func:`wrap`; master weights start from its weights.
        config: optimizer settings.
    """

    def __init__(self, wrapped: DistributedDataParallel, config: OptimConfig) -> None:
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
                overlap_param_gather=wrapped.ddp_config.overlap_param_gather,
            ),
            [wrapped],
        )
        # megatron-core leaves the product to a scheduler of its own.
        for group in self._optimizer.param_groups:
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        for part in self._parts():
            _fill_state(part.optimizer)

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

    def trains(self, parameter: nn.Parameter) -> bool:
        """Whether ``parameter`` is optimised at all; if so, any part of it may lie on other data ranks."""
        return parameter in self._wrapped.param_to_bucket_group

    def own_part(self, parameter: nn.Parameter) -> OwnPart | None:
        """What this data rank keeps of ``parameter``; None: nothing."""
        for part in self._parts():
            if parameter not in part.model_param_group_index_map:
                continue
            group, position = part.model_param_group_index_map[parameter]
            master = part.optimizer.param_groups[group]["params"][position]
            state = part.optimizer.state[master]
            return OwnPart(
                start=part._get_model_param_range_map(parameter)["param"].start,
                tensors={MASTER: master.detach(), **{name: state[name] for name in MOMENTS}},
            )
        return None

    @torch.no_grad()
    def whole_master(self, parameter: nn.Parameter) -> Tensor:
        """This tensor rank's shard of the master weight, in fp32; right on the first data rank, all take part."""
        flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        own = self.own_part(parameter)
        if own is not None:
            flat[own.start : own.end] = own.tensors[MASTER]
        group = parallel_state.get_data_parallel_group()
        # As integers, of which all but one are 0: also the sign of a zero stays as it is.
        distributed.reduce(flat.view(torch.int32), dst=distributed.get_global_rank(group, 0), group=group)
        return flat.view(parameter.shape)

    @torch.no_grad()
    def set_own_parts(self, values: Callable[[str, int, int], dict[str, Tensor]]) -> None:
        """Set master weights and moments, and the weights that run after them; every rank calls it.

        Args:
            values: (name of a parameter of the stage, first of its elements, element after the last one) -> some of
                :attr:`OwnPart.tensors`, [elements], on any device.
        """
        for name, parameter in self._wrapped.module.named_parameters():
            own = self.own_part(parameter)
            if own is not None:
                for key, tensor in values(name, own.start, own.end).items():
                    own.tensors[key].copy_(tensor)
        for part in self._parts():
            part._copy_main_params_to_model_params()
        # Others may read for longer than a message of megatron-core's groups may take.
        barrier()
        self._wrapped.start_param_sync(force_sync=True)

    @property
    def num_steps(self) -> int:
        """Steps done, by which AdamW corrects its moments."""
        for group, state in self._counted():
            return int(group["step"] if "step" in group else state["step"])
        return 0

    @num_steps.setter
    def num_steps(self, number: int) -> None:
        for group, state in self._counted():
            state["step"].fill_(number)
            # Apex and Transformer Engine, whose AdamW megatron-core takes where it finds one, count by group.
            if not isinstance(self._parts()[0].optimizer, torch.optim.AdamW):
                group["step"] = number

    def _counted(self) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Group and state of every master weight."""
        for part in self._parts():
            for group in part.optimizer.param_groups:
                for master in group["params"]:
                    yield group, part.optimizer.state[master]

    def _parts(self) -> list[Any]:
        return getattr(self._optimizer, "chained_optimizers", [self._optimizer])


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """State of no step: torch's AdamW has nothing before its first one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                **{name: torch.zeros_like(parameter) for name in MOMENTS},
            }

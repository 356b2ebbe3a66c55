"""The reference engine: plain torch in one process, DDP or FSDP2, with or without sequence parallelism."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distill import distributed
from distill.config import EngineConfig, OptimConfig
from distill.data.batch import Batch
from distill.engine import torch_sharding, torch_state
from distill.engine.base import export_from, micro_batch_size, resolve_device, resolve_dtype
from distill.engine.setup import TrainingSetup
from distill.engine.student_step import (
    StudentStep,
    evaluate_step,
    freeze_untrained,
    own_part,
    prepare_student,
    sum_metrics,
)
from distill.engine.teachers import build_teachers
from distill.objective import Objective, Totals
from distill.optim import build_optimizer, init_optimizer_state


class TorchEngine:
    """fp32 master weights and optimizer state on every rank (DDP) or dealt over the ranks (FSDP2).

    bf16 precision is autocast on whole weights; sharded weights are gathered in bf16, and their gradients are summed
    over the ranks in fp32. See :class:`distill.engine.base.Engine` for the interface and
    :func:`distill.engine.base.create_engine` for the arguments.
    """

    def __init__(
        self, setup: TrainingSetup, *, optim: OptimConfig, engine: EngineConfig, batch_size: int, seq_len: int
    ) -> None:
        self.device = resolve_device(engine)
        self._ranks = distributed.data_ranks(engine.sequence_parallel)
        self.data_rank, self.num_data_ranks = self._ranks.data_rank, self._ranks.num_data_ranks
        assert batch_size % self.num_data_ranks == 0, f"{batch_size} sequences for {self.num_data_ranks} data ranks"
        self._engine = engine
        self._provider = setup.student
        self._num_positions = batch_size * seq_len
        self._micro_batch = micro_batch_size(
            engine, batch_size=batch_size // self.num_data_ranks, seq_len=seq_len // self._ranks.num_parts
        )
        self._is_sharded = engine.shard or engine.offload_optimizer
        self._teachers = build_teachers(setup, engine, device=self.device, ranks=self._ranks, sharded=engine.shard)
        self._step = self._build(
            Objective(config=setup.objective, teacher=self._teachers.training, layer_map=setup.layer_map)
        )
        self._wrapped = self._wrap()
        self._optimizer = build_optimizer(self.student, optim, fused=engine.offload_optimizer or None)
        # At once, not in the first step: what is saved never lacks any, and memory that is short shows here.
        init_optimizer_state(self._optimizer)
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._max_grad_norm = optim.grad_clip or math.inf

    @property
    def student(self) -> nn.Module:
        """The model under training, sharded where it is dealt."""
        return self._step.model

    def _build(self, objective: Objective) -> StudentStep:
        """The student with its weights, sharded if it is to be, in training mode."""
        if not self._is_sharded:
            model = self._provider.load(device=self.device, dtype=torch.float32)
            freeze_untrained(model, objective.config)
            prepare_student(model, self._engine, self._ranks.group)
            return StudentStep(model, objective, self._teachers.held_out).train()
        step = StudentStep(self._provider.empty(), objective, self._teachers.held_out)
        freeze_untrained(step.model, objective.config)
        prepare_student(step.model, self._engine, self._ranks.group)
        torch_sharding.shard_student(step, self._engine, self.device)
        torch_sharding.fill(step.model, self._provider, self.device, on_cpu=self._engine.offload_optimizer)
        return step.train()

    def _wrap(self) -> nn.Module:
        """What a step calls: the student step, in DDP where each of several ranks has it whole."""
        if self._is_sharded or distributed.world_size() == 1:
            return self._step
        return DistributedDataParallel(self._step, gradient_as_bucket_view=True)

    def step(self, batch: Batch, *, lr: float) -> dict[str, Tensor]:
        """See :class:`distill.engine.base.Engine`. Waits for the device only where the optimizer is on the CPU."""
        batch = own_part(batch, self._ranks, self.device)
        totals = Totals(num_positions=self._num_positions, num_targets=distributed.all_reduce_sum(batch.num_targets()))
        parts = list(batch.split(self._micro_batch))
        metrics = sum_metrics(
            [self._accumulate(part, totals, last=index == len(parts) - 1) for index, part in enumerate(parts)]
        )
        grad_norm = nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._clear_gradients()
        grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        return {**distributed.all_reduce_sums(metrics), "grad_norm": grad_norm.to(self.device)}

    def _accumulate(self, batch: Batch, totals: Totals, *, last: bool) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch. DDP sums over the ranks once, in the last one's backward pass.

        FSDP2 does so in each: it would have to keep whole gradients otherwise.
        """
        with self._without_reduction() if not last else nullcontext():
            with self._autocast():
                loss, metrics = self._wrapped(batch, totals)
            # DDP and FSDP2 take the mean over the ranks where contributions are to be summed.
            (loss * distributed.world_size()).backward()
        return metrics

    def _without_reduction(self) -> AbstractContextManager[None]:
        is_ddp = isinstance(self._wrapped, DistributedDataParallel)
        return self._wrapped.no_sync() if is_ddp else nullcontext()

    def _clear_gradients(self) -> None:
        # DDP's buckets stay. Gradients that are dropped would be made anew beside them, micro-batch by micro-batch.
        self._optimizer.zero_grad(set_to_none=not isinstance(self._wrapped, DistributedDataParallel))

    def evaluate(self, sequences: Tensor | Batch) -> dict[str, float]:
        """See :class:`distill.engine.base.Engine`."""
        self._step.eval()
        with self._autocast():
            metrics = evaluate_step(
                self._step, sequences, ranks=self._ranks, micro_batch=self._micro_batch, device=self.device
            )
        if isinstance(self._step, FSDPModule):
            # After a backward pass FSDP2 does so itself. What is gathered is not the master weights.
            self._step.reshard()
        self._step.train()
        return metrics | self._teachers.known_metrics(len(sequences))

    def save(self, directory: Path) -> None:
        """See :class:`distill.engine.base.Engine`. Any number of ranks can load it, sharded or not."""
        torch_state.current(self.student, self._optimizer, self.device).write(directory)

    def snapshot(self) -> Callable[[Path], None]:
        """See :class:`distill.engine.base.Engine`."""
        return torch_state.snapshot(self.student, self._optimizer, self.device).write

    def load(self, directory: Path) -> None:
        """See :class:`distill.engine.base.Engine`."""
        torch_state.load(directory, self.student, self._optimizer, self.device)

    def export(self, directory: Path) -> None:
        """See :class:`distill.engine.base.Engine`. No rank ever holds more than one whole parameter."""
        export_from(self._provider, self._whole_parameters(), directory)

    @torch.no_grad()
    def _whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.student.named_parameters():
            yield name, torch_sharding.whole(parameter)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = resolve_dtype(self._engine)
        enabled = dtype != torch.float32 and not self._is_sharded
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)

"""The reference engine: plain torch in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.config import EngineConfig, OptimConfig
from distill.engine.base import TensorGroups, compile_blocks, micro_batch_size, resolve_device, resolve_dtype
from distill.objective import Objective
from distill.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors


class TorchEngine:
    """fp32 master weights and optimizer state; bf16 precision is autocast on top of them.

    Args:
        model: student with fp32 parameters; moved to the device in place.
        objective: what each step minimises.
        optim: optimizer settings.
        engine: device, precision, micro-batch size and whether blocks are compiled.
    """

    def __init__(self, *, model: nn.Module, objective: Objective, optim: OptimConfig, engine: EngineConfig) -> None:
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad), "master weights are fp32"
        self.device = resolve_device(engine)
        self._engine = engine
        self._objective = objective
        self._model = model.to(self.device).train()
        if engine.compile:
            compile_blocks(self._model)
        self._optimizer = build_optimizer(self._model, optim)
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._max_grad_norm = optim.grad_clip or math.inf

    def step(self, input_ids: Tensor, *, lr: float) -> dict[str, Tensor]:
        """See :class:`distill.engine.base.Engine`. Never waits for the device."""
        batch_size, seq_len = input_ids.shape
        input_ids = self._to_device(input_ids)
        metrics: dict[str, Tensor] = {}
        for micro_batch in input_ids.split(micro_batch_size(self._engine, batch_size=batch_size, seq_len=seq_len)):
            share = len(micro_batch) / batch_size
            with self._autocast():
                loss, micro_metrics = self._objective(self._model, micro_batch)
            (loss * share).backward()
            for name, value in micro_metrics.items():
                metrics[name] = metrics.get(name, 0) + value * share
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return metrics

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """See :class:`distill.engine.base.Engine`."""
        self._model.eval()
        with torch.no_grad(), self._autocast():
            yield
        self._model.train()

    def state_dict(self) -> TensorGroups:
        """See :class:`distill.engine.base.Engine`. Tied parameters are held once."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": {name: parameter.detach() for name, parameter in self._model.named_parameters()},
            "optimizer": optimizer_tensors(self._optimizer),
            "rng": rng,
        }

    def load_state_dict(self, state: TensorGroups) -> None:
        """See :class:`distill.engine.base.Engine`."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(state["model"][name])
        load_optimizer_tensors(self._optimizer, state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def _autocast(self) -> torch.autocast:
        dtype = resolve_dtype(self._engine)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _to_device(self, input_ids: Tensor) -> Tensor:
        if self.device.type == "cuda":
            input_ids = input_ids.pin_memory()
        return input_ids.to(self.device, non_blocking=True)

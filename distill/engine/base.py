"""What a training engine is to the trainer, and which engines there are."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from distill.config import EngineConfig, OptimConfig, require
from distill.objective import Objective

ENGINES = {"torch": "distill.engine.torch_engine:TorchEngine"}
"""``module:class`` by name, imported when it is asked for: an engine's library need not be installed otherwise."""

TensorGroups = dict[str, dict[str, Tensor]]
"""Training state by group (``model``, ``optimizer``, ``rng``) and name."""


class Engine(Protocol):
    """Runs forward, backward and step. Takes the model over: its parameters move to the engine's device."""

    device: torch.device

    def step(self, input_ids: Tensor, *, lr: float) -> dict[str, Tensor]:
        """One optimizer step on ``input_ids`` [batch, seq] at learning rate ``lr``.

        Returns:
            The objective's metrics and ``grad_norm`` as scalars on the device: reading one waits for the device.
        """

    def evaluation(self) -> AbstractContextManager[None]:
        """Eval mode, no gradient, the engine's precision."""

    def state_dict(self) -> TensorGroups:
        """Everything that an exact resume needs besides the step number."""

    def load_state_dict(self, state: TensorGroups) -> None:
        """Undo of :meth:`state_dict`."""


def create_engine(*, model: nn.Module, objective: Objective, optim: OptimConfig, engine: EngineConfig) -> Engine:
    """The engine that ``engine.name`` asks for."""
    module, _, name = ENGINES[engine.name].partition(":")
    return getattr(importlib.import_module(module), name)(model=model, objective=objective, optim=optim, engine=engine)


def resolve_device(engine: EngineConfig) -> torch.device:
    """The device that ``engine.device`` means here.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    require(
        engine.device != "cuda" or available,
        "engine.device=cuda, but torch finds no CUDA device; set engine.device=cpu or install a CUDA build of torch",
    )
    use_cuda = engine.device == "cuda" or (engine.device == "auto" and available)
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def resolve_dtype(engine: EngineConfig) -> torch.dtype:
    """Data type of activations, and of the weights of models that are not trained."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[engine.precision]


def expect_shapes(number: int) -> None:
    """Have torch.compile accept ``number`` shapes of one function: after a few it would go on without compiling."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, number)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, number)


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of a causal LM in place, one by one: equal blocks share their code, so this takes seconds."""
    # At most one shape per block, for full and for last batches, under training and evaluation.
    expect_shapes(4 * len(model.model.layers))
    for block in model.model.layers:
        block.compile(dynamic=False)


def micro_batch_size(engine: EngineConfig, *, batch_size: int, seq_len: int) -> int:
    """Sequences in one forward pass: at least one, at most what ``engine.micro_batch_tokens`` allows."""
    if engine.micro_batch_tokens == 0:
        return batch_size
    return max(1, min(batch_size, engine.micro_batch_tokens // seq_len))

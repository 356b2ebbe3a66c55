"""What a training engine is to the trainer, and which engines there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from distill import distributed
from distill.config import EngineConfig, OptimConfig, require
from distill.data.batch import Batch
from distill.engine.setup import ModelProvider, TrainingSetup

ENGINES = {
    "torch": "distill.engine.torch_engine:TorchEngine",
    "deepspeed": "distill.engine.deepspeed_engine:DeepSpeedEngine",
    "megatron": "distill.engine.megatron_engine:MegatronEngine",
}
"""``module:class`` by name, imported when it is asked for: an engine's library need not be installed otherwise."""

TensorGroups = dict[str, dict[str, Tensor]]
"""Training state by group (``model``, ``optimizer``, ``rng``) and name."""


class Engine(Protocol):
    """A student under training, with its optimizer and its teacher, over all processes that work together.

    Every process calls every method, in the same order.
    """

    device: torch.device
    data_rank: int
    """Ranks that see the same sequences share it."""
    num_data_ranks: int

    def step(self, batch: Batch, *, lr: float) -> dict[str, Tensor]:
        """One optimizer step at learning rate ``lr``.

        Args:
            batch: whole sequences of this data rank, on the CPU; as many on every data rank.
            lr: learning rate.

        Returns:
            The objective's metrics as means over the batch of all ranks and ``grad_norm``, before clipping; equal on
            all ranks, scalars on the device: reading one waits for the device.
        """

    def evaluate(self, sequences: Tensor | Batch) -> dict[str, float]:
        """Held-out metrics of the student as it stands, equal on all ranks.

        Args:
            sequences: token ids [num_sequences, seq], or a batch that says more of them (documents that are kept
                apart); all of them on every rank.

        Returns:
            ``lm_loss`` in nats per token and, beside a teacher, ``kld`` (KL(teacher || student) in nats per token;
            beside one that is cached ``kld_top_k``, a lower bound), ``top1_agreement_frac`` and ``teacher_lm_loss``.
        """

    def save(self, directory: Path) -> None:
        """Write everything that :meth:`load` needs into an existing directory that all ranks share."""

    def snapshot(self) -> Callable[[Path], None]:
        """Copy what :meth:`save` would write to CPU memory: of each parameter 12 bytes over all ranks together.

        Returns:
            :meth:`save` of the copy, which later steps do not change. Every rank may call it in a thread of its own
            while it trains; the ranks then talk over :func:`distill.distributed.background_group`.
        """

    def load(self, directory: Path) -> None:
        """Undo of :meth:`save`, before the first step.

        Raises:
            ValueError: the state is of another layout that this engine cannot convert.
        """

    def export(self, directory: Path) -> None:
        """Write the student as a model directory in the stored data type. The first rank writes."""


def create_engine(
    setup: TrainingSetup, *, optim: OptimConfig, engine: EngineConfig, batch_size: int, seq_len: int
) -> Engine:
    """The engine that ``engine.name`` asks for, with the student's weights as its directory has them.

    Args:
        setup: student, objective and teacher.
        optim: optimizer settings.
        engine: engine and layout, which fits the number of processes (``distill.engine.layout``).
        batch_size: sequences of an optimizer step, over all data ranks.
        seq_len: tokens per sequence.
    """
    module, _, name = ENGINES[engine.name].partition(":")
    engine_class = getattr(importlib.import_module(module), name)
    return engine_class(setup, optim=optim, engine=engine, batch_size=batch_size, seq_len=seq_len)


def export_from(provider: ModelProvider, tensors: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Write ``tensors`` as a model directory. Every process calls it, the first one writes.

    Args:
        provider: of the model, whose architecture is written.
        tensors: whole tensors by name, on any device. Every process goes through them, which may gather them; only
            those of the first process are looked at.
        directory: made if needed; holds no weights yet.
    """
    with distributed.limited(distributed.STORAGE_TIMEOUT):
        if distributed.is_main():
            provider.write(directory, tensors)
        else:
            for _ in tensors:
                pass
        distributed.barrier()


def resolve_device(engine: EngineConfig) -> torch.device:
    """The device that ``engine.device`` means here.

    Raises:
        ValueError: CUDA is asked for and there is none, or processes that work together would share a device.
    """
    available = torch.cuda.is_available()
    require(
        engine.device != "cuda" or available,
        "engine.device=cuda, but torch finds no CUDA device; set engine.device=cpu or install a CUDA build of torch",
    )
    use_cuda = engine.device == "cuda" or (engine.device == "auto" and available)
    if use_cuda and distributed.world_size() > 1:
        distributed.check_own_gpu()
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
        # Not the call: hooks, such as those that gather a block's weights, would break its graph.
        block.forward = torch.compile(block.forward, dynamic=False)


def micro_batch_size(engine: EngineConfig, *, batch_size: int, seq_len: int) -> int:
    """Sequences in one forward pass: at least one, at most what ``engine.micro_batch_tokens`` allows."""
    if engine.micro_batch_tokens == 0:
        return batch_size
    return max(1, min(batch_size, engine.micro_batch_tokens // seq_len))

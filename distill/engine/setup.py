"""What a training engine is given: models as directories, what they are trained for, and who teaches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.config import ObjectiveConfig


class ModelProvider(Protocol):
    """A causal LM in a directory, as engines read, build and write it. It is implemented where models are known."""

    directory: Path

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type that the weights are stored in."""

    def sequence_flops(self, seq_len: int, *, head: bool = True) -> int:
        """FLOPs of the matrix products in one forward pass over ``seq_len`` tokens, with or without the head."""

    def load(self, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The whole model with its weights, in evaluation mode, with the Hugging Face surface."""

    def empty(self) -> nn.Module:
        """The module on the meta device, in fp32: no memory, no values. Its parameters are named as the tensors of the
        directory; tied ones are one parameter."""

    def names(self) -> list[str]:
        """Tensors of the directory, by parameter name; of tied ones the first alone."""

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """One tensor on the CPU, as stored, or these ``rows`` of its first dimension. Reads nothing else."""

    def write(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write a model directory of the same architecture with these weights, in the stored data type, one tensor at a
        time in any order; with the tokenizer.

        Raises:
            ValueError: the tensors are not those of :meth:`names`.
        """

    def megatron(self) -> Any:
        """What megatron-core is told of the model (``puzzle.model.megatron``); imports it."""


class TeacherStore(Protocol):
    """Signals of a teacher that were computed once, by sequence."""

    def signal(self, sequence_ids: Tensor, positions: slice, *, device: torch.device) -> Any:
        """Signals at ``positions`` of sequences [batch], on ``device``. Reads nothing else."""

    def teacher_lm_loss(self, num_sequences: int) -> float:
        """The teacher's LM loss on sequences 0 to ``num_sequences`` - 1, in nats per token with a next token."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What an engine trains."""

    student: ModelProvider
    objective: ObjectiveConfig
    teacher: ModelProvider | None = None
    """Runs beside the student."""
    store: TeacherStore | None = None
    """In place of a teacher that runs."""
    held_out_store: TeacherStore | None = None
    """Of the held-out sequences, with ``store``."""
    layer_map: tuple[int, ...] = ()
    """Teacher block that each student block is paired with; empty: hidden states are not compared."""

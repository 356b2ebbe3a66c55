"""A model directory as training engines read, build and write it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import require
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import (
    CheckpointWriter,
    TensorReader,
    check_tensors,
    copy_tokenizer,
    has_tokenizer,
    load_model,
    read_architecture,
)
from puzzle.model.configuration_decilm import DeciLMConfig
from puzzle.model.hf_config import hf_config
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.stats import sequence_flops
from puzzle.model.tensor_layout import EMBEDDING, tensor_shapes


class DirectoryProvider:
    """The model of a directory in the nemotron-nas format: a ``distill.engine.setup.ModelProvider``.

    It keeps no file open and can be sent to other processes.
    """

    def __init__(
        self,
        directory: Path,
        architecture: Architecture | None = None,
        tokenizer_from: Path | None = None,
        *,
        written_dtype: torch.dtype | None = None,
    ) -> None:
        """Look into the configuration and the headers; no weight is read.

        Args:
            directory: a model directory.
            architecture: one with the same tensors that stands in place of the directory's own, in what is built and in
                what is written: other rotary settings, more positions. None: the directory's own.
            tokenizer_from: directory whose tokenizer goes along with what is written; None: ``directory``, if it has
                one.
            written_dtype: data type of what is written; None: that of the stored weights.

        Raises:
            ValueError: ``directory`` is no checkpoint, its tensors are not those of its configuration, they are
                quantised, or ``architecture`` has others.
        """
        stored = read_architecture(directory)
        self.directory = directory
        self.architecture = architecture or stored
        with TensorReader(directory) as reader:
            check_tensors(reader, stored)
            self._dtype = reader.dtype(EMBEDDING)
        require(
            tensor_shapes(self.architecture) == tensor_shapes(stored),
            f"{directory}: its tensors are not those of the architecture that is to take its place; only what has no "
            "weights may differ (rotary settings, positions, parallel windows)",
        )
        self._tokenizer_from = tokenizer_from or (directory if has_tokenizer(directory) else None)
        self._written_dtype = written_dtype or self._dtype

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return self.architecture.num_blocks

    @property
    def dtype(self) -> torch.dtype:
        """Data type that the weights are stored in."""
        return self._dtype

    def sequence_flops(self, seq_len: int, *, head: bool = True) -> int:
        """Forward FLOPs of one sequence, with or without the head."""
        return sequence_flops(self.architecture, seq_len, head=head)

    def load(self, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The whole model with its weights, in evaluation mode, with the Hugging Face surface."""
        model = load_model(self.directory, device=device, dtype=dtype)
        if self.architecture == read_architecture(self.directory):
            return model
        rebuilt = self.empty()
        # The parameters themselves move over: nothing is copied, and a tied head stays tied.
        rebuilt.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        return rebuilt.eval()

    def empty(self) -> DeciLMForCausalLM:
        """The module on the meta device, in fp32 and evaluation mode: no memory, no values.

        Its parameters are named as the tensors of the directory; tied ones are one parameter.
        """
        with torch.device("meta"):
            model = DeciLMForCausalLM(DeciLMConfig(**hf_config(self.architecture, "float32")))
        if self.architecture.tie_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    def names(self) -> list[str]:
        """Tensors of the directory, by parameter name; of tied ones the first alone."""
        return list(tensor_shapes(self.architecture))

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """One tensor on the CPU, as stored, or these ``rows`` of its first dimension. Reads nothing else.

        Args:
            name: one of :meth:`names`.
            rows: consecutive; None: all.
        """
        with TensorReader(self.directory) as reader:
            return reader.read(name) if rows is None else reader.rows(name, rows.start, rows.stop)

    def write(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write a model directory of the same architecture with these weights, in ``written_dtype``.

        Each tensor is written before the next one is asked for. ``config.json`` comes last: what a killed process
        leaves is not taken for a model.

        Args:
            directory: made if needed; holds no weights yet.
            tensors: name and tensor, on any device and in any floating type, in any order.

        Raises:
            ValueError: the tensors are not those of :meth:`names`, in their shapes, or ``directory`` holds weights.
        """
        with CheckpointWriter(directory, self.architecture, dtype=self._written_dtype) as writer:
            if self._tokenizer_from is not None:
                copy_tokenizer(self._tokenizer_from, directory)
            for name, tensor in tensors:
                writer.add(name, tensor)

    def megatron(self) -> Any:
        """What megatron-core is told of the model: ``puzzle.model.megatron.MegatronModel``, of the architecture."""
        from puzzle.model.megatron import MegatronModel

        return MegatronModel(self.architecture)

"""A tiny stock transformers model: the training substrate knows models by that surface alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from distill.data.batch import Batch

VOCAB_SIZE = 61


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Builds an fp32 Llama from a seed."""

    def make(*, seed: int, num_blocks: int = 2, tied: bool = True, dropout: float = 0.0) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=num_blocks,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            attention_dropout=dropout,
            # Wide enough that two seeds disagree clearly.
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config)

    return make


@dataclass(frozen=True)
class LlamaProvider:
    """A directory that transformers wrote, as engines read it: ``distill.engine.setup.ModelProvider``."""

    directory: Path

    @property
    def num_blocks(self) -> int:
        return LlamaConfig.from_pretrained(self.directory).num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def sequence_flops(self, seq_len: int, *, head: bool = True) -> int:
        raise NotImplementedError

    def load(self, *, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.directory, dtype=dtype).to(device).eval()

    def empty(self) -> LlamaForCausalLM:
        raise NotImplementedError("transformers' rotary buffers do not survive the meta device")

    def names(self) -> list[str]:
        return list(self._tensors())

    def read(self, name: str, rows: range | None = None) -> Tensor:
        tensor = self._tensors()[name]
        return tensor if rows is None else tensor[rows.start : rows.stop]

    def write(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        model = self.load(device=torch.device("cpu"), dtype=self.dtype)
        model.load_state_dict(dict(tensors), strict=False)
        model.save_pretrained(directory)

    def megatron(self) -> Any:
        raise NotImplementedError

    def _tensors(self) -> dict[str, Tensor]:
        return load_file(self.directory / "model.safetensors")


@pytest.fixture
def llama_provider(make_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Callable[..., LlamaProvider]:
    """A directory with the model of :func:`make_llama`."""

    def provide(**settings: Any) -> LlamaProvider:
        directory = tmp_path / "_".join(["llama", *(f"{name}_{value}" for name, value in settings.items())])
        if not directory.exists():
            make_llama(**settings).save_pretrained(directory)
        return LlamaProvider(directory)

    return provide


@dataclass(frozen=True, kw_only=True)
class RandomBatches:
    """Token ids from a seed and the step: few distinct sequences, so that a tiny model can learn them."""

    batch_size: int
    seq_len: int

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        shape = (self.batch_size, self.seq_len)
        whole = Batch.of(torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(step % 3)))
        share = self.batch_size // num_ranks
        return whole.rows(rank * share, (rank + 1) * share)

    def describe_step(self, step: int) -> str:
        return f"tokens of seed {step % 3}"


@pytest.fixture
def make_batches() -> type[RandomBatches]:
    return RandomBatches

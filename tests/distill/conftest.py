"""A tiny stock transformers model: the training substrate knows models by that surface alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

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


class RandomBatches:
    """Token ids from a seed and the step: few distinct sequences, so that a tiny model can learn them."""

    def __init__(self, *, batch_size: int, seq_len: int) -> None:
        self._shape = (batch_size, seq_len)

    def batch(self, step: int) -> Tensor:
        return torch.randint(VOCAB_SIZE, self._shape, generator=torch.Generator().manual_seed(step % 3))


@pytest.fixture
def make_batches() -> type[RandomBatches]:
    return RandomBatches

"""The mapping of tensors onto megatron-core's shards, without megatron-core."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from puzzle.model.architecture import Architecture
from puzzle.model.megatron_layout import TensorLayout, stage_layouts
from puzzle.model.tensor_layout import tensor_shapes


def _tensors(architecture: Architecture) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(architecture).items()}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_comes_back_from_its_shards(
    heterogeneous_architecture: Architecture, num_ranks: int, tied: bool
) -> None:
    architecture = replace(heterogeneous_architecture, tie_embeddings=tied, qkv_bias=True, qk_norm=True)
    tensors = _tensors(architecture)
    back: dict[str, Tensor] = {}
    for first, num_blocks in ((0, 2), (2, 4)):
        for layout in stage_layouts(architecture, first, num_blocks):
            sources = [tensors[name] for name in layout.sources]
            back |= dict(layout.merge([layout.shard(sources, rank, num_ranks) for rank in range(num_ranks)]))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_queries_stand_beside_the_key_and_value_that_they_read() -> None:
    # Four query heads and two KV heads of one channel; rows are numbered by what they are.
    layout = TensorLayout(name="qkv", sources=("q", "k", "v"), kind="qkv", num_kv_heads=2, queries_per_group=2)
    q, k, v = torch.tensor([[1], [2], [3], [4]]), torch.tensor([[10], [20]]), torch.tensor([[100], [200]])
    assert layout.shard([q, k, v], 0, 2).flatten().tolist() == [1, 2, 10, 100]
    assert layout.shard([q, k, v], 1, 2).flatten().tolist() == [3, 4, 20, 200]


def test_gate_and_up_are_stacked_within_each_shard() -> None:
    layout = TensorLayout(name="fc1", sources=("gate", "up"), kind="gate_up")
    gate, up = torch.arange(4)[:, None], 10 + torch.arange(4)[:, None]
    assert layout.shard([gate, up], 1, 2).flatten().tolist() == [2, 3, 12, 13]


def test_a_tied_head_is_a_copy_of_the_embedding_where_the_last_stage_is_not_the_first(
    pico_architecture: Architecture,
) -> None:
    tied = replace(pico_architecture, tie_embeddings=True)
    heads = [layout for layout in stage_layouts(tied, 2, 2) if layout.name == "output_layer.weight"]
    assert [head.sources for head in heads] == [("model.embed_tokens.weight",)]
    assert not [layout for layout in stage_layouts(tied, 0, 4) if layout.name == "output_layer.weight"]

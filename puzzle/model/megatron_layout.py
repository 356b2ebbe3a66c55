"""Tensors of a checkpoint and of megatron-core's modules, shard by shard: an exact mapping both ways.

megatron-core stacks what reads the same input. Queries, keys and values are stacked by KV head ([its queries, its key,
its value], then the next), gate and up within each rank's shard. Rows of what reads the whole input and columns of what
reads dealt channels are dealt over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.model.tensor_layout import EMBEDDING, FINAL_NORM, HEAD, block_prefix


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """One parameter of a stage and the tensors of the checkpoint that it is made of."""

    name: str
    """Parameter of the stage's module."""
    sources: tuple[str, ...]
    """Tensors of the checkpoint."""
    kind: Literal["whole", "rows", "columns", "gate_up", "qkv"]
    """whole: the same on every rank; rows, columns: dealt over the ranks; gate_up, qkv: stacked, then dealt by rows."""
    num_kv_heads: int = 0
    """qkv alone."""
    queries_per_group: int = 0
    """qkv alone: query heads of one KV head."""

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """What rank ``rank`` of ``size`` holds, of the :attr:`sources`' whole ``tensors``."""
        if self.kind == "whole":
            return tensors[0]
        if self.kind == "gate_up":
            return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])
        if self.kind == "qkv":
            return self._interleave(tensors).chunk(size)[rank]
        return tensors[0].chunk(size, dim=1 if self.kind == "columns" else 0)[rank]

    def merge(self, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Name and whole tensor of each of the :attr:`sources`, of all ranks' ``shards``: undo of :meth:`shard`."""
        if self.kind == "whole":
            merged = [shards[0]]
        elif self.kind == "gate_up":
            halves = [shard.chunk(2) for shard in shards]
            merged = [torch.cat([half[part] for half in halves]) for part in range(2)]
        elif self.kind == "qkv":
            merged = self._separate(torch.cat(list(shards)))
        else:
            merged = [torch.cat(list(shards), dim=1 if self.kind == "columns" else 0)]
        return list(zip(self.sources, merged, strict=True))

    def _interleave(self, tensors: Sequence[Tensor]) -> Tensor:
        groups = [tensor.unflatten(0, (self.num_kv_heads, -1)) for tensor in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def _separate(self, stacked: Tensor) -> list[Tensor]:
        groups = stacked.unflatten(0, (self.num_kv_heads, -1))
        head_dim = groups.shape[1] // (self.queries_per_group + 2)
        parts = groups.split([self.queries_per_group * head_dim, head_dim, head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


def stage_layouts(architecture: Architecture, first_block: int, num_blocks: int) -> list[TensorLayout]:
    """Every parameter of the stage of ``num_blocks`` blocks from ``first_block`` on, in the order of the checkpoint.

    A tied head stands on the last stage too, where that is not the first: a copy of the embedding.
    """
    end = first_block + num_blocks
    is_first, is_last = first_block == 0, end == architecture.num_blocks
    layouts = []
    if is_first:
        layouts.append(TensorLayout(name="embedding.word_embeddings.weight", sources=(EMBEDDING,), kind="rows"))
    for index in range(first_block, end):
        layouts += _block_layouts(architecture, index, f"decoder.layers.{index - first_block}.")
    if is_last:
        layouts.append(TensorLayout(name="decoder.final_layernorm.weight", sources=(FINAL_NORM,), kind="whole"))
        if not (architecture.tie_embeddings and is_first):
            head = EMBEDDING if architecture.tie_embeddings else HEAD
            layouts.append(TensorLayout(name="output_layer.weight", sources=(head,), kind="rows"))
    return layouts


def _block_layouts(architecture: Architecture, index: int, prefix: str) -> list[TensorLayout]:
    block, source = architecture.blocks[index], block_prefix(index)
    return [
        TensorLayout(
            name=prefix + layout.name,
            sources=tuple(source + name for name in layout.sources),
            kind=layout.kind,
            num_kv_heads=layout.num_kv_heads,
            queries_per_group=layout.queries_per_group,
        )
        for layout in (*_attention_layouts(architecture, block), *_ffn_layouts(block))
    ]


def _attention_layouts(architecture: Architecture, block: BlockConfig) -> list[TensorLayout]:
    if block.attention.is_no_op:
        return []
    layouts = [TensorLayout(name="input_layernorm.weight", sources=("input_layernorm.weight",), kind="whole")]
    num_kv_heads = block.attention.num_kv_heads
    if num_kv_heads is None:
        sources = ("self_attn.linear_attn.weight",)
        return [*layouts, TensorLayout(name="self_attention.weight", sources=sources, kind="rows")]
    for leaf in ("weight", "bias") if architecture.qkv_bias else ("weight",):
        layouts.append(
            TensorLayout(
                name=f"self_attention.linear_qkv.{leaf}",
                sources=tuple(f"self_attn.{name}_proj.{leaf}" for name in "qkv"),
                kind="qkv",
                num_kv_heads=num_kv_heads,
                queries_per_group=architecture.num_heads // num_kv_heads,
            )
        )
    for name in ("q", "k") if architecture.qk_norm else ():
        sources = (f"self_attn.{name}_norm.weight",)
        layouts.append(TensorLayout(name=f"self_attention.{name}_layernorm.weight", sources=sources, kind="whole"))
    sources = ("self_attn.o_proj.weight",)
    return [*layouts, TensorLayout(name="self_attention.linear_proj.weight", sources=sources, kind="columns")]


def _ffn_layouts(block: BlockConfig) -> list[TensorLayout]:
    if block.ffn.is_no_op:
        return []
    sources = ("post_attention_layernorm.weight",)
    norm = TensorLayout(name="pre_mlp_layernorm.weight", sources=sources, kind="whole")
    if block.ffn.ffn_dim is None:
        return [norm, TensorLayout(name="mlp.weight", sources=("mlp.linear_mlp.weight",), kind="rows")]
    gate_up = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    return [
        norm,
        TensorLayout(name="mlp.linear_fc1.weight", sources=gate_up, kind="gate_up"),
        TensorLayout(name="mlp.linear_fc2.weight", sources=("mlp.down_proj.weight",), kind="columns"),
    ]

"""Weights of a replacement before any training, computed from the parent's (Puzzle, appendix A).

Tensors carry their names within a block, as in a checkpoint: ``self_attn.q_proj.weight``, ``mlp.down_proj.weight``.
Products and means are taken in fp32 and returned in the parent's data type.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from puzzle.importance import Rankings
from puzzle.library import BlockLibrary, LibraryEntry, Replacement, subblock_tensors
from puzzle.model.architecture import Architecture, AttentionConfig, FFNConfig
from puzzle.model.checkpoint import TensorReader
from puzzle.model.tensor_layout import attention_shapes, block_prefix, ffn_shapes
from puzzle.pool import content_digest

KVInit = Literal["mean_pool", "select"]


class Init(Protocol):
    """First weights of replacements."""

    def __call__(self, replacement: Replacement) -> Mapping[str, Tensor]:
        """Tensors (CPU) of a replacement before training. Several replacements may share them: not to be written to."""

    def origin(self, replacement: Replacement) -> Mapping[str, Any]:
        """JSON values that say where these tensors come from, beside the parent and the data. None of them is read.

        Equal for all tensors that differ by rounding alone: it is part of the key under which what becomes of them is
        found again (:class:`puzzle.pool.ReplacementPool`).
        """


class CheckpointInit:
    """Tensors of any replacement from the parent's checkpoint, in its stored data type.

    A tensor of a block is read once, and each of its subblocks made once, while replacements are asked for block by
    block. What one block needs stays in memory until the next one's turn.

    Args:
        reader: of the parent's checkpoint.
        parent: its architecture.
        rankings: of the blocks that narrower FFNs are asked for; KV heads only for ``kv_init="select"``.
        kv_init: how fewer KV heads are made.
    """

    def __init__(self, reader: TensorReader, parent: Architecture, rankings: Rankings, kv_init: KVInit) -> None:
        self._reader = reader
        self._parent = parent
        self._rankings = rankings
        self._kv_init = kv_init
        self._block = _OneBlock()

    def __call__(self, replacement: Replacement) -> dict[str, Tensor]:
        """Tensors of one subblock or both."""
        index, tensors = replacement.block, dict[str, Tensor]()
        for subblock in (replacement.attention, replacement.ffn):
            if subblock is not None:
                tensors |= self._block.once(index, subblock, partial(self._make, index, subblock))
        return tensors

    def origin(self, replacement: Replacement) -> dict[str, Any]:
        """What ranked a narrower FFN's channels, and how fewer KV heads are made; nothing where neither is."""
        own = self._parent.blocks[replacement.block]
        origin: dict[str, Any] = {}
        attention, ffn = replacement.attention, replacement.ffn
        if attention is not None and attention.kind == "gqa" and attention != own.attention:
            origin["kv_heads"] = self._kv_init
        if ffn is not None and ffn.kind == "swiglu" and ffn != own.ffn:
            origin["channels"] = self._rankings.criterion
        return origin

    def _make(self, index: int, subblock: AttentionConfig | FFNConfig) -> dict[str, Tensor]:
        own = self._parent.blocks[index]
        if isinstance(subblock, AttentionConfig):
            return init_attention(
                self._tensors(index, attention_shapes(self._parent, own.attention)),
                subblock,
                parent=own.attention,
                architecture=self._parent,
                ranking=self._rankings.kv_heads.get(index) if self._kv_init == "select" else None,
            )
        return init_ffn(
            self._tensors(index, ffn_shapes(self._parent, own.ffn)),
            subblock,
            parent=own.ffn,
            ranking=self._rankings.channels.get(index),
        )

    def _tensors(self, index: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Of a large parent's block not more than what is replaced."""
        prefix = block_prefix(index)
        return {name: self._block.once(index, name, partial(self._reader.read, prefix + name)) for name in names}


class LibraryInit:
    """Weights to start from: those of an earlier ``library``, and the parent's (``reader``) where it has none.

    A pair takes the attention that was trained beside the parent's FFN and the FFN that was trained beside the parent's
    attention. Every file and tensor of a block is read once, as in :class:`CheckpointInit`. Calls raise ``ValueError``
    for a replacement whose block the library cannot serve.
    """

    def __init__(self, library: BlockLibrary, reader: TensorReader) -> None:
        self._library = library
        self._reader = reader
        self._block = _OneBlock()

    def __call__(self, replacement: Replacement) -> dict[str, Tensor]:
        """Tensors of one subblock or both."""
        index, prefix, trained = replacement.block, block_prefix(replacement.block), dict[str, Tensor]()
        for entry in self._entries(replacement):
            trained |= self._block.once(index, entry.file, partial(self._library.load, entry))

        def tensor(name: str) -> Tensor:
            if name in trained:
                return trained[name]
            return self._block.once(index, name, partial(self._reader.read, prefix + name))

        return {name: tensor(name) for name in replacement.shapes(self._library.parent)}

    def origin(self, replacement: Replacement) -> dict[str, Any]:
        """Digests of the library's files."""
        directory = self._library.directory
        return {"library": [content_digest(directory / entry.file) for entry in self._entries(replacement)]}

    def _entries(self, replacement: Replacement) -> list[LibraryEntry]:
        return self._library.entries_of(replacement.block, replacement.block_in(self._library.parent))


class _OneBlock:
    """What was read and made of the block that was asked for last."""

    def __init__(self) -> None:
        self._index: int | None = None
        self._kept: dict[Hashable, Any] = {}

    def once(self, index: int, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when ``key`` of block ``index`` was first asked for."""
        if index != self._index:
            self._index, self._kept = index, {}
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def init_attention(
    block: Mapping[str, Tensor],
    variant: AttentionConfig,
    *,
    parent: AttentionConfig,
    architecture: Architecture,
    ranking: Tensor | None,
) -> dict[str, Tensor]:
    """Tensors of attention ``variant`` (fewer KV heads, linear, or the parent's own) from those of the parent's block.

    ``ranking [num_kv_heads]`` lists the block's KV heads, dearest first, of which the first stay; None: all are pooled.
    """
    tensors = subblock_tensors(block, "attention")
    if variant == parent:
        return tensors
    assert parent.num_kv_heads is not None, f"{variant.name} cannot be made of an attention of kind {parent.kind}"
    num_heads, num_kv_heads = architecture.num_heads, parent.num_kv_heads
    if variant.kind == "linear":
        weight = linear_attention(
            tensors["self_attn.v_proj.weight"],
            tensors["self_attn.o_proj.weight"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
        )
        return {
            "input_layernorm.weight": tensors["input_layernorm.weight"],
            "self_attn.linear_attn.weight": weight,
        }
    assert variant.num_kv_heads is not None
    if ranking is not None:
        kept = kept_first(ranking, variant.num_kv_heads)
        return select_kv_heads(tensors, kept, num_heads=num_heads, num_kv_heads=num_kv_heads)
    return {
        name: pool_kv_heads(tensor, num_kv_heads, variant.num_kv_heads)
        if name.startswith(("self_attn.k_proj.", "self_attn.v_proj."))
        else tensor
        for name, tensor in tensors.items()
    }


def init_ffn(
    block: Mapping[str, Tensor], variant: FFNConfig, *, parent: FFNConfig, ranking: Tensor | None
) -> dict[str, Tensor]:
    """Tensors of FFN ``variant`` (narrower, linear, or the parent's own) from the tensors of the parent's block.

    ``ranking [ffn_dim]`` lists the block's FFN channels, dearest first; only a narrower FFN needs it.
    """
    tensors = subblock_tensors(block, "ffn")
    if variant == parent:
        return tensors
    assert parent.kind == "swiglu", f"{variant.name} cannot be made of an FFN of kind {parent.kind}"
    if variant.kind == "linear":
        weight = linear_ffn(tensors["mlp.up_proj.weight"], tensors["mlp.down_proj.weight"])
        return {
            "post_attention_layernorm.weight": tensors["post_attention_layernorm.weight"],
            "mlp.linear_mlp.weight": weight,
        }
    assert ranking is not None, f"{variant.name} needs the ranking of the channels"
    assert variant.ffn_dim is not None
    return slice_ffn(tensors, kept_first(ranking, variant.ffn_dim))


def kept_first(ranking: Tensor, num_kept: int) -> Tensor:
    """Indices ``[num_kept]`` of the dearest channels or heads, in the parent's order.

    The order matters where they are dealt to ranks (tensor parallelism) or quantised in groups: sorted by importance,
    the first rank would hold all that counts.
    """
    return ranking[:num_kept].sort().values


def slice_ffn(tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """A narrower SwiGLU: rows ``kept`` of gate and up, the same columns of down; the norm as it is."""
    return {
        name: tensor[:, kept] if ".down_proj." in name else tensor[kept] if name.startswith("mlp.") else tensor
        for name, tensor in tensors.items()
    }


def pool_kv_heads(projection: Tensor, num_kv_heads: int, num_pooled: int) -> Tensor:
    """Mean of neighbouring KV heads in a key or value projection (GQA, arXiv 2305.13245).

    ``projection`` is a weight ``[num_kv_heads * head_dim, hidden]`` or a bias ``[num_kv_heads * head_dim]``. Heads lie
    group-major, so that query heads keep their order: pooled head j stands for heads j*r .. j*r + r - 1.
    """
    assert num_kv_heads % num_pooled == 0, f"{num_pooled} does not divide {num_kv_heads} KV heads"
    head_dim = projection.shape[0] // num_kv_heads
    groups = projection.float().unflatten(0, (num_pooled, num_kv_heads // num_pooled, head_dim))
    return groups.mean(dim=1).flatten(0, 1).to(projection.dtype)


def select_kv_heads(
    tensors: Mapping[str, Tensor], kept: Tensor, *, num_heads: int, num_kv_heads: int
) -> dict[str, Tensor]:
    """The attention with the KV heads ``kept [num_kept]`` alone, whose output is the parent's less what the others add.

    The format has every query head in every attention, so those of a removed KV head stay: they attend to a kept one,
    after its own, and the columns of W_o that read them are 0. Heads stay group-major. Tensors per head (QK norms) or
    per hidden channel (norm, bias of W_o) stay as they are.
    """
    num_kept, group = len(kept), num_heads // num_kv_heads
    assert num_kv_heads % num_kept == 0, f"{num_kept} does not divide {num_kv_heads} KV heads"
    is_kept = torch.zeros(num_kv_heads, dtype=torch.bool)
    is_kept[kept] = True
    removed = (~is_kept).nonzero().view(num_kept, -1)
    # [num_kept, num_kv_heads / num_kept]: each kept KV head, then those whose query heads it takes over.
    origin = torch.cat((kept[:, None], removed), dim=1).flatten()
    query_heads = (origin[:, None] * group + torch.arange(group)).flatten()
    is_live = is_kept[origin].repeat_interleave(group)
    child = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("self_attn.q_proj."):
            child[name] = tensor.unflatten(0, (num_heads, -1))[query_heads].flatten(0, 1)
        elif name.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            child[name] = tensor.unflatten(0, (num_kv_heads, -1))[kept].flatten(0, 1)
        elif name == "self_attn.o_proj.weight":
            columns = tensor.unflatten(1, (num_heads, -1))[:, query_heads]
            child[name] = (columns * is_live[:, None]).flatten(1)
    return child


def linear_attention(v_proj: Tensor, o_proj: Tensor, *, num_heads: int, num_kv_heads: int) -> Tensor:
    """``W_o W_v [hidden, hidden]``: the attention in which every token sees itself alone.

    ``v_proj [num_kv_heads * head_dim, hidden]`` is repeated for every query head of its group. A value bias has no
    place in the format's linear attention and is left out.
    """
    heads = v_proj.float().unflatten(0, (num_kv_heads, -1))
    values = heads.repeat_interleave(num_heads // num_kv_heads, dim=0).flatten(0, 1)
    return (o_proj.float() @ values).to(o_proj.dtype)


def linear_ffn(up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """``W_down W_up [hidden, hidden]``: the SwiGLU with its gate left out."""
    return (down_proj.float() @ up_proj.float()).to(down_proj.dtype)

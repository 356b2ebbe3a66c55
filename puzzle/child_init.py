"""Weights of a replacement before any training, computed from the parent's (Puzzle, appendix A).

Tensors carry their names within a block, as in a checkpoint: ``self_attn.q_proj.weight``, ``mlp.down_proj.weight``.
Products and means are taken in fp32 and returned in the parent's data type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from puzzle.library import Replacement, subblock_tensors
from puzzle.model.architecture import Architecture, AttentionConfig, FFNConfig
from puzzle.model.checkpoint import TensorReader
from puzzle.model.tensor_layout import block_prefix, block_shapes


def checkpoint_init(
    reader: TensorReader, parent: Architecture, rankings: Mapping[int, Tensor]
) -> Callable[[Replacement], dict[str, Tensor]]:
    """Tensors of any replacement from the parent's checkpoint, in its stored data type.

    ``rankings`` holds the channels [ffn_dim] of every block's FFN, dearest first.
    """

    def init(replacement: Replacement) -> dict[str, Tensor]:
        index = replacement.block
        block = {name: reader.read(block_prefix(index) + name) for name in block_shapes(parent, parent.blocks[index])}
        return init_replacement(block, replacement, parent, rankings.get(index))

    return init


def init_replacement(
    block: Mapping[str, Tensor], replacement: Replacement, architecture: Architecture, ranking: Tensor | None
) -> dict[str, Tensor]:
    """Tensors of ``replacement`` from those of the parent's block.

    ``ranking [ffn_dim]`` lists the block's FFN channels, dearest first; only a narrower FFN needs it.
    """
    parent = architecture.blocks[replacement.block]
    if isinstance(replacement.variant, AttentionConfig):
        return init_attention(block, replacement.variant, parent=parent.attention, architecture=architecture)
    return init_ffn(block, replacement.variant, parent=parent.ffn, ranking=ranking)


def init_attention(
    block: Mapping[str, Tensor], variant: AttentionConfig, *, parent: AttentionConfig, architecture: Architecture
) -> dict[str, Tensor]:
    """Tensors of attention ``variant`` (fewer KV heads, or linear) from the tensors of the parent's block."""
    assert parent.num_kv_heads is not None, f"{variant.name} cannot be made of an attention of kind {parent.kind}"
    tensors = subblock_tensors(block, "attention")
    if variant.kind == "linear":
        weight = linear_attention(
            tensors["self_attn.v_proj.weight"],
            tensors["self_attn.o_proj.weight"],
            num_heads=architecture.num_heads,
            num_kv_heads=parent.num_kv_heads,
        )
        return {
            "input_layernorm.weight": tensors["input_layernorm.weight"],
            "self_attn.linear_attn.weight": weight,
        }
    assert variant.num_kv_heads is not None
    for name, tensor in tensors.items():
        if name.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            tensors[name] = pool_kv_heads(tensor, parent.num_kv_heads, variant.num_kv_heads)
    return tensors


def init_ffn(
    block: Mapping[str, Tensor], variant: FFNConfig, *, parent: FFNConfig, ranking: Tensor | None
) -> dict[str, Tensor]:
    """Tensors of FFN ``variant`` (narrower, linear, or the parent's own) from the tensors of the parent's block.

    ``ranking`` is that of :func:`init_replacement`.
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
    return slice_ffn(tensors, kept_channels(ranking, variant.ffn_dim))


def kept_channels(ranking: Tensor, ffn_dim: int) -> Tensor:
    """Indices ``[ffn_dim]`` of the dearest channels, in the parent's order.

    The order matters where channels are dealt to ranks (tensor parallelism) or quantised in groups: sorted by
    importance, the first rank would hold all that counts.
    """
    return ranking[:ffn_dim].sort().values


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

"""The search space: which variants may stand at every block. Torch-free."""

from __future__ import annotations

from distill.config import require
from puzzle.config import SpaceConfig
from puzzle.model.architecture import (
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionConfig,
    BlockConfig,
    FFNConfig,
    round_up_ffn_dim,
)


def attention_variants(parent: Architecture, index: int, space: SpaceConfig) -> tuple[AttentionConfig, ...]:
    """Attentions that may stand at block ``index``, the parent's own first.

    Raises:
        ValueError: a KV head count of the space does not divide the parent's.
    """
    own = parent.blocks[index].attention
    variants = [own]
    if own.kind == "gqa":
        assert own.num_kv_heads is not None
        for heads in space.kv_heads:
            require(
                own.num_kv_heads % heads == 0,
                f"space.kv_heads: {heads} does not divide the {own.num_kv_heads} KV heads of block {index}",
            )
            variants.append(AttentionConfig(num_kv_heads=heads))
    removable = space.keep_first_blocks <= index < parent.num_blocks - space.keep_last_blocks
    if removable and space.attention_linear and own.kind == "gqa":
        variants.append(AttentionConfig(kind="linear"))
    if removable and space.attention_no_op:
        variants.append(NO_ATTENTION)
    return tuple(dict.fromkeys(variants))


def ffn_variants(parent: Architecture, index: int, space: SpaceConfig) -> tuple[FFNConfig, ...]:
    """FFNs that may stand at block ``index``, the parent's own first. Equal rounded widths are one variant."""
    own = parent.blocks[index].ffn
    variants = [own]
    if own.ffn_dim is not None:
        widths = (round_up_ffn_dim(frac * own.ffn_dim) for frac in space.ffn_fracs)
        variants.extend(FFNConfig(ffn_dim=width) for width in widths if width < own.ffn_dim)
    if space.ffn_linear and own.kind == "swiglu":
        variants.append(FFNConfig(kind="linear"))
    if space.ffn_no_op:
        variants.append(NO_FFN)
    return tuple(dict.fromkeys(variants))


def block_variants(parent: Architecture, index: int, space: SpaceConfig) -> tuple[BlockConfig, ...]:
    """Every attention beside every FFN at block ``index``; the parent's own block comes first."""
    return tuple(
        BlockConfig(attention=attention, ffn=ffn, parent_block_indices=parent.blocks[index].parent_block_indices)
        for attention in attention_variants(parent, index, space)
        for ffn in ffn_variants(parent, index, space)
    )

"""The search space: which variants may stand at every block. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

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

_SELECTION = re.compile(r"(-?\d+)(?:\.\.(-?\d+))?")


def block_indices(selection: Iterable[int | str], num_blocks: int, *, name: str) -> frozenset[int]:
    """The blocks that ``selection`` means: indices, negative ones from the end, and ranges with both ends.

    Args:
        selection: for example ``(0, "4..9", "-2..-1")``.
        num_blocks: blocks of the parent.
        name: configuration key, for the error.

    Raises:
        ValueError: an entry is none of these, names no block of the parent, or is a range that ends before it starts.
    """
    found: set[int] = set()
    for entry in selection:
        match = None if isinstance(entry, bool) else _SELECTION.fullmatch(str(entry))
        require(match is not None, f"{name}: {entry!r} is no block; give an index (0, -1) or a range (4..9, -2..-1)")
        assert match is not None
        first, last = (int(end) for end in (match[1], match[2] or match[1]))
        for index in (first, last):
            require(
                -num_blocks <= index < num_blocks,
                f"{name}: {entry} is beyond the parent's {num_blocks} blocks; give 0..{num_blocks - 1} "
                f"or -{num_blocks}..-1",
            )
        first, last = first % num_blocks, last % num_blocks
        require(first <= last, f"{name}: {entry} is empty, block {first} comes after block {last}; swap the ends")
        found.update(range(first, last + 1))
    return frozenset(found)


def attention_variants(parent: Architecture, index: int, space: SpaceConfig) -> tuple[AttentionConfig, ...]:
    """Attentions that may stand at block ``index``, the parent's own first.

    Raises:
        ValueError: a KV head count of the space does not divide the parent's, or space.keep_attention is wrong.
    """
    own = parent.blocks[index].attention
    if index in block_indices(space.keep_attention, parent.num_blocks, name="space.keep_attention"):
        return (own,)
    variants = [own]
    if own.num_kv_heads is not None:
        counts = _kv_head_counts(space, own.num_kv_heads, index)
        variants.extend(replace(own, num_kv_heads=heads) for heads in counts)
        if space.attention_linear:
            variants.append(AttentionConfig(kind="linear"))
    if space.attention_no_op:
        variants.append(NO_ATTENTION)
    return tuple(dict.fromkeys(variants))


def _kv_head_counts(space: SpaceConfig, own: int, index: int) -> tuple[int, ...]:
    """KV head counts that the space offers an attention with ``own`` of them."""
    if space.kv_heads == "divisors":
        return tuple(heads for heads in range(own - 1, 0, -1) if own % heads == 0)
    for heads in space.kv_heads:
        require(
            own % heads == 0,
            f"space.kv_heads: {heads} does not divide the {own} KV heads of block {index}; "
            "give divisors, or space.kv_heads=divisors for all of them",
        )
    return space.kv_heads


def ffn_variants(parent: Architecture, index: int, space: SpaceConfig) -> tuple[FFNConfig, ...]:
    """FFNs that may stand at block ``index``, the parent's own first. Equal rounded widths are one variant.

    Raises:
        ValueError: space.keep_ffn is wrong.
    """
    own = parent.blocks[index].ffn
    if index in block_indices(space.keep_ffn, parent.num_blocks, name="space.keep_ffn"):
        return (own,)
    variants = [own]
    if own.ffn_dim is not None:
        # As written, not as the nearest binary fraction: 0.55 x 25600 is 14080 channels, in floats a little more.
        widths = (round_up_ffn_dim(math.ceil(Fraction(str(frac)) * own.ffn_dim)) for frac in space.ffn_fracs)
        variants.extend(FFNConfig(ffn_dim=width) for width in widths if width < own.ffn_dim)
        if space.ffn_linear:
            variants.append(FFNConfig(kind="linear"))
    if space.ffn_no_op:
        variants.append(NO_FFN)
    return tuple(dict.fromkeys(variants))


def block_variants(parent: Architecture, index: int, space: SpaceConfig) -> tuple[BlockConfig, ...]:
    """Every attention beside every FFN at block ``index``; the parent's own block comes first.

    Raises:
        ValueError: see :func:`attention_variants` and :func:`ffn_variants`.
    """
    return tuple(
        replace(parent.blocks[index], attention=attention, ffn=ffn)
        for attention in attention_variants(parent, index, space)
        for ffn in ffn_variants(parent, index, space)
    )

"""What the paper sets fusion against: the members in reversed order, and as many of them removed as save its latency.

FFN Fusion (arXiv 2503.18908), section 5.2: were the members' order what matters, reversing it would hurt as fusing
does (Table 6); were the members themselves dispensable, removing some would be as good (Figure 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distill.config import require
from fusion.config import FuseConfig
from fusion.group_table import GroupTable
from fusion.grouping import Group, member_widths, validate_groups
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, copy_checkpoint, read_architecture
from puzzle.model.tensor_layout import block_prefix, block_shapes, other_shapes


def reverse_groups(model_dir: Path, out_dir: Path, groups: Sequence[Group]) -> Architecture:
    """Write the checkpoint of ``model_dir`` to ``out_dir`` with the blocks of every group in the opposite order.

    Every block keeps the parent block that it stands for.

    Args:
        model_dir: checkpoint before fusion.
        out_dir: directory of the new checkpoint.
        groups: first and last block (inclusive) of every group, in rising order.

    Returns:
        The architecture with the blocks in their new order.

    Raises:
        ValueError: the groups could not be fused either, or tensors are missing; nothing is written.
    """
    architecture = read_architecture(model_dir)
    validate_groups(architecture, groups)
    order = list(range(architecture.num_blocks))
    for first, last in groups:
        order[first : last + 1] = reversed(order[first : last + 1])
    reordered = architecture.with_blocks(tuple(architecture.blocks[index] for index in order))
    _write_blocks(model_dir, out_dir, reordered, order)
    return reordered


def ffns_to_remove(
    architecture: Architecture, groups: Sequence[Group], table: GroupTable, config: FuseConfig
) -> tuple[int, ...]:
    """The attention-free blocks of the groups that go, the one whose own removal costs the least KLD first.

    ``config.num_removed`` of them, or the fewest whose measured ``config.latency`` sums to what fusing the groups
    saves.

    Args:
        architecture: the model before fusion.
        groups: first and last block (inclusive) of every group; only their members may go.
        table: scores of the removals, and latencies.
        config: how many, or by which latency.

    Raises:
        ValueError: not as many members, or fusing the groups saves nothing; a removal or a width that was not measured.
    """
    members = [index for first, last in groups for index in range(first, last + 1)]
    cheapest_first = sorted(members, key=lambda index: table.removal(index).kld)
    if config.num_removed is not None:
        require(
            config.num_removed <= len(members),
            f"fuse.num_removed={config.num_removed}, but the groups have only {len(members)} FFNs; ask for fewer",
        )
        return tuple(cheapest_first[: config.num_removed])

    target_ms = sum(table.saved_ms(member_widths(architecture, group), config.latency) for group in groups)
    require(
        target_ms > 0,
        f"fuse.treatment=remove: fusing the groups saves {target_ms:.4g} ms of {config.latency} latency, so there is "
        "nothing to match; set fuse.num_removed or choose other groups",
    )
    removed_ms = 0.0
    for count, index in enumerate(cheapest_first, start=1):
        removed_ms += removal_saved_ms(architecture, [index], table, config)
        if removed_ms >= target_ms:
            return tuple(cheapest_first[:count])
    # A fused FFN takes no time below 0, so all of them save as much, but for the rounding of the sums.
    return tuple(cheapest_first)


def removal_saved_ms(
    architecture: Architecture, removed: Sequence[int], table: GroupTable, config: FuseConfig
) -> float:
    """Milliseconds of ``config.latency`` that the FFNs of the blocks ``removed`` take."""
    widths = (width for index in removed for width in member_widths(architecture, (index, index)))
    return sum(table.ffn_ms(width, config.latency) for width in widths)


def removed_architecture(architecture: Architecture, removed: Sequence[int]) -> Architecture:
    """``architecture`` without the blocks ``removed``.

    The block before a removed one (after it, if there is none) takes the place of its parent blocks too, with nothing
    of them (``dropped_parent_indices``): every parent block is still stood for, distillation finds what each block's
    output corresponds to, and no removed FFN passes for a fused one.
    """
    gone = set(removed)
    require(len(gone) < architecture.num_blocks, "fuse.treatment=remove leaves no block of the model; keep one")
    kept = [index for index in range(architecture.num_blocks) if index not in gone]
    parents: dict[int, tuple[int, ...]] = dict.fromkeys(kept, ())
    dropped: dict[int, tuple[int, ...]] = dict.fromkeys(kept, ())
    for index, block in enumerate(architecture.blocks):
        heir = max((place for place in kept if place <= index), default=kept[0])
        parents[heir] += block.parent_block_indices
        dropped[heir] += block.parent_block_indices if index in gone else block.dropped_parent_indices
    return architecture.with_blocks(
        tuple(
            replace(
                architecture.blocks[index],
                parent_block_indices=parents[index],
                dropped_parent_indices=dropped[index],
            )
            for index in kept
        )
    )


def remove_ffns(model_dir: Path, out_dir: Path, removed: Sequence[int]) -> Architecture:
    """Write the checkpoint of ``model_dir`` to ``out_dir`` without the attention-free blocks ``removed``.

    Returns:
        The architecture without them.

    Raises:
        ValueError: a block has attention or no SwiGLU FFN, no block would be left, or tensors are missing; nothing is
            written.
    """
    architecture = read_architecture(model_dir)
    for index in removed:
        require(
            0 <= index < architecture.num_blocks and architecture.blocks[index].is_attention_free,
            f"fuse.treatment=remove: block {index} is not one of SwiGLU FFN alone; name attention-free blocks",
        )
    shortened = removed_architecture(architecture, removed)
    kept = [index for index in range(architecture.num_blocks) if index not in set(removed)]
    _write_blocks(model_dir, out_dir, shortened, kept)
    return shortened


def _write_blocks(model_dir: Path, out_dir: Path, architecture: Architecture, sources: Sequence[int]) -> None:
    """Copy a checkpoint, tensor by tensor, to one whose block i is the block ``sources[i]`` of it."""
    names = {name: name for name in other_shapes(architecture)}
    for index, (source, block) in enumerate(zip(sources, architecture.blocks, strict=True)):
        names |= {block_prefix(index) + name: block_prefix(source) + name for name in block_shapes(architecture, block)}
    with TensorReader(model_dir) as reader:
        copy_checkpoint(reader, out_dir, architecture, names=names)

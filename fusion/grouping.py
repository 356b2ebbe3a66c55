"""Which runs of attention-free FFNs become one fused FFN, and the architecture that comes of it. Torch-free.

Source: FFN Fusion (arXiv 2503.18908), sections 3 and 4: whole runs are fused except their last FFN, and a run is split
only where the fused FFN would not fit the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from distill.config import require
from fusion.config import FuseConfig
from puzzle.model.architecture import NO_ATTENTION, Architecture, BlockConfig, FFNConfig

Group = tuple[int, int]
"""First and last block of a fusion group, inclusive."""

Matrix = Sequence[Sequence[float | None]]
"""Dependency matrix: row = removed block, column = measured block, null where nothing is measured."""


def group_width(architecture: Architecture, group: Group) -> int:
    """Channels of the FFN that the attention-free blocks of ``group`` fuse to."""
    first, last = group
    return sum(block.ffn.ffn_dim or 0 for block in architecture.blocks[first : last + 1])


def largest_dependency(matrix: Matrix, group: Group) -> float:
    """Largest cosine distance of ``matrix`` from any block of ``group`` (two blocks at least) to a later one of it."""
    first, last = group
    distances = [matrix[i][j] for i in range(first, last) for j in range(i + 1, last + 1)]
    return max(distance for distance in distances if distance is not None)


def fusion_groups(architecture: Architecture, config: FuseConfig, matrix: Matrix | None) -> tuple[Group, ...]:
    """Choose the fusion groups of a model.

    Groups come from the attention-free runs: the last FFN is left out if so configured, and the rest is split to hold
    ``max_ffn_dim`` and ``max_dependency``. Of all such splits the one with the fewest blocks is taken, of those the one
    with the fewest FFNs left alone, of those the most even one. Groups by hand are taken as they are, if in bounds.

    Args:
        architecture: the model before fusion.
        config: how to choose.
        matrix: ``[num_blocks, num_blocks]``, row = removed block, column = measured block (paper, section 3); needed
            for ``max_dependency``.

    Returns:
        First and last block (inclusive) of every group, in rising order; at least one group.

    Raises:
        ValueError: no run is long enough; ``max_dependency`` without a matrix; a matrix of another model; groups by
            hand that cannot be fused or break a bound.
    """
    _check_matrix(architecture, config, matrix)
    if config.groups is not None:
        groups = tuple(sorted(config.groups))
        validate_groups(architecture, groups)
        for group in groups:
            _check_bounds(architecture, config, matrix, group)
        return groups

    runs = tuple(architecture.attention_free_runs())
    trimmed = [(first, last - 1 if config.leave_last_out else last) for first, last in runs]
    groups = tuple(group for run in trimmed for group in _split(architecture, config, matrix, run))
    require(
        len(groups) > 0,
        f"fuse: nothing to fuse; attention-free runs of this model: {format_groups(runs) or 'none'}, with "
        f"leave_last_out={config.leave_last_out}, min_length={config.min_length}, max_ffn_dim={config.max_ffn_dim}, "
        f"max_dependency={config.max_dependency}; relax these or remove more neighbouring attentions first",
    )
    validate_groups(architecture, groups)
    return groups


def validate_groups(architecture: Architecture, groups: Sequence[Group]) -> None:
    """Raise ``ValueError`` unless ``groups`` are disjoint, in rising order and of unfused attention-free blocks."""
    require(len(groups) > 0, "fuse.groups is empty; name at least one [first, last], or null to choose from the runs")
    for first, last in groups:
        require(
            0 <= first < last < architecture.num_blocks,
            f"fuse.groups: [{first}, {last}] must name at least two blocks within 0..{architecture.num_blocks - 1}",
        )
        for index in range(first, last + 1):
            _check_member(architecture.blocks[index], index, (first, last))
    for before, after in pairwise(groups):
        require(
            before[1] < after[0],
            f"fuse.groups: {list(before)} and {list(after)} overlap or are out of order; a block belongs to one group",
        )


def block_spans(num_blocks: int, groups: Sequence[Group]) -> tuple[Group, ...]:
    """First and last of the ``num_blocks`` unfused blocks that stand at every block of the fused model."""
    last_of = dict(groups)
    spans: list[Group] = []
    while (first := spans[-1][1] + 1 if spans else 0) < num_blocks:
        spans.append((first, last_of.get(first, first)))
    return tuple(spans)


def fused_architecture(architecture: Architecture, groups: Sequence[Group]) -> Architecture:
    """``architecture`` with every group as one attention-free block that stands for its members' parent blocks."""
    blocks = architecture.blocks
    spans = block_spans(architecture.num_blocks, groups)
    return architecture.with_blocks(
        tuple(blocks[first] if first == last else _fused_block(architecture, (first, last)) for first, last in spans)
    )


def format_groups(groups: Sequence[Group]) -> str:
    """``3-6, 8-9``."""
    return ", ".join(f"{first}-{last}" for first, last in groups)


def _fused_block(architecture: Architecture, group: Group) -> BlockConfig:
    members = architecture.blocks[group[0] : group[1] + 1]
    return BlockConfig(
        attention=NO_ATTENTION,
        ffn=FFNConfig(ffn_dim=group_width(architecture, group)),
        parent_block_indices=tuple(index for member in members for index in member.parent_block_indices),
    )


def _check_member(block: BlockConfig, index: int, group: Group) -> None:
    where = f"fuse: block {index} of group {list(group)}"
    require(
        block.attention.is_no_op,
        f"{where} has attention {block.attention.name}; name blocks without attention, or remove it first",
    )
    require(block.ffn.kind == "swiglu", f"{where} has FFN {block.ffn.name}, not SwiGLU; name a group without it")
    require(
        len(block.parent_block_indices) == 1,
        f"{where} is already fused from parent blocks {list(block.parent_block_indices)}; fuse the model before that",
    )


def _check_matrix(architecture: Architecture, config: FuseConfig, matrix: Matrix | None) -> None:
    require(
        config.max_dependency is None or matrix is not None,
        f"fuse.max_dependency={config.max_dependency} needs a dependency matrix; give input `dependency` (stage "
        "measure_dependency) or set it to null",
    )
    require(
        matrix is None or len(matrix) == architecture.num_blocks,
        f"dependency matrix of {len(matrix or ())} blocks for a model of {architecture.num_blocks} blocks; measure it "
        "on the model that is fused",
    )


def _check_bounds(architecture: Architecture, config: FuseConfig, matrix: Matrix | None, group: Group) -> None:
    width = group_width(architecture, group)
    require(
        config.max_ffn_dim is None or width <= config.max_ffn_dim,
        f"fuse.groups: {list(group)} is {width} channels wide, over fuse.max_ffn_dim={config.max_ffn_dim}; split it or "
        "raise the bound",
    )
    if config.max_dependency is not None and matrix is not None:
        distance = largest_dependency(matrix, group)
        require(
            distance <= config.max_dependency,
            f"fuse.groups: {list(group)} has a dependency of {distance:.4g}, over "
            f"fuse.max_dependency={config.max_dependency}; split it or raise the bound",
        )


def _fits(architecture: Architecture, config: FuseConfig, matrix: Matrix | None, group: Group) -> bool:
    if config.max_ffn_dim is not None and group_width(architecture, group) > config.max_ffn_dim:
        return False
    return config.max_dependency is None or matrix is None or largest_dependency(matrix, group) <= config.max_dependency


def _split(architecture: Architecture, config: FuseConfig, matrix: Matrix | None, run: Group) -> list[Group]:
    """Best split of ``run`` by dynamic programming over its prefixes; FFNs that stay alone are not returned."""

    def may_stand(group: Group) -> bool:
        num_members = group[1] - group[0] + 1
        return num_members == 1 or (num_members >= config.min_length and _fits(architecture, config, matrix, group))

    def cost(split: tuple[Group, ...]) -> tuple[int, int, int]:
        num_alone = sum(first == last for first, last in split)
        # At equal depth the least sum of squares is the most even split.
        return len(split), num_alone, sum(group_width(architecture, group) ** 2 for group in split)

    best: list[tuple[Group, ...]] = [()]
    for last in range(run[0], run[1] + 1):
        ends = [(first, last) for first in range(run[0], last + 1) if may_stand((first, last))]
        best.append(min(((*best[group[0] - run[0]], group) for group in ends), key=cost))
    return [group for group in best[-1] if group[0] < group[1]]

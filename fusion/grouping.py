"""Which runs of attention-free FFNs become one fused FFN, and the architecture that comes of it. Torch-free.

Source: FFN Fusion (arXiv 2503.18908), sections 3 and 4: whole runs are fused except their last FFN, and a run is split
only where the fused FFN would not fit the device. Smaller groups are the steps of its ablation (section 5, Table 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from distill.config import require
from fusion.config import FuseConfig
from fusion.gain import Candidate, most_gain
from fusion.group_table import GroupTable
from puzzle.model.architecture import NO_ATTENTION, Architecture, BlockConfig, FFNConfig, require_sequential

Group = tuple[int, int]
"""First and last block of a fusion group, inclusive."""

Matrix = Sequence[Sequence[float | None]]
"""Dependency matrix: row = removed block, column = measured block, null where nothing is measured."""


def group_width(architecture: Architecture, group: Group) -> int:
    """Channels of the FFN that the attention-free blocks of ``group`` fuse to."""
    return sum(member_widths(architecture, group))


def member_widths(architecture: Architecture, group: Group) -> tuple[int, ...]:
    """Channels of the FFN of every attention-free block of ``group``."""
    first, last = group
    return tuple(block.ffn.ffn_dim or 0 for block in architecture.blocks[first : last + 1])


def largest_dependency(matrix: Matrix, group: Group) -> float:
    """Largest cosine distance of ``matrix`` from any block of ``group`` (two blocks at least) to a later one of it."""
    first, last = group
    distances = [matrix[i][j] for i in range(first, last) for j in range(i + 1, last + 1)]
    return max(distance for distance in distances if distance is not None)


def fusion_groups(
    architecture: Architecture,
    config: FuseConfig,
    matrix: Matrix | None = None,
    table: GroupTable | None = None,
    *,
    itemsize: int = 2,
) -> tuple[Group, ...]:
    """Choose the fusion groups of a model.

    Groups come from the attention-free runs, whose last FFN is left out first if so configured, and which end at FFNs
    that are fused already:

    - choose=fewest_blocks: every run is dealt into ``run // group_size`` groups, at least one, as even as can be, the
      larger first; without a group size it stays whole. What then exceeds a bound is split: of all splits the one with
      the fewest blocks is taken, of those the one with the fewest FFNs left alone, of those the most even one.
    - choose=most_gain: of all scored groups within the bounds those that save the most of ``config.latency`` together,
      their KL divergences summing to ``max_kld`` at most; of equal savings the least divergence. Groups that save
      nothing are never taken.

    The bounds are ``max_ffn_dim``, ``max_gib_per_rank``, ``tensor_parallel`` (which must divide the width) and
    ``max_dependency``, for each group alone. Groups by hand are taken as they are, if in bounds.

    Args:
        architecture: the model before fusion.
        config: how to choose.
        matrix: ``[num_blocks, num_blocks]``, row = removed block, column = measured block (paper, section 3); needed
            for ``max_dependency``.
        table: scores of the groups of this model; needed for choose=most_gain.
        itemsize: bytes per weight of the checkpoint, for ``max_gib_per_rank``.

    Returns:
        First and last block (inclusive) of every group, in rising order; at least one group.

    Raises:
        ValueError: nothing can be fused (the error names what forbids it and what would be possible); a bound without
            its measurement; a measurement of another model; groups by hand that cannot be fused or break a bound.
    """
    require_sequential(architecture.parallel_windows, "fusion")
    _check_matrix(architecture, config, matrix)
    _check_table(architecture, config, table)
    bounds = _bounds(architecture, config, matrix, itemsize)
    if config.groups is not None:
        groups = tuple(sorted(config.groups))
        validate_groups(architecture, groups)
        _check_by_hand(config, groups, bounds, table)
        return groups

    runs = _trimmed_runs(architecture, config)
    if config.choose == "most_gain":
        assert table is not None
        chosen = most_gain(_candidates(architecture, config, table, bounds), config.max_kld)
        groups = tuple(candidate.group for candidate in chosen)
    else:
        parts = [part for run in runs for part in _dealt(run, config.group_size)]
        groups = tuple(group for part in parts for group in _split(architecture, config, bounds, part))
    if not groups:
        raise ValueError(_why_nothing(architecture, config, bounds, table))
    validate_groups(architecture, groups)
    return groups


def validate_groups(architecture: Architecture, groups: Sequence[Group]) -> None:
    """Raise ``ValueError`` unless ``groups`` are disjoint, in rising order and of unfused attention-free blocks."""
    require_sequential(architecture.parallel_windows, "fusion")
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
        dropped_parent_indices=tuple(index for member in members for index in member.dropped_parent_indices),
    )


def _check_member(block: BlockConfig, index: int, group: Group) -> None:
    where = f"fuse: block {index} of group {list(group)}"
    require(
        block.attention.is_no_op,
        f"{where} has attention {block.attention.name}; name blocks without attention, or remove it first",
    )
    require(block.ffn.kind == "swiglu", f"{where} has FFN {block.ffn.name}, not SwiGLU; name a group without it")
    require(
        not block.is_fused,
        f"{where} is already fused from parent blocks {list(block.member_indices)}; fuse the model before that",
    )


def _trimmed_runs(architecture: Architecture, config: FuseConfig) -> list[Group]:
    """What may fuse: attention-free runs, which end at FFNs that are fused already, without their last FFN where that
    is left out; a run of one may become empty."""
    ends = {last for _, last in architecture.attention_free_runs()} if config.leave_last_out else set()
    return [(first, last - 1 if last in ends else last) for first, last in architecture.fusible_runs()]


def _dealt(run: Group, group_size: int | None) -> list[Group]:
    """``run`` in groups of about ``group_size``, as even as can be, the larger first."""
    first, num_ffns = run[0], run[1] - run[0] + 1
    num_groups = max(1, num_ffns // group_size) if group_size else 1
    size, num_larger = divmod(num_ffns, num_groups)
    parts: list[Group] = []
    for index in range(num_groups):
        start = parts[-1][1] + 1 if parts else first
        parts.append((start, start + size - (index >= num_larger)))
    return parts


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """What each group has to keep."""

    setting: str
    """``fuse.max_ffn_dim=512``."""
    excess: Callable[[Group], float]
    """How far a group is beyond it; 0 or less: within."""
    describe: Callable[[Group], str]
    """``1024 channels wide``."""

    def allows(self, group: Group) -> bool:
        return self.excess(group) <= 0


def _bounds(architecture: Architecture, config: FuseConfig, matrix: Matrix | None, itemsize: int) -> list[_Bound]:
    def width(group: Group) -> int:
        return group_width(architecture, group)

    def gib(group: Group) -> float:
        return 3 * architecture.hidden_dim * width(group) * itemsize / config.tensor_parallel / 1024**3

    bounds = [
        _Bound(
            setting=f"fuse.tensor_parallel={config.tensor_parallel}",
            excess=lambda group: width(group) % config.tensor_parallel,
            describe=lambda group: f"{width(group)} channels wide, which the ranks cannot share evenly",
        )
    ]
    if (max_ffn_dim := config.max_ffn_dim) is not None:
        bounds.append(
            _Bound(
                setting=f"fuse.max_ffn_dim={max_ffn_dim}",
                excess=lambda group: width(group) - max_ffn_dim,
                describe=lambda group: f"{width(group)} channels wide",
            )
        )
    if (max_gib := config.max_gib_per_rank) is not None:
        bounds.append(
            _Bound(
                setting=f"fuse.max_gib_per_rank={max_gib}",
                excess=lambda group: gib(group) - max_gib,
                describe=lambda group: f"{gib(group):.4g} GiB on each of {config.tensor_parallel} ranks",
            )
        )
    if (max_dependency := config.max_dependency) is not None:
        assert matrix is not None
        bounds.append(
            _Bound(
                setting=f"fuse.max_dependency={max_dependency}",
                excess=lambda group: largest_dependency(matrix, group) - max_dependency,
                describe=lambda group: f"dependent by {largest_dependency(matrix, group):.4g}",
            )
        )
    return bounds


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


def _check_table(architecture: Architecture, config: FuseConfig, table: GroupTable | None) -> None:
    if table is None:
        require(
            config.choose != "most_gain",
            "fuse.choose=most_gain needs group scores; give input `group_scores` (stage score_groups) or set "
            "fuse.choose=fewest_blocks",
        )
        return
    require(
        table.norm == config.norm,
        f"group scores of norm={table.norm}, but fuse.norm={config.norm}; set fuse.norm={table.norm}, or score the "
        f"groups with group_scores.norm={config.norm}",
    )
    ranks = table.workload.get("tensor_parallel", 1)
    require(
        config.tensor_parallel in (1, ranks),
        f"group scores timed on a share of {ranks} tensor-parallel ranks, but fuse.tensor_parallel="
        f"{config.tensor_parallel}; score the groups with workload.tensor_parallel={config.tensor_parallel}",
    )
    for score in table.groups:
        group = (score.first, score.last)
        require(
            score.last < architecture.num_blocks and score.ffn_dim == group_width(architecture, group),
            f"group scores: [{score.first}, {score.last}] with {score.ffn_dim} channels is no group of this model of "
            f"{architecture.num_blocks} blocks; score the model that is fused",
        )


def _check_by_hand(
    config: FuseConfig, groups: Sequence[Group], bounds: Sequence[_Bound], table: GroupTable | None
) -> None:
    for group in groups:
        for bound in bounds:
            require(
                bound.allows(group),
                f"fuse.groups: {list(group)} is {bound.describe(group)}, against {bound.setting}; name other blocks or "
                "change the bound",
            )
    if config.max_kld is not None:
        assert table is not None
        kld = sum(table.group(*group).kld for group in groups)
        require(
            kld <= config.max_kld,
            f"fuse.groups: {format_groups(groups)} cost {kld:.4g} nats per token together, over "
            f"fuse.max_kld={config.max_kld}; name fewer or raise the bound",
        )


def _split(architecture: Architecture, config: FuseConfig, bounds: Sequence[_Bound], run: Group) -> list[Group]:
    """Best split of ``run`` by dynamic programming over its prefixes; FFNs that stay alone are not returned."""

    def may_stand(group: Group) -> bool:
        num_members = group[1] - group[0] + 1
        return num_members == 1 or (num_members >= config.min_length and all(bound.allows(group) for bound in bounds))

    def cost(split: tuple[Group, ...]) -> tuple[int, int, int]:
        num_alone = sum(first == last for first, last in split)
        # At equal depth the least sum of squares is the most even split.
        return len(split), num_alone, sum(group_width(architecture, group) ** 2 for group in split)

    best: list[tuple[Group, ...]] = [()]
    for last in range(run[0], run[1] + 1):
        ends = [(first, last) for first in range(run[0], last + 1) if may_stand((first, last))]
        best.append(min(((*best[group[0] - run[0]], group) for group in ends), key=cost))
    return [group for group in best[-1] if group[0] < group[1]]


def _possible(architecture: Architecture, config: FuseConfig, table: GroupTable | None) -> list[Group]:
    """Every group within the trimmed runs that is long enough and, for most_gain, scored, whatever the bounds."""
    scored = {(score.first, score.last) for score in table.groups} if table is not None else set()
    return [
        (first, last)
        for start, end in _trimmed_runs(architecture, config)
        for first in range(start, end + 1)
        for last in range(first + config.min_length - 1, end + 1)
        if config.choose != "most_gain" or (first, last) in scored
    ]


def _candidates(
    architecture: Architecture, config: FuseConfig, table: GroupTable, bounds: Sequence[_Bound]
) -> list[Candidate]:
    return [
        Candidate(
            group=group,
            gain_ms=table.saved_ms(member_widths(architecture, group), config.latency),
            kld=table.group(*group).kld,
        )
        for group in _possible(architecture, config, table)
        if all(bound.allows(group) for bound in bounds)
    ]


def _why_nothing(
    architecture: Architecture, config: FuseConfig, bounds: Sequence[_Bound], table: GroupTable | None
) -> str:
    """What stands in the way of any group, and how near the nearest comes to what is asked."""
    runs = tuple(architecture.attention_free_runs())
    fused = ", ".join(str(index) for index, block in enumerate(architecture.blocks) if block.is_fused)
    possible = _possible(architecture, config, table)
    parts = []
    for bound in bounds:
        forbidden = [group for group in possible if not bound.allows(group)]
        if forbidden:
            nearest = min(forbidden, key=bound.excess)
            parts.append(
                f"{bound.setting} forbids {len(forbidden)} of {len(possible)} groups (the nearest, {list(nearest)}, "
                f"is {bound.describe(nearest)})"
            )
    if config.choose == "most_gain" and table is not None:
        parts += _why_no_gain(config, _candidates(architecture, config, table, bounds))
    return (
        f"fuse: nothing to fuse; attention-free runs of this model: {format_groups(runs) or 'none'}"
        f"{f' (fused already: {fused})' if fused else ''}, with "
        f"leave_last_out={config.leave_last_out}, min_length={config.min_length}"
        f"{''.join(f'; {part}' for part in parts)}; relax these or remove more neighbouring attentions first"
    )


def _why_no_gain(config: FuseConfig, candidates: Sequence[Candidate]) -> list[str]:
    """Why :func:`most_gain` takes none of ``candidates``."""
    if not candidates:
        return []
    best = max(candidates, key=lambda candidate: candidate.gain_ms)
    gainful = [candidate for candidate in candidates if candidate.gain_ms > 0]
    if not gainful:
        return [f"no group saves {config.latency} latency (the best, {list(best.group)}, saves {best.gain_ms:.4g} ms)"]
    cheapest = min(gainful, key=lambda candidate: candidate.kld)
    return [
        f"fuse.max_kld={config.max_kld} forbids every group that saves latency (the cheapest, {list(cheapest.group)}, "
        f"costs {cheapest.kld:.4g} nats per token and saves {cheapest.gain_ms:.4g} ms)"
    ]

"""What became of every block of the parent, as columns of a picture. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, BlockConfig

_REMOVED = BlockConfig(attention=NO_ATTENTION, ffn=NO_FFN, parent_block_indices=())


@dataclass(frozen=True, kw_only=True)
class Column:
    """One block of the parent."""

    block: int
    attention: str
    """Variant that stands there now; ``no_op`` where it, or the whole block, was removed."""
    attention_frac: float
    """KV heads as a fraction of the parent's."""
    ffn: str
    ffn_frac: float
    """Width as a fraction of the parent's widest FFN; 0 where there is none, or where it is one linear layer."""
    is_fused: bool
    """Part of a fused FFN now."""
    fate: str
    """One sentence."""


@dataclass(frozen=True, kw_only=True)
class FusedGroup:
    """A fused FFN, over the columns that it stands for."""

    members: tuple[int, ...]
    """Columns of the FFNs that became one."""
    ffn_dim: int | None

    @property
    def first(self) -> int:
        """First column."""
        return min(self.members)

    @property
    def last(self) -> int:
        """Last column."""
        return max(self.members)

    @property
    def num_members(self) -> int:
        """FFNs that became one."""
        return len(self.members)


@dataclass(frozen=True, kw_only=True)
class ArchitectureStrip:
    """The whole picture."""

    columns: tuple[Column, ...]
    groups: tuple[FusedGroup, ...]

    @property
    def attentions(self) -> list[tuple[str, float]]:
        """Attention variants that occur, with their fractions, for the legend."""
        return sorted({(c.attention, c.attention_frac) for c in self.columns}, key=lambda item: -item[1])

    @property
    def ffns(self) -> list[tuple[str, float]]:
        """FFN variants that occur, with their fractions, for the legend."""
        return sorted({(c.ffn, c.ffn_frac) for c in self.columns}, key=lambda item: -item[1])


def architecture_strip(parent: Architecture, unfused: Architecture, final: Architecture) -> ArchitectureStrip:
    """Columns for the blocks of ``parent``.

    Args:
        parent: the dense model.
        unfused: the model before fusion (the final one where nothing was fused): which variants stand where.
        final: the model after fusion: which blocks became one.
    """
    # A parent may come of a fusion or a removal itself.
    column_of = {member: index for index, own in enumerate(parent.blocks) for member in own.member_indices}

    def places(model: Architecture) -> dict[int, int]:
        """Block of ``model`` by column; removed columns have none."""
        blocks = enumerate(model.blocks)
        members = ((member, place) for place, block in blocks for member in block.member_indices)
        return {column_of[member]: place for member, place in members if member in column_of}

    before, after = places(unfused), places(final)
    members_of = {place: tuple(column for column in after if after[column] == place) for place in after.values()}
    groups = tuple(
        FusedGroup(members=members, ffn_dim=final.blocks[place].ffn.ffn_dim)
        for place, members in members_of.items()
        if len(members) > 1
    )
    group_of = {index: group for group in groups for index in group.members}
    full_width = max(block.ffn.ffn_dim or 0 for block in parent.blocks)
    columns = []
    for index, own in enumerate(parent.blocks):
        place = after.get(index)
        now = _REMOVED if place is None else unfused.blocks[before[index]]
        columns.append(
            Column(
                block=index,
                attention=now.attention.name,
                attention_frac=_share(now.attention.num_kv_heads, own.attention.num_kv_heads),
                ffn=now.ffn.name,
                ffn_frac=_share(now.ffn.ffn_dim, full_width),
                is_fused=index in group_of,
                fate=_fate(index, own, now, group_of.get(index), place),
            )
        )
    return ArchitectureStrip(columns=tuple(columns), groups=groups)


def _share(part: int | None, whole: int | None) -> float:
    return part / whole if part and whole else 0.0


def _fate(index: int, own: BlockConfig, now: BlockConfig, group: FusedGroup | None, place: int | None) -> str:
    if place is None:
        return f"Block {index}: {own.name} removed"
    change = "kept as it was" if now.name == own.name else f"{own.name} → {now.name}"
    if group is not None:
        return f"Block {index}: {change}, fused with blocks {group.first} to {group.last} into block {place}"
    return f"Block {index}: {change}" + (f", block {place} now" if place != index else "")

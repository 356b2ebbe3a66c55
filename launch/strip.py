"""What became of every block of the parent, as columns of a picture. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from puzzle.model.architecture import Architecture, BlockConfig


@dataclass(frozen=True, kw_only=True)
class Column:
    """One block of the parent."""

    block: int
    attention: str
    """Variant that stands there now; ``no_op`` where it was removed."""
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

    first: int
    last: int
    ffn_dim: int | None

    @property
    def num_members(self) -> int:
        """FFNs that became one."""
        return self.last - self.first + 1


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
    now = {index: block for block in unfused.blocks for index in block.parent_block_indices}
    places = {index: place for place, block in enumerate(final.blocks) for index in block.parent_block_indices}
    groups = tuple(
        FusedGroup(first=min(indices), last=max(indices), ffn_dim=block.ffn.ffn_dim)
        for block in final.blocks
        if len(indices := block.parent_block_indices) > 1
    )
    group_of = {index: group for group in groups for index in range(group.first, group.last + 1)}
    full_width = max(block.ffn.ffn_dim or 0 for block in parent.blocks)
    columns = tuple(
        Column(
            block=index,
            attention=now[index].attention.name,
            attention_frac=_share(now[index].attention.num_kv_heads, own.attention.num_kv_heads),
            ffn=now[index].ffn.name,
            ffn_frac=_share(now[index].ffn.ffn_dim, full_width),
            is_fused=index in group_of,
            fate=_fate(index, own, now[index], group_of.get(index), places[index]),
        )
        for index, own in enumerate(parent.blocks)
    )
    return ArchitectureStrip(columns=columns, groups=groups)


def _share(part: int | None, whole: int | None) -> float:
    return part / whole if part and whole else 0.0


def _fate(index: int, own: BlockConfig, now: BlockConfig, group: FusedGroup | None, place: int) -> str:
    change = "kept as it was" if now.name == own.name else f"{own.name} → {now.name}"
    if group is not None:
        return f"Block {index}: {change}, fused with blocks {group.first} to {group.last} into block {place}"
    return f"Block {index}: {change}" + (f", block {place} now" if place != index else "")

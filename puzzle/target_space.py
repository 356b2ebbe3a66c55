"""The variants that the engines which a child is for can load, as they were costed. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from distill.config import require
from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.model.compatibility import costly_rewrites, report, require_loadable
from puzzle.model.targets import Target
from puzzle.tables import parse_variant


def loadable_variants(
    parent: Architecture,
    scores: Sequence[Mapping[str, float]],
    targets: Sequence[Target],
    *,
    base: Sequence[str] | None = None,
) -> tuple[dict[str, float], ...]:
    """``scores`` by block and variant, without the variants that one of ``targets`` takes only at another cost.

    That is what it cannot load, and what it loads after a rewrite that adds weights or KV cache which the parent does
    not need: costs were measured without them. A block without attention and FFN stays, for exports drop it.

    Args:
        parent: the model that is searched.
        scores: of every variant, block by block.
        targets: engines.
        base: variants of the model that the scores are changes to, where it is not the parent.

    Raises:
        ValueError: a target cannot load the parent or a variant of the base, no variant of a block is left, or the
            parent's own everywhere.
    """
    require_loadable(parent, targets, name="search.targets")
    named = f"search.targets=[{','.join(targets)}]"
    left: list[dict[str, float]] = []
    known: dict[tuple[bool, BlockConfig], str] = {}
    for index, row in enumerate(scores):
        obstacles: dict[str, str] = {}
        for variant in row:
            attention, ffn = parse_variant(variant)
            block = replace(parent.blocks[index], attention=attention, ffn=ffn)
            # Engines ask more of block 0 than of all others, of which no two differ to them.
            key = index == 0, replace(block, parent_block_indices=(), dropped_parent_indices=())
            if key not in known:
                known[key] = "; ".join(_obstacles(parent, index, block, targets))
            obstacles[variant] = known[key]
        left.append({variant: score for variant, score in row.items() if not obstacles[variant]})
        reasons = ", ".join(f"{variant} ({why})" for variant, why in obstacles.items())
        require(
            len(left[-1]) > 0,
            f"{named} leaves nothing at block {index}: {reasons}; score variants that these engines load, or take one "
            "out of search.targets",
        )
        require(
            base is None or base[index] in left[-1],
            f"{named}: the scores are changes to a model with {base[index] if base else ''} at block {index}, which is "
            "left out; score the library on a base that these engines load",
        )
    own = [block.name for block in parent.blocks]
    require(
        any(set(row) != {name} for row, name in zip(left, own, strict=True)),
        f"{named} leaves the parent's own block everywhere, so there is nothing to search; widen space by variants "
        "that these engines load, or take one out of search.targets",
    )
    return tuple(left)


def _obstacles(parent: Architecture, index: int, block: BlockConfig, targets: Sequence[Target]) -> Iterator[str]:
    if block.is_dummy:
        return
    child = parent.with_block(index, block)
    for target in targets:
        added = costly_rewrites(target, child).items() - costly_rewrites(target, parent).items()
        yield from (f"{target}: {reason}" for reason in report(target, child).reasons)
        yield from (f"{target} would need {what}" for _, what in sorted(added))

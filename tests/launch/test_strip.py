from __future__ import annotations

from dataclasses import replace

import pytest

from distill.config import RopeConfig
from fusion.controls import removed_architecture
from fusion.grouping import fused_architecture
from launch.strip import FusedGroup, architecture_strip
from puzzle.model.architecture import NO_ATTENTION, Architecture, AttentionConfig, BlockConfig, FFNConfig, dense_blocks


def test_every_block_of_the_parent_has_a_column_that_says_what_became_of_it() -> None:
    parent = Architecture(
        vocab_size=64,
        hidden_dim=32,
        num_heads=8,
        head_dim=4,
        blocks=dense_blocks(6, 4, 768),
        max_positions=64,
        rope=RopeConfig(theta=1e4),
    )
    child = parent
    for index, width in ((2, 768), (3, 512), (4, 256)):
        ffn = FFNConfig(ffn_dim=width)
        child = child.with_block(index, BlockConfig(attention=NO_ATTENTION, ffn=ffn, parent_block_indices=(index,)))
    grouped = AttentionConfig(num_kv_heads=2)
    child = child.with_block(1, BlockConfig(attention=grouped, ffn=parent.blocks[1].ffn, parent_block_indices=(1,)))

    strip = architecture_strip(parent, child, fused_architecture(child, [(2, 3)]))

    assert [column.block for column in strip.columns] == list(range(6))
    assert [column.attention_frac for column in strip.columns] == [1.0, 0.5, 0.0, 0.0, 0.0, 1.0]
    assert [column.ffn_frac for column in strip.columns] == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 1])
    assert [column.is_fused for column in strip.columns] == [False, False, True, True, False, False]
    assert strip.groups == (FusedGroup(members=(2, 3), ffn_dim=1280),)
    assert [column.fate for column in strip.columns[:4]] == [
        "Block 0: kept as it was",
        "Block 1: kv4+w768 → kv2+w768",
        "Block 2: kv4+w768 → no_op+w768, fused with blocks 2 to 3 into block 2",
        "Block 3: kv4+w768 → no_op+w512, fused with blocks 2 to 3 into block 2",
    ]
    assert strip.columns[5].fate == "Block 5: kept as it was, block 4 now"
    assert strip.attentions == [("kv4", 1.0), ("kv2", 0.5), ("no_op", 0.0)]


def pruned(num_blocks: int) -> tuple[Architecture, Architecture]:
    """A dense parent, and the same without the attention of all blocks but the first and the last."""
    parent = Architecture(
        vocab_size=64,
        hidden_dim=32,
        num_heads=8,
        head_dim=4,
        blocks=dense_blocks(num_blocks, 4, 768),
        max_positions=64,
        rope=RopeConfig(theta=1e4),
    )
    child = parent
    for index in range(1, num_blocks - 1):
        child = child.with_block(index, replace(child.blocks[index], attention=NO_ATTENTION))
    return parent, child


def test_removed_blocks_are_empty_columns_and_nothing_is_fused() -> None:
    parent, child = pruned(6)
    removed = removed_architecture(child, (3, 4))

    strip = architecture_strip(parent, removed, removed)

    assert strip.groups == ()
    assert not any(column.is_fused for column in strip.columns)
    assert [column.ffn for column in strip.columns] == ["w768", "w768", "w768", "no_op", "no_op", "w768"]
    assert [column.ffn_frac for column in strip.columns] == [1, 1, 1, 0, 0, 1]
    assert [column.fate for column in strip.columns[2:]] == [
        "Block 2: kv4+w768 → no_op+w768",
        "Block 3: kv4+w768 removed",
        "Block 4: kv4+w768 removed",
        "Block 5: kept as it was, block 3 now",
    ]


def test_reversed_blocks_are_not_fused() -> None:
    parent, child = pruned(5)
    reordered = child.with_blocks(tuple(child.blocks[index] for index in (0, 3, 2, 1, 4)))

    strip = architecture_strip(parent, reordered, reordered)

    assert strip.groups == ()
    assert strip.columns[1].fate == "Block 1: kv4+w768 → no_op+w768, block 3 now"
    assert strip.columns[2].fate == "Block 2: kv4+w768 → no_op+w768"


def test_a_fusion_across_a_removed_block_counts_its_members_alone() -> None:
    parent, child = pruned(6)
    removed = removed_architecture(child, (2,))

    strip = architecture_strip(parent, removed, fused_architecture(removed, [(1, 3)]))

    assert strip.groups == (FusedGroup(members=(1, 3, 4), ffn_dim=3 * 768),)
    assert (strip.groups[0].first, strip.groups[0].last, strip.groups[0].num_members) == (1, 4, 3)
    assert [column.is_fused for column in strip.columns] == [False, True, False, True, True, False]
    assert strip.columns[2].fate == "Block 2: kv4+w768 removed"


def test_a_parent_that_was_fused_before_keeps_its_columns() -> None:
    _, child = pruned(7)
    parent = fused_architecture(child, [(1, 2)])

    strip = architecture_strip(parent, parent, fused_architecture(parent, [(2, 4)]))

    assert strip.groups == (FusedGroup(members=(2, 3, 4), ffn_dim=3 * 768),)
    assert [column.ffn for column in strip.columns] == ["w768", "w1536", "w768", "w768", "w768", "w768"]
    assert strip.columns[1].fate == "Block 1: kept as it was"
    assert strip.columns[5].fate == "Block 5: kept as it was, block 3 now"

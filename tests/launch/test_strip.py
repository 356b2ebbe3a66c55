from __future__ import annotations

import pytest

from distill.config import RopeConfig
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
    assert strip.groups == (FusedGroup(first=2, last=3, ffn_dim=1280),)
    assert [column.fate for column in strip.columns[:4]] == [
        "Block 0: kept as it was",
        "Block 1: kv4+w768 → kv2+w768",
        "Block 2: kv4+w768 → no_op+w768, fused with blocks 2 to 3 into block 2",
        "Block 3: kv4+w768 → no_op+w512, fused with blocks 2 to 3 into block 2",
    ]
    assert strip.columns[5].fate == "Block 5: kept as it was, block 4 now"
    assert strip.attentions == [("kv4", 1.0), ("kv2", 0.5), ("no_op", 0.0)]

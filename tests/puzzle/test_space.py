"""Spaces on the shapes of the published parents, and the notation of block selections."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.config import RopeConfig
from launch.config import compose_stage
from launch.stage_configs import MeasureCostsStage
from puzzle.config import SpaceConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, dense_blocks
from puzzle.space import attention_variants, block_indices, block_variants, ffn_variants


def llama(*, num_blocks: int, hidden_dim: int, num_heads: int, ffn_dim: int) -> Architecture:
    return Architecture(
        vocab_size=128_256,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        head_dim=128,
        blocks=dense_blocks(num_blocks, num_kv_heads=8, ffn_dim=ffn_dim),
        max_positions=131_072,
        rope=RopeConfig(theta=500_000.0),
    )


LLAMA_70B = llama(num_blocks=80, hidden_dim=8192, num_heads=64, ffn_dim=28_672)
LLAMA_405B = llama(num_blocks=126, hidden_dim=16_384, num_heads=128, ffn_dim=53_248)


def shipped(name: str, *overrides: str) -> SpaceConfig:
    return compose_stage(MeasureCostsStage, [f"space={name}", *overrides]).space


def widths(parent: Architecture, space: SpaceConfig) -> list[int]:
    return [ffn.ffn_dim or 0 for ffn in ffn_variants(parent, 1, space)]


@pytest.mark.parametrize("parent", [LLAMA_70B, LLAMA_405B], ids=["70b", "405b"])
def test_the_papers_space_has_54_variants_per_block(parent: Architecture) -> None:
    whole = shipped("puzzle_54", "space.keep_attention=[]")
    assert {len(block_variants(parent, index, whole)) for index in range(parent.num_blocks)} == {54}
    space = shipped("puzzle_54")
    assert [len(block_variants(parent, index, space)) for index in (0, 1)] == [9, 54]
    names = [attention.name for attention in attention_variants(parent, 5, space)]
    assert names == ["kv8", "kv4", "kv2", "kv1", "linear", "no_op"]
    assert block_variants(parent, 5, space)[0] == parent.blocks[5]


def test_fewer_kv_heads_do_not_rotate_either_where_the_parents_do_not() -> None:
    own = LLAMA_70B.blocks[3]
    parent = LLAMA_70B.with_block(3, replace(own, attention=replace(own.attention, rope=False)))
    names = [attention.name for attention in attention_variants(parent, 3, shipped("puzzle_54"))]
    assert names == ["kv8_nope", "kv4_nope", "kv2_nope", "kv1_nope", "linear", "no_op"]


def test_the_70b_library_has_16_variants_of_these_widths() -> None:
    space = shipped("puzzle_70b_16")
    assert len(block_variants(LLAMA_70B, 1, space)) == 16
    assert widths(LLAMA_70B, space) == [28_672, 21_504, 17_920, 14_336, 7168, 5632, 2816, 0]
    assert len(block_variants(LLAMA_70B, 0, space)) == 8


def test_ultras_grid_gives_the_widths_of_its_fused_ffns() -> None:
    space = shipped("ultra_grid")
    assert len(block_variants(LLAMA_405B, 1, space)) == 20
    by_frac = dict(zip((100, 90, 80, 70, 60, 50, 40, 30, 20, 10), widths(LLAMA_405B, space), strict=True))
    # 0.4875 x 2/3 x 16384, rounded up as every reader of the format does
    assert by_frac[10] == 5376
    assert 7 * by_frac[100] + by_frac[50] == 399_360
    assert 4 * by_frac[100] + 8 * by_frac[50] == 425_984
    assert 11 * by_frac[40] + 4 * by_frac[50] == 343_040
    assert 14 * by_frac[40] == 301_056


def test_widths_are_those_of_the_fraction_as_written() -> None:
    """In floats 0.55 x 25600 and 0.07 x 25600 are a little more than the 14080 and 1792 channels that they are."""
    parent = llama(num_blocks=2, hidden_dim=5120, num_heads=40, ffn_dim=25_600)
    space = SpaceConfig(ffn_fracs=(0.55, 0.5501, 0.07))
    assert widths(parent, space) == [25_600, 14_080, 14_336, 1792]


def test_attention_only_and_ffn_only_touch_one_subblock() -> None:
    attention, ffn = shipped("attention_only"), shipped("ffn_only")
    assert {block.ffn for block in block_variants(LLAMA_70B, 3, attention)} == {LLAMA_70B.blocks[3].ffn}
    assert NO_ATTENTION in attention_variants(LLAMA_70B, 3, attention)
    assert {block.attention for block in block_variants(LLAMA_70B, 0, ffn)} == {LLAMA_70B.blocks[0].attention}
    assert widths(LLAMA_70B, ffn) == [28_672, 21_504, 14_336, 7168, 0]


def test_kept_blocks_keep_their_whole_subblock() -> None:
    space = SpaceConfig(
        kv_heads="divisors",
        attention_linear=True,
        ffn_fracs=(0.5,),
        ffn_no_op=True,
        keep_attention=(0, "4..5", -1),
        keep_ffn=("-2..-1",),
    )
    parent = LLAMA_70B
    kept = [index for index in range(parent.num_blocks) if len(attention_variants(parent, index, space)) == 1]
    assert kept == [0, 4, 5, 79]
    assert [index for index in range(parent.num_blocks) if len(ffn_variants(parent, index, space)) == 1] == [78, 79]
    assert block_variants(parent, 79, space) == (parent.blocks[79],)


def test_divisors_of_a_count_that_is_no_power_of_two(pico_architecture: Architecture) -> None:
    parent = pico_architecture.with_blocks(dense_blocks(2, num_kv_heads=4, ffn_dim=512))
    space = SpaceConfig(kv_heads="divisors", attention_no_op=False)
    assert [a.num_kv_heads for a in attention_variants(parent, 1, space)] == [4, 2, 1]
    nine = Architecture(
        vocab_size=64,
        hidden_dim=576,
        num_heads=9,
        head_dim=64,
        blocks=dense_blocks(2, num_kv_heads=3, ffn_dim=1536),
        max_positions=64,
        rope=RopeConfig(theta=10_000.0),
    )
    assert [a.num_kv_heads for a in attention_variants(nine, 1, space)] == [3, 1]
    with pytest.raises(ValueError, match=r"space.kv_heads: 2 does not divide the 3 KV heads of block 1.*divisors"):
        attention_variants(nine, 1, SpaceConfig(kv_heads=(2,)))


def test_what_a_parent_has_not_is_not_offered(heterogeneous_architecture: Architecture) -> None:
    space = SpaceConfig(
        kv_heads="divisors", attention_linear=True, ffn_fracs=(0.5,), ffn_linear=True, ffn_no_op=True, keep_attention=()
    )
    names = [
        [variant.name for variant in block_variants(heterogeneous_architecture, index, space)] for index in range(6)
    ]
    assert names[1] == ["no_op+w256", "no_op+linear", "no_op+no_op"]
    assert names[4] == ["no_op+no_op"]
    assert names[5] == ["kv2+no_op", "kv1+no_op", "linear+no_op", "no_op+no_op"]
    assert [ffn.name for ffn in ffn_variants(heterogeneous_architecture, 3, space)] == ["linear", NO_FFN.name]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ((), set()),
        ((0,), {0}),
        ((-1, 0, "0"), {0, 9}),
        (("4..6",), {4, 5, 6}),
        (("-2..-1",), {8, 9}),
        (("7..-1", "-10..0"), {0, 7, 8, 9}),
        (("3..3", "3"), {3}),
    ],
)
def test_block_indices(selection: tuple[int | str, ...], expected: set[int]) -> None:
    assert block_indices(selection, 10, name="space.keep_attention") == expected


@pytest.mark.parametrize("entry", ["4-6", "4..", "..4", "a", "", "1..2..3", "4.5", "first", True, 1.0])
def test_malformed_selections_are_named(entry: str) -> None:
    with pytest.raises(ValueError, match=r"space.keep_ffn: .* is no block; give an index"):
        block_indices((0, entry), 10, name="space.keep_ffn")


@pytest.mark.parametrize("entry", [10, -11, "8..10", "-11..3"])
def test_blocks_beyond_the_parent_are_named(entry: int | str) -> None:
    with pytest.raises(ValueError, match=rf"prune.keep: {entry} is beyond the parent's 10 blocks; give 0\.\.9"):
        block_indices((entry,), 10, name="prune.keep")


def test_empty_ranges_are_named() -> None:
    with pytest.raises(ValueError, match=r"space.keep_ffn: -1\.\.4 is empty, block 9 comes after block 4"):
        block_indices(("-1..4",), 10, name="space.keep_ffn")


def test_fractions_and_counts_out_of_range_are_named() -> None:
    for frac in (0.0, 1.0, -0.5, 1.5):
        with pytest.raises(ValueError, match=r"space\.ffn_fracs must lie in 0\.\.1"):
            SpaceConfig(ffn_fracs=(frac,))
    with pytest.raises(ValueError, match=r"space\.kv_heads must be >= 1, got 0"):
        SpaceConfig(kv_heads=(0,))


def test_a_misspelt_word_for_kv_heads_is_named() -> None:
    with pytest.raises(ValueError, match="kv_heads"):
        shipped("puzzle_54", "space.kv_heads=divisor")


def test_ranges_come_through_the_command_line() -> None:
    space = shipped("puzzle_54", "space.keep_attention=[0,4..9,-2..-1]", "space.kv_heads=[4,2]")
    assert space.keep_attention == (0, "4..9", "-2..-1")
    assert space.kv_heads == (4, 2)

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest

from distill.config import RopeConfig
from fusion.config import FuseConfig
from fusion.group_table import FFNLatency, GroupScore, GroupTable, RemovalScore
from fusion.grouping import block_spans, fused_architecture, fusion_groups, group_width, largest_dependency
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import NO_ATTENTION, Architecture, AttentionConfig, BlockConfig, FFNConfig

A = (2, 256)  # with attention
F = (None, 256)  # attention-free
IDENTITY = (None, None)


def choose(architecture, matrix=None, table=None, *, itemsize=2, **fields):
    return fusion_groups(architecture, FuseConfig(**fields), matrix, table, itemsize=itemsize)


def uniform_matrix(num_blocks, value=0.1):
    return [[value if j > i else None for j in range(num_blocks)] for i in range(num_blocks)]


def test_last_ffn_of_every_run_is_left_out(make_architecture):
    architecture = make_architecture(A, F, F, F, A, F, F, F, F)
    assert choose(architecture) == ((1, 2), (5, 7))
    assert choose(architecture, leave_last_out=False) == ((1, 3), (5, 8))


def test_short_runs_stay(make_architecture):
    architecture = make_architecture(A, F, F, A, F, F, F, F)
    assert choose(architecture, min_length=3) == ((4, 6),)
    assert choose(architecture) == ((4, 6),)  # of two FFNs, one is left out: nothing to fuse


def test_identity_block_ends_a_run(make_architecture):
    assert choose(make_architecture(A, F, F, IDENTITY, F, F), leave_last_out=False) == ((1, 2), (4, 5))


@pytest.mark.parametrize(
    ("num_ffns", "max_members", "expected"),
    [
        (5, 4, [2, 3]),  # not 4 and a lone one
        (7, 3, [2, 2, 3]),
        (8, 4, [4, 4]),
        (9, 4, [3, 3, 3]),
        (4, 9, [4]),
    ],
)
def test_max_ffn_dim_splits_evenly(make_architecture, num_ffns, max_members, expected):
    architecture = make_architecture(A, *[F] * num_ffns)
    groups = choose(architecture, leave_last_out=False, max_ffn_dim=256 * max_members)
    assert sorted(last - first + 1 for first, last in groups) == expected
    assert [index for first, last in groups for index in range(first, last + 1)] == list(range(1, num_ffns + 1))


def test_max_ffn_dim_with_unequal_widths(make_architecture):
    architecture = make_architecture(A, *[(None, width) for width in (1024, 256, 256, 256, 1024, 256)])
    groups = choose(architecture, leave_last_out=False, max_ffn_dim=1536)
    assert groups == ((1, 3), (4, 6))
    assert [group_width(architecture, group) for group in groups] == [1536, 1536]


def test_ffn_wider_than_the_bound_stays_alone(make_architecture):
    architecture = make_architecture(A, F, F, (None, 1024), F, F)
    assert choose(architecture, leave_last_out=False, max_ffn_dim=512) == ((1, 2), (4, 5))


def test_min_length_holds_for_the_parts_of_a_split(make_architecture):
    architecture = make_architecture(A, *[F] * 7)
    groups = choose(architecture, leave_last_out=False, max_ffn_dim=4 * 256, min_length=4)
    assert [last - first + 1 for first, last in groups] == [4]


def test_max_dependency_splits_where_a_later_member_depends_on_an_earlier_one(make_architecture):
    architecture = make_architecture(A, F, F, F, F)
    matrix = uniform_matrix(5, 0.01)
    assert choose(architecture, matrix, leave_last_out=False, max_dependency=0.05) == ((1, 4),)
    matrix[2][3] = 0.2
    assert choose(architecture, matrix, leave_last_out=False, max_dependency=0.05) == ((1, 2), (3, 4))
    matrix[1][2] = 0.2
    assert choose(architecture, matrix, leave_last_out=False, max_dependency=0.05) == ((3, 4),)
    assert largest_dependency(matrix, (1, 4)) == 0.2
    assert largest_dependency(matrix, (3, 4)) == 0.01


def test_matrix_without_a_bound_changes_nothing(make_architecture):
    assert choose(make_architecture(A, F, F, F), uniform_matrix(4, 1.0)) == ((1, 2),)


def test_groups_by_hand(make_architecture):
    architecture = make_architecture(A, F, F, F, F, F, F)
    assert choose(architecture, groups=((4, 6), (1, 2))) == ((1, 2), (4, 6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": ()}, "fuse.groups is empty"),
        ({"groups": ((0, 2),)}, r"block 0 of group \[0, 2\] has attention kv2"),
        ({"groups": ((5, 6),)}, r"block 6 of group \[5, 6\] has FFN no_op"),
        ({"groups": ((1, 3), (3, 5))}, r"\[1, 3\] and \[3, 5\] overlap"),
        ({"groups": ((4, 9),)}, r"\[4, 9\] must name at least two blocks within 0..6"),
        ({"groups": ((1, 4),), "max_ffn_dim": 768}, r"\[1, 4\] is 1024 channels wide, against fuse.max_ffn_dim=768"),
        ({"groups": ((1, 4),), "max_dependency": 0.05}, r"\[1, 4\] is dependent by 0.1, against"),
        ({"groups": ((1, 3),), "tensor_parallel": 512}, r"\[1, 3\] is 768 channels wide, which the ranks cannot share"),
        ({"groups": ((1, 4),), "max_gib_per_rank": 1e-4}, r"\[1, 4\] is 0.0001831 GiB on each of 1 ranks, against"),
    ],
)
def test_groups_by_hand_that_cannot_be_fused(make_architecture, fields, message):
    architecture = make_architecture(A, F, F, F, F, F, IDENTITY)
    with pytest.raises(ValueError, match=message) as error:
        choose(architecture, uniform_matrix(7), **fields)
    assert "\n" not in str(error.value)


def test_group_of_one_is_refused_by_the_configuration():
    with pytest.raises(ValueError, match=r"\[3, 3\] must name at least two blocks"):
        FuseConfig(groups=((3, 3),))


def test_nothing_to_fuse_names_the_runs_and_the_settings(make_architecture):
    with pytest.raises(ValueError, match=r"runs of this model: 1-2, with leave_last_out=True, min_length=2"):
        choose(make_architecture(A, F, F, A))
    with pytest.raises(ValueError, match="runs of this model: none"):
        choose(make_architecture(A, A))


def test_bound_on_dependency_needs_a_matrix_of_this_model(make_architecture):
    architecture = make_architecture(A, F, F, F)
    with pytest.raises(ValueError, match=r"fuse.max_dependency=0.1 needs a dependency matrix"):
        choose(architecture, max_dependency=0.1)
    with pytest.raises(ValueError, match="matrix of 5 blocks for a model of 4 blocks"):
        choose(architecture, uniform_matrix(5), max_dependency=0.1)


def test_fused_architecture_keeps_lineage_and_order(make_architecture):
    architecture = make_architecture(A, (None, 256), (None, 512), F, A, F, F)
    groups = ((1, 2), (5, 6))
    fused = fused_architecture(architecture, groups)
    assert [block.name for block in fused.blocks] == ["kv2+w256", "no_op+w768", "no_op+w256", "kv2+w256", "no_op+w512"]
    assert [block.parent_block_indices for block in fused.blocks] == [(0,), (1, 2), (3,), (4,), (5, 6)]
    assert block_spans(7, groups) == ((0, 0), (1, 2), (3, 3), (4, 4), (5, 6))


def test_a_run_goes_on_where_a_part_of_it_is_fused_already(make_architecture):
    architecture = make_architecture(A, *[F] * 8, A, F, F, F)
    fused = fused_architecture(architecture, ((3, 4),))
    assert list(fused.attention_free_runs()) == [(1, 7), (9, 11)]
    assert list(fused.fusible_runs()) == [(1, 2), (4, 7), (9, 11)]
    # The last FFN of the run is left out; the one before the fused block is not the last.
    assert choose(fused) == ((1, 2), (4, 6), (9, 10))
    assert choose(fused, leave_last_out=False) == ((1, 2), (4, 7), (9, 11))
    assert choose(fused, group_size=2) == ((1, 2), (4, 6), (9, 10))


def test_a_run_that_begins_and_ends_with_fused_blocks(make_architecture):
    fused = fused_architecture(make_architecture(A, *[F] * 8), ((1, 2), (3, 4), (7, 8)))
    assert list(fused.fusible_runs()) == [(3, 4)]
    assert choose(fused) == ((3, 4),)


def test_gain_is_sought_among_what_is_not_fused_yet(make_architecture):
    fused = fused_architecture(make_architecture(A, *[F] * 6), ((1, 2),))
    table = group_table(fused)
    groups = choose(fused, None, table, choose="most_gain", leave_last_out=False)
    assert groups == ((2, 5),)


def test_fused_block_is_never_fused_again(make_architecture):
    fused = fused_architecture(make_architecture(A, F, F, F, F), ((1, 2),))
    with pytest.raises(ValueError, match=r"block 1 of group \[1, 2\] is already fused from parent blocks \[1, 2\]"):
        choose(fused, groups=((1, 2),))
    with pytest.raises(
        ValueError, match=r"attention-free runs of this model: 1-3 \(fused already: 1\), with leave_last"
    ):
        choose(fused)


def test_blocks_that_run_in_parallel_are_not_fused_besides(make_architecture):
    architecture = replace(make_architecture(A, A, F, F, F), parallel_windows=((0, 1),))
    with pytest.raises(ValueError, match="fusion takes blocks one after another, and this model runs blocks 0-1"):
        choose(architecture)


SUPER_49B_WIDTHS = {
    **{6: 50, 7: 50, 11: 62.5, 42: 25, 43: 50, 44: 50, 45: 25, 46: 100, 47: 25, 48: 50, 49: 25, 50: 25, 51: 25},
    **{53: 25, 54: 20, 55: 20, 56: 25, 57: 20, 58: 20, 59: 20, 60: 25, 61: 25, 62: 10, 63: 10, 64: 20, 65: 20, 66: 10},
    **{67: 10, 68: 20, 69: 10, 70: 10},
}
"""Attention-free blocks of Super-49B (80 blocks) and the widths of their FFNs in percent of the parent's 28672."""
STORED_PERCENT = {20: 5632, 10: 2816}
"""Widths that are rounded to a multiple of 256."""


@pytest.fixture(scope="module")
def super_49b():
    dense = BlockConfig(
        attention=AttentionConfig(num_kv_heads=8), ffn=FFNConfig(ffn_dim=28_672), parent_block_indices=(0,)
    )
    blocks = [replace(dense, parent_block_indices=(index,)) for index in range(80)]
    for index, percent in SUPER_49B_WIDTHS.items():
        width = STORED_PERCENT.get(percent) or int(28_672 * percent / 100)
        blocks[index] = replace(blocks[index], attention=NO_ATTENTION, ffn=FFNConfig(ffn_dim=width))
    return Architecture(
        vocab_size=128_256,
        hidden_dim=8192,
        num_heads=64,
        head_dim=128,
        max_positions=131_072,
        rope=RopeConfig(theta=500_000.0),
        blocks=tuple(blocks),
    )


@pytest.mark.parametrize(
    ("group_size", "sizes"),
    [
        (2, [3, 2, 2, 2, 3, *[2] * 7]),
        (4, [5, 4, 5, 4, 4, 4]),
        (8, [9, 9, 8]),
        (None, [9, 17]),
    ],
    ids=["step 1", "step 2", "step 3", "step 4"],
)
def test_steps_of_the_49b_ablation(super_49b, group_size, sizes):
    """Table 4: 26 FFNs (42-50 and 53-69) -> 12, 6, 3 and 2. The run 6-7 is too short once its last FFN is left out."""
    groups = choose(super_49b, group_size=group_size)
    assert [last - first + 1 for first, last in groups] == sizes
    members = [index for first, last in groups for index in range(first, last + 1)]
    assert members == [*range(42, 51), *range(53, 70)]


def test_fused_widths_of_the_49b_model(super_49b):
    assert [group_width(super_49b, group) for group in choose(super_49b)] == [107_520, 87_808]
    whole = choose(super_49b, leave_last_out=False)
    assert [group_width(super_49b, group) for group in whole] == [28_672, 114_688, 90_624]


def test_memory_of_a_rank_splits_a_run(super_49b):
    """One rank of 8 holds 3 x 8192 x 107520 x 2 bytes / 8 = 0.615 GiB of the first run in bf16."""
    assert choose(super_49b, max_gib_per_rank=0.616, tensor_parallel=8) == ((42, 50), (53, 69))
    assert choose(super_49b, max_gib_per_rank=0.614, tensor_parallel=8)[-1] == (53, 69)
    assert len(choose(super_49b, max_gib_per_rank=0.614, tensor_parallel=8)) == 3
    # fp32 weights need twice as much, and so do half as many ranks. Blocks 42-50 have 375 % of the parent's width; no
    # cut leaves 187.5 % at most on both sides, because block 46 alone has 100 %.
    groups = ((42, 44), (45, 46), (47, 50), (53, 59), (60, 69))
    assert choose(super_49b, max_gib_per_rank=0.616, tensor_parallel=8, itemsize=4) == groups
    assert choose(super_49b, max_gib_per_rank=0.616, tensor_parallel=4) == groups


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("num_ffns", range(2, 13))
def test_group_size_deals_a_run_evenly(make_architecture, num_ffns, size):
    groups = choose(make_architecture(A, *[F] * num_ffns), group_size=size, leave_last_out=False)
    sizes = [last - first + 1 for first, last in groups]
    assert len(sizes) == max(1, num_ffns // size)
    assert sum(sizes) == num_ffns
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_a_part_beyond_a_bound_is_split_further(make_architecture):
    architecture = make_architecture(A, *[F] * 8)
    assert choose(architecture, group_size=4, leave_last_out=False, max_ffn_dim=768) == ((1, 2), (3, 4), (5, 6), (7, 8))


def test_ranks_share_every_fused_width(make_architecture):
    architecture = make_architecture(A, F, F, F, F, F)
    # Of 256-channel FFNs only pairs and fours give widths that 512 ranks divide.
    assert choose(architecture, leave_last_out=False, tensor_parallel=512) == ((2, 5),)
    with pytest.raises(ValueError, match=r"fuse.tensor_parallel=7 forbids 10 of 10 groups .* cannot share evenly"):
        choose(architecture, leave_last_out=False, tensor_parallel=7)


WORKLOAD = WorkloadConfig(batch_size=1, prefill_tokens=64, generated_tokens=9)


def group_table(architecture, *, kld=None, widths=range(256, 256 * 41, 256), **fields):
    """All groups of the runs; every FFN takes 1 ms and 0.1 ms per 256 channels to decode, so a merge saves 1 ms."""
    groups = [
        (first, last)
        for start, end in architecture.fusible_runs()
        for first in range(start, end + 1)
        for last in range(first + 1, end + 1)
    ]
    kld = kld or (lambda group: 0.01 * (group[1] - group[0]) ** 2)
    return GroupTable(
        **{
            "num_tokens": 1,
            "norm": "folded",
            "lm_loss": 3.0,
            "groups": tuple(
                GroupScore(
                    first=group[0],
                    last=group[1],
                    ffn_dim=group_width(architecture, group),
                    kld=kld(group),
                    kld_stderr=0.0,
                    lm_loss=3.0,
                )
                for group in groups
            ),
            "removals": tuple(
                RemovalScore(block=index, kld=0.1 * index, kld_stderr=0.0, lm_loss=3.0)
                for index, block in enumerate(architecture.blocks)
                if block.is_attention_free
            ),
            "latencies": tuple(
                FFNLatency(ffn_dim=width, prefill_ms=0.5 + width / 2560, decode_ms=1.0 + width / 2560)
                for width in widths
            ),
            "hardware": "none",
            "workload": asdict(WORKLOAD),
            **fields,
        }
    )


def test_most_gain_takes_whole_runs_where_every_merge_saves_the_same(make_architecture):
    architecture = make_architecture(A, *[F] * 5, A, *[F] * 4)
    assert choose(architecture, None, group_table(architecture), choose="most_gain") == ((1, 4), (7, 9))


def test_most_gain_spends_the_divergence_where_it_buys_the_most(make_architecture):
    """(n - 1)^2 / 100 nats for n - 1 ms: pairs are the cheapest, then threes. One bound over both runs."""
    architecture = make_architecture(A, *[F] * 5, A, *[F] * 4)
    table = group_table(architecture)

    def sizes(max_kld):
        groups = choose(architecture, None, table, choose="most_gain", leave_last_out=False, max_kld=max_kld)
        return sorted(last - first + 1 for first, last in groups)

    assert sizes(0.015) == [2]
    assert sizes(0.045) == [2, 2, 2, 2]
    assert sizes(0.095) == [2, 2, 2, 3]
    assert sizes(1.0) == [4, 5]


def test_most_gain_keeps_the_bounds_of_a_group(make_architecture):
    architecture = make_architecture(A, *[F] * 6)
    table = group_table(architecture)
    fields = {"choose": "most_gain", "leave_last_out": False}
    assert choose(architecture, None, table, max_ffn_dim=768, **fields) == ((1, 3), (4, 6))
    assert choose(architecture, None, table, min_length=4, max_kld=0.2, **fields) in {((1, 5),), ((2, 6),)}
    matrix = uniform_matrix(7, 0.01)
    matrix[2][5] = 0.5
    chosen = choose(architecture, matrix, table, max_dependency=0.1, **fields)
    assert sum(last - first for first, last in chosen) == 4
    assert all(not (first <= 2 and last >= 5) for first, last in chosen)


@pytest.mark.parametrize("seed", range(3))
def test_most_gain_equals_brute_force_over_splits(make_architecture, seed):
    """Random latencies and divergences, unequal widths, both runs under one bound: all splits enumerated."""
    rng = random.Random(seed)
    widths = [256 * rng.randint(1, 6) for _ in range(10)]
    architecture = make_architecture(
        A, *[(None, width) for width in widths[:6]], A, *[(None, width) for width in widths[6:]]
    )
    klds = {(first, last): rng.uniform(0, 0.2) for first in range(12) for last in range(first + 1, 12)}
    table = group_table(architecture, kld=klds.__getitem__)
    latencies = [replace(row, decode_ms=rng.uniform(1, 3) + row.ffn_dim / 2560) for row in table.latencies]
    table = replace(table, latencies=tuple(latencies))

    def splits(first, last):
        if first > last:
            yield ()
        for end in range(first, last + 1):
            for rest in splits(end + 1, last):
                yield ((first, end), *rest) if end > first else rest

    def total(groups):
        kld = sum(klds[group] for group in groups)
        member_widths = [[widths[i - 1 - (i > 7)] for i in range(first, last + 1)] for first, last in groups]
        return sum(table.saved_ms(members, "decode") for members in member_widths), kld

    for max_kld in (0.05, 0.15, 0.4):
        fields = {"choose": "most_gain", "leave_last_out": False, "max_ffn_dim": 4096, "max_kld": max_kld}
        chosen = choose(architecture, None, table, **fields)
        best = max(
            saved
            for one in splits(1, 6)
            for two in splits(8, 11)
            if all(group_width(architecture, group) <= 4096 for group in one + two)
            for saved, kld in [total(one + two)]
            if kld <= max_kld
        )
        assert total(chosen)[0] == pytest.approx(best, abs=1e-9)
        assert total(chosen)[1] <= max_kld


def test_most_gain_goes_by_the_latency_that_is_asked(make_architecture):
    """Prefill of the fused width is slow here, decode is fast: the request of 9 tokens still gains."""
    architecture = make_architecture(A, F, F)
    table = group_table(architecture, widths=(256, 512))
    slow = replace(table.latencies[1], prefill_ms=9.0, decode_ms=1.2)
    table = replace(table, latencies=(table.latencies[0], slow))
    fields = {"choose": "most_gain", "leave_last_out": False}
    assert choose(architecture, None, table, latency="decode", **fields) == ((1, 2),)
    # 2 x 0.6 - 9 ms of prefill + 8 x (2 x 1.1 - 1.2) ms of decode
    assert choose(architecture, None, table, latency="request", **fields) == ((1, 2),)
    with pytest.raises(ValueError, match=r"no group saves prefill latency \(the best, \[1, 2\], saves -7.8 ms\)"):
        choose(architecture, None, table, latency="prefill", **fields)


def test_only_scored_groups_are_chosen_by_gain(make_architecture):
    architecture = make_architecture(A, *[F] * 4)
    table = group_table(architecture)
    table = replace(table, groups=tuple(row for row in table.groups if row.last - row.first == 1))
    assert choose(architecture, None, table, choose="most_gain", leave_last_out=False) == ((1, 2), (3, 4))


def test_bounds_that_leave_nothing_say_so_and_what_would_be_possible(make_architecture):
    architecture = make_architecture(A, F, F, (None, 512), F)
    fields = {"choose": "most_gain", "leave_last_out": False}
    table = group_table(architecture)
    with pytest.raises(
        ValueError, match=r"fuse.max_kld=0.005 forbids every .* \(the cheapest, \[1, 2\], costs 0.01 nats"
    ):
        choose(architecture, None, table, max_kld=0.005, **fields)
    with pytest.raises(ValueError, match=r"max_ffn_dim=256 forbids 6 of 6 groups \(the nearest, \[1, 2\], is 512 chan"):
        choose(architecture, None, table, max_ffn_dim=256, **fields)
    with pytest.raises(
        ValueError, match=r"max_dependency=0.05 forbids 6 of 6 groups .* is dependent by 0.1\)"
    ) as error:
        choose(architecture, uniform_matrix(5), max_dependency=0.05, leave_last_out=False)
    assert "\n" not in str(error.value)
    # Two bounds that only together forbid everything are both named.
    matrix = uniform_matrix(5, 0.5)
    matrix[2][3] = 0.01
    with pytest.raises(ValueError, match=r"max_ffn_dim=512 forbids 5 of 6 .*; fuse.max_dependency=0.1 forbids 5 of 6"):
        choose(architecture, matrix, max_dependency=0.1, max_ffn_dim=512, leave_last_out=False)


@pytest.mark.parametrize(
    ("fields", "table_fields", "message"),
    [
        ({"choose": "most_gain"}, None, "choose=most_gain needs group scores"),
        ({"norm": "last"}, {}, r"group scores of norm=folded, but fuse.norm=last; set fuse.norm=folded"),
        ({"tensor_parallel": 2}, {}, r"timed on a share of 1 tensor-parallel ranks, but fuse.tensor_parallel=2"),
        (
            {"choose": "most_gain", "groups": ((1, 3),), "max_kld": 0.01},
            {},
            r"fuse.groups: 1-3 cost 0.04 nats per token together, over fuse.max_kld=0.01",
        ),
    ],
)
def test_scores_that_do_not_fit_the_configuration(make_architecture, fields, table_fields, message):
    architecture = make_architecture(A, F, F, F)
    table = None if table_fields is None else group_table(architecture, **table_fields)
    with pytest.raises(ValueError, match=message):
        choose(architecture, None, table, **fields)


def test_scores_of_another_model_are_refused(make_architecture):
    table = group_table(make_architecture(A, F, (None, 512), F))
    with pytest.raises(ValueError, match=r"\[1, 2\] with 768 channels is no group of this model of 4 blocks"):
        choose(make_architecture(A, F, F, F), None, table)

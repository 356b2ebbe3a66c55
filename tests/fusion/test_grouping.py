from __future__ import annotations

import pytest

from fusion.config import FuseConfig
from fusion.grouping import block_spans, fused_architecture, fusion_groups, group_width, largest_dependency

A = (2, 256)  # with attention
F = (None, 256)  # attention-free
IDENTITY = (None, None)


def choose(architecture, matrix=None, **fields):
    return fusion_groups(architecture, FuseConfig(**fields), matrix)


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
        ({"groups": ((1, 4),), "max_ffn_dim": 768}, r"\[1, 4\] is 1024 channels wide, over fuse.max_ffn_dim=768"),
        ({"groups": ((1, 4),), "max_dependency": 0.05}, r"\[1, 4\] has a dependency of 0.1, over"),
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


def test_fused_block_is_never_fused_again(make_architecture):
    fused = fused_architecture(make_architecture(A, F, F, F, F), ((1, 2),))
    with pytest.raises(ValueError, match=r"block 1 of group \[1, 2\] is already fused from parent blocks \[1, 2\]"):
        choose(fused)

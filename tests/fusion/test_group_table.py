from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from fusion.config import FuseConfig
from fusion.controls import ffns_to_remove
from fusion.group_table import FFNLatency, GroupScore, GroupTable, RemovalScore
from fusion.grouping import fusion_groups

TABLE = GroupTable(
    num_tokens=64,
    norm="folded",
    lm_loss=3.0,
    groups=(
        GroupScore(first=1, last=2, ffn_dim=768, kld=0.01, kld_stderr=0.001, lm_loss=3.1),
        GroupScore(first=1, last=3, ffn_dim=1024, kld=0.03, kld_stderr=0.002, lm_loss=3.2),
    ),
    removals=(RemovalScore(block=1, kld=0.5, kld_stderr=0.01, lm_loss=3.4),),
    latencies=(
        FFNLatency(ffn_dim=256, prefill_ms=4.0, decode_ms=1.0),
        FFNLatency(ffn_dim=512, prefill_ms=6.0, decode_ms=1.5),
        # Faster than the narrower one, as it was measured.
        FFNLatency(ffn_dim=1024, prefill_ms=12.0, decode_ms=1.25),
    ),
    hardware="a device",
    workload={"batch_size": 1, "generated_tokens": 11},
)


def test_file_round_trip(tmp_path):
    TABLE.write(tmp_path / "groups.json")
    assert GroupTable.read(tmp_path / "groups.json") == TABLE


def test_rows_are_found_by_their_blocks():
    assert TABLE.group(1, 3).kld == 0.03
    assert TABLE.removal(1).kld == 0.5
    with pytest.raises(ValueError, match=r"\[1, 4\] was not scored; .* up to 3 FFNs .* group_scores.max_members"):
        TABLE.group(1, 4)
    with pytest.raises(ValueError, match="removal of block 2 was not scored, only those of 1; score the model"):
        TABLE.removal(2)


def test_widths_between_measured_ones_are_interpolated():
    assert TABLE.ffn_ms(256, "decode") == 1.0
    assert TABLE.ffn_ms(1024, "prefill") == 12.0
    # Halfway from 512 to 1024.
    assert TABLE.ffn_ms(768, "decode") == pytest.approx(1.375)
    assert TABLE.ffn_ms(768, "prefill") == pytest.approx(9.0)
    # The prompt gives the first of eleven tokens.
    assert TABLE.ffn_ms(768, "request") == pytest.approx(9.0 + 10 * 1.375)


@pytest.mark.parametrize("width", [128, 1280])
def test_widths_beyond_the_measured_ones_are_refused(width):
    with pytest.raises(ValueError, match=rf"FFN of {width} channels, measured are 256 to 1024; score the model"):
        TABLE.ffn_ms(width, "decode")


def test_saving_is_the_members_less_the_fused_ffn():
    assert TABLE.saved_ms((256, 512), "decode") == pytest.approx(1.0 + 1.5 - 1.375)
    # Where the wide FFN is slow, fusing costs time, and the table says so.
    assert TABLE.saved_ms((512, 512), "prefill") == pytest.approx(6.0 + 6.0 - 12.0)
    assert TABLE.saved_ms((256, 256, 256), "request") == pytest.approx(3 * 14.0 - (9.0 + 13.75))
    with pytest.raises(ValueError, match="FFN of 1536 channels"):
        TABLE.saved_ms((512, 1024), "decode")


def test_every_ffn_ends_in_an_all_reduce():
    table = replace(TABLE, all_reduce_prefill_ms=0.25, all_reduce_decode_ms=0.125, all_reduce_hardware="a host")
    assert table.ffn_ms(256, "decode") == 1.125
    assert table.ffn_ms(768, "prefill") == pytest.approx(9.25)
    assert table.ffn_ms(256, "request") == pytest.approx(4.25 + 10 * 1.125)
    # Three FFNs less are two all-reduces less: one is left behind the fused FFN.
    for latency, all_reduce_ms in (("decode", 0.125), ("prefill", 0.25), ("request", 0.25 + 10 * 0.125)):
        computed_ms = TABLE.saved_ms((256, 256, 256), latency)
        assert table.saved_ms((256, 256, 256), latency) == pytest.approx(computed_ms + 2 * all_reduce_ms)


def test_a_group_that_saves_nothing_but_an_all_reduce_gains(tmp_path):
    linear = tuple(FFNLatency(ffn_dim=w, prefill_ms=w / 64, decode_ms=w / 256) for w in (256, 1024))
    alone = replace(TABLE, latencies=linear)
    assert alone.saved_ms((256, 512), "decode") == 0.0
    shared = replace(alone, all_reduce_decode_ms=0.5)
    assert shared.saved_ms((256, 512), "decode") == pytest.approx(0.5)
    shared.write(tmp_path / "groups.json")
    assert GroupTable.read(tmp_path / "groups.json") == shared


def test_choice_of_groups_and_removals_count_the_all_reduce(make_architecture):
    """Three FFNs whose computation fusing does not shorten: all that it saves is two all-reduces."""
    architecture = make_architecture((2, 256), *[(None, 256)] * 3)
    config = FuseConfig(choose="most_gain", leave_last_out=False)
    computed = replace(
        TABLE,
        groups=tuple(replace(TABLE.groups[1], last=last, ffn_dim=256 * last) for last in (2, 3)),
        removals=tuple(RemovalScore(block=index, kld=0.1 * index, kld_stderr=0.0, lm_loss=3.0) for index in (1, 2, 3)),
        latencies=tuple(FFNLatency(ffn_dim=w, prefill_ms=w / 64, decode_ms=w / 256) for w in (256, 1024)),
    )
    with pytest.raises(ValueError, match="no group saves decode latency"):
        fusion_groups(architecture, config, table=computed)
    table = replace(computed, all_reduce_decode_ms=4.0)
    assert fusion_groups(architecture, config, table=table) == ((1, 3),)
    # Two all-reduces, 8 ms; an FFN with its own takes 5 ms.
    assert ffns_to_remove(architecture, [(1, 3)], table, config) == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"all_reduce_decode_ms": -0.1}, r"all-reduces of 0.0 and -0.1 ms must be >= 0"),
        ({"all_reduce_prefill_ms": float("nan")}, "all_reduce_prefill_ms is nan"),
        ({"groups": 2 * TABLE.groups}, r"group \(1, 2\) stands twice"),
        ({"removals": 2 * TABLE.removals}, "removal of block 1 stands twice"),
        ({"latencies": ()}, "no FFN latency"),
        ({"latencies": TABLE.latencies[::-1]}, "by rising width, 1024 stands before 512"),
        ({"latencies": (replace(TABLE.latencies[0], decode_ms=-1.0),)}, "time below 0"),
        ({"groups": (replace(TABLE.groups[0], kld=float("nan")),)}, "kld is nan, not a finite number"),
        ({"lm_loss": float("inf")}, "lm_loss is inf"),
    ],
)
def test_tables_with_holes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TABLE, **change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"groups.json: Expecting"),
        ("[]", r"groups.json: holds a list, expected a JSON object"),
        (json.dumps({**asdict(TABLE), "extra": 1}), r"groups.json: .*extra"),
        (
            json.dumps({name: value for name, value in asdict(TABLE).items() if name != "groups"}),
            "groups.json: .*groups",
        ),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "groups.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        GroupTable.read(tmp_path / "groups.json")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"groups.json does not exist"):
        GroupTable.read(tmp_path / "groups.json")

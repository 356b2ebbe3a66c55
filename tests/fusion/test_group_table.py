from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from fusion.group_table import FFNLatency, GroupScore, GroupTable, RemovalScore

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
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

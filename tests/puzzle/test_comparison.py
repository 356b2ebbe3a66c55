"""Two tables of one workload, row by row."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from puzzle.analytic import cost_table
from puzzle.comparison import compare, median_error, write_csv
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import NO_FFN, AttentionConfig, FFNConfig

WORKLOAD = WorkloadConfig(batch_size=3)
SUBBLOCKS = (AttentionConfig(num_kv_heads=2), FFNConfig(ffn_dim=512), FFNConfig(ffn_dim=256), NO_FFN)


def table(architecture, source, times, workload=WORKLOAD):
    return cost_table(
        architecture,
        workload,
        source=source,
        hardware="a device",
        subblock_ms=dict(zip(SUBBLOCKS, [*times, (0.0, 0.0)], strict=True)),
        overhead_ms=(1.0, 1.0),
        merge_saving_ms=(0.0, 0.0),
    )


@pytest.fixture
def rows(pico_architecture):
    measured = table(pico_architecture, "measured", [(4.0, 2.0), (8.0, 1.0), (5.0, 0.0)])
    return compare(measured, table(pico_architecture, "analytic", [(5.0, 1.0), (8.0, 1.5), (4.0, 0.3)]))


def test_every_variant_in_both_phases(rows):
    assert [(row.subblock, row.variant, row.phase, row.relative_difference) for row in rows] == [
        ("outside", "", "prefill", 0.0),
        ("outside", "", "decode", 0.0),
        ("attention", "kv2", "prefill", 0.25),
        ("attention", "kv2", "decode", -0.5),
        ("ffn", "w512", "prefill", 0.0),
        ("ffn", "w512", "decode", 0.5),
        ("ffn", "w256", "prefill", pytest.approx(-0.2)),
        # A measurement that was clamped to 0 has no relative difference.
        ("ffn", "w256", "decode", None),
    ]
    assert {row.batch_size for row in rows} == {3}


def test_the_median_is_over_sizes_within_the_blocks(rows):
    assert median_error(rows, "prefill") == pytest.approx(0.2)
    assert median_error(rows, "decode") == 0.5
    assert median_error([], "decode") is None


def test_csv(rows, tmp_path):
    write_csv(rows, tmp_path / "comparison.csv")
    with (tmp_path / "comparison.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert lines[3] == {
        "batch_size": "3",
        "subblock": "attention",
        "variant": "kv2",
        "phase": "decode",
        "measured_ms": "2.0",
        "analytic_ms": "1.0",
        "relative_difference": "-0.5",
    }
    assert lines[7]["relative_difference"] == ""


def test_two_workloads(pico_architecture):
    times = [(1.0, 1.0)] * 3
    other = table(pico_architecture, "analytic", times, replace(WORKLOAD, batch_size=4))
    with pytest.raises(ValueError, match=r"tables from 'measured' and 'analytic' are of two workloads"):
        compare(table(pico_architecture, "measured", times), other)

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.artifact import Artifact
from launch.quantities import duration, num_bytes, scaled, serving, signed_percent, significant
from launch.report import write_report
from launch.summary import print_summary


def test_the_table_fits_80_columns(full_steps: dict[str, Artifact], tmp_path: Path) -> None:
    report = json.loads((write_report(tmp_path, "demo", full_steps).parent / "report.json").read_text())
    out = io.StringIO()

    print_summary(report, Console(file=out, width=80))

    assert "…" not in out.getvalue()
    rows = {line.split()[0]: line.split()[1:] for line in out.getvalue().splitlines() if line.strip()}
    ratio = "0.70\N{MULTIPLICATION SIGN}"
    assert rows["distilled"] == [
        "8.59M",
        "7.00",
        "KiB",
        "2.80",
        ratio,
        "3.650",
        "0.135",
        "75.0%",
    ]
    assert rows["extended"][3:5] == ["\N{EN DASH}", "\N{EN DASH}"], "it was not timed"
    assert "LM-loss gap between fused and parent" in out.getvalue()
    words = " ".join(out.getvalue().split())
    assert "latency: batch 1, prompt of 128 tokens, 128 generated, float32; Synthetic CPU" in words


def test_without_a_benchmark_no_workload_is_named(short: Any, tmp_path: Path) -> None:
    report = json.loads((write_report(tmp_path / "short", "short", short.steps).parent / "report.json").read_text())
    out = io.StringIO()

    print_summary(report, Console(file=out, width=80))

    assert "latency:" not in out.getvalue()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (scaled(0), "0"),
        (scaled(812), "812"),
        (scaled(134_515_008), "135M"),
        (scaled(8_388_608), "8.39M"),
        (scaled(405_849_533_440), "406B"),
        (num_bytes(512), "512 B"),
        (num_bytes(23_040), "22.5 KiB"),
        (num_bytes(516_096), "504 KiB"),
        (significant(0.042123), "0.0421"),
        (significant(3.0), "3.00"),
        (significant(816.97), "817"),
        (significant(1816.97), "1817"),
        (signed_percent(-0.123), "\N{MINUS SIGN}12%"),
        (signed_percent(0.04), "+4%"),
        (duration(4.21), "4.2 s"),
        (duration(185.4), "3 min 05 s"),
        (duration(7_620), "2 h 07 min"),
    ],
)
def test_numbers_are_short(text: str, expected: str) -> None:
    assert text == expected


def test_a_workload_names_its_ranks_where_there_are_several() -> None:
    workload = {"batch_size": 64, "prefill_tokens": 2048, "generated_tokens": 512, "dtype": "bfloat16"}

    assert serving(workload) == "batch 64, prompt of 2048 tokens, 512 generated, bfloat16"
    assert serving({**workload, "tensor_parallel": 8}).endswith("bfloat16, 8 tensor-parallel ranks")

from __future__ import annotations

import pytest

from distill.config import EngineConfig
from distill.utilization import peak_flops_per_s, training_flops


@pytest.mark.parametrize(
    ("device", "engine", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", {"precision": "bf16"}, 989.4e12),
        ("NVIDIA H100 80GB HBM3", {"precision": "fp32"}, None),
        ("NVIDIA H100 PCIe", {"precision": "bf16"}, None),
        ("cpu", {}, None),
        ("cpu", {"peak_flops_per_s": 1e11}, 1e11),
        ("NVIDIA H200", {"precision": "bf16", "peak_flops_per_s": 9e14}, 9e14),
    ],
)
def test_a_peak_is_stated_or_known_by_name(device: str, engine: dict[str, object], peak: float | None) -> None:
    assert peak_flops_per_s(device, EngineConfig(**engine)) == peak  # type: ignore[arg-type]


def test_a_stated_peak_is_positive() -> None:
    with pytest.raises(ValueError, match=r"engine\.peak_flops_per_s must be > 0, got 0"):
        EngineConfig(peak_flops_per_s=0)


def test_a_student_counts_thrice_and_its_teacher_once() -> None:
    assert training_flops(10.0) == 30.0
    assert training_flops(10.0, 7.0) == 37.0

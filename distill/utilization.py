"""Model FLOPs utilization: how much of the devices' peak a training step turns into matrix products. Torch-free.

Counted as in PaLM (arXiv 2204.02311, appendix B): what is computed again counts for nothing.
"""

from __future__ import annotations

from distill.config import EngineConfig

PEAK_FLOPS_PER_S = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
"""Dense bf16 FLOP/s of one GPU by its whole name (NVIDIA's data sheets, SXM). Cards of other names, the PCIe and NVL
ones among them, have other peaks: their MFU is left out unless ``engine.peak_flops_per_s`` states it."""


def peak_flops_per_s(device: str, engine: EngineConfig) -> float | None:
    """Dense FLOP/s of one device in the engine's precision; None: not known.

    Args:
        device: name, as torch gives it.
        engine: precision, and what it states.
    """
    if engine.peak_flops_per_s is not None:
        return engine.peak_flops_per_s
    return PEAK_FLOPS_PER_S.get(device) if engine.precision == "bf16" else None


def training_flops(student: float, teacher: float = 0.0) -> float:
    """Model FLOPs of training, of those of the forward passes: the student's once forward and twice backward.

    Args:
        student: FLOPs of its forward pass.
        teacher: of a teacher that runs beside it.
    """
    return 3 * student + teacher

"""What was written to an FP8 directory, held against the weights that it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from distill.config import require
from puzzle.model.architecture import Architecture
from puzzle.model.fp8 import HALF_SMALLEST, HALF_STEP, SCALE_SUFFIX, dequantize, quantized_names
from puzzle.model.safetensors_file import FP8_DTYPES
from puzzle.model.tensor_reader import TensorReader, row_ranges

ROUNDING = 1e-6
"""Of scaling and back in fp32, relative."""


@dataclass(frozen=True, kw_only=True)
class Fp8Error:
    """How far the quantised weights of a directory are from those that they were made of."""

    largest: float
    """Of ||w - q|| / ||w|| over all quantised matrices w."""
    name: str
    """The matrix with that error."""


def check_fp8(directory: Path, architecture: Architecture, tensors: Iterable[tuple[str, Tensor]]) -> Fp8Error:
    """Compare every stored tensor with the one of ``tensors`` that it was made of, read anew, one at a time.

    Raises:
        ValueError: a quantised value is further from its weight than rounding to E4M3 puts it, or anything else is
            not its weight in the stored data type.
    """
    quantized = quantized_names(architecture)
    errors: dict[str, float] = {}
    with TensorReader(directory, FP8_DTYPES) as reader:
        for name, tensor in tensors:
            if name in quantized:
                errors[name] = _error(reader, name, tensor)
            else:
                _check_copy(reader, name, tensor)
    if not errors:
        return Fp8Error(largest=0.0, name="")
    worst = max(errors, key=lambda name: errors[name])
    return Fp8Error(largest=errors[worst], name=worst)


def _check_copy(reader: TensorReader, name: str, tensor: Tensor) -> None:
    _require_as_written(reader, name, reader.shape(name) == tensor.shape)
    for rows in row_ranges(tensor.shape[0], prod(tensor.shape[1:]) * tensor.itemsize):
        stored = reader.rows(name, rows.start, rows.stop)
        _require_as_written(reader, name, torch.equal(stored, tensor[rows.start : rows.stop].to(stored.dtype)))


def _error(reader: TensorReader, name: str, tensor: Tensor) -> float:
    squared_error = squared_norm = 0.0
    for rows in row_ranges(tensor.shape[0], tensor.shape[1] * 4):
        weight = tensor[rows.start : rows.stop].float()
        scale = reader.rows(name + SCALE_SUFFIX, rows.start, rows.stop)
        error = (dequantize(reader.rows(name, rows.start, rows.stop), scale) - weight).abs()
        bound = torch.maximum(weight.abs() * HALF_STEP, scale * HALF_SMALLEST) + weight.abs() * ROUNDING
        _require_as_written(reader, name, bool((error <= bound).all()))
        squared_error += float(error.double().square().sum())
        squared_norm += float(weight.double().square().sum())
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def _require_as_written(reader: TensorReader, name: str, is_so: bool) -> None:
    require(
        is_so,
        f"{reader.directory}: {name} is not what the model's weights round to; the disk or another process has "
        "changed it. Export again",
    )

"""What stands in an FP8 directory: its weights dequantised, as a model, and against the weights that it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.config import require
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import model_of
from puzzle.model.fp8 import FP8_CONFIG, HALF_SMALLEST, HALF_STEP, SCALE_SUFFIX, dequantize, quantized_names
from puzzle.model.hf_config import architecture_from_config
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.safetensors_file import FP8_DTYPES
from puzzle.model.tensor_layout import tensor_shapes
from puzzle.model.tensor_reader import TensorReader, read_json, row_ranges

ROUNDING = 1e-6
"""Of scaling and back in fp32, relative."""


@dataclass(frozen=True, kw_only=True)
class Fp8Error:
    """How far the quantised weights of a directory are from those that they were made of."""

    largest: float
    """Of ||w - q|| / ||w|| over all quantised matrices w."""
    name: str
    """The matrix with that error."""


def read_fp8_architecture(directory: Path) -> Architecture:
    """Architecture of a directory that was written with FP8 weights.

    Raises:
        ValueError: it has other weights, or is no model directory.
    """
    config = read_json(directory / "config.json")
    require(
        config.get("quantization_config") == FP8_CONFIG,
        f"{directory}: config.json has not the quantization_config of an export with export.quantization=fp8",
    )
    return architecture_from_config(config)


def dequantized_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 tensor of every weight of an FP8 directory, one in memory at a time; scales are multiplied in.

    Raises:
        ValueError: as :func:`read_fp8_architecture`, or a tensor is missing.
    """
    architecture = read_fp8_architecture(directory)
    quantized = quantized_names(architecture)
    with TensorReader(directory, FP8_DTYPES) as reader:
        for name in tensor_shapes(architecture):
            stored = reader.read(name)
            yield name, dequantize(stored, reader.read(name + SCALE_SUFFIX)) if name in quantized else stored.float()


def load_dequantized(directory: Path) -> DeciLMForCausalLM:
    """The model of an FP8 directory in fp32 on the CPU and in evaluation mode; its activations are not quantised.

    Raises:
        ValueError: as :func:`dequantized_weights`.
    """
    return model_of(read_fp8_architecture(directory), dequantized_weights(directory), dtype=torch.float32)


def check_fp8(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> Fp8Error:
    """Compare what was written with the ``tensors`` that it was made of, read anew, one at a time.

    Raises:
        ValueError: a value is further from its weight than rounding to E4M3 puts it.
    """
    quantized = quantized_names(read_fp8_architecture(directory))
    errors: dict[str, float] = {}
    with TensorReader(directory, FP8_DTYPES) as reader:
        for name, tensor in tensors:
            if name in quantized:
                errors[name] = _error(reader, name, tensor)
    if not errors:
        return Fp8Error(largest=0.0, name="")
    worst = max(errors, key=lambda name: errors[name])
    return Fp8Error(largest=errors[worst], name=worst)


def _error(reader: TensorReader, name: str, tensor: Tensor) -> float:
    squared_error = squared_norm = 0.0
    for rows in row_ranges(tensor.shape[0], tensor.shape[1] * 4):
        weight = tensor[rows.start : rows.stop].float()
        scale = reader.rows(name + SCALE_SUFFIX, rows.start, rows.stop)
        error = (dequantize(reader.rows(name, rows.start, rows.stop), scale) - weight).abs()
        bound = torch.maximum(weight.abs() * HALF_STEP, scale * HALF_SMALLEST) + weight.abs() * ROUNDING
        require(
            bool((error <= bound).all()),
            f"{reader.directory}: {name} is not what the model's weights round to; the disk or another process has "
            "changed it. Export again",
        )
        squared_error += float(error.double().square().sum())
        squared_norm += float(weight.double().square().sum())
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0

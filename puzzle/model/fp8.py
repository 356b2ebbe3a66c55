"""FP8 weights of a checkpoint as compressed-tensors stores them: per-channel scales, dynamic scales per token.

Every matrix within a block is stored as float8_e4m3fn [out, in] beside one fp32 scale per output channel [out, 1],
which readers multiply with. Engines quantise the inputs of such a matrix themselves, with one scale per token.
Embedding, head, norms and biases stay as they are. The keys of ``quantization_config`` are those of the package
compressed-tensors 0.20, which transformers, vLLM and SGLang read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from puzzle.model.architecture import Architecture
from puzzle.model.tensor_layout import Shapes, block_prefix, block_shapes, tensor_shapes
from puzzle.model.tensor_reader import row_ranges

E4M3 = torch.float8_e4m3fn
MAX = torch.finfo(E4M3).max
"""448, the largest value of E4M3."""
HALF_STEP = 2.0**-4
"""Largest relative error of rounding to E4M3's three bits behind the leading one."""
HALF_SMALLEST = 2.0**-10
"""Largest error, in scales, of rounding a value below 2**-6 scales, where E4M3's steps are 2**-9."""
SCALE_SUFFIX = "_scale"
"""Of a scale's name, behind that of its weight."""

_ARGS: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
FP8_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _ARGS | {"strategy": "channel", "dynamic": False},
            "input_activations": _ARGS | {"strategy": "token", "dynamic": True},
            "output_activations": None,
            "format": "float-quantized",
        }
    },
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "version": "0.20.0",
}
"""``quantization_config`` of config.json."""


def quantized_names(architecture: Architecture) -> frozenset[str]:
    """The tensors of ``architecture`` that are quantised: every matrix within a block."""
    return frozenset(
        block_prefix(index) + name
        for index, block in enumerate(architecture.blocks)
        for name, shape in block_shapes(architecture, block).items()
        if len(shape) == 2
    )


def fp8_shapes(architecture: Architecture) -> Shapes:
    """Shapes of all stored tensors, scales behind their weights."""
    quantized, shapes = quantized_names(architecture), Shapes()
    for name, shape in tensor_shapes(architecture).items():
        shapes[name] = shape
        if name in quantized:
            shapes[name + SCALE_SUFFIX] = (shape[0], 1)
    return shapes


def fp8_dtypes(architecture: Architecture, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Data types of all stored tensors; ``dtype``: of those that are not quantised."""
    dtypes = dict.fromkeys(tensor_shapes(architecture), dtype)
    for name in quantized_names(architecture):
        dtypes |= {name: E4M3, name + SCALE_SUFFIX: torch.float32}
    return dtypes


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [rows, columns], finite, as E4M3 values and fp32 scales [rows, 1]; the largest of a row becomes 448.

    Rows of a weight are its output channels; rows of an activation are tokens. A row of zeros has scale 1.
    """
    largest = values.abs().amax(dim=1, keepdim=True).float()
    smallest = torch.finfo(torch.float32).tiny
    scale = (largest / MAX).clamp_min(smallest).masked_fill(largest == 0, 1.0)
    return (values.float() / scale).clamp(-MAX, MAX).to(E4M3), scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """The fp32 values that E4M3 ``values`` [rows, columns] and ``scale`` [rows, 1] stand for."""
    return values.float() * scale


def quantized_tensors(
    tensors: Iterable[tuple[str, Tensor]], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """``tensors`` of ``architecture`` as they are stored in FP8, each as it comes: one in memory at a time."""
    quantized = quantized_names(architecture)
    for name, tensor in tensors:
        if name not in quantized:
            yield name, tensor
            continue
        values, scale = torch.empty(tensor.shape, dtype=E4M3), torch.empty(tensor.shape[0], 1)
        # In rows, so that no fp32 copy of a wide FFN exists.
        for rows in row_ranges(tensor.shape[0], tensor.shape[1] * scale.itemsize):
            part = slice(rows.start, rows.stop)
            values[part], scale[part] = quantize(tensor[part])
        yield name, values
        yield name + SCALE_SUFFIX, scale

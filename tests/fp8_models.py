"""FP8 directories as models of ours: their weights dequantised, and their linear layers as engines compute them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import model_of
from puzzle.model.fp8 import FP8_CONFIG, SCALE_SUFFIX, dequantize, quantized_names
from puzzle.model.hf_config import architecture_from_config
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.safetensors_file import FP8_DTYPES
from puzzle.model.tensor_layout import tensor_shapes
from puzzle.model.tensor_reader import TensorReader, read_json

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_dequantized(directory: Path) -> DeciLMForCausalLM:
    """The model of an FP8 directory in fp32 on the CPU and in evaluation mode; its activations are not quantised."""
    return model_of(_architecture(directory), dequantized_weights(directory), dtype=torch.float32)


def dequantized_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 tensor of every weight of an FP8 directory; scales are multiplied in."""
    architecture = _architecture(directory)
    quantized = quantized_names(architecture)
    with TensorReader(directory, FP8_DTYPES) as reader:
        for name in tensor_shapes(architecture):
            stored = reader.read(name)
            yield name, dequantize(stored, reader.read(name + SCALE_SUFFIX)) if name in quantized else stored.float()


def import_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``name`` of the directory benchmarks, whose programs import each other by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def _architecture(directory: Path) -> Architecture:
    config = read_json(directory / "config.json")
    assert config["quantization_config"] == FP8_CONFIG
    return architecture_from_config(config)

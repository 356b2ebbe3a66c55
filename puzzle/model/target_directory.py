"""The directory that one engine gets, written from a stream of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import CheckpointWriter, copy_tokenizer, dtype_name
from puzzle.model.fp8 import quantized_tensors
from puzzle.model.fp8_check import Fp8Error, check_fp8
from puzzle.model.megatron_arguments import ARGUMENTS_NAME, LAYERS_NAME, arguments, layers_json


def write_hf_directory(
    out: Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    tokenizer_from: Path,
) -> None:
    """Write ``tensors`` of ``architecture`` as a nemotron-nas checkpoint with the tokenizer of ``tokenizer_from``."""
    with CheckpointWriter(out, architecture, dtype=dtype, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
    copy_tokenizer(tokenizer_from, out)


def write_fp8_directory(
    out: Path,
    architecture: Architecture,
    tensors: Callable[[], Iterable[tuple[str, Tensor]]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    tokenizer_from: Path,
) -> Fp8Error:
    """Write such a checkpoint with FP8 weights, and hold what was written against the weights.

    Args:
        out: made if needed; holds no weights yet.
        architecture: of ``tensors``.
        tensors: gives the weights, once to be written and once to be compared with.
        dtype: of what is not quantised.
        max_shard_bytes: of the tensors of one file.
        tokenizer_from: directory with a tokenizer.

    Raises:
        ValueError: what was written is not what the weights round to.
    """
    with CheckpointWriter(
        out, architecture, dtype=dtype, max_shard_bytes=max_shard_bytes, quantization="fp8_dynamic"
    ) as writer:
        for name, tensor in quantized_tensors(tensors(), architecture):
            writer.add(name, tensor)
    copy_tokenizer(tokenizer_from, out)
    return check_fp8(out, architecture, tensors())


def add_megatron_files(directory: Path, architecture: Architecture, dtype: torch.dtype) -> None:
    """Write beside the checkpoint of ``architecture`` what Megatron-LM reads in place of its config.json."""
    (directory / LAYERS_NAME).write_text(layers_json(architecture, dtype_name(dtype)), encoding="utf-8")
    (directory / ARGUMENTS_NAME).write_text(arguments(architecture), encoding="utf-8")


def link_directory(source: Path, out: Path) -> None:
    """Give ``out`` the files of ``source``, which then are in both and on disk once."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        (out / path.name).hardlink_to(path)


def weight_file_bytes(path: Path) -> int:
    """Bytes of the weight files of a checkpoint directory, or of one file."""
    files = path.glob("*.safetensors") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)

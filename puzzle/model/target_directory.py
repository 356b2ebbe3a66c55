"""The directory that one engine gets, written from a stream of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import CheckpointWriter, copy_tokenizer, dtype_name
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


def add_megatron_files(directory: Path, architecture: Architecture, dtype: torch.dtype) -> None:
    """Write beside the checkpoint of ``architecture`` what Megatron-LM reads in place of its config.json."""
    (directory / LAYERS_NAME).write_text(layers_json(architecture, dtype_name(dtype)), encoding="utf-8")
    (directory / ARGUMENTS_NAME).write_text(arguments(architecture), encoding="utf-8")


def link_directory(source: Path, out: Path) -> None:
    """Give ``out`` the files of ``source``, which then are in both and on disk once."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        (out / path.name).hardlink_to(path)

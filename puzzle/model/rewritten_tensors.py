"""The weights of an exact rewrite, tensor by tensor: read, repeated, or zeros."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill.config import require
from puzzle.model.architecture import Architecture
from puzzle.model.rewrites import kept_blocks
from puzzle.model.tensor_layout import EMBEDDING, block_prefix, block_shapes, other_shapes
from puzzle.model.tensor_reader import TensorReader


def rewritten_tensors(reader: TensorReader, source: Architecture, form: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in ``form``, in the order of the model, one in memory at a time.

    Args:
        reader: the checkpoint of ``source``.
        source: what ``form`` was rewritten from.
        form: what :func:`puzzle.model.rewrites.rewritten` made of ``source``.

    Raises:
        ValueError: a weight is infinite or no number.
    """
    dtype = reader.dtype(EMBEDDING)
    for name in other_shapes(form):
        yield name, _read(reader, name)
    for index, origin in enumerate(tqdm(kept_blocks(source), desc="export", unit="block", leave=False)):
        stored = block_shapes(source, source.blocks[origin])
        for name, shape in block_shapes(form, form.blocks[index]).items():
            if name in stored:
                tensor = _read(reader, block_prefix(origin) + name)
                yield block_prefix(index) + name, _repeat_heads(tensor, shape[0], form.head_dim)
            else:
                yield block_prefix(index) + name, torch.zeros(shape, dtype=dtype)


def _read(reader: TensorReader, name: str) -> Tensor:
    tensor = reader.read(name)
    require(
        bool(tensor.isfinite().all()),
        f"{reader.directory}: {name} holds values that are infinite or no numbers; engines would answer with nothing "
        "but those. Export a model from before its training diverged",
    )
    return tensor


def _repeat_heads(tensor: Tensor, rows: int, head_dim: int) -> Tensor:
    """``tensor [kv_heads * head_dim, ...]`` with every head repeated in place until there are ``rows`` rows."""
    if tensor.shape[0] == rows:
        return tensor
    heads = tensor.unflatten(0, (-1, head_dim))
    return heads.repeat_interleave(rows // tensor.shape[0], dim=0).flatten(0, 1)

"""Weight fusion: every group of attention-free FFNs becomes one wide FFN, streamed from checkpoint to checkpoint.

FFN Fusion (arXiv 2503.18908), Theorem 3.1: a sum of SwiGLUs that read the same input is one SwiGLU whose gate and up
projections are the members' stacked along the channels and whose down projection is the members' side by side. That is
exact; what fusion approximates is the chain of members by their parallel sum (eq. 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fusion.config import Norm
from fusion.grouping import Group, block_spans, fused_architecture, validate_groups
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import CheckpointWriter, check_tensors, read_architecture
from puzzle.model.tensor_layout import EMBEDDING, block_prefix, block_shapes, other_shapes
from puzzle.model.tensor_reader import TensorReader, row_ranges

NORM = "post_attention_layernorm.weight"
GATE = "mlp.gate_proj.weight"
UP = "mlp.up_proj.weight"
DOWN = "mlp.down_proj.weight"


def fuse_checkpoint(model_dir: Path, out_dir: Path, groups: Sequence[Group], norm: Norm) -> Architecture:
    """Write the checkpoint of ``model_dir`` to ``out_dir`` with every group fused; all other tensors are copied.

    Norm "folded" multiplies the columns of every member's gate and up projections by that member's own norm scale and
    gives the fused norm a scale of 1, so that every member still reads its own norm: exact but for one rounding of each
    product to the checkpoint's data type. A scale of 1 rounds less in bf16 than the last member's scale, divided out of
    the weights, would: dividing spares the last member's weights their rounding, but then the norm rounds every
    activation once more, for all members, when it multiplies by the scale; and it breaks down where a scale is 0. Norm
    "last" leaves all weights as they are and gives every member the last one's norm (paper, eq. 5).

    Memory is a few chunks of rows of some MiB, however large the tensors. What only moves (copied tensors, gate and
    up under norm "last") goes from file to file; what is folded, and the down projections, pass through in chunks.

    Args:
        model_dir: checkpoint before fusion.
        out_dir: directory of the new checkpoint.
        groups: first and last block (inclusive) of every group, in rising order.
        norm: what becomes of the members' norms.

    Returns:
        The architecture after fusion.

    Raises:
        ValueError: the groups cannot be fused, weights are quantised, or the tensors are not those of the
            configuration; nothing is written.
    """
    architecture = read_architecture(model_dir)
    validate_groups(architecture, groups)
    fused = fused_architecture(architecture, groups)
    spans = block_spans(architecture.num_blocks, groups)
    with TensorReader(model_dir) as reader:
        check_tensors(reader, architecture)
        with CheckpointWriter(out_dir, fused, dtype=reader.dtype(EMBEDDING)) as writer:
            for name in other_shapes(fused):
                writer.copy(name, reader)
            for index, span in enumerate(tqdm(spans, desc="fuse", unit="block", leave=False)):
                for name in block_shapes(fused, fused.blocks[index]):
                    _write_block_tensor(writer, index, reader, span, name, norm)
    return fused


def fold_scale(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight @ diag(scale)`` for weight [channels, hidden] and norm scale [hidden], rounded once to ``dtype``.

    A product in the data type of both is rounded once by itself: CPU kernels multiply bf16 and fp16 in fp32, where such
    products are exact. Where types differ it is taken in fp64, in which products of bf16, fp16 and fp32 are exact.
    """
    if weight.dtype == scale.dtype == dtype:
        return weight * scale
    return (weight.double() * scale.double()).to(dtype)


def _write_block_tensor(
    writer: CheckpointWriter, block: int, reader: TensorReader, span: Group, name: str, norm: Norm
) -> None:
    """Write tensor ``name`` of ``block``, which the blocks ``span`` of the unfused model become."""
    sources = [block_prefix(index) + name for index in range(span[0], span[1] + 1)]
    target = block_prefix(block) + name
    if len(sources) == 1:
        writer.copy(target, reader, *sources)
    elif name == NORM and norm == "folded":
        writer.add(target, torch.ones(reader.shape(sources[0])))
    elif name == NORM:
        writer.copy(target, reader, sources[-1])
    elif name == DOWN:
        writer.add_rows(target, _side_by_side(reader, sources))
    elif norm == "folded":
        norms = [block_prefix(index) + NORM for index in range(span[0], span[1] + 1)]
        writer.add_rows(target, _folded_rows(reader, sources, norms, writer.dtype))
    else:
        writer.copy(target, reader, *sources)


def _folded_rows(
    reader: TensorReader, sources: Sequence[str], norms: Sequence[str], dtype: torch.dtype
) -> Iterator[Tensor]:
    """Rows of the members' gate or up projections [channels, hidden], each with its norm's scale in its columns."""
    for source, norm in zip(sources, norms, strict=True):
        scale = reader.read(norm)
        for rows in reader.row_chunks(source):
            yield fold_scale(rows, scale, dtype)


def _side_by_side(reader: TensorReader, sources: Sequence[str]) -> Iterator[Tensor]:
    """Rows of the members' down projections [hidden, channels], beside each other."""
    hidden_dim = reader.shape(sources[0])[0]
    row_bytes = sum(reader.shape(source)[1] * reader.dtype(source).itemsize for source in sources)
    for rows in row_ranges(hidden_dim, row_bytes):
        yield torch.cat([reader.rows(source, rows.start, rows.stop) for source in sources], dim=1)

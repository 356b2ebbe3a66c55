"""Weight fusion: every group of attention-free FFNs becomes one wide FFN, streamed from checkpoint to checkpoint.

FFN Fusion (arXiv 2503.18908), Theorem 3.1: a sum of SwiGLUs that read the same input is one SwiGLU whose gate and up
projections are the members' stacked along the channels and whose down projection is the members' side by side. That is
exact; what fusion approximates is the chain of members by their parallel sum (eq. 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill.config import require
from fusion.grouping import Group, block_spans, fused_architecture, validate_groups
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import CheckpointWriter, TensorReader, read_architecture
from puzzle.model.tensor_layout import EMBEDDING, block_prefix, block_shapes, other_shapes, tensor_shapes

Norm = Literal["folded", "last"]

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

    Tensors are read and written one at a time: peak memory is the shard being filled, the widest fused projection and
    one member's in fp64.

    Args:
        model_dir: checkpoint before fusion.
        out_dir: directory of the new checkpoint.
        groups: first and last block (inclusive) of every group, in rising order.
        norm: what becomes of the members' norms.

    Returns:
        The architecture after fusion.

    Raises:
        ValueError: the groups cannot be fused, or the tensors are not those of the configuration; nothing is written.
    """
    architecture = read_architecture(model_dir)
    validate_groups(architecture, groups)
    fused = fused_architecture(architecture, groups)
    spans = block_spans(architecture.num_blocks, groups)
    with TensorReader(model_dir) as reader:
        _check_tensors(reader, architecture)
        with CheckpointWriter(out_dir, fused, dtype=reader.dtype(EMBEDDING)) as writer:
            for name in other_shapes(fused):
                writer.add(name, reader.read(name))
            for index, span in enumerate(tqdm(spans, desc="fuse", unit="block", leave=False)):
                for name in block_shapes(fused, fused.blocks[index]):
                    writer.add(block_prefix(index) + name, _block_tensor(reader, span, name, norm))
    return fused


def fold_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """``weight @ diag(scale)`` for weight [channels, hidden] and norm scale [hidden], in fp64.

    Products of fp32 or bf16 values are exact in fp64, so the cast to the checkpoint's data type is the only rounding.
    """
    return weight.double() * scale.double()


def _block_tensor(reader: TensorReader, span: Group, name: str, norm: Norm) -> Tensor:
    """Tensor ``name`` of the block that the blocks ``span`` of the unfused model become."""
    first, last = span
    if first == last:
        return reader.read(block_prefix(first) + name)
    if name == NORM:
        scale = reader.read(block_prefix(last) + NORM)
        return torch.ones_like(scale) if norm == "folded" else scale
    return _concatenated(reader, span, name, folded=norm == "folded" and name != DOWN)


def _concatenated(reader: TensorReader, span: Group, name: str, *, folded: bool) -> Tensor:
    """The members' gate or up [channels, hidden] stacked, or their down [hidden, channels] side by side."""
    dim = 1 if name == DOWN else 0
    prefixes = [block_prefix(index) for index in range(span[0], span[1] + 1)]
    shapes = [reader.shape(prefix + name) for prefix in prefixes]
    widths = [shape[dim] for shape in shapes]
    shape = list(shapes[0])
    shape[dim] = sum(widths)
    # Filled member by member: torch.cat would hold all members besides.
    fused = torch.empty(shape, dtype=reader.dtype(prefixes[0] + name))
    for prefix, channels in zip(prefixes, fused.split(widths, dim=dim), strict=True):
        weight = reader.read(prefix + name)
        channels.copy_(fold_scale(weight, reader.read(prefix + NORM)) if folded else weight)
    return fused


def _check_tensors(reader: TensorReader, architecture: Architecture) -> None:
    expected, names = tensor_shapes(architecture), set(reader.names())
    lacking, unknown = sorted(expected.keys() - names), sorted(names - expected.keys())
    require(
        not lacking and not unknown,
        f"{reader.directory} does not hold what its config.json describes: it lacks {lacking[:4]} and has "
        f"{unknown[:4]} besides; make the model anew",
    )
    for name, shape in expected.items():
        stored = reader.shape(name)
        require(
            stored == shape,
            f"{reader.directory}: {name} is {list(stored)}, config.json says {list(shape)}; make the model anew",
        )

"""Assembly: the parent's checkpoint with the chosen variants in place of its blocks, streamed tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from distill.config import require
from puzzle.library import BlockLibrary, inherited_names
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import CheckpointWriter, TensorReader, check_tensors, copy_tokenizer, read_architecture
from puzzle.model.tensor_layout import EMBEDDING, block_prefix, block_shapes, other_shapes
from puzzle.tables import parse_variant


def child_architecture(parent: Architecture, variants: Sequence[str]) -> Architecture:
    """``parent`` with one named variant (``kv2+w512``) per block.

    Raises:
        ValueError: not one variant per block, or a name that is none.
    """
    require(
        len(variants) == parent.num_blocks,
        f"the solution has {len(variants)} blocks, the parent {parent.num_blocks}; search with this parent's scores",
    )
    blocks = []
    for own, name in zip(parent.blocks, variants, strict=True):
        attention, ffn = parse_variant(name)
        blocks.append(replace(own, attention=attention, ffn=ffn))
    return parent.with_blocks(tuple(blocks))


def assemble(parent_dir: Path, library: BlockLibrary, variants: Sequence[str], out: Path) -> Architecture:
    """Write the child, in the parent's data type and with its tokenizer, to ``out``; returns its architecture.

    Raises:
        ValueError: variants that do not fit the parent, or that the library does not have.
    """
    parent = read_architecture(parent_dir)
    library.require_parent(parent)
    child = child_architecture(parent, variants)
    library.require_variants([(block,) for block in child.blocks])
    with TensorReader(parent_dir) as reader, ExitStack() as stack:
        check_tensors(reader, parent)
        writer = stack.enter_context(CheckpointWriter(out, child, dtype=reader.dtype(EMBEDDING)))
        for name in other_shapes(parent):
            writer.copy(name, reader)
        for index, block in enumerate(tqdm(child.blocks, desc="assemble", unit="block", leave=False)):
            prefix, own = block_prefix(index), parent.blocks[index]
            replaced = library.tensors(index, block)
            for name in inherited_names(block_shapes(parent, own), own, block, replaced):
                writer.copy(prefix + name, reader)
            for name, tensor in replaced.items():
                writer.add(prefix + name, tensor)
    copy_tokenizer(parent_dir, out)
    return child

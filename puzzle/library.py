"""The block library: trained replacements of the parent's subblocks, one safetensors file each.

On disk: ``library.json`` (the parent's architecture and one entry per replacement) beside ``replacements/``. A variant
that the parent's own weights serve (its own subblock, or none at all) has no entry, with one exception: an FFN whose
attention is gone reads another input than in the parent, so it is a replacement of its own at every width, the
parent's included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.config import require
from puzzle.config import SpaceConfig
from puzzle.model.architecture import Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.hf_config import architecture_from_config, hf_config
from puzzle.space import block_variants
from puzzle.tables import parse_attention, parse_ffn

INDEX_FILE = "library.json"

Subblock = Literal["attention", "ffn"]
SUBBLOCK_PREFIXES: dict[Subblock, tuple[str, ...]] = {
    "attention": ("self_attn.", "input_layernorm."),
    "ffn": ("mlp.", "post_attention_layernorm."),
}


def subblock_of(name: str) -> Subblock:
    """The subblock that a tensor of a block, named relative to it, belongs to. A subblock's norm is part of it."""
    (subblock,) = (subblock for subblock, prefixes in SUBBLOCK_PREFIXES.items() if name.startswith(prefixes))
    return subblock


def subblock_tensors(block: Mapping[str, Tensor], subblock: Subblock) -> dict[str, Tensor]:
    """Those of a block's tensors that belong to ``subblock``."""
    return {name: tensor for name, tensor in block.items() if subblock_of(name) == subblock}


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """What is replaced, where, and beside what: the key of a library."""

    block: int
    subblock: Subblock
    variant: AttentionConfig | FFNConfig
    beside: Literal["parent", "no_op"] = "parent"
    """The other subblock that it was trained with: the parent's, or (an FFN alone) no attention."""

    @property
    def name(self) -> str:
        """``<block>.<subblock>.<variant>[.beside_no_op]``: the stem of its file."""
        beside = "" if self.beside == "parent" else ".beside_no_op"
        return f"{self.block}.{self.subblock}.{self.variant.name}{beside}"


@dataclass(frozen=True, kw_only=True)
class LibraryEntry:
    """A replacement's file and its held-out error: MSE of the block output over the parent's mean square."""

    replacement: Replacement
    file: str
    bld_nmse_init: float
    bld_nmse: float

    def as_json(self) -> dict[str, Any]:
        """Its row in the index."""
        return {
            "block": self.replacement.block,
            "subblock": self.replacement.subblock,
            "variant": self.replacement.variant.name,
            "beside": self.replacement.beside,
            "file": self.file,
            "bld_nmse_init": self.bld_nmse_init,
            "bld_nmse": self.bld_nmse,
        }


def space_replacements(parent: Architecture, space: SpaceConfig) -> tuple[Replacement, ...]:
    """Every replacement that the search space needs, block by block."""
    needed = (
        replacement
        for index in range(parent.num_blocks)
        for block in block_variants(parent, index, space)
        for replacement in block_replacements(parent, index, block)
    )
    return tuple(dict.fromkeys(needed))


def block_replacements(parent: Architecture, index: int, block: BlockConfig) -> tuple[Replacement, ...]:
    """The replacements that block ``index`` takes from the library to become ``block``."""
    own = parent.blocks[index]
    needed: list[Replacement] = []
    if not block.attention.is_no_op and block.attention != own.attention:
        needed.append(Replacement(block=index, subblock="attention", variant=block.attention))
    attention_removed = block.attention.is_no_op and not own.attention.is_no_op
    if not block.ffn.is_no_op and (attention_removed or block.ffn != own.ffn):
        beside: Literal["parent", "no_op"] = "no_op" if attention_removed else "parent"
        needed.append(Replacement(block=index, subblock="ffn", variant=block.ffn, beside=beside))
    return tuple(needed)


def inherited_names(
    names: Iterable[str], parent: BlockConfig, child: BlockConfig, replaced: Iterable[str]
) -> list[str]:
    """Those of a parent block's tensor names whose tensors stand unchanged in the child block."""
    subblocks = {subblock_of(name) for name in replaced}
    if child.attention != parent.attention:
        subblocks.add("attention")
    if child.ffn != parent.ffn:
        subblocks.add("ffn")
    return [name for name in names if subblock_of(name) not in subblocks]


class BlockLibrary:
    """A library directory, open for reading or under construction."""

    def __init__(
        self, directory: Path, parent: Architecture, dtype: str, entries: dict[Replacement, LibraryEntry]
    ) -> None:
        self.directory = directory
        self.parent = parent
        self.entries = entries
        self._dtype = dtype

    @classmethod
    def create(cls, directory: Path, parent: Architecture, *, dtype: torch.dtype) -> BlockLibrary:
        """An empty library; its tensors will be stored as ``dtype``."""
        (directory / "replacements").mkdir(parents=True, exist_ok=True)
        return cls(directory, parent, str(dtype).removeprefix("torch."), {})

    @classmethod
    def open(cls, directory: Path) -> BlockLibrary:
        """Reads the index; tensors are read when asked for."""
        index = json.loads((directory / INDEX_FILE).read_text())
        parent = architecture_from_config(index["parent_architecture"])
        entries = (_entry_from_json(row) for row in index["replacements"])
        dtype = index["parent_architecture"]["torch_dtype"]
        return cls(directory, parent, dtype, {entry.replacement: entry for entry in entries})

    def add(
        self, replacement: Replacement, tensors: Mapping[str, Tensor], *, bld_nmse_init: float, bld_nmse: float
    ) -> None:
        """Stores one replacement. It enters the file of the index with the next :meth:`write_index`."""
        file = f"replacements/{replacement.name}.safetensors"
        dtype = getattr(torch, self._dtype)
        stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
        save_file(stored, self.directory / file)
        self.entries[replacement] = LibraryEntry(
            replacement=replacement, file=file, bld_nmse_init=bld_nmse_init, bld_nmse=bld_nmse
        )

    def write_index(self) -> None:
        """Write ``library.json``, whole or not at all."""
        index = {
            "parent_architecture": hf_config(self.parent, self._dtype),
            "replacements": [entry.as_json() for entry in self.entries.values()],
        }
        unfinished = self.directory / f"{INDEX_FILE}.partial"
        unfinished.write_text(json.dumps(index, indent=1) + "\n")
        unfinished.replace(self.directory / INDEX_FILE)

    def tensors(self, index: int, block: BlockConfig) -> dict[str, Tensor]:
        """Tensors (CPU) of every subblock of ``block`` that is not the parent's own, by their names in the block.

        Raises:
            ValueError: the library has no replacement for one of them.
        """
        found: dict[str, Tensor] = {}
        for entry in self._entries_of(index, block):
            found |= load_file(self.directory / entry.file)
        return found

    def require_variants(self, variants: Sequence[Sequence[BlockConfig]]) -> None:
        """``ValueError`` unless :meth:`tensors` has an answer for all ``variants``, listed block by block."""
        for index, blocks in enumerate(variants):
            for block in blocks:
                self._entries_of(index, block)

    def require_parent(self, architecture: Architecture) -> None:
        """``ValueError`` unless the library was built from a parent of this architecture."""
        require(
            self.parent == architecture,
            f"the library's parent has {self.parent.num_blocks} blocks like {self.parent.blocks[0].name}, the model "
            f"given has {architecture.num_blocks} like {architecture.blocks[0].name}; give the library's own parent",
        )

    def _entries_of(self, index: int, block: BlockConfig) -> list[LibraryEntry]:
        needed = block_replacements(self.parent, index, block)
        for replacement in needed:
            require(
                replacement in self.entries,
                f"the library has no replacement {replacement.name}, which block {index} = {block.name} needs; "
                "build it with a search space (space) that holds this variant",
            )
        return [self.entries[replacement] for replacement in needed]


def _entry_from_json(row: Mapping[str, Any]) -> LibraryEntry:
    parse = parse_attention if row["subblock"] == "attention" else parse_ffn
    replacement = Replacement(
        block=row["block"], subblock=row["subblock"], variant=parse(row["variant"]), beside=row["beside"]
    )
    return LibraryEntry(
        replacement=replacement, file=row["file"], bld_nmse_init=row["bld_nmse_init"], bld_nmse=row["bld_nmse"]
    )

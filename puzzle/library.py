"""The block library: replacements of the parent's subblocks, one safetensors file each.

On disk: ``library.json`` (the parent's architecture, the mode, the block variants that the library serves and one entry
per replacement) beside ``replacements/``. What the parent's own weights serve has no entry. That an attention is gone
changes what the FFN beside it reads, so such an FFN is a replacement of its own at every width, the parent's included.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from distill.config import require
from distill.files import write_whole
from puzzle.model.architecture import Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.hf_config import architecture_from_config, hf_config
from puzzle.model.tensor_layout import Shapes, attention_shapes, ffn_shapes
from puzzle.tables import parse_attention, parse_ffn, parse_variant

INDEX_FILE = "library.json"
REPLACEMENTS_DIR = "replacements"

Mode = Literal["decoupled", "coupled"]
Subblock = Literal["attention", "ffn"]
Variants = tuple[tuple[BlockConfig, ...], ...]
"""Block variants by block of the parent, the parent's own first."""

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
    attention: AttentionConfig | None = None
    """The attention that is replaced; None: it is not part of this replacement."""
    ffn: FFNConfig | None = None
    """The FFN that is replaced; None: it is not part of this replacement."""
    beside: Literal["parent", "no_op"] = "parent"
    """What stands for the subblock that is not replaced: the parent's, or nothing."""

    def __post_init__(self) -> None:
        replaced = [subblock for subblock in (self.attention, self.ffn) if subblock is not None]
        assert replaced, "a replacement replaces something"
        assert not any(subblock.is_no_op for subblock in replaced), "a no-op has no weights to replace"
        assert len(replaced) == 1 or self.beside == "parent", "nothing stands beside a pair"

    @property
    def variant_name(self) -> str:
        """``attention.kv2``, ``ffn.w512`` or ``block.kv2+w512``, with ``.beside_no_op`` where nothing is beside it."""
        beside = "" if self.beside == "parent" else ".beside_no_op"
        if self.attention is not None and self.ffn is not None:
            return f"block.{self.attention.name}+{self.ffn.name}"
        if self.attention is not None:
            return f"attention.{self.attention.name}{beside}"
        assert self.ffn is not None
        return f"ffn.{self.ffn.name}{beside}"

    @property
    def name(self) -> str:
        """``<block>.<variant name>``: the stem of its file."""
        return f"{self.block}.{self.variant_name}"

    def block_in(self, parent: Architecture) -> BlockConfig:
        """The whole block that it stands in: its own subblocks, and beside them the parent's or none."""
        own = parent.blocks[self.block]
        attention, ffn = self.attention, self.ffn
        if attention is None:
            attention = own.attention if self.beside == "parent" else AttentionConfig(kind="no_op")
        if ffn is None:
            ffn = own.ffn if self.beside == "parent" else FFNConfig(kind="no_op")
        return replace(own, attention=attention, ffn=ffn)

    def shapes(self, parent: Architecture) -> Shapes:
        """Its tensors, named relative to the block."""
        shapes: Shapes = {}
        if self.attention is not None:
            shapes |= attention_shapes(parent, self.attention)
        if self.ffn is not None:
            shapes |= ffn_shapes(parent, self.ffn)
        return shapes


@dataclass(frozen=True, kw_only=True)
class LibraryEntry:
    """A replacement's file and its held-out error: MSE of the block output over the parent's mean square."""

    replacement: Replacement
    file: str
    bld_nmse_init: float
    bld_nmse: float
    """Of the weights that are stored; equal to ``bld_nmse_init`` where they are those of the init."""
    trained: bool = True
    """Whether the weights are trained; else training was off, or made the held-out loss worse."""

    def as_json(self) -> dict[str, Any]:
        """Its row in the index."""
        attention, ffn = self.replacement.attention, self.replacement.ffn
        return {
            "block": self.replacement.block,
            "attention": None if attention is None else attention.name,
            "ffn": None if ffn is None else ffn.name,
            "beside": self.replacement.beside,
            "file": self.file,
            "bld_nmse_init": self.bld_nmse_init,
            "bld_nmse": self.bld_nmse,
            "trained": self.trained,
        }


def block_replacements(
    parent: Architecture, index: int, block: BlockConfig, mode: Mode = "decoupled"
) -> tuple[Replacement, ...]:
    """The replacements that block ``index`` takes from the library to become ``block``.

    Decoupled, a subblock is replaced where it differs from the parent's, and an FFN wherever the attention beside it is
    removed. Coupled, every block other than the parent's is one replacement.
    """
    own = parent.blocks[index]
    no_attention = block.attention.is_no_op and not own.attention.is_no_op
    no_ffn = block.ffn.is_no_op and not own.ffn.is_no_op
    if mode == "coupled":
        attention = None if block.attention.is_no_op else block.attention
        ffn = None if block.ffn.is_no_op else block.ffn
        if (block.attention, block.ffn) == (own.attention, own.ffn) or (attention is None and ffn is None):
            return ()
        beside: Literal["parent", "no_op"] = "no_op" if no_attention or no_ffn else "parent"
        return (Replacement(block=index, attention=attention, ffn=ffn, beside=beside),)
    needed: list[Replacement] = []
    if not block.attention.is_no_op and block.attention != own.attention:
        needed.append(Replacement(block=index, attention=block.attention))
    if not block.ffn.is_no_op and (no_attention or block.ffn != own.ffn):
        needed.append(Replacement(block=index, ffn=block.ffn, beside="no_op" if no_attention else "parent"))
    return tuple(needed)


def library_replacements(
    parent: Architecture, variants: Sequence[Sequence[BlockConfig]], mode: Mode = "decoupled"
) -> tuple[Replacement, ...]:
    """Every replacement that ``variants``, listed block by block, need; each once, ordered by block."""
    needed = (
        replacement
        for index, blocks in enumerate(variants)
        for block in blocks
        for replacement in block_replacements(parent, index, block, mode)
    )
    return tuple(dict.fromkeys(needed))


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


def crossed_variants(
    variants: Variants, chosen: Iterable[str], *, max_attentions: int | None = None, max_ffns: int | None = None
) -> Variants:
    """``variants`` without the subblocks that no block of ``chosen`` (names like ``kv2+w512``) has, wherever it stands.

    What is left of the attentions and of the FFNs stays crossed at every block (Puzzle, section 3: the space shrinks to
    the popular choices before the coupled training).

    Args:
        variants: by block.
        chosen: a name for every use, so that popular ones come more often.
        max_attentions: attentions that stay at a block: the parent's own and those of most uses, of equal ones those
            that are used first; None: all that are used.
        max_ffns: the same for FFNs.

    Raises:
        ValueError: a name that is none of a block variant.
    """
    pairs = [parse_variant(name) for name in chosen]
    attentions = _most_used_first(attention for attention, _ in pairs)
    ffns = _most_used_first(ffn for _, ffn in pairs)

    def at_block(blocks: Sequence[BlockConfig]) -> tuple[BlockConfig, ...]:
        kept_attentions = _kept(attentions, blocks[0].attention, max_attentions)
        kept_ffns = _kept(ffns, blocks[0].ffn, max_ffns)
        return tuple(block for block in blocks if block.attention in kept_attentions and block.ffn in kept_ffns)

    return tuple(map(at_block, variants))


def _most_used_first(used: Iterable[AttentionConfig | FFNConfig]) -> list[AttentionConfig | FFNConfig]:
    return [subblock for subblock, _ in Counter(used).most_common()]


def _kept(
    most_used: Sequence[AttentionConfig | FFNConfig], own: AttentionConfig | FFNConfig, limit: int | None
) -> set[AttentionConfig | FFNConfig]:
    others = [subblock for subblock in most_used if subblock != own]
    return {own, *others[: None if limit is None else limit - 1]}


class BlockLibrary:
    """A library directory, open for reading or under construction."""

    def __init__(
        self,
        directory: Path,
        parent: Architecture,
        variants: Variants,
        *,
        mode: Mode,
        dtype: str,
        entries: dict[Replacement, LibraryEntry],
    ) -> None:
        self.directory = directory
        self.parent = parent
        self.variants = variants
        self.mode: Mode = mode
        self.entries = entries
        self._dtype = dtype

    @classmethod
    def create(
        cls, directory: Path, parent: Architecture, variants: Variants, *, dtype: torch.dtype, mode: Mode = "decoupled"
    ) -> BlockLibrary:
        """An empty library that is to serve ``variants``; its tensors will be stored as ``dtype``."""
        (directory / REPLACEMENTS_DIR).mkdir(parents=True, exist_ok=True)
        dtype_name = str(dtype).removeprefix("torch.")
        return cls(directory, parent, variants, mode=mode, dtype=dtype_name, entries={})

    @classmethod
    def open(cls, directory: Path) -> BlockLibrary:
        """Reads the index; tensors are read when asked for."""
        index = json.loads((directory / INDEX_FILE).read_text())
        parent = architecture_from_config(index["parent_architecture"])
        variants = tuple(
            tuple(_block(name, own) for name in names)
            for names, own in zip(index["variants"], parent.blocks, strict=True)
        )
        entries = (_entry_from_json(row) for row in index["replacements"])
        return cls(
            directory,
            parent,
            variants,
            mode=index["mode"],
            dtype=index["parent_architecture"]["torch_dtype"],
            entries={entry.replacement: entry for entry in entries},
        )

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the stored tensors."""
        return getattr(torch, self._dtype)

    def write_index(self) -> None:
        """Write ``library.json``, whole or not at all."""
        index = {
            "parent_architecture": hf_config(self.parent, self._dtype),
            "mode": self.mode,
            "variants": [[block.name for block in blocks] for blocks in self.variants],
            "replacements": [entry.as_json() for entry in self.entries.values()],
        }
        write_whole(self.directory / INDEX_FILE, json.dumps(index, indent=1) + "\n")

    def tensors(self, index: int, block: BlockConfig) -> dict[str, Tensor]:
        """Tensors (CPU) of every subblock of ``block`` that is not the parent's own, by their names in the block.

        Raises:
            ValueError: the library has no replacement for one of them, or its file holds other tensors than it should.
        """
        found: dict[str, Tensor] = {}
        for entry in self.entries_of(index, block):
            found |= self.load(entry)
        return found

    def load(self, entry: LibraryEntry) -> dict[str, Tensor]:
        """Tensors (CPU) of one replacement, by their names in the block.

        Raises:
            ValueError: its file holds other tensors than it should.
        """
        self._require_shapes(entry)
        return load_file(self.directory / entry.file)

    def entries_of(self, index: int, block: BlockConfig) -> list[LibraryEntry]:
        """Those replacements of which :meth:`tensors` is made.

        Raises:
            ValueError: the library has none for one of the subblocks.
        """
        needed = block_replacements(self.parent, index, block, self.mode)
        for replacement in needed:
            require(
                replacement in self.entries,
                f"the library has no replacement {replacement.name}, which block {index} = {block.name} needs; "
                "build it with a search space (space) that holds this variant",
            )
        return [self.entries[replacement] for replacement in needed]

    def require_variants(self, variants: Sequence[Sequence[BlockConfig]]) -> None:
        """``ValueError`` unless :meth:`tensors` has an answer for all ``variants``, listed block by block.

        The files of their replacements are looked into: names and shapes, not values.
        """
        needed = {
            entry.file: entry
            for index, blocks in enumerate(variants)
            for block in blocks
            for entry in self.entries_of(index, block)
        }
        for entry in needed.values():
            self._require_shapes(entry)

    def require_parent(self, architecture: Architecture) -> None:
        """``ValueError`` unless the library was built from a parent of this architecture."""
        require(
            self.parent == architecture,
            f"the library's parent has {self.parent.num_blocks} blocks like {self.parent.blocks[0].name}, the model "
            f"given has {architecture.num_blocks} like {architecture.blocks[0].name}; give the library's own parent",
        )

    def _require_shapes(self, entry: LibraryEntry) -> None:
        path, expected = self.directory / entry.file, entry.replacement.shapes(self.parent)
        try:
            with safe_open(path, framework="pt") as file:
                stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}; build the library again") from error
        for name in sorted(expected.keys() | stored.keys()):
            require(
                stored.get(name) == expected.get(name),
                f"{path}: tensor {name} has {_shape(stored, name)}, the replacement {entry.replacement.name} of this "
                f"parent has {_shape(expected, name)}; build the library again",
            )


def file_of(replacement: Replacement) -> str:
    """Its file, relative to the library's directory."""
    return f"{REPLACEMENTS_DIR}/{replacement.name}.safetensors"


def _shape(shapes: Shapes, name: str) -> str:
    return f"shape {list(shapes[name])}" if name in shapes else "no place"


def _block(name: str, own: BlockConfig) -> BlockConfig:
    attention, ffn = parse_variant(name)
    return replace(own, attention=attention, ffn=ffn)


def _entry_from_json(row: Mapping[str, Any]) -> LibraryEntry:
    replacement = Replacement(
        block=row["block"],
        attention=None if row["attention"] is None else parse_attention(row["attention"]),
        ffn=None if row["ffn"] is None else parse_ffn(row["ffn"]),
        beside=row["beside"],
    )
    return LibraryEntry(
        replacement=replacement,
        file=row["file"],
        bld_nmse_init=row["bld_nmse_init"],
        bld_nmse=row["bld_nmse"],
        trained=row["trained"],
    )

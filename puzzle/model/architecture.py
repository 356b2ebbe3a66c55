"""The architecture of a heterogeneous decoder as data.

Torch-free. An :class:`Architecture` is what every other module plans with: it is read from and written to the
``config.json`` of a nemotron-nas checkpoint, and :mod:`puzzle.model.stats` answers parameters, FLOPs and bytes from it
before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from distill.config import RopeConfig, require

FFN_DIM_MULTIPLE = 256
"""Widths that the nemotron-nas format can express and that matrix units like, in channels."""


def round_up_ffn_dim(width: float) -> int:
    """Smallest FFN width of the format that holds ``width`` channels."""
    return max(FFN_DIM_MULTIPLE, -(-int(-(-width // 1)) // FFN_DIM_MULTIPLE) * FFN_DIM_MULTIPLE)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The attention subblock of one block: grouped-query with ``num_kv_heads``, one linear layer, or nothing."""

    kind: Literal["gqa", "linear", "no_op"] = "gqa"
    num_kv_heads: int | None = None
    rope: bool = True
    """Queries and keys are rotated; false in the NoPE blocks of a parent that has some (SmolLM3)."""

    def __post_init__(self) -> None:
        require(
            (self.kind == "gqa") == (self.num_kv_heads is not None),
            f"attention of kind {self.kind} with num_kv_heads={self.num_kv_heads}: gqa alone has a count",
        )
        require(self.rope or self.kind == "gqa", f"attention of kind {self.kind} with rope=false: gqa alone rotates")

    @property
    def is_no_op(self) -> bool:
        """Whether nothing stands here."""
        return self.kind == "no_op"

    @property
    def name(self) -> str:
        """Short name in tables: ``kv8``, ``kv8_nope`` (without rotary positions), ``linear``, ``no_op``."""
        return f"kv{self.num_kv_heads}{'' if self.rope else '_nope'}" if self.kind == "gqa" else self.kind


@dataclass(frozen=True, kw_only=True)
class FFNConfig:
    """The FFN subblock of one block: SwiGLU with ``ffn_dim`` channels, one linear layer, or nothing."""

    kind: Literal["swiglu", "linear", "no_op"] = "swiglu"
    ffn_dim: int | None = None

    def __post_init__(self) -> None:
        require(
            (self.kind == "swiglu") == (self.ffn_dim is not None),
            f"FFN of kind {self.kind} with ffn_dim={self.ffn_dim}: swiglu needs a width, the others have none",
        )
        require(
            self.ffn_dim is None or (self.ffn_dim > 0 and self.ffn_dim % FFN_DIM_MULTIPLE == 0),
            f"ffn_dim={self.ffn_dim} is not a multiple of {FFN_DIM_MULTIPLE}; the format cannot express it",
        )

    @property
    def is_no_op(self) -> bool:
        """Whether nothing stands here."""
        return self.kind == "no_op"

    @property
    def name(self) -> str:
        """Short name used in tables: ``w14336``, ``linear``, ``no_op``."""
        return f"w{self.ffn_dim}" if self.kind == "swiglu" else self.kind


NO_ATTENTION = AttentionConfig(kind="no_op")
NO_FFN = FFNConfig(kind="no_op")


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One block: attention, then FFN, each with its own norm and residual."""

    attention: AttentionConfig
    ffn: FFNConfig
    parent_block_indices: tuple[int, ...]
    """Blocks of the parent that this block stands for: more than one where it is a fusion of them, or where blocks
    beside it were removed."""
    dropped_parent_indices: tuple[int, ...] = ()
    """Those of ``parent_block_indices`` that were removed: this block keeps their place and nothing of them."""

    def __post_init__(self) -> None:
        foreign = sorted(set(self.dropped_parent_indices) - set(self.parent_block_indices))
        require(
            not foreign,
            f"dropped_parent_indices: {foreign} are not among parent_block_indices={list(self.parent_block_indices)}; "
            "a block can only lack what it stands for",
        )

    @property
    def member_indices(self) -> tuple[int, ...]:
        """Blocks of the parent whose place *and* weights this block has; more than one after fusion."""
        return tuple(index for index in self.parent_block_indices if index not in self.dropped_parent_indices)

    @property
    def is_fused(self) -> bool:
        """True for one FFN that is the fusion of several (FFN Fusion, arXiv 2503.18908, section 3)."""
        return self.is_attention_free and len(self.member_indices) > 1

    @property
    def is_dummy(self) -> bool:
        """True where neither attention nor FFN is left: the block passes on what it gets."""
        return self.attention.is_no_op and self.ffn.is_no_op

    @property
    def is_attention_free(self) -> bool:
        """True where only a SwiGLU FFN is left: the material of FFN Fusion."""
        return self.attention.is_no_op and self.ffn.kind == "swiglu"

    @property
    def name(self) -> str:
        """``<attention>+<ffn>``, for example ``kv8+w14336`` or ``no_op+w7168``."""
        return f"{self.attention.name}+{self.ffn.name}"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A whole decoder. Dimensions are in channels, positions in tokens."""

    vocab_size: int
    hidden_dim: int
    num_heads: int
    head_dim: int
    blocks: tuple[BlockConfig, ...]
    max_positions: int
    rope: RopeConfig
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    """Tokens that attention looks back, in every block; null: all of them."""
    family: str = "llama"
    """Row of puzzle.model.families that the weights came from."""
    source_ffn_dim: int | None = None
    """The parent's own FFN width where it was zero-padded to the format's multiple."""
    token_ids: dict[str, int | list[int] | None] = field(default_factory=dict)
    """bos_token_id, eos_token_id, pad_token_id."""
    parallel_windows: tuple[tuple[int, int], ...] = ()
    """First and last block (inclusive) of every window whose blocks all read the window's input, in rising order. The
    window's output is X + sum of f_i(X) - X over its blocks f_i (FFN Fusion, Appendix B)."""

    def __post_init__(self) -> None:
        require(len(self.blocks) > 0, "an architecture needs at least one block")
        for index, block in enumerate(self.blocks):
            heads = block.attention.num_kv_heads
            require(
                heads is None or (0 < heads <= self.num_heads and self.num_heads % heads == 0),
                f"block {index}: num_kv_heads={heads} must divide num_heads={self.num_heads}",
            )
        _check_windows(self)

    @property
    def num_blocks(self) -> int:
        """Blocks, dummies included."""
        return len(self.blocks)

    @property
    def depth(self) -> int:
        """Blocks that run one after another: a parallel window counts as one."""
        return self.num_blocks - sum(last - first for first, last in self.parallel_windows)

    def with_blocks(self, blocks: tuple[BlockConfig, ...]) -> Architecture:
        """The same decoder with other blocks.

        Raises:
            ValueError: another number of blocks, where parallel windows count on the present one.
        """
        if len(blocks) != self.num_blocks:
            require_sequential(self.parallel_windows, "a change of the number of blocks")
        return replace(self, blocks=blocks)

    def with_block(self, index: int, block: BlockConfig) -> Architecture:
        """The same decoder with another block at ``index``."""
        return self.with_blocks((*self.blocks[:index], block, *self.blocks[index + 1 :]))

    def attention_free_runs(self) -> Iterator[tuple[int, int]]:
        """First and last index of every maximal run of attention-free blocks, in order."""
        start: int | None = None
        for index in range(self.num_blocks + 1):
            free = index < self.num_blocks and self.blocks[index].is_attention_free
            if free and start is None:
                start = index
            elif not free and start is not None:
                yield start, index - 1
                start = None

    def fusible_runs(self) -> Iterator[tuple[int, int]]:
        """First and last index of every maximal run of attention-free blocks that are not fused already, in order."""
        for run_first, run_last in self.attention_free_runs():
            first = run_first
            for index in range(run_first, run_last + 2):
                if index > run_last or self.blocks[index].is_fused:
                    if first < index:
                        yield first, index - 1
                    first = index + 1


def dense_blocks(num_blocks: int, num_kv_heads: int, ffn_dim: int) -> tuple[BlockConfig, ...]:
    """The blocks of a homogeneous parent."""
    return tuple(
        BlockConfig(
            attention=AttentionConfig(num_kv_heads=num_kv_heads),
            ffn=FFNConfig(ffn_dim=ffn_dim),
            parent_block_indices=(index,),
        )
        for index in range(num_blocks)
    )


def require_sequential(windows: Sequence[Sequence[int]], what: str) -> None:
    """Raise ``ValueError`` where a model has parallel ``windows``, for ``what`` takes blocks one after another."""
    spans = ", ".join(f"{first}-{last}" for first, last in windows)
    require(
        not windows,
        f"{what} takes blocks one after another, and this model runs blocks {spans} in parallel; give it the model "
        "from before stage parallelize_blocks",
    )


def _check_windows(architecture: Architecture) -> None:
    windows, blocks = architecture.parallel_windows, architecture.blocks
    for first, last in windows:
        where = f"parallel window [{first}, {last}]"
        require(
            0 <= first < last < len(blocks),
            f"{where} must name at least two blocks within 0..{len(blocks) - 1}, in rising order",
        )
        without = [index for index in range(first, last + 1) if blocks[index].attention.is_no_op]
        require(
            not without,
            f"{where} has blocks without attention: {', '.join(map(str, without))}; stage fuse makes one wide FFN of "
            "such blocks, a window is for blocks that attend",
        )
    for before, after in pairwise(windows):
        require(
            before[1] < after[0],
            f"parallel windows {list(before)} and {list(after)} overlap or are out of order; a block is in one at most",
        )

"""Typed configuration of dependency measurement and FFN fusion. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.config import require


@dataclass(frozen=True, kw_only=True)
class DependencyConfig:
    """Block-wise dependency matrix (FFN Fusion, section 3)."""

    num_sequences: int
    """Calibration sequences."""
    seq_len: int
    """Tokens per sequence."""
    batch_size: int = 8
    """Sequences per forward."""

    def __post_init__(self) -> None:
        for name in ("num_sequences", "seq_len", "batch_size"):
            require(getattr(self, name) > 0, f"dependency.{name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class FuseConfig:
    """Which runs of attention-free FFNs are fused, and how."""

    norm: Literal["folded", "last"] = "folded"
    """folded: every member's norm scale goes into its own weights, exact for the parallel sum; last: all members read
    the last member's norm (FFN Fusion, eq. 5)."""
    leave_last_out: bool = True
    """Keep the last FFN of every run as it is: the paper found it sensitive (FFN Fusion, Table 5)."""
    min_length: int = 2
    """Shortest run worth fusing, in FFNs."""
    max_ffn_dim: int | None = None
    """Widest fused FFN in channels; longer runs are split. null: no bound."""
    max_dependency: float | None = None
    """Split a run where a later member depends on an earlier one by more than this cosine distance. null: no bound."""
    groups: tuple[tuple[int, int], ...] | None = None
    """First and last block (inclusive) of every group, chosen by hand; null: chosen from the runs."""

    def __post_init__(self) -> None:
        require(
            self.max_ffn_dim is None or self.max_ffn_dim > 0, f"fuse.max_ffn_dim must be > 0, got {self.max_ffn_dim}"
        )
        require(self.min_length >= 2, f"fuse.min_length must be >= 2, got {self.min_length}")
        require(
            self.max_dependency is None or 0 <= self.max_dependency <= 2,
            f"fuse.max_dependency is a cosine distance in 0..2, got {self.max_dependency}",
        )
        for first, last in self.groups or ():
            require(0 <= first < last, f"fuse.groups: [{first}, {last}] must name at least two blocks in rising order")

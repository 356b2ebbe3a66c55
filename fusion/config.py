"""Typed configuration of FFN Fusion: what it measures first, the fusion, what recovers it locally. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distill.config import PLACEMENT, OptimConfig, TrainConfig, require
from puzzle.config import HardwareConfig
from puzzle.model.targets import Target

Span = tuple[int, int]
"""First and last block, inclusive."""

Norm = Literal["folded", "last"]
"""What becomes of the members' norms, as in :attr:`FuseConfig.norm`."""

Average = Literal["token", "sequence"]
"""What a dependency is the mean over, as in :attr:`DependencyConfig.average`."""

Latency = Literal["decode", "prefill", "request"]
"""decode: one token; prefill: the prompt; request: the prompt and all generated tokens."""


def _require_positive(node: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{node}.{name} must be > 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class DependencyConfig:
    """Block-wise dependency matrix (FFN Fusion, section 3)."""

    num_sequences: int
    """Calibration sequences."""
    seq_len: int
    """Tokens per sequence."""
    batch_size: int = field(default=8, metadata=PLACEMENT)
    """Sequences per forward."""
    average: Average = "token"
    """token: the mean over tokens of each token's cosine distance; sequence: the mean over sequences of one cosine
    distance each, of all the tokens' contributions together, in which large ones weigh more. The paper names none."""

    def __post_init__(self) -> None:
        _require_positive("dependency", self, "num_sequences", "seq_len", "batch_size")


@dataclass(frozen=True, kw_only=True)
class GroupScoreConfig:
    """What every group of neighbouring attention-free FFNs gains, and what it costs in quality, when it alone fuses."""

    num_sequences: int
    """Calibration sequences."""
    seq_len: int
    """Tokens per sequence."""
    batch_size: int = field(default=8, metadata=PLACEMENT)
    """Sequences per forward."""
    norm: Norm = "folded"
    """As in fuse.norm."""
    max_members: int | None = None
    """FFNs of the longest group that is scored; null: whole runs too. A run of n has n (n - 1) / 2 groups."""
    num_widths: int = 16
    """FFN widths that are timed, of those that occur; the others are interpolated."""
    repeats: int = 20
    """Timed rounds; the median counts."""
    warmup: int = 3
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """Models the all-reduce behind every FFN where workload.tensor_parallel is above 1; follows costs.hardware."""

    def __post_init__(self) -> None:
        _require_positive("group_scores", self, "seq_len", "batch_size", "repeats")
        for name in ("num_sequences", "num_widths"):
            require(getattr(self, name) >= 2, f"group_scores.{name} must be >= 2, got {getattr(self, name)}")
        require(
            self.max_members is None or self.max_members >= 2,
            f"group_scores.max_members must be >= 2, got {self.max_members}",
        )
        require(self.warmup >= 0, f"group_scores.warmup must be >= 0, got {self.warmup}")


@dataclass(frozen=True, kw_only=True)
class FuseConfig:
    """Which runs of attention-free FFNs are fused, and how."""

    norm: Norm = "folded"
    """folded: every member's norm scale goes into its own weights, exact for the parallel sum; last: all members read
    the last member's norm (FFN Fusion, eq. 5)."""
    leave_last_out: bool = True
    """Keep the last FFN of every run as it is: the paper found it sensitive (FFN Fusion, Table 5)."""
    min_length: int = 2
    """Shortest run worth fusing, in FFNs."""
    group_size: int | None = None
    """FFNs per group: a run of n is split into n // group_size groups, at least one, as even as can be. 2, 4 and 8 are
    steps 1 to 3 of the paper's 49B ablation. null: as few groups as the bounds allow."""
    choose: Literal["fewest_blocks", "most_gain"] = "fewest_blocks"
    """most_gain: of all groups within the bounds those that save the most measured latency; needs group scores."""
    latency: Latency = "decode"
    """Latency that most_gain and an equal-latency removal go by."""
    max_ffn_dim: int | None = None
    """Widest fused FFN in channels; longer runs are split. null: no bound."""
    max_gib_per_rank: float | None = None
    """Weights of one fused FFN on one tensor-parallel rank, in the checkpoint's data type; null: no bound."""
    tensor_parallel: int = 1
    """Ranks that the fused FFNs will be served on: their widths have to divide by it."""
    max_dependency: float | None = None
    """Split a run where a later member depends on an earlier one by more than this cosine distance. null: no bound."""
    max_kld: float | None = None
    """Bound on the sum of the groups' KL divergences, each measured with that group alone fused, in nats per token;
    needs group scores and choose=most_gain. null: no bound."""
    groups: tuple[Span, ...] | None = None
    """First and last block (inclusive) of every group, chosen by hand; null: chosen from the runs."""
    targets: tuple[Target, ...] = ()
    """Engines that the model is for, as in export.targets: where one of them cannot load it, nothing is fused."""
    treatment: Literal["fuse", "reverse", "remove"] = "fuse"
    """What is done to the groups. The paper's controls (section 5.2, Table 6): reverse runs their FFNs in the opposite
    order, remove drops those of them that cost the least when one alone is dropped."""
    num_removed: int | None = None
    """FFNs that treatment=remove drops; null: as few as make the model no slower than the fused one, by the measured
    latencies of the group scores."""

    def __post_init__(self) -> None:
        _require_positive(
            "fuse", self, "group_size", "max_ffn_dim", "max_gib_per_rank", "tensor_parallel", "num_removed"
        )
        require(self.min_length >= 2, f"fuse.min_length must be >= 2, got {self.min_length}")
        require(self.group_size is None or self.group_size >= 2, f"fuse.group_size must be >= 2, got {self.group_size}")
        require(
            self.max_dependency is None or 0 <= self.max_dependency <= 2,
            f"fuse.max_dependency is a cosine distance in 0..2, got {self.max_dependency}",
        )
        require(self.max_kld is None or self.max_kld >= 0, f"fuse.max_kld must be >= 0, got {self.max_kld}")
        require(
            self.max_kld is None or self.choose == "most_gain",
            f"fuse.max_kld={self.max_kld} bounds what fuse.choose=most_gain chooses; set that, or max_kld=null",
        )
        require(
            self.groups is None or self.group_size is None,
            f"fuse.groups names the groups, fuse.group_size={self.group_size} would too; use one",
        )
        require(
            self.group_size is None or self.choose == "fewest_blocks",
            f"fuse.group_size={self.group_size} settles the groups, fuse.choose=most_gain would too; use one",
        )
        require(
            self.num_removed is None or self.treatment == "remove",
            f"fuse.num_removed={self.num_removed} is for fuse.treatment=remove, got {self.treatment}",
        )
        for first, last in self.groups or ():
            require(0 <= first < last, f"fuse.groups: [{first}, {last}] must name at least two blocks in rising order")


@dataclass(frozen=True, kw_only=True)
class GroupDistillationConfig:
    """Block-local distillation of fused FFNs, or of runs that shall become fusible."""

    train: TrainConfig
    optim: OptimConfig
    sequential_weight: float = 1.0
    """Where a run is trained before it is fused: weight of its own sequential error beside the parallel sum's."""

    def __post_init__(self) -> None:
        require(
            self.sequential_weight >= 0,
            f"group_distillation.sequential_weight must be >= 0, got {self.sequential_weight}",
        )
        require(
            not self.train.separate_documents,
            "group_distillation.train.separate_documents=true, but groups learn on whole sequences; set it to false",
        )


@dataclass(frozen=True, kw_only=True)
class ParallelizeConfig:
    """Full-block parallelism: windows of whole blocks that read the same input (FFN Fusion, Appendix B)."""

    num_windows: int = 1
    """Windows that the greedy choice takes, least dependent first."""
    window_size: int = 4
    """Blocks per window."""
    windows: tuple[Span, ...] | None = None
    """First and last block (inclusive) of every window, chosen by hand; null: chosen greedily."""

    def __post_init__(self) -> None:
        _require_positive("parallelize", self, "num_windows")
        require(self.window_size >= 2, f"parallelize.window_size must be >= 2, got {self.window_size}")
        for first, last in self.windows or ():
            require(0 <= first < last, f"parallelize.windows: [{first}, {last}] must name at least two blocks")

"""Typed configuration of library, scoring, costs and search. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distill.config import PLACEMENT, OptimConfig, TrainConfig, require
from puzzle.model.targets import Target


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """The variants that may stand at every block, beside the parent's own subblocks."""

    kv_heads: tuple[int, ...] | Literal["divisors"] = ()
    """KV head counts below the parent's, each a divisor of it; divisors: all of them."""
    attention_linear: bool = False
    attention_no_op: bool = True
    ffn_fracs: tuple[float, ...] = ()
    """FFN widths as fractions of the parent's, rounded up to a multiple of 256 channels."""
    ffn_linear: bool = False
    ffn_no_op: bool = False
    keep_attention: tuple[int | str, ...] = (0,)
    """Blocks whose attention stays the parent's: indices, negative ones from the end, and ranges with both ends
    (4..9, -2..-1). Engines read layer 0's attention."""
    keep_ffn: tuple[int | str, ...] = ()
    """Blocks whose FFN stays the parent's, in the same notation."""

    def __post_init__(self) -> None:
        for frac in self.ffn_fracs:
            require(
                0 < frac < 1, f"space.ffn_fracs must lie in 0..1 (the parent's own width is always there), got {frac}"
            )
        if self.kv_heads != "divisors":
            for heads in self.kv_heads:
                require(heads >= 1, f"space.kv_heads must be >= 1, got {heads}")


@dataclass(frozen=True, kw_only=True)
class LibraryConfig:
    """Child init and blockwise local distillation (Puzzle, section 3)."""

    importance_sequences: int
    """Calibration sequences from which FFN channels, and KV heads that are selected, are ranked."""
    skip_sequences: int = 0
    """Calibration sequences to leave out before the first: another sample of the same data."""
    ffn_importance: Literal["independent", "iterative"] = "independent"
    """independent: every channel by what its removal alone does; iterative: by what its removal does beside those that
    are removed already, a share of the channels in each round."""
    importance_rounds: int = 8
    """Rounds of the iterative ranking, each on an equal share of the sequences."""
    kv_init: Literal["mean_pool", "select"] = "mean_pool"
    """Fewer KV heads: neighbours averaged, or the most important ones kept (as true pruning)."""
    mode: Literal["decoupled", "coupled"] = "decoupled"
    """decoupled: every subblock learns beside the parent's other one; coupled: every pair of subblocks learns
    together, from the replacements of the input `library` if there is one (decoupled, then coupled)."""
    max_attentions: int | None = None
    """With the input `solution`: attentions that stay at a block, the parent's own and the most used; null: all."""
    max_ffns: int | None = None
    """FFNs that stay at a block, likewise."""
    train: bool = True
    """false: replacements stay as initialised."""
    nmse: Literal["tensor", "sample", "token"] = "tensor"
    """What the squared error is normalised over: all tokens at once, each sequence, or each token."""
    bld: TrainConfig
    """Budget of BLD; every variant of every block learns from the same parent activations."""
    optim: OptimConfig

    def __post_init__(self) -> None:
        for name in ("importance_sequences", "importance_rounds"):
            require(getattr(self, name) > 0, f"library.{name} must be > 0, got {getattr(self, name)}")
        require(self.skip_sequences >= 0, f"library.skip_sequences must be >= 0, got {self.skip_sequences}")
        for name, value in (("max_attentions", self.max_attentions), ("max_ffns", self.max_ffns)):
            require(value is None or value >= 1, f"library.{name} must be >= 1 (the parent's own stays), got {value}")
        require(
            self.ffn_importance == "independent" or self.importance_rounds <= self.importance_sequences,
            f"library.importance_rounds={self.importance_rounds} is beyond "
            f"library.importance_sequences={self.importance_sequences}: every round needs a sequence of its own",
        )
        require(
            not self.bld.separate_documents,
            "library.bld.separate_documents=true, but replacements learn on whole sequences; set it to false",
        )

    @property
    def num_calibration(self) -> int:
        """Calibration sequences that are read: those left out, those that rank, those that judge BLD."""
        return self.skip_sequences + self.importance_sequences + self.bld.eval_sequences


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Replace-1-block scores (Puzzle, section 4.2)."""

    num_sequences: int
    """Calibration sequences."""
    seq_len: int
    """Tokens per sequence."""
    skip_sequences: int = 0
    """Calibration sequences to leave out before the first: another sample of the same data."""
    batch_size: int = field(default=8, metadata=PLACEMENT)
    """Sequences per forward; variants of one block share a forward where this is more than a batch of sequences."""
    iterative_removals: int = 0
    """Attentions that are removed one after another, the cheapest first, each scored beside those that are gone
    already. Their scores then add up to the KLD of removing them all; 0: every removal is scored alone."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks that are scored too, as the drop in accuracy; needs the package lm-eval."""
    task_dir: str | None = field(default=None, metadata=PLACEMENT)
    """Directory of further lm-eval task files."""
    task_limit: int | None = None
    """Examples per task; null: all."""

    def __post_init__(self) -> None:
        for name in ("num_sequences", "seq_len", "batch_size"):
            require(getattr(self, name) > 0, f"scores.{name} must be > 0, got {getattr(self, name)}")
        for name in ("skip_sequences", "iterative_removals"):
            require(getattr(self, name) >= 0, f"scores.{name} must be >= 0, got {getattr(self, name)}")
        require(self.task_limit is None or self.task_limit > 0, f"scores.task_limit must be > 0, got {self.task_limit}")

    @property
    def num_calibration(self) -> int:
        """Calibration sequences that are read: those left out and those that are scored on."""
        return self.skip_sequences + self.num_sequences


@dataclass(frozen=True, kw_only=True)
class AdditivityConfig:
    """How far the sum of replace-1-block scores is the KLD of the child that makes all the replacements."""

    num_random_children: int = 16
    """Children with randomly chosen variants, of rising numbers of replaced blocks, besides those of the search."""

    def __post_init__(self) -> None:
        number = self.num_random_children
        require(number >= 0, f"additivity.num_random_children must be >= 0, got {number}")


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """The serving situation that every cost and latency is stated for."""

    batch_size: int = 1
    """Sequences served at once."""
    prefill_tokens: int = 128
    """Prompt length in tokens."""
    generated_tokens: int = 128
    """Tokens generated per sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights, activations and KV cache."""
    num_cpu_threads: int | None = None
    """Threads of a CPU; null: as many as torch takes. Without meaning on a GPU."""
    tensor_parallel: int = 1
    """Ranks that share every subblock; times, weights and KV cache are then those of one rank, all-reduces included."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "prefill_tokens", "generated_tokens", "num_cpu_threads", "tensor_parallel"):
            value = getattr(self, name)
            require(value is None or value > 0, f"workload.{name} must be > 0, got {value}")

    @property
    def max_context_tokens(self) -> int:
        """Prompt and answer."""
        return self.prefill_tokens + self.generated_tokens

    @property
    def bytes_per_value(self) -> int:
        """Size of one weight, activation or cached value."""
        return {"float32": 4, "bfloat16": 2}[self.dtype]


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """What the analytic cost model needs to know of a device."""

    name: str | None = None
    """Name of the device that the rates are of; null: the one that they are calibrated on."""
    flops_per_s: float | None = None
    """Sustained matrix-product rate; null: calibrated here by a quick measurement."""
    bytes_per_s: float | None = None
    """Sustained memory bandwidth; null: calibrated here."""
    kernel_launch_s: float | None = None
    """Fixed time per kernel or operator; null: calibrated here."""
    all_reduce_s: float | None = None
    """Fixed time of an all-reduce over the ranks of tensor parallelism; null: measured here, which takes that many
    processes."""
    all_reduce_bytes_per_s: float | None = None
    """Bandwidth of one rank's links in an all-reduce; null: measured here."""

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s", "all_reduce_bytes_per_s"):
            value = getattr(self, name)
            require(value is None or value > 0, f"costs.hardware.{name} must be > 0, got {value}")
        for name in ("kernel_launch_s", "all_reduce_s"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"costs.hardware.{name} must be >= 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """What every variant costs, from one or several sources."""

    sources: tuple[Literal["measured", "analytic", "vllm"], ...] = ("measured", "analytic")
    """measured: timed here, in our own model; analytic: a roofline of `hardware`; vllm: timed here through vLLM."""
    batch_sizes: tuple[int, ...] = ()
    """Batch sizes besides the workload's own, among which the search may choose."""
    repeats: int = 20
    """Timed runs; the median counts."""
    warmup: int = 3
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """For the analytic table."""

    def __post_init__(self) -> None:
        require(
            self.repeats >= 1 and self.warmup >= 0,
            f"costs.repeats={self.repeats} must be >= 1, costs.warmup={self.warmup} >= 0",
        )
        require(len(self.sources) > 0, "costs.sources is empty; name measured, analytic or vllm")
        for size in self.batch_sizes:
            require(size > 0, f"costs.batch_sizes must be > 0, got {size}")


@dataclass(frozen=True, kw_only=True)
class ConstraintConfig:
    """Budgets, all of which hold. `_frac` is relative to the parent in the same cost table, at the same batch size;
    null: no such budget."""

    latency_frac: float | None = None
    latency_ms: float | None = None
    throughput_ratio: float | None = None
    """Least generated tokens per second, relative to the most that the parent reaches at any of the batch sizes at
    which it is within memory_gib."""
    throughput_tokens_per_s: float | None = None
    """Least generated tokens per second of whole requests, prompt included."""
    memory_frac: float | None = None
    """Weights plus KV cache at the workload's batch and full length."""
    memory_gib: float | None = None
    params_frac: float | None = None
    params: int | None = None
    kv_frac: float | None = None
    kv_bytes_per_token: int | None = None
    """KV cache per token and sequence."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value is None or value > 0, f"search.constraint.{name} must be > 0, got {value}")
        for frac, absolute in (
            ("latency_frac", "latency_ms"),
            ("throughput_ratio", "throughput_tokens_per_s"),
            ("memory_frac", "memory_gib"),
            ("params_frac", "params"),
            ("kv_frac", "kv_bytes_per_token"),
        ):
            require(
                getattr(self, frac) is None or getattr(self, absolute) is None,
                f"search.constraint: give {frac} or {absolute}, not both",
            )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Mixed-integer search for one variant per block (Puzzle, appendix B)."""

    constraint: ConstraintConfig
    method: Literal["mip", "greedy", "attention_pruning", "random", "max_params", "no_op_only"] = "mip"
    """mip: the proven best choice. The others are baselines under the same budgets. greedy: block by block, the best
    variant within an even share of the budget; attention_pruning: attentions removed, lowest score first; random: any
    choice within the budgets; max_params: the most parameters; no_op_only: the MIP over whole subblocks kept or
    removed."""
    scores: str | None = field(default=None, metadata=PLACEMENT)
    """Scores of your own, a CSV or JSON file, in place of the input `scores`."""
    costs: str | None = field(default=None, metadata=PLACEMENT)
    """Costs of your own, a CSV or JSON file, in place of the input `costs`."""
    metric: str = "kld"
    """Score column that is minimised: kld, lm_loss, top1_disagreement, hidden_cosine, or what else the scores have."""
    latency: Literal["decode", "prefill", "request"] = "decode"
    """decode: one token; prefill: the prompt; request: the prompt and all generated tokens."""
    cost_table: str = "measured"
    """Source of the costs: measured, analytic or vllm."""
    batch_sizes: tuple[int, ...] = ()
    """Batch sizes that are tried, each in a search of its own; empty: all that the costs have."""
    fusion_aware: bool = True
    """Latencies are less what the merges of attention-free runs will save, each at the costs' one price per merge."""
    targets: tuple[Target, ...] = ()
    """Engines that the child is for, as in export.targets: variants that one of them cannot load as they were costed
    are left out."""
    num_solutions: int = 1
    """Solutions to find, each differing from all before it in at least min_different_frac of the blocks."""
    min_different_frac: float = 0.2
    pareto_latency_fracs: tuple[float, ...] = ()
    """Latency budgets at which the Pareto front is solved besides the constraint."""
    time_limit_seconds: float = 60.0
    random_seed: int = 0
    """Of the random baseline."""

    def __post_init__(self) -> None:
        for size in self.batch_sizes:
            require(size > 0, f"search.batch_sizes must be > 0, got {size}")
        for frac in self.pareto_latency_fracs:
            require(frac > 0, f"search.pareto_latency_fracs must be > 0, got {frac}")
        require(self.num_solutions >= 1, f"search.num_solutions must be >= 1, got {self.num_solutions}")
        require(
            0 < self.min_different_frac <= 1,
            f"search.min_different_frac must be in 0..1, got {self.min_different_frac}",
        )
        require(self.time_limit_seconds > 0, f"search.time_limit_seconds must be > 0, got {self.time_limit_seconds}")


@dataclass(frozen=True, kw_only=True)
class AssembleConfig:
    """Which of the search's solutions becomes the child."""

    solution: int = 0
    """0: the best one."""

    def __post_init__(self) -> None:
        require(self.solution >= 0, f"assemble.solution must be >= 0, got {self.solution}")


@dataclass(frozen=True, kw_only=True)
class PruneAttentionConfig:
    """The short road to fusion: no library, no search."""

    num_attentions: int
    """Attentions that become no-ops, lowest score first."""
    num_sequences: int
    """Calibration sequences for the scores."""
    seq_len: int
    batch_size: int = field(default=8, metadata=PLACEMENT)
    keep_attention: tuple[int | str, ...] = (0,)
    """Blocks whose attention stays, in the notation of space.keep_attention."""
    iterative: bool = False
    """Score the attentions that are left again after every removal: independent scores pick bad sets when many go."""
    contiguous: bool = False
    """Take the cheapest run of neighbouring attentions, not the cheapest set, so that one long run can be fused."""

    def __post_init__(self) -> None:
        for name in ("num_attentions", "num_sequences", "seq_len", "batch_size"):
            require(getattr(self, name) > 0, f"prune_attention.{name} must be > 0, got {getattr(self, name)}")
        require(
            not (self.iterative and self.contiguous),
            "prune_attention: iterative takes the cheapest one after another, contiguous the cheapest run; choose one",
        )


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Latency, throughput and memory of whole models, measured here, interleaved in one process."""

    repeats: int = 15
    warmup: int = 3

    def __post_init__(self) -> None:
        require(
            self.repeats >= 1 and self.warmup >= 0,
            f"benchmark.repeats={self.repeats} must be >= 1, benchmark.warmup={self.warmup} >= 0",
        )

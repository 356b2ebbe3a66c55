"""Typed configuration of the training substrate.

Torch-free: a login node validates, plans and submits with these classes alone. Every class is frozen, checks its own
ranges and names the offending key in its error. A field whose metadata says ``placement`` decides where and how fast
work runs, never what comes out, and is left out of fingerprints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

PLACEMENT: dict[str, Any] = {"placement": True}


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of text documents."""

    kind: Literal["python_stdlib", "text", "hub", "generated"]
    """python_stdlib: source and docstrings of the running Python; text: local files; hub: a Hugging Face dataset;
    generated: what stage generate_text sampled from a model, the input `generated`."""
    path: str | None = field(default=None, metadata=PLACEMENT)
    """text: a file, a directory or a glob (.txt .md .rst .py .jsonl .parquet, .xz, .gz); hub: the dataset id."""
    subset: str | None = None
    """hub: the dataset's configuration name."""
    split: str = "train"
    """hub: the dataset's split."""
    revision: str | None = None
    """hub: branch, tag or commit; null: the default branch. A commit makes later runs equal."""
    text_field: str = "text"
    """jsonl, parquet and hub: the column that holds the text."""
    weight: float = 1.0
    """Share of this source in the mixture, relative to the other sources' weights."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data.sources: weight must be > 0, got {self.weight} for kind={self.kind}")
        if self.kind in ("text", "hub"):
            require(
                bool(self.path),
                f"data.sources: kind={self.kind} needs a path; set path=<file, directory, glob or dataset id>",
            )
        else:
            # The stage itself fills in where generated text lies.
            require(
                self.path is None or self.kind == "generated",
                f"data.sources: kind={self.kind} has no use for path={self.path}; leave it out, or set kind=text",
            )
        if self.kind != "hub":
            given = {"subset": self.subset, "revision": self.revision}
            unused = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
            require(not unused, f"data.sources: {unused} is for kind=hub, got kind={self.kind}; leave it out")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What stage prepare_data turns into token streams."""

    sources: tuple[SourceConfig, ...]
    """The mixture."""
    train_tokens: int
    """Most tokens of the train split. Where the text ends before, the split is shorter, and the stages whose budget is
    beyond it refuse, repeat or stop as their ``data_end`` says."""
    validation_tokens: int
    """Tokens of the held-out split: rows and files that train never sees (of large files, long parts)."""
    calibration_tokens: int
    """Tokens of the frozen split shared by importance, scoring and dependency measurement."""
    long_document_tokens: int = 0
    """> 0: documents of at least this many tokens alone, and files whole in place of cut into documents of 8,192
    characters. Set to the longest seq_len of a context extension, at most one document ends inside a sequence."""
    tokenizer: Literal["train", "parent"] = "parent"
    """train: learn a byte-level BPE on the text; parent: use the tokenizer of input `parent`."""
    vocab_size: int = 2048
    """Vocabulary of a tokenizer that is trained here."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources is empty; name at least one source")
        for name in ("train_tokens", "validation_tokens", "calibration_tokens"):
            require(getattr(self, name) > 0, f"data.{name} must be > 0, got {getattr(self, name)}")
        require(
            self.long_document_tokens >= 0,
            f"data.long_document_tokens must be >= 0, got {self.long_document_tokens}",
        )
        seen = set[tuple[str | None, ...]]()
        for source in self.sources:
            origin = (source.kind, source.path, source.subset, source.split, source.text_field)
            require(
                origin not in seen,
                f"data.sources: kind={source.kind} path={source.path} is there twice; duplicate documents are dropped, "
                "so give it once, with the sum of the weights",
            )
            seen.add(origin)
        require(self.vocab_size >= 260, f"data.vocab_size must be >= 260 (bytes and specials), got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The library that runs forward, backward and step."""

    name: Literal["torch", "deepspeed", "megatron"] = "torch"
    """torch: one process, DDP or FSDP2; deepspeed: ZeRO; megatron: tensor, sequence and pipeline parallelism."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=PLACEMENT)
    """auto: the first CUDA device if there is one, else the CPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of activations and matrix products. Weights under training and optimizer state are always fp32."""
    micro_batch_tokens: int = field(default=0, metadata=PLACEMENT)
    """Most tokens in one forward and backward; larger batches accumulate gradients. 0: never split."""
    slices: int = field(default=1, metadata=PLACEMENT)
    """Ranks over which the blocks of a parent are dealt while its library is built and scored: no rank holds more than
    its slice. Further ranks are replicas, which share the work."""
    compile: bool = field(default=False, metadata=PLACEMENT)
    """Compile every block of student and teacher with torch.compile: seconds at the start, faster steps on GPUs."""
    shard: bool = field(default=False, metadata=PLACEMENT)
    """torch: FSDP2, which deals weights, gradients and optimizer state over the ranks, in place of DDP. It deals the
    teacher's weights too."""
    zero_stage: Literal[1, 2, 3] = field(default=2, metadata=PLACEMENT)
    """deepspeed: what is dealt over the ranks: optimizer state, gradients too, weights too."""
    offload_optimizer: bool = field(default=False, metadata=PLACEMENT)
    """torch and deepspeed: master weights and optimizer state live in CPU memory, where the step is made."""
    recompute: bool = field(default=False, metadata=PLACEMENT)
    """Activation checkpointing: keep each block's input alone and compute the rest again in the backward pass."""
    offload_activations: bool = field(default=False, metadata=PLACEMENT)
    """With recompute: keep the blocks' inputs in CPU memory."""
    ffn_tile_tokens: int = field(default=0, metadata=PLACEMENT)
    """Most tokens that go through the widest FFN at once, narrower ones take more in proportion; 0: all of them."""
    sequence_parallel: int = field(default=1, metadata=PLACEMENT)
    """torch and deepspeed: ranks that share every sequence (Ulysses): each holds a part of its tokens, and in attention
    a part of the heads."""
    tensor_parallel: int = field(default=1, metadata=PLACEMENT)
    """megatron: ranks that share every matrix; between them activations are split over the sequence."""
    pipeline_parallel: int = field(default=1, metadata=PLACEMENT)
    """megatron: ranks that share the blocks, one stage each, of nearly equal cost."""
    teacher_device: str = field(default="same", metadata=PLACEMENT)
    """Where the teacher runs: same, cpu, or a device of its own such as cuda:1."""
    peak_flops_per_s: float | None = field(default=None, metadata=PLACEMENT)
    """Dense FLOP/s of one device at this precision, of which ``perf/mfu_frac`` is a fraction; null: what is known of
    the device's name, in bf16."""

    def __post_init__(self) -> None:
        counts = ("slices", "sequence_parallel", "tensor_parallel", "pipeline_parallel")
        for name in counts:
            require(getattr(self, name) >= 1, f"engine.{name} must be >= 1, got {getattr(self, name)}")
        peak = self.peak_flops_per_s
        require(peak is None or peak > 0, f"engine.peak_flops_per_s must be > 0, got {peak}; null: not stated")
        require(self.ffn_tile_tokens >= 0, f"engine.ffn_tile_tokens must be >= 0, got {self.ffn_tile_tokens}")
        require(self.micro_batch_tokens >= 0, f"engine.micro_batch_tokens must be >= 0, got {self.micro_batch_tokens}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule, a function of the fraction of the token budget that is spent."""

    lr: float
    """Peak learning rate."""
    min_lr_frac: float = 0.1
    """Final learning rate as a fraction of lr."""
    warmup_frac: float = 0.02
    """Fraction of the token budget with linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (never on norms and biases)."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0: never clip."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr must be > 0, got {self.lr}")
        for name in ("min_lr_frac", "warmup_frac", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name} must be in 0..1, got {value}")
        require(self.weight_decay >= 0, f"optim.weight_decay must be >= 0, got {self.weight_decay}")
        require(self.grad_clip >= 0, f"optim.grad_clip must be >= 0, got {self.grad_clip}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the loss terms. A weight of 0 leaves the term out."""

    kld: float = 0.0
    """Divergence of the student from the teacher over the full vocabulary, per token, in nats."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """forward: KL(teacher || student); reverse: KL(student || teacher); jsd: the generalised Jensen-Shannon divergence,
    jsd_beta KL(teacher || m) + (1 - jsd_beta) KL(student || m) with m = jsd_beta teacher + (1 - jsd_beta) student."""
    jsd_beta: float = 0.5
    """Weight of the teacher in the mixture."""
    hidden_cosine: float = 0.0
    """Mean over mapped blocks of 1 - cos(teacher hidden, student hidden) (Puzzle, GKD)."""
    hidden_mse: float = 0.0
    """Mean over mapped blocks and tokens of |student - teacher|^2 / |teacher|^2, each token against its own norm."""
    lm: float = 0.0
    """Next-token cross-entropy on the data, per token, in nats."""
    temperature: float = 1.0
    """Softmax temperature of both models in the divergence, which is then multiplied by its square."""
    chunk_tokens: int = field(default=0, metadata=PLACEMENT)
    """Most tokens whose logits exist at once. Bounds memory. 0: as many as fill 1 GiB per model on a GPU, 64 MiB on a
    CPU."""

    def __post_init__(self) -> None:
        names = ("kld", "hidden_cosine", "hidden_mse", "lm")
        weights = tuple(getattr(self, name) for name in names)
        require(all(w >= 0 for w in weights), f"objective weights must be >= 0, got {', '.join(names)} = {weights}")
        require(any(w > 0 for w in weights), f"objective has no term; give one of {', '.join(names)} a weight > 0")
        require(0 < self.jsd_beta < 1, f"objective.jsd_beta must be in 0..1 without its ends, got {self.jsd_beta}")
        require(self.temperature > 0, f"objective.temperature must be > 0, got {self.temperature}")
        require(self.chunk_tokens >= 0, f"objective.chunk_tokens must be >= 0, got {self.chunk_tokens}")

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares the student with a teacher."""
        return self.kld > 0 or self.compares_hidden

    @property
    def reads_logits(self) -> bool:
        """Whether a term is on the student's logits; without one its head neither runs nor learns."""
        return self.kld > 0 or self.lm > 0

    @property
    def compares_hidden(self) -> bool:
        """Whether a term compares hidden states block by block."""
        return self.hidden_cosine > 0 or self.hidden_mse > 0


@dataclass(frozen=True, kw_only=True)
class ResumePointsConfig:
    """Which resume points stay, and how long training waits for one to be written."""

    newest: int = 2
    """The newest ones that stay. With 2 there is another one in case the disk damages the last."""
    every: int = 0
    """> 0: beside them, of the points that fall due every n-th stays until the run is finished, to go back to."""
    background: bool = True
    """Training goes on as soon as the state is copied to CPU memory, which needs room for it; a thread writes it. BLD
    and group distillation wait for the disk in any case."""

    def __post_init__(self) -> None:
        require(self.newest >= 1, f"resume_points.newest must be >= 1, got {self.newest}; a run goes on from the last")
        require(self.every >= 0, f"resume_points.every must be >= 0 (0: none), got {self.every}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Budget and cadence of one training run."""

    max_tokens: int
    """Token budget; the last step is the first that reaches it."""
    seq_len: int
    """Tokens per sequence."""
    batch_size: int
    """Sequences per optimizer step."""
    eval_every_tokens: int = 0
    """Tokens between held-out evaluations (points of the recovery curve). 0: only at the start and at the end."""
    eval_sequences: int = 32
    """Validation sequences per evaluation."""
    resume_every_tokens: int = field(default=0, metadata=PLACEMENT)
    """Tokens between resume points. 0: a tenth of the budget."""
    resume_points: ResumePointsConfig = field(default_factory=ResumePointsConfig, metadata=PLACEMENT)
    """Which of them stay, and who waits for them."""
    data_end: Literal["refuse", "repeat", "stop"] = "refuse"
    """What to do where the budget is beyond the train split: refuse it before anything runs, repeat the split in
    another order, or stop after one pass."""
    separate_documents: bool = False
    """Keep the documents of a packed sequence apart: positions start anew and no token attends to another document."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "seq_len", "batch_size", "eval_sequences"):
            require(getattr(self, name) > 0, f"{name} must be > 0, got {getattr(self, name)}")
        require(self.seq_len >= 2, f"seq_len must be >= 2 to have a next token, got {self.seq_len}")
        for name in ("eval_every_tokens", "resume_every_tokens"):
            require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")
        require(
            self.max_tokens >= self.tokens_per_step,
            f"max_tokens={self.max_tokens} is less than one step of batch_size x seq_len = {self.tokens_per_step}; "
            "raise max_tokens or lower batch_size",
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.seq_len

    @property
    def num_steps(self) -> int:
        """Optimizer steps that spend the budget."""
        return -(-self.max_tokens // self.tokens_per_step)

    @property
    def spent_tokens(self) -> int:
        """Tokens of these steps: the budget, or what its last step goes beyond it."""
        return self.num_steps * self.tokens_per_step

    @property
    def default_resume_tokens(self) -> int:
        """Tokens between resume points where ``resume_every_tokens`` leaves it open: a tenth of the budget."""
        return -(-self.max_tokens // 10)

    def is_due(self, num_steps: int, every_tokens: int) -> bool:
        """Whether step ``num_steps`` is the first at or beyond a multiple of ``every_tokens``; 0 is never due."""
        tokens = num_steps * self.tokens_per_step
        return every_tokens > 0 and tokens // every_tokens > (tokens - self.tokens_per_step) // every_tokens

    def kept_points(self, steps: Sequence[int]) -> list[int]:
        """Of resume points at optimizer ``steps``, in rising order, those that stay."""
        every_tokens = self.resume_points.every * (self.resume_every_tokens or self.default_resume_tokens)
        newest = steps[-self.resume_points.newest :]
        return [step for step in steps if step in newest or self.is_due(step, every_tokens)]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position settings, in the terms of transformers' rope parameters."""

    theta: float
    """Base frequency."""
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    """Scaling rule."""
    factor: float | None = None
    """Scaling factor of linear, llama3 and yarn."""
    low_freq_factor: float | None = None
    """llama3 only."""
    high_freq_factor: float | None = None
    """llama3 only."""
    original_max_positions: int | None = None
    """llama3 and yarn: positions of the model before scaling, in tokens."""

    def __post_init__(self) -> None:
        require(self.theta > 0, f"rope.theta must be > 0, got {self.theta}")
        if self.kind != "default":
            require(
                self.factor is not None and self.factor >= 1,
                f"rope.kind={self.kind} needs rope.factor >= 1, got {self.factor}",
            )
        if self.kind == "llama3":
            for name in ("low_freq_factor", "high_freq_factor", "original_max_positions"):
                require(getattr(self, name) is not None, f"rope.kind=llama3 needs rope.{name}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out evaluation of models against the parent."""

    seq_len: int
    """Tokens per validation sequence."""
    num_sequences: int
    """Validation sequences."""
    batch_size: int = 8
    """Sequences per forward."""
    lengths: tuple[int, ...] = ()
    """Context lengths in tokens of the retrieval and long-text columns; empty: no such columns."""
    num_needles: int = 32
    """Retrieval questions per length."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks or groups that every model does; needs the package lm-eval."""
    task_dir: str | None = field(default=None, metadata=PLACEMENT)
    """Directory of further lm-eval task files, with the files of their examples."""
    task_limit: int | None = None
    """Examples per task; null: all."""
    num_fewshot: int | None = None
    """Worked examples before each question; null: as the task's file says, or none. Tasks whose file says 0 stay at
    0."""
    task_metrics: dict[str, str] | None = None
    """By task: the metric that stands for it; of all others, and with null of all, the first of their file where more
    is better."""

    def __post_init__(self) -> None:
        stray = [task for task in self.task_metrics or () if task not in self.tasks]
        require(
            not stray,
            f"evaluate.task_metrics names {', '.join(stray)}, not of evaluate.tasks={list(self.tasks)}; add it",
        )
        require(all(length > 1 for length in self.lengths), f"evaluate.lengths must be > 1, got {list(self.lengths)}")
        require(
            len({*self.tasks}) == len(self.tasks), f"evaluate.tasks has one twice: {list(self.tasks)}; name it once"
        )
        limit, num_fewshot = self.task_limit, self.num_fewshot
        require(limit is None or limit > 0, f"evaluate.task_limit must be > 0, got {limit}; null takes all examples")
        require(num_fewshot is None or num_fewshot >= 0, f"evaluate.num_fewshot must be >= 0, got {num_fewshot}")
        for name in ("seq_len", "num_sequences", "batch_size", "num_needles"):
            require(getattr(self, name) > 0, f"evaluate.{name} must be > 0, got {getattr(self, name)}")

    def num_sequences_at(self, length: int) -> int:
        """Sequences of ``length`` tokens that have as many tokens together as the main evaluation."""
        return max(1, self.num_sequences * self.seq_len // length)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides the JSONL file that is always written."""

    wandb: Literal["off", "offline", "online"] = "off"
    """off: JSONL alone; offline: W&B files on disk, no account; online: wandb.ai."""
    project: str = "ffn-fusion"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null: the account's default."""

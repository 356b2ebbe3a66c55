"""Which serving and training engines load a model that is written in the nemotron-nas format, and why not. Torch-free.

One rule per limitation of a reader. The rules state what these versions do, seen by running them or by reading their
loaders: transformers 5.23, vLLM 0.33, SGLang 0.5.23, llama.cpp 0c1e570, MLX-LM 0.32, Megatron-LM with megatron-core
0.16.1 (``--heterogeneous-layers-config-path`` and Megatron-Bridge's weight mapping). An engine outside of its row may
load a model by accident; none of these does so on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from puzzle.model.architecture import Architecture

Target = Literal["transformers", "vllm", "sglang", "llama_cpp", "mlx", "megatron"]
TARGETS: tuple[Target, ...] = get_args(Target)

LLAMA3_VOCAB_SIZE = 128_256


@dataclass(frozen=True, kw_only=True)
class TargetReport:
    """What one engine does with a model."""

    target: Target
    status: Literal["loads", "cannot"]
    reasons: tuple[str, ...]
    """Every limitation that the model runs into; empty where it loads."""
    notes: tuple[str, ...]
    """What to pass or to know when it is loaded."""

    def as_json(self) -> dict[str, Any]:
        """Content of compatibility.json for this engine."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Limitation:
    """Something that readers of the format cannot express, or read wrongly."""

    targets: tuple[Target, ...]
    reason: str
    applies: Callable[[Architecture], bool]


def compatibility(architecture: Architecture) -> list[TargetReport]:
    """One report per engine, in the order of ``TARGETS``."""
    met = [limitation for limitation in LIMITATIONS if limitation.applies(architecture)]
    return [_report(target, architecture, met) for target in TARGETS]


def _report(target: Target, architecture: Architecture, met: list[Limitation]) -> TargetReport:
    reasons = tuple(limitation.reason for limitation in met if target in limitation.targets)
    status: Literal["loads", "cannot"] = "cannot" if reasons else "loads"
    return TargetReport(target=target, status=status, reasons=reasons, notes=_notes(target, architecture))


def _notes(target: Target, architecture: Architecture) -> tuple[str, ...]:
    if target == "llama_cpp":
        is_llama3 = architecture.vocab_size == LLAMA3_VOCAB_SIZE
        return () if is_llama3 else ("the converter takes a vocabulary whose size is not Llama 3's for SentencePiece",)
    if target == "megatron":
        return ("weights come in through Megatron-Bridge's LlamaNemotronBridge, which is deprecated",)
    return () if target == "mlx" else ("the configuration comes with the checkpoint: pass trust_remote_code",)


def _num_kv_head_counts(architecture: Architecture) -> int:
    return len({block.attention.num_kv_heads for block in architecture.blocks if block.attention.kind == "gqa"})


def _ends_in_dummy(architecture: Architecture) -> bool:
    last = architecture.blocks[-1]
    return last.attention.is_no_op and last.ffn.is_no_op


def _has_attention_only_block(architecture: Architecture) -> bool:
    return any(block.ffn.is_no_op and not block.attention.is_no_op for block in architecture.blocks)


def _window_is_felt(architecture: Architecture) -> bool:
    window = architecture.sliding_window
    return window is not None and window < architecture.max_positions


LIMITATIONS: tuple[Limitation, ...] = (
    Limitation(
        targets=("vllm", "sglang", "llama_cpp", "mlx", "megatron"),
        reason="blocks run in parallel windows, which is no part of the format: this reader would chain them",
        applies=lambda model: len(model.parallel_windows) > 0,
    ),
    Limitation(
        targets=("vllm", "sglang", "llama_cpp", "mlx", "megatron"),
        reason="queries and keys are normalised per head, which is no part of the format",
        applies=lambda model: model.qk_norm,
    ),
    # vLLM reads the key qkv_bias; SGLang would expect a bias on the output projection as well.
    Limitation(
        targets=("sglang", "llama_cpp", "mlx", "megatron"),
        reason="query, key and value projections have biases, which are no part of the format",
        applies=lambda model: model.qkv_bias,
    ),
    Limitation(
        targets=("llama_cpp", "mlx", "megatron"),
        reason="head_dim differs from hidden_dim / num_heads, and this reader always divides",
        applies=lambda model: model.head_dim * model.num_heads != model.hidden_dim,
    ),
    # vLLM applies config.sliding_window to every attention of a model without layer_types.
    Limitation(
        targets=("sglang", "llama_cpp", "mlx", "megatron"),
        reason="the sliding window is ignored by this reader: attention would reach back further than in training",
        applies=_window_is_felt,
    ),
    Limitation(
        targets=("llama_cpp",),
        reason="linear and yarn rotary scaling is dropped by the converter; default and llama3 are kept",
        applies=lambda model: model.rope.kind in ("linear", "yarn"),
    ),
    Limitation(
        targets=("megatron",),
        reason="the command line reads rope_scaling.factor and applies llama3 scaling; the model has another rule",
        applies=lambda model: model.rope.kind != "llama3",
    ),
    Limitation(
        targets=("vllm", "sglang", "llama_cpp", "megatron"),
        reason="block 0 has no grouped-query attention, from which this reader takes the residual or the head counts",
        applies=lambda model: model.blocks[0].attention.kind != "gqa",
    ),
    Limitation(
        targets=("sglang", "megatron"),
        reason="blocks have different KV head counts; search with space.kv_heads=[] for this reader",
        applies=lambda model: _num_kv_head_counts(model) > 1,
    ),
    Limitation(
        targets=("vllm", "sglang", "mlx", "megatron"),
        reason="an attention is replaced by a linear layer",
        applies=lambda model: any(block.attention.kind == "linear" for block in model.blocks),
    ),
    Limitation(
        targets=("vllm", "sglang", "llama_cpp", "mlx", "megatron"),
        reason="an FFN is replaced by a linear layer",
        applies=lambda model: any(block.ffn.kind == "linear" for block in model.blocks),
    ),
    Limitation(
        targets=("llama_cpp",),
        reason="a block has attention and no FFN: the attention's output is silently dropped",
        applies=_has_attention_only_block,
    ),
    Limitation(
        targets=("llama_cpp",),
        reason="the last block has neither attention nor FFN",
        applies=_ends_in_dummy,
    ),
)

"""Which serving and training engines load a model that is written in the nemotron-nas format, and why not. Torch-free.

Every engine gets the model in a form of its own, after the exact rewrites of :mod:`puzzle.model.rewrites`; what it
cannot take even then is one rule per limitation. The rules state what these versions do: transformers 5.23, vLLM 0.32,
llama.cpp as in llama-cpp-python 0.3.36, MLX-LM 0.32 and megatron-core 0.16.1, run by ``tests/readers``; SGLang 0.5.23,
read. An engine outside of its row may load a model by accident; none of these does so on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from distill.config import require
from puzzle.model.architecture import Architecture
from puzzle.model.rewrites import kv_head_counts, rewritten
from puzzle.model.targets import NO_FP8, TARGETS, Quantization, Target

Status = Literal["loads", "loads_rewritten", "cannot"]

MEGATRON_LLAMA3 = (1.0, 4.0, 8192)
"""Low and high frequency factor and original positions of llama3 scaling, which Megatron-LM has as constants."""


@dataclass(frozen=True, kw_only=True)
class TargetReport:
    """What one engine does with a model."""

    target: Target
    status: Status
    reasons: tuple[str, ...]
    """Every limitation that the model runs into, as a rewrite cannot help; empty where it loads."""
    rewrites: tuple[str, ...]
    """What is changed for this engine, exactly, and nothing of what the model computes."""
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


def compatibility(architecture: Architecture, quantization: Quantization = "none") -> list[TargetReport]:
    """One report per engine, in the order of ``TARGETS``."""
    return [report(target, architecture, quantization) for target in TARGETS]


def report(target: Target, architecture: Architecture, quantization: Quantization = "none") -> TargetReport:
    """What ``target`` does with ``architecture``, its weights stored as ``quantization`` says."""
    form, done = rewritten(target, architecture)
    reasons = _reasons(target, form)
    if quantization == "fp8_dynamic" and target in NO_FP8:
        reasons = (*reasons, NO_FP8[target])
    status: Status = "cannot" if reasons else "loads_rewritten" if done else "loads"
    rewrites = () if reasons else tuple(what for _, what in done)
    notes = _NOTES[target]
    if quantization == "fp8_dynamic" and not reasons:
        notes = (*notes, _FP8_NOTE, *(_FP8_IN_TRANSFORMERS if target == "transformers" else ()))
    return TargetReport(target=target, status=status, reasons=reasons, rewrites=rewrites, notes=notes)


def costly_rewrites(target: Target, architecture: Architecture) -> dict[str, str]:
    """Name of every rewrite for ``target`` that adds weights or KV cache, with what it does."""
    _, done = rewritten(target, architecture)
    return {rewrite.name: what for rewrite, what in done if rewrite.adds_cost}


def require_loadable(architecture: Architecture, targets: Sequence[Target], *, name: str) -> None:
    """Raise ``ValueError`` where one of ``targets`` cannot load ``architecture``; ``name`` is the configuration key."""
    reports = (report(target, architecture) for target in targets)
    refused = [found for found in reports if found.status == "cannot"]
    reasons = "; ".join(f"{found.target} cannot load this model: {', '.join(found.reasons)}" for found in refused)
    names = ", ".join(found.target for found in refused)
    require(not refused, f"{name}: {reasons}; leave {names} out of {name}")


def _reasons(target: Target, form: Architecture) -> tuple[str, ...]:
    return tuple(
        limitation.reason for limitation in LIMITATIONS if target in limitation.targets and limitation.applies(form)
    )


_REMOTE_CODE = ("the configuration comes with the checkpoint: pass trust_remote_code",)
_NOTES: dict[Target, tuple[str, ...]] = {
    "transformers": _REMOTE_CODE,
    "vllm": _REMOTE_CODE,
    "sglang": _REMOTE_CODE,
    "llama_cpp": ("one GGUF file in the stored data type; llama-quantize makes smaller ones of it",),
    "mlx": ("pass --trust-remote-code: the tokenizer is found by way of the configuration",),
    "megatron": (
        "megatron_layers.json is for --heterogeneous-layers-config-path, megatron_arguments.txt has the flags with it",
    ),
}


_FP8_NOTE = "FP8 matrices with a scale per output channel; their inputs are quantised per token as it runs"
_FP8_IN_TRANSFORMERS = (
    "needs package compressed-tensors; CompressedTensorsConfig(dequantize=True) runs it dequantised",
)


def _window_is_felt(architecture: Architecture) -> bool:
    window = architecture.sliding_window
    return window is not None and window < architecture.max_positions


def _has_foreign_llama3(architecture: Architecture) -> bool:
    rope = architecture.rope
    constants = (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions)
    return rope.kind == "llama3" and constants != MEGATRON_LLAMA3


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
    Limitation(
        targets=("vllm", "sglang", "llama_cpp", "mlx", "megatron"),
        reason="attentions without rotary positions are no part of the format: this reader would rotate them",
        applies=lambda model: not all(block.attention.rope for block in model.blocks),
    ),
    # vLLM reads the key qkv_bias; SGLang would expect a bias on the output projection as well; a GGUF has places.
    Limitation(
        targets=("sglang", "mlx", "megatron"),
        reason="query, key and value projections have biases, which are no part of the format",
        applies=lambda model: model.qkv_bias,
    ),
    Limitation(
        targets=("mlx", "megatron"),
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
        targets=("megatron",),
        reason="Megatron-LM takes llama3 scaling or none; the model has another rule",
        applies=lambda model: model.rope.kind in ("linear", "yarn"),
    ),
    Limitation(
        targets=("megatron",),
        reason="Megatron-LM has low_freq_factor=1, high_freq_factor=4 and 8192 original positions of llama3 scaling as "
        "constants; the model has others",
        applies=_has_foreign_llama3,
    ),
    Limitation(
        targets=("megatron",),
        reason="Megatron-LM takes a whole number for the base frequency of rotary positions; the model's is none",
        applies=lambda model: not float(model.rope.theta).is_integer(),
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
        reason="no block has grouped-query attention, without which llama.cpp makes no context",
        applies=lambda model: not kv_head_counts(model),
    ),
)

"""Exact rewrites of an architecture for engines that cannot take it as it is. Torch-free.

No rewrite changes what a model computes. What it adds is zeros, whose output is zero, and copies of KV heads, each of
which serves some of the queries that the one head served. :mod:`puzzle.model.rewritten_tensors` makes the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import lcm

from puzzle.model.architecture import FFN_DIM_MULTIPLE, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.targets import TARGETS, Target


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """One change, made where one of ``targets`` needs it."""

    name: str
    targets: tuple[Target, ...]
    adds_cost: bool
    """Whether the rewritten model has more weights or a larger KV cache than the one that was searched for."""
    apply: Callable[[Architecture], Architecture]
    """The architecture itself where there is nothing to change."""
    describe: Callable[[Architecture, Architecture], str]
    """Architecture before and after -> what was done."""


def rewritten(target: Target, architecture: Architecture) -> tuple[Architecture, tuple[tuple[Rewrite, str], ...]]:
    """``architecture`` in the form that ``target`` gets, and the rewrites that led there, each with what it did."""
    done: list[tuple[Rewrite, str]] = []
    for rewrite in REWRITES:
        if target in rewrite.targets:
            after = rewrite.apply(architecture)
            if after != architecture:
                done.append((rewrite, rewrite.describe(architecture, after)))
                architecture = after
    return architecture, tuple(done)


def kept_blocks(architecture: Architecture) -> tuple[int, ...]:
    """Blocks that are no dummies; all where there is nothing else. Block i of every form is the i-th of them."""
    real = tuple(index for index, block in enumerate(architecture.blocks) if not block.is_dummy)
    return real or tuple(range(architecture.num_blocks))


def kv_head_counts(architecture: Architecture) -> list[int]:
    """Distinct KV head counts of its attentions, in rising order."""
    counts = {block.attention.num_kv_heads for block in architecture.blocks}
    return sorted(count for count in counts if count is not None)


def _without_dummies(architecture: Architecture) -> Architecture:
    kept = kept_blocks(architecture)
    # A window has no dummies, so both its ends are kept.
    windows = tuple((kept.index(first), kept.index(last)) for first, last in architecture.parallel_windows)
    return replace(architecture, blocks=tuple(architecture.blocks[index] for index in kept), parallel_windows=windows)


def _attention_in_block_0(architecture: Architecture) -> Architecture:
    first = architecture.blocks[0]
    if not first.attention.is_no_op:
        return architecture
    attention = AttentionConfig(num_kv_heads=min(kv_head_counts(architecture), default=1))
    return architecture.with_block(0, replace(first, attention=attention))


def _some_attention(architecture: Architecture) -> Architecture:
    has_any = any(not block.attention.is_no_op for block in architecture.blocks)
    return architecture if has_any else _attention_in_block_0(architecture)


def _ffn_everywhere(architecture: Architecture) -> Architecture:
    zeros = FFNConfig(ffn_dim=FFN_DIM_MULTIPLE)
    blocks = (replace(block, ffn=zeros) if block.ffn.is_no_op else block for block in architecture.blocks)
    return architecture.with_blocks(tuple(blocks))


def _one_kv_head_count(architecture: Architecture) -> Architecture:
    common = lcm(*kv_head_counts(architecture))

    def changed(block: BlockConfig) -> BlockConfig:
        if block.attention.num_kv_heads is None:
            return block
        return replace(block, attention=replace(block.attention, num_kv_heads=common))

    return architecture.with_blocks(tuple(map(changed, architecture.blocks)))


def _changed(before: Architecture, after: Architecture) -> str:
    pairs = zip(before.blocks, after.blocks, strict=True)
    indices = [str(index) for index, (old, new) in enumerate(pairs) if old != new]
    return f"block{'s' * (len(indices) > 1)} {', '.join(indices)}"


def _dropped(before: Architecture, _: Architecture) -> str:
    gone = sorted(set(range(before.num_blocks)) - set(kept_blocks(before)))
    return f"without the {len(gone)} dummy block{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}"


def _repeated(before: Architecture, after: Architecture) -> str:
    counts, (common,) = kv_head_counts(before), kv_head_counts(after)
    return (
        f"KV heads repeated to {common} in every attention (they were {', '.join(map(str, counts))}), with the KV "
        "cache of that many"
    )


REWRITES: tuple[Rewrite, ...] = (
    Rewrite(
        name="drop_dummies",
        targets=TARGETS,
        adds_cost=False,
        apply=_without_dummies,
        describe=_dropped,
    ),
    # vLLM and SGLang start the residual stream at block 0's attention, llama.cpp and Megatron-Bridge take head counts
    # from it.
    Rewrite(
        name="zero_attention",
        targets=("vllm", "sglang", "llama_cpp", "megatron"),
        adds_cost=True,
        apply=_attention_in_block_0,
        describe=lambda before, after: (
            f"block 0 with an attention of zeros and {after.blocks[0].attention.num_kv_heads} KV heads"
        ),
    ),
    # MLX-LM takes the mask from the cache of the first attention.
    Rewrite(
        name="some_attention",
        targets=("mlx",),
        adds_cost=True,
        apply=_some_attention,
        describe=lambda *_: "block 0 with an attention of zeros, the only one of the model",
    ),
    # llama.cpp drops the output of an attention that no FFN follows.
    Rewrite(
        name="zero_ffn",
        targets=("llama_cpp",),
        adds_cost=True,
        apply=_ffn_everywhere,
        describe=lambda before, after: f"{_changed(before, after)} with an FFN of {FFN_DIM_MULTIPLE} zero channels",
    ),
    Rewrite(
        name="one_kv_head_count",
        targets=("sglang", "megatron"),
        adds_cost=True,
        apply=_one_kv_head_count,
        describe=_repeated,
    ),
)

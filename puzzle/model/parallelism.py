"""Which models can be dealt how: heads, widths, vocabulary and blocks against an engine's ranks. Torch-free.

What depends on the processes and on the batch, and the search for settings that suit all, stand in
:mod:`distill.engine.dealing`.
"""

from __future__ import annotations

from distill.config import EngineConfig
from distill.engine.dealing import Refuses
from puzzle.model.architecture import Architecture


def refuses(architecture: Architecture, *, role: str = "model") -> Refuses:
    """What a model has to say of settings that it is to be dealt by, for :func:`distill.engine.layout.check_layout`.

    Args:
        architecture: of the model.
        role: what the model is called in errors: student, teacher.

    Returns:
        Function from settings to the reason why heads, widths, vocabulary or blocks cannot be dealt, or the engine's
        library cannot build the model; None where neither is so.
    """

    def reason(engine: EngineConfig) -> str | None:
        windows = ", ".join(f"{first}-{last}" for first, last in architecture.parallel_windows)
        if engine.name == "megatron" and windows:
            return (
                f"engine.name=megatron runs blocks one after another, and the {role} runs blocks {windows} in parallel"
            )
        for name, why_not in (
            ("sequence_parallel", _sequence_parts),
            ("tensor_parallel", _shards),
            ("pipeline_parallel", _stages),
        ):
            ranks = getattr(engine, name)
            why = why_not(architecture, ranks)
            if why is not None:
                return f"engine.{name}={ranks}: {why} of the {role}"
        return None

    return reason


def _sequence_parts(architecture: Architecture, ranks: int) -> str | None:
    """Parts of a sequence on ``ranks``, which hold some of the heads each within attention; KV heads are repeated."""
    if ranks == 1 or not any(block.attention.kind == "gqa" for block in architecture.blocks):
        return None
    if architecture.sliding_window is not None:
        return (
            f"attention to whole sequences, unlike the {architecture.sliding_window} tokens that attention looks back"
        )
    if architecture.num_heads % ranks:
        return f"it does not divide the {architecture.num_heads} attention heads"
    return None


def _shards(architecture: Architecture, ranks: int) -> str | None:
    """Every matrix over ``ranks``, by heads, by FFN channels, by rows of the vocabulary or of a linear replacement."""
    # megatron-core asks for it whether a block has heads or not.
    if architecture.num_heads % ranks:
        return f"it does not divide the {architecture.num_heads} attention heads"
    if architecture.vocab_size % ranks:
        return f"it does not divide the vocabulary of {architecture.vocab_size} rows"
    for index, block in enumerate(architecture.blocks):
        heads, width = block.attention.num_kv_heads, block.ffn.ffn_dim
        if "linear" in (block.attention.kind, block.ffn.kind) and architecture.hidden_dim % ranks:
            return f"it does not divide the {architecture.hidden_dim} rows of the linear replacement in block {index}"
        # megatron-core repeats KV heads where there are fewer than ranks.
        if heads is not None and heads % ranks and ranks % heads:
            return f"the {heads} KV heads of block {index} are neither a multiple nor a divisor of it"
        if width is not None and width % ranks:
            return f"it does not divide the {width} channels of the FFN in block {index}"
    return None


def num_real_blocks(architecture: Architecture) -> int:
    """Blocks that compute something: a block without attention and FFN is none."""
    return sum(not block.is_dummy for block in architecture.blocks)


def _stages(architecture: Architecture, ranks: int) -> str | None:
    """The blocks in ``ranks`` stages, each with one that computes something."""
    real = num_real_blocks(architecture)
    return None if ranks <= max(1, real) else f"more stages than the {real} blocks with attention or FFN"

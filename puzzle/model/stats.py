"""Parameters, FLOPs and bytes of an architecture, by arithmetic alone. Torch-free."""

from __future__ import annotations

from math import prod

from puzzle.model.architecture import Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.tensor_layout import Shapes, attention_shapes, ffn_shapes, other_shapes


def _num_values(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())


def attention_params(architecture: Architecture, attention: AttentionConfig) -> int:
    """Parameters of one attention, its norm included."""
    return _num_values(attention_shapes(architecture, attention))


def ffn_params(architecture: Architecture, ffn: FFNConfig) -> int:
    """Parameters of one FFN, its norm included."""
    return _num_values(ffn_shapes(architecture, ffn))


def block_params(architecture: Architecture, block: BlockConfig) -> int:
    """Parameters of one block."""
    return attention_params(architecture, block.attention) + ffn_params(architecture, block.ffn)


def other_params(architecture: Architecture) -> int:
    """Parameters outside of the blocks: embedding, final norm and head; a tied head is the embedding, counted once."""
    return _num_values(other_shapes(architecture))


def num_params(architecture: Architecture) -> int:
    """Parameters of the whole model."""
    return other_params(architecture) + sum(block_params(architecture, block) for block in architecture.blocks)


def weight_bytes(architecture: Architecture, bytes_per_value: int) -> int:
    """Bytes of the weights at ``bytes_per_value``."""
    return num_params(architecture) * bytes_per_value


def attention_kv_bytes_per_token(architecture: Architecture, attention: AttentionConfig, bytes_per_value: int) -> int:
    """Bytes that one attention adds to the KV cache per token: a key and a value of every KV head."""
    return 2 * (attention.num_kv_heads or 0) * architecture.head_dim * bytes_per_value


def kv_bytes_per_token(architecture: Architecture, bytes_per_value: int) -> int:
    """Bytes that the whole model adds to the KV cache per token (within the sliding window, if there is one)."""
    attentions = (block.attention for block in architecture.blocks)
    return sum(attention_kv_bytes_per_token(architecture, attention, bytes_per_value) for attention in attentions)


def attention_flops_per_token(architecture: Architecture, attention: AttentionConfig, context_tokens: int) -> int:
    """Forward FLOPs of one attention for one token that attends to ``context_tokens`` tokens, itself included."""
    projections = 2 * _num_matrix_values(attention_shapes(architecture, attention))
    if attention.num_kv_heads is None:
        return projections
    attended = min(context_tokens, architecture.sliding_window or context_tokens)
    # Two FLOPs per multiply-add, in the scores and again in the weighted sum of the values.
    return projections + 4 * architecture.num_heads * architecture.head_dim * attended


def ffn_flops_per_token(architecture: Architecture, ffn: FFNConfig) -> int:
    """Forward FLOPs of one FFN for one token."""
    return 2 * _num_matrix_values(ffn_shapes(architecture, ffn))


def _num_matrix_values(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values() if len(shape) == 2)


def flops_per_token(architecture: Architecture, context_tokens: int) -> int:
    """Forward FLOPs of the whole model for one token that attends to ``context_tokens`` tokens, itself included.

    Matrix products alone, two FLOPs per multiply-add: norms, activations and the embedding lookup are left out, the
    head is in. A training step costs three times as much.
    """
    flops = 2 * architecture.vocab_size * architecture.hidden_dim
    for block in architecture.blocks:
        flops += attention_flops_per_token(architecture, block.attention, context_tokens)
        flops += ffn_flops_per_token(architecture, block.ffn)
    return flops


def sequence_flops(architecture: Architecture, seq_len: int, *, head: bool = True) -> int:
    """Forward FLOPs of one sequence of ``seq_len`` tokens: the sum of :func:`flops_per_token` over its positions.

    With ``head`` False, of the blocks alone.
    """
    # They grow linearly with the position, up to the sliding window.
    window = min(seq_len, architecture.sliding_window or seq_len)
    first, last = flops_per_token(architecture, 1), flops_per_token(architecture, window)
    flops = (first + last) * window // 2 + last * (seq_len - window)
    return flops if head else flops - 2 * architecture.vocab_size * architecture.hidden_dim * seq_len

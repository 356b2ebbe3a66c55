"""Names and shapes of the tensors of a checkpoint, from the architecture alone. Torch-free.

Names are Llama's, with ``self_attn.linear_attn`` and ``mlp.linear_mlp`` for linear replacements. A subblock's norm
belongs to the subblock: a no-op has neither. Matrices are stored [out, in].
"""

from __future__ import annotations

from puzzle.model.architecture import Architecture, AttentionConfig, BlockConfig, FFNConfig

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def block_prefix(index: int) -> str:
    """What precedes the names of block ``index`` in a checkpoint."""
    return f"model.layers.{index}."


def attention_shapes(architecture: Architecture, attention: AttentionConfig) -> Shapes:
    """Tensors of one attention with its norm, named relative to the block."""
    a = architecture
    if attention.is_no_op:
        return {}
    norm: Shapes = {"input_layernorm.weight": (a.hidden_dim,)}
    if attention.num_kv_heads is None:
        return norm | {"self_attn.linear_attn.weight": (a.hidden_dim, a.hidden_dim)}
    query_dim, kv_dim = a.num_heads * a.head_dim, attention.num_kv_heads * a.head_dim
    shapes = norm | {
        "self_attn.q_proj.weight": (query_dim, a.hidden_dim),
        "self_attn.k_proj.weight": (kv_dim, a.hidden_dim),
        "self_attn.v_proj.weight": (kv_dim, a.hidden_dim),
        "self_attn.o_proj.weight": (a.hidden_dim, query_dim),
    }
    if a.qkv_bias:
        biases = {"q_proj": query_dim, "k_proj": kv_dim, "v_proj": kv_dim}
        shapes |= {f"self_attn.{name}.bias": (dim,) for name, dim in biases.items()}
    if a.qk_norm:
        shapes |= {f"self_attn.{name}.weight": (a.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


def ffn_shapes(architecture: Architecture, ffn: FFNConfig) -> Shapes:
    """Tensors of one FFN with its norm, named relative to the block."""
    hidden = architecture.hidden_dim
    if ffn.is_no_op:
        return {}
    norm: Shapes = {"post_attention_layernorm.weight": (hidden,)}
    if ffn.ffn_dim is None:
        return norm | {"mlp.linear_mlp.weight": (hidden, hidden)}
    return norm | {
        "mlp.gate_proj.weight": (ffn.ffn_dim, hidden),
        "mlp.up_proj.weight": (ffn.ffn_dim, hidden),
        "mlp.down_proj.weight": (hidden, ffn.ffn_dim),
    }


def block_shapes(architecture: Architecture, block: BlockConfig) -> Shapes:
    """Tensors of one block, named relative to it."""
    return attention_shapes(architecture, block.attention) | ffn_shapes(architecture, block.ffn)


def other_shapes(architecture: Architecture) -> Shapes:
    """Tensors outside of the blocks; a tied head is not stored."""
    a = architecture
    shapes: Shapes = {EMBEDDING: (a.vocab_size, a.hidden_dim), FINAL_NORM: (a.hidden_dim,)}
    return shapes if a.tie_embeddings else shapes | {HEAD: (a.vocab_size, a.hidden_dim)}


def tensor_shapes(architecture: Architecture) -> Shapes:
    """Every tensor of the checkpoint of ``architecture``."""
    shapes = other_shapes(architecture)
    for index, block in enumerate(architecture.blocks):
        shapes |= {block_prefix(index) + name: shape for name, shape in block_shapes(architecture, block).items()}
    return shapes

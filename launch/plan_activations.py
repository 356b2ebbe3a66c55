"""Bytes that one block keeps for its backward pass, and needs within it, operator by operator. Torch-free.

What is counted are the tensors that autograd saves of ``puzzle/model/modeling_decilm.py`` as it stands (DeciLMRMSNorm,
DeciLMAttention, DeciLMMLP). T tokens of a micro-batch on one rank, hidden H, queries Q = heads x head_dim, keys and
values K = KV heads x head_dim each, FFN width W; r bytes per value of the residual stream, c of matrix products:

======================  ===================================  ========================================================
norm and its products   r = c = 4                            12 TH: input, normalised, output, which its products share
                        r = 4, c = 2 (autocast)              8 TH, and a bf16 copy of the output per product
                        r = c = 2                            8 TH: the fp32 copy, what is scaled, the output
                        compiled                             r TH: the input; the rest is computed again
attention               all                                  c T (2 Q + 2 K) and 4 bytes per head: q, k, v, output, sums
FFN                     eager                                4 c TW: gate, silu, up, product
                        compiled                             2 c TW: gate, up
======================  ===================================  ========================================================

A norm keeps 4 bytes per token besides, its inverse root mean square. Norms and FFNs that run in tiles keep their input,
and one tile at a time is computed again; attention's products keep the output of its norm.

Within the backward pass come two more of an FFN's activations, and of attention what the flash kernel needs: gradients
of output, queries, keys and values, those of keys and values once more for all query heads, and fp32 sums for queries.
Without a flash kernel (fp32 on a GPU) the probabilities [heads, T, seq] exist.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle.model.architecture import Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.stats import attention_params, ffn_params


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Data types of a step and how blocks run."""

    residual: int
    """Bytes per value of the residual stream (r)."""
    product: int
    """Bytes per value that matrix products read and give (c)."""
    compiled: bool = False
    """Blocks go through torch.compile."""
    flash: bool = True
    """Attention runs in a flash kernel. On a GPU there is none for fp32 with grouped queries."""

    @property
    def is_autocast(self) -> bool:
        """fp32 weights and residual stream, products in bf16."""
        return self.residual != self.product

    def norm_bytes(self, hidden: int, num_products: int, *, tiled: bool = False) -> int:
        """Per token, kept of a norm over ``hidden`` channels and of what ``num_products`` products read of it."""
        if tiled:
            return hidden * (self.residual + (self.product * num_products if self.is_autocast else self.product))
        per_channel = 12 if self.residual == 4 else 8
        if self.compiled:
            per_channel = self.residual
        elif self.is_autocast:
            per_channel = 8 + self.product * num_products
        return per_channel * hidden + 4


@dataclass(frozen=True, kw_only=True)
class Part:
    """One attention or FFN of a block, in bytes."""

    saved: float
    """From its forward to its backward pass."""
    backward: float
    """Within its backward pass, beside what is saved."""
    num_params: int
    largest_matrix: int
    """Values of the largest weight, whose gradient is made beside the others."""
    block_input: float = 0.0
    """Of ``saved``, what is the input of the block itself."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a block works on."""

    tokens: int
    """Of a micro-batch on one rank (T)."""
    seq_len: int
    """Of whole sequences, also where ranks share them."""
    tile_tokens: int = 0
    """``engine.ffn_tile_tokens``; 0: no tiles."""
    widest: int = 1
    """Channels of the model's widest FFN, which takes tile_tokens at once (``distill.memory.tile_ffns``)."""

    def tile(self, width: int) -> int:
        """Tokens at once of an FFN or norm of ``width`` channels; all of them: it does not run in tiles."""
        return min(self.tokens, max(1, self.tile_tokens * self.widest // width)) if self.tile_tokens else self.tokens


def attention_part(
    architecture: Architecture, attention: AttentionConfig, shape: Shape, numerics: Numerics
) -> Part | None:
    """The attention of a block; None: it has none."""
    if attention.is_no_op:
        return None
    a, tokens, c = architecture, shape.tokens, numerics.product
    params, hidden = attention_params(a, attention), a.hidden_dim
    tiled = shape.tile(hidden) < tokens
    # A norm in bf16 keeps a copy of its input in fp32, unless it runs in tiles or is compiled.
    copies_input = numerics.residual == 2 and not tiled and not numerics.compiled
    block_input = 0.0 if copies_input else float(numerics.residual * tokens * hidden)
    if attention.num_kv_heads is None:
        return Part(
            saved=numerics.norm_bytes(hidden, 1, tiled=tiled) * tokens,
            backward=c * tokens * hidden,
            num_params=params,
            largest_matrix=hidden**2,
            block_input=block_input,
        )
    q, k = a.num_heads * a.head_dim, attention.num_kv_heads * a.head_dim
    norm = numerics.norm_bytes(hidden, 3, tiled=tiled) * tokens
    saved = norm + c * tokens * (2 * q + 2 * k) + 4 * tokens * a.num_heads
    if a.qk_norm:
        saved += (8 if numerics.residual == 4 and not numerics.is_autocast else 6) * tokens * (q + k)
    # dO, dQ, dK, dV; dK and dV for all query heads; sums for dQ in fp32.
    backward = c * tokens * (2 * q + 2 * k) + (2 * c * tokens * q if k < q else 0) + 4 * tokens * q
    if not numerics.flash:
        probabilities = 4 * tokens * shape.seq_len * a.num_heads
        saved, backward = saved + probabilities, backward + 2 * probabilities
    return Part(saved=saved, backward=backward, num_params=params, largest_matrix=q * hidden, block_input=block_input)


def ffn_part(architecture: Architecture, ffn: FFNConfig, shape: Shape, numerics: Numerics) -> Part | None:
    """The FFN of a block; None: it has none."""
    if ffn.is_no_op:
        return None
    tokens, hidden, c = shape.tokens, architecture.hidden_dim, numerics.product
    params = ffn_params(architecture, ffn)
    if ffn.ffn_dim is None:
        norm = numerics.norm_bytes(hidden, 1, tiled=shape.tile(hidden) < tokens) * tokens
        return Part(saved=norm, backward=c * tokens * hidden, num_params=params, largest_matrix=hidden**2)
    width = ffn.ffn_dim
    inner = (2 if numerics.compiled else 4) * c * width
    extra = (4 if numerics.compiled else 2) * c * width
    norm = numerics.norm_bytes(hidden, 2)
    tile = shape.tile(width)
    if tile < tokens:
        # Gradients of the weights are summed over the tiles in fp32 (distill.tile_weights).
        kept = 2 * numerics.residual * tokens * hidden
        return Part(
            saved=kept,
            backward=tile * (inner + extra + norm) + 4 * params,
            num_params=params,
            largest_matrix=width * hidden,
        )
    saved = tokens * (norm + inner)
    return Part(saved=saved, backward=tokens * extra, num_params=params, largest_matrix=width * hidden)


def block_parts(
    architecture: Architecture, block: BlockConfig, shape: Shape, numerics: Numerics
) -> tuple[Part | None, Part | None]:
    """Attention and FFN of ``block``."""
    return (
        attention_part(architecture, block.attention, shape, numerics),
        ffn_part(architecture, block.ffn, shape, numerics),
    )


def widest_ffn(architecture: Architecture) -> int:
    """Channels of the widest FFN, at least the hidden width: what tiles go by."""
    return max(architecture.hidden_dim, *(block.ffn.ffn_dim or 0 for block in architecture.blocks))


def forward_bytes(architecture: Architecture, shape: Shape, numerics: Numerics) -> float:
    """Most that one block of a model without gradient needs while it runs (``distill.teacher.Teacher``)."""
    c, tokens, hidden = numerics.product, shape.tokens, architecture.hidden_dim
    widest = 0
    for block in architecture.blocks:
        attends = block.attention.num_kv_heads
        heads = 0 if attends is None else (2 * architecture.num_heads + 2 * attends) * architecture.head_dim
        widest = max(widest, 3 * (block.ffn.ffn_dim or 0), heads)
    # Residual stream before and after, the norm's fp32 copies and its output.
    return tokens * (c * widest + hidden * (3 * c + 8))

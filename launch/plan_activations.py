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

    def norm_bytes(self, hidden: int, *, tiled: bool = False) -> int:
        """Per token, kept of a norm over ``hidden`` channels beside its output."""
        if tiled:
            return self.residual * hidden
        if self.compiled:
            return self.residual * hidden + 4
        return {4: 8, 2: 6}[self.residual] * hidden + 4

    def product_input_bytes(self, hidden: int, num_products: int) -> int:
        """Per token, kept of a norm's output by the ``num_products`` products that read it."""
        if self.compiled:
            return 0
        return hidden * (self.product * num_products if self.is_autocast else self.residual)

    def keeps_norm_input(self, *, tiled: bool) -> bool:
        """Whether a norm keeps its input itself: in bf16 it is a copy in fp32."""
        return tiled or self.compiled or self.residual == 4


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
    norm_input: float = 0.0
    """Of ``saved``, the input of the norm: where a block begins with this part, the block's."""


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
    if attention.num_kv_heads is None:
        return _linear_part(params, hidden, shape, numerics)
    norm, norm_input = _norm(hidden, shape, numerics)
    q, k = a.num_heads * a.head_dim, attention.num_kv_heads * a.head_dim
    norm += numerics.product_input_bytes(hidden, 3) * tokens
    saved = norm + c * tokens * (2 * q + 2 * k) + 4 * tokens * a.num_heads
    if a.qk_norm:
        saved += (8 if numerics.residual == 4 and not numerics.is_autocast else 6) * tokens * (q + k)
    # dO, dQ, dK, dV; dK and dV for all query heads; sums for dQ in fp32.
    backward = c * tokens * (2 * q + 2 * k) + (2 * c * tokens * q if k < q else 0) + 4 * tokens * q
    if not numerics.flash:
        probabilities = 4 * tokens * shape.seq_len * a.num_heads
        saved, backward = saved + probabilities, backward + 2 * probabilities
    return Part(saved=saved, backward=backward, num_params=params, largest_matrix=q * hidden, norm_input=norm_input)


def _linear_part(num_params: int, hidden: int, shape: Shape, numerics: Numerics) -> Part:
    """One matrix in the place of an attention or FFN: it keeps its input alone."""
    norm, norm_input = _norm(hidden, shape, numerics)
    return Part(
        saved=norm + numerics.product_input_bytes(hidden, 1) * shape.tokens,
        backward=numerics.product * shape.tokens * hidden,
        num_params=num_params,
        largest_matrix=hidden**2,
        norm_input=norm_input,
    )


def _norm(hidden: int, shape: Shape, numerics: Numerics) -> tuple[float, float]:
    """What a norm keeps beside its output, and of it the norm's own input."""
    tiled = shape.tile(hidden) < shape.tokens
    kept = numerics.norm_bytes(hidden, tiled=tiled) * shape.tokens
    own_input = numerics.residual * shape.tokens * hidden if numerics.keeps_norm_input(tiled=tiled) else 0
    return float(kept), float(own_input)


def ffn_part(architecture: Architecture, ffn: FFNConfig, shape: Shape, numerics: Numerics) -> Part | None:
    """The FFN of a block; None: it has none."""
    if ffn.is_no_op:
        return None
    tokens, hidden, c = shape.tokens, architecture.hidden_dim, numerics.product
    params = ffn_params(architecture, ffn)
    if ffn.ffn_dim is None:
        return _linear_part(params, hidden, shape, numerics)
    norm, norm_input = _norm(hidden, shape, numerics)
    width = ffn.ffn_dim
    inner = (2 if numerics.compiled else 4) * c * width + numerics.product_input_bytes(hidden, 2)
    extra = (4 if numerics.compiled else 2) * c * width
    tile = shape.tile(max(width, hidden))
    if tile < tokens:
        # Tiles of FFN and norm start from whole tensors: the norm's output is kept as it is. Gradients of the weights
        # are summed over the tiles in fp32 (distill.tile_weights).
        saved = norm + numerics.residual * tokens * hidden
        backward = tile * (inner + extra + numerics.norm_bytes(hidden)) + 4 * params
    else:
        saved, backward = norm + tokens * inner, tokens * extra
    return Part(saved=saved, backward=backward, num_params=params, largest_matrix=width * hidden, norm_input=norm_input)


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

"""Sequences that several ranks share: Ulysses (arXiv 2309.14509), layer by layer.

Outside of attention every rank has a part of each sequence; in attention it has the whole sequence and a part of the
heads. One all-to-all before and one after changes between the two. The numbers of heads are read off each layer's
tensors: layers may differ in KV heads, and layers without attention need nothing. Weights are whole on every rank, so
each rank's gradient is that of its own tokens and the sum over the ranks is the gradient of the sequence.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill.config import require
from distill.flex_attention import attend

ULYSSES = "ulysses"
"""Name of the attention implementation in transformers."""

_group: ProcessGroup | None = None


def use_ulysses(model: nn.Module, group: ProcessGroup) -> None:
    """Have ``model`` expect the own part of every sequence (:meth:`distill.data.batch.Batch.sequence_part`).

    Rank r of ``group`` passes part r; ``position_ids`` are those of the whole sequence and must be passed too. An
    attention mask is that of the whole sequence, and the same on all ranks; None: causal. One group serves all models
    of a process: it is what was last given here.

    Args:
        model: causal LM with the Hugging Face surface, whose attention goes through ``ALL_ATTENTION_FUNCTIONS``.
        group: the ranks that share sequences.

    Raises:
        ValueError: the attention heads cannot be dealt evenly, or attention is over a sliding window.
    """
    global _group
    heads, size = model.config.num_attention_heads, group.size()
    fits = max(n for n in range(1, size + 1) if heads % n == 0)
    require(
        heads % size == 0,
        f"engine.sequence_parallel={size} does not divide the {heads} attention heads; the nearest that does is {fits}",
    )
    window = getattr(model.config, "sliding_window", None)
    require(
        window is None,
        f"engine.sequence_parallel={size} is for attention to the whole sequence, and this model's looks back "
        f"{window} tokens; set engine.sequence_parallel=1",
    )
    _group = group
    ALL_ATTENTION_FUNCTIONS.register(ULYSSES, ulysses_attention)
    model.config._attn_implementation = ULYSSES


def whole_sequence(part: Tensor) -> Tensor:
    """``part [batch, seq / ranks]`` of every rank of the group, side by side: [batch, seq]. Without gradient.

    For what a mask is made from, such as position ids.
    """
    assert _group is not None, "use_ulysses comes first"
    parts = [torch.empty_like(part) for _ in range(_group.size())]
    distributed.all_gather(parts, part.contiguous(), group=_group)
    return torch.cat(parts, dim=1)


# Not what it calls: FlexAttention has to be compiled, or it would build [seq, seq].
@torch.compiler.disable(recursive=False)
def ulysses_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention of the whole sequence for this rank's part of it, as transformers calls it.

    Args:
        module: the attention layer.
        query: [batch, heads, part, head_dim], rotated.
        key: [batch, kv_heads, part, head_dim], rotated. Any number of KV heads that divides ``heads``: where the ranks
            do not divide it, each KV head is repeated as often as it takes.
        value: as ``key``. All three travel and attend in its data type: under autocast the rotated ones are fp32.
        attention_mask: of the whole sequence: None (causal), a tensor [batch or 1, 1, seq, seq] or a BlockMask.
        options: ``scaling`` and ``dropout``.

    Returns:
        Output [batch, part, heads, head_dim], and None in place of the attention weights.
    """
    assert _group is not None, "use_ulysses comes first"
    size = _group.size()
    query, key = query.to(value.dtype), key.to(value.dtype)
    repeats = size // gcd(size, key.shape[1])
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    heads = [tensor.shape[1] // size for tensor in (query, key, value)]
    query, key, value = _to_heads((query, key, value), _group).split(heads, dim=1)
    output = _attend(query, key, value, attention_mask, **options)
    return _to_parts(output, _group), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> Tensor:
    """Attention of some heads: [batch, heads, seq, head_dim] -> [batch, seq, heads, head_dim]."""
    if isinstance(attention_mask, BlockMask):
        return attend(query, key, value, attention_mask, scaling=scaling, dropout=dropout)
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=attention_mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


@torch.compiler.disable
def _to_heads(tensors: tuple[Tensor, ...], group: ProcessGroup) -> Tensor:
    """Tensors [batch, heads_i, part, dim] of this part -> [batch, sum of heads_i / ranks, seq, dim] of these heads."""
    size = group.size()
    # [ranks, batch, heads of that rank, part, dim]: one message for all tensors.
    dealt = torch.cat([tensor.unflatten(1, (size, -1)) for tensor in tensors], dim=2).transpose(0, 1)
    parts = _Exchange.apply(dealt, group)
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


@torch.compiler.disable
def _to_parts(output: Tensor, group: ProcessGroup) -> Tensor:
    """[batch, seq, heads / ranks, dim] of these heads -> [batch, part, heads, dim] of this part."""
    dealt = output.unflatten(1, (group.size(), -1)).transpose(0, 1)
    heads = _Exchange.apply(dealt, group)
    return heads.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """All-to-all: entry j of [ranks, ...] goes to rank j, and entry i of the result came from rank i."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        distributed.all_to_all_single(received, tensor.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad_outputs[0], ctx.group), None

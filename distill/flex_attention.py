"""FlexAttention where a token may not see all before it: the mask in blocks, and one compiled kernel per shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from distill.config import require
from distill.engine.base import expect_shapes

MASK_BLOCK = 128
"""Tokens on each side of a block of the mask: FlexAttention's default."""

# A shape that was not seen before is compiled. Without a graph of the whole function a call beyond torch's limit of
# shapes would run without compiling, and build [heads, seq, seq]; with it such a call is an error.
_compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
_seen = set[tuple[object, ...]]()


def block_mask(first_keys: Tensor) -> BlockMask:
    """Block mask in which query q of sequence b sees the keys from ``first_keys[b, q]`` to q.

    It takes four int32 [seq / 128, seq / 128] per sequence, and to make it takes no more at any time: 16.8 MB at
    131,072 tokens, 1.07 GB at 1,048,576. Nothing is read back from the device.

    Args:
        first_keys: int64 [batch, seq], at most q, never falling from a query to the next: what a query block sees are
            runs of key blocks, and what sees a key block are runs of query blocks.
    """
    seq = first_keys.shape[1]
    num_blocks = -(-seq // MASK_BLOCK)
    blocks = torch.arange(num_blocks, device=first_keys.device, dtype=torch.int32)
    first_queries = torch.arange(0, seq, MASK_BLOCK, device=first_keys.device)
    last_queries = (first_queries + MASK_BLOCK - 1).clamp(max=seq - 1)
    # The first query of a block sees the most behind, the last the least: key blocks that some query sees, and that
    # all see, up to the block on the diagonal, of which no query but the last sees all.
    first_seen = (first_keys[:, first_queries] // MASK_BLOCK).int()
    first_full = (-(-first_keys[:, last_queries] // MASK_BLOCK)).int().minimum(blocks)
    # The same, from the key block: the last query block of which some query sees it, and of which all do.
    by_key = blocks.expand(len(first_keys), -1).contiguous()
    last_seen = torch.searchsorted(first_seen, by_key, right=True, out_int32=True) - 1
    last_full = (torch.searchsorted(first_full, by_key, right=True, out_int32=True) - 1).maximum(blocks)

    partial_keys = _runs(first_seen, num_blocks)
    num_before = first_full - first_seen
    partial_keys.scatter_(-1, num_before[..., None].long(), blocks.expand(len(first_keys), -1)[..., None])
    partial_queries = _runs(last_full, num_blocks)
    partial_queries[..., 0] = blocks

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_keys[b, query])

    return BlockMask(
        seq_lengths=(seq, seq),
        kv_num_blocks=(num_before + 1)[:, None],
        kv_indices=partial_keys[:, None],
        full_kv_num_blocks=(blocks - first_full)[:, None],
        full_kv_indices=_runs(first_full, num_blocks)[:, None],
        q_num_blocks=(last_seen - last_full + 1)[:, None],
        q_indices=partial_queries[:, None],
        full_q_num_blocks=(last_full - blocks)[:, None],
        full_q_indices=_runs((blocks + 1).expand(len(first_keys), -1), num_blocks)[:, None],
        BLOCK_SIZE=(MASK_BLOCK, MASK_BLOCK),
        mask_mod=sees,
    )


def _runs(first: Tensor, length: int) -> Tensor:
    """Consecutive numbers from ``first`` [batch, rows], int32 [batch, rows, length], none beyond ``length - 1``."""
    return (first[..., None] + torch.arange(length, device=first.device, dtype=torch.int32)).clamp_(max=length - 1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention under ``mask``. Within a compiled function it is a part of that one, else compiled for each shape.

    Args:
        query: [batch, heads, seq, head_dim].
        key: [batch, kv_heads, seq, head_dim].
        value: as ``key``.
        mask: from :func:`block_mask`.
        scaling: factor of the scores; None: head_dim ** -0.5.
        dropout: of the attention weights; FlexAttention has none.

    Returns:
        Output [batch, seq, heads, head_dim].

    Raises:
        ValueError: dropout is asked for.
        torch._dynamo.exc.FailOnRecompileLimitHit: torch refuses to compile for one more shape.
    """
    require(
        dropout == 0,
        f"separate_documents=true: FlexAttention, which keeps them apart, has no dropout, and the model's "
        f"attention_dropout is {dropout}; set it to 0 in its config.json",
    )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads & (heads - 1):
        # As in transformers: kernels that share KV heads are for powers of two.
        key, value = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (key, value))
    run = flex_attention
    if not torch.compiler.is_compiling():
        _expect(query, key, value)
        run = _compiled
    output = run(query, key, value, block_mask=mask, scale=scaling, enable_gqa=heads != key.shape[1])
    return output.transpose(1, 2)


def _expect(*tensors: Tensor) -> None:
    """Make room for another compiled kernel where ``tensors`` have another shape than any before."""
    shapes = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]
    _seen.add((torch.is_grad_enabled(), *shapes))
    # More than that, for what torch tells apart besides: autocast, deterministic algorithms.
    expect_shapes(8 + 2 * len(_seen))

"""What a causal LM's forward pass is given for a batch: positions, and who may attend to whom.

Where documents are not kept apart, attention is causal and needs no mask, so that flash kernels run. Where they are:

- on the CPU, and on a GPU up to ``MAX_DENSE_MASK_TOKENS`` tokens of sequence, a dense mask for SDPA (or eager);
- on a GPU beyond that, FlexAttention with a block mask that is computed from where documents begin: nothing of
  [seq, seq] is ever built, and blocks between two documents cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill.config import require
from distill.data.batch import Batch
from distill.sequence_parallel import ULYSSES, whole_sequence

MAX_DENSE_MASK_TOKENS = 1024
"""Longest sequence on a GPU whose mask is dense: below it FlexAttention's compilation costs more than it saves."""

MASK_BLOCK = 128
"""Tokens on each side of a block of the mask: FlexAttention's default."""

SDPA_OR_FLEX = "sdpa_or_flex"
"""Attention implementation: SDPA, and FlexAttention where the mask is a block mask."""


def forward_inputs(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of ``model.model`` for ``batch``, besides ``input_ids``.

    Reads nothing back from the device. Where a long mask is needed on a GPU, a model whose attention is SDPA is
    switched to ``SDPA_OR_FLEX`` for good, which is SDPA as before wherever there is no block mask.

    Args:
        batch: on the model's device; under sequence parallelism the rank's part of each sequence. Its positions then
            make one all-gather where documents are kept apart: all ranks of the sequence group have to call this.
        model: causal LM with the Hugging Face surface.

    Raises:
        ValueError: documents are kept apart and the model's attention implementation takes no mask.
    """
    config = model.config
    in_parts = config._attn_implementation == ULYSSES
    if not batch.separate_documents:
        # transformers would look for packed documents in the positions, and wait for the device to see whether there
        # are any. Left out, they are 0, 1, ...; for attention in parts of sequences it makes no mask.
        return {"position_ids": batch.position_ids if in_parts else None, "attention_mask": None}
    mask = document_mask(
        whole_sequence(batch.position_ids) if in_parts else batch.position_ids,
        sliding_window=getattr(config, "sliding_window", None),
        flex=config._attn_implementation == "flex_attention",
    )
    if isinstance(mask, BlockMask) and config._attn_implementation == "sdpa":
        config._attn_implementation = SDPA_OR_FLEX
    if config._attn_implementation == "eager":
        mask = additive(mask, next(model.parameters()).dtype)
    else:
        require(
            config._attn_implementation in ("sdpa", "flex_attention", SDPA_OR_FLEX, ULYSSES),
            f"separate_documents=true needs a mask, which attention implementation {config._attn_implementation} does "
            "not take; load the model with attn_implementation=sdpa, or set separate_documents=false",
        )
    return {"position_ids": batch.position_ids, "attention_mask": mask}


def document_mask(position_ids: Tensor, *, sliding_window: int | None = None, flex: bool = False) -> Tensor | BlockMask:
    """Causal mask of whole sequences within documents.

    Args:
        position_ids: int64 [batch, seq], 0 where a document begins and consecutive in it.
        sliding_window: tokens that a token sees, itself included; None: all before it.
        flex: a block mask in any case.

    Returns:
        A dense mask, bool [batch, 1, seq, seq], True where a query (third axis) may see a key; or the same as a block
        mask, on a GPU beyond ``MAX_DENSE_MASK_TOKENS`` tokens.
    """
    seq = position_ids.shape[1]
    visible = position_ids if sliding_window is None else position_ids.clamp(max=sliding_window - 1)
    first_keys = torch.arange(seq, device=position_ids.device) - visible
    if flex or (position_ids.is_cuda and seq > MAX_DENSE_MASK_TOKENS):
        return _block_mask(first_keys)
    keys = torch.arange(seq, device=position_ids.device)
    return ((keys >= first_keys[..., None]) & (keys <= keys[:, None]))[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean mask as what is added to attention scores: 0 where it is True, the lowest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _block_mask(first_keys: Tensor) -> BlockMask:
    """Block mask in which query q of sequence b sees the keys from ``first_keys[b, q]`` [batch, seq] to q.

    The first visible key never falls from a query to the next, so the first and the last query of a block of queries
    say which blocks of keys are seen by some of them, and which by all.
    """
    seq = first_keys.shape[1]
    num_blocks = -(-seq // MASK_BLOCK)
    blocks = torch.arange(num_blocks, device=first_keys.device)
    first_queries = blocks * MASK_BLOCK
    last_queries = (first_queries + MASK_BLOCK - 1).clamp(max=seq - 1)
    first_seen = first_keys[:, first_queries] // MASK_BLOCK
    first_full = -(-first_keys[:, last_queries] // MASK_BLOCK)
    before, diagonal = blocks < blocks[:, None], blocks == blocks[:, None]
    full = before & (blocks >= first_full[..., None])
    partial = (before | diagonal) & (blocks >= first_seen[..., None]) & ~full

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_keys[b, query])

    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=MASK_BLOCK, mask_mod=sees, seq_lengths=(seq, seq)
    )


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen blocks of keys, bool [batch, blocks of queries, blocks of keys], as FlexAttention lists them.

    Returns their number, int32 [batch, 1, blocks of queries], and their indices in order, with the others behind them.
    """
    counts = chosen.sum(dim=-1, dtype=torch.int32)
    indices = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None], indices[:, None].contiguous()


def sdpa_or_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in transformers' form, by FlexAttention where ``attention_mask`` is a block mask, else by SDPA."""
    attend = flex_attention_forward if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
    return attend(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(SDPA_OR_FLEX, sdpa_or_flex_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(SDPA_OR_FLEX, sdpa_mask)

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
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill.config import require
from distill.data.batch import Batch
from distill.flex_attention import attend, block_mask
from distill.sequence_parallel import ULYSSES, whole_sequence

MAX_DENSE_MASK_TOKENS = 1024
"""Longest sequence on a GPU whose mask is dense: below it FlexAttention's compilation costs more than it saves."""

SDPA_OR_FLEX = "sdpa_or_flex"
"""Attention implementation: SDPA, and FlexAttention where the mask is a block mask."""

_masks = WeakIdKeyDictionary()
"""Batch -> its masks by what else they depend on, as long as there is the batch."""


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
    flex = config._attn_implementation == "flex_attention"
    mask = _mask_of(batch, in_parts=in_parts, sliding_window=getattr(config, "sliding_window", None), flex=flex)
    if isinstance(mask, BlockMask) and config._attn_implementation in ("sdpa", "flex_attention"):
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


def _mask_of(batch: Batch, **options: Any) -> Tensor | BlockMask:
    """The mask of ``batch``, made once for all models that it is passed to."""
    made = _masks.setdefault(batch, {})
    key = tuple(options.values())
    if key not in made:
        positions = whole_sequence(batch.position_ids) if options.pop("in_parts") else batch.position_ids
        made[key] = document_mask(positions, **options)
    return made[key]


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
        return block_mask(first_keys)
    keys = torch.arange(seq, device=position_ids.device)
    return ((keys >= first_keys[..., None]) & (keys <= keys[:, None]))[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean mask as what is added to attention scores: 0 where it is True, the lowest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def sdpa_or_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in transformers' form, by FlexAttention where ``attention_mask`` is a block mask, else by SDPA.

    Raises:
        ValueError: dropout is asked for together with a block mask.
    """
    # Under autocast the rotation is fp32, and so is what it was applied to. SDPA would cast it, FlexAttention not.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    options = {name: kwargs[name] for name in ("scaling", "dropout") if name in kwargs}
    return attend(query, key, value, attention_mask, **options), None


ALL_ATTENTION_FUNCTIONS.register(SDPA_OR_FLEX, sdpa_or_flex_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(SDPA_OR_FLEX, sdpa_mask)

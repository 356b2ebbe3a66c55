"""Replace-1-block scores: what one variant at one block, alone, does to the parent (Puzzle, section 4.2).

Nothing before the replaced block is computed again: the parent advances block by block, its hidden states before the
current block are kept for all sequences, and a variant runs from there to the end. Of the parent's output only the
final hidden states are kept; its logits are made again for each chunk of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill.config import require
from distill.losses import hidden_cosine, token_metrics
from distill.objective import next_token_hidden, next_token_labels
from puzzle.blockwise import build_block, embed, precision
from puzzle.library import inherited_names
from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM
from puzzle.tables import ScoreRow, ScoreTable

CHUNK_TOKENS = 2048
"""Tokens whose logits exist at once."""

ReplacedTensors = Callable[[int, BlockConfig], Mapping[str, Tensor]]
"""Tensors of the subblocks of a variant that are not the parent's own, by their names in the block."""


@dataclass(kw_only=True)
class _Batch:
    """A batch of sequences on its way through the parent."""

    labels: Tensor
    """[batch * (seq - 1)]"""
    hidden: Tensor
    """[batch, seq, hidden], fp32: the parent's residual stream before the current block."""
    attention_inputs: Mapping[str, Any]
    final: Tensor
    """[batch, seq, hidden]: the parent's output after the final norm."""


@dataclass(frozen=True, kw_only=True)
class _Means:
    """One model beside the parent: means over the tokens of each sequence [num_sequences], or over all tokens."""

    kld: Tensor
    lm_loss: Tensor
    hidden_cosine: float


@torch.no_grad()
def score_variants(
    parent: DeciLMForCausalLM,
    architecture: Architecture,
    variants: Sequence[Sequence[BlockConfig]],
    replaced_tensors: ReplacedTensors,
    sequences: Tensor,
    *,
    batch_size: int,
) -> ScoreTable:
    """Score every variant of every block; the parent's own block is zero without being run.

    All variants see the same tokens, and all values are means over the tokens that have a next one. Differences between
    rows are therefore much more certain than ``kld_stderr``, which is over sequences, suggests.

    Args:
        parent: in the data type to score in; matrix products run in it, all else in fp32.
        architecture: of the parent.
        variants: candidates for each block.
        replaced_tensors: tensors of a variant; subblocks that it leaves out are the parent's.
        sequences: token ids [num_sequences, seq].
        batch_size: sequences per forward.

    Raises:
        ValueError: fewer than two sequences, which have no standard error.
    """
    require(len(sequences) >= 2, f"scores need num_sequences >= 2 for their standard error, got {len(sequences)}")
    with precision(parent):
        batches = [_parent_run(parent, batch) for batch in sequences.split(batch_size)]
        baseline = _measure(parent, None, len(variants), batches)
        rows = []
        with tqdm(total=sum(map(len, variants)), desc="score", unit="variant", leave=False) as bar:
            for index, parent_block in enumerate(parent.model.layers):
                for variant in variants[index]:
                    bar.set_postfix_str(f"block {index} {variant.name}", refresh=False)
                    if variant == architecture.blocks[index]:
                        rows.append(_zero_row(index, variant))
                    else:
                        block = _variant_block(parent, architecture, index, variant, replaced_tensors(index, variant))
                        rows.append(_row(index, variant, _measure(parent, block, index, batches), baseline))
                    bar.update()
                for batch in batches:
                    batch.hidden = parent_block(batch.hidden, **batch.attention_inputs)
    return ScoreTable(
        parent={"lm_loss": baseline.lm_loss.mean().item()}, num_tokens=sequences.numel(), rows=tuple(rows)
    )


def _parent_run(parent: DeciLMForCausalLM, input_ids: Tensor) -> _Batch:
    input_ids = input_ids.to(parent.device)
    first, attention_inputs = embed(parent, input_ids)
    hidden = first
    for block in parent.model.layers:
        hidden = block(hidden, **attention_inputs)
    return _Batch(
        labels=next_token_labels(input_ids),
        hidden=first,
        attention_inputs=attention_inputs,
        final=parent.model.norm(hidden),
    )


def _variant_block(
    parent: DeciLMForCausalLM,
    architecture: Architecture,
    index: int,
    variant: BlockConfig,
    replaced: Mapping[str, Tensor],
) -> DeciLMDecoderLayer:
    """The variant of block ``index``, sharing with the parent what it leaves as it is."""
    own = dict(parent.model.layers[index].named_parameters())
    tensors: dict[str, Tensor] = {
        name: own[name] for name in inherited_names(own, architecture.blocks[index], variant, replaced)
    }
    for name, tensor in replaced.items():
        tensors[name] = tensor.to(parent.device, parent.dtype)
    return build_block(parent, architecture, variant, tensors)


def _measure(parent: DeciLMForCausalLM, block: nn.Module | None, index: int, batches: Sequence[_Batch]) -> _Means:
    """The parent with ``block`` in place of its block ``index``, compared with the parent as it is."""
    head = parent.get_output_embeddings().weight
    suffix = parent.model.layers[index + 1 :]
    klds, lm_losses, cosines = [], [], []
    for batch in batches:
        final = batch.final
        if block is not None:
            hidden = block(batch.hidden, **batch.attention_inputs)
            for later in suffix:
                hidden = later(hidden, **batch.attention_inputs)
            final = parent.model.norm(hidden)
        student, teacher = next_token_hidden(final), next_token_hidden(batch.final)
        metrics = token_metrics(student, head, teacher, head, batch.labels, CHUNK_TOKENS)
        klds.append(metrics["kld"].view(len(final), -1).double().mean(1))
        lm_losses.append(metrics["lm_loss"].view(len(final), -1).double().mean(1))
        cosines.append(hidden_cosine(student, teacher).double() * len(final))
    kld, lm_loss = torch.cat(klds).cpu(), torch.cat(lm_losses).cpu()
    return _Means(kld=kld, lm_loss=lm_loss, hidden_cosine=torch.stack(cosines).sum().item() / len(kld))


def _row(index: int, variant: BlockConfig, child: _Means, baseline: _Means) -> ScoreRow:
    return ScoreRow(
        block=index,
        variant=variant.name,
        kld=child.kld.mean().item(),
        lm_loss=(child.lm_loss - baseline.lm_loss).mean().item(),
        hidden_cosine=child.hidden_cosine,
        kld_stderr=child.kld.std().item() / math.sqrt(len(child.kld)),
    )


def _zero_row(index: int, variant: BlockConfig) -> ScoreRow:
    return ScoreRow(block=index, variant=variant.name, kld=0.0, lm_loss=0.0, hidden_cosine=0.0, kld_stderr=0.0)

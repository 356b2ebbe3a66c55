"""Which FFN channels and KV heads matter: the rankings that narrower subblocks are cut by (Puzzle, appendix A).

Everything is measured in one pass through the unchanged parent, each block on the input that it has there, so that
blocks are ranked independently of each other. Activations come in the parent's precision; what is made of them is fp32:
differences between channels drown in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from puzzle.config import LibraryConfig
from puzzle.model.modeling_decilm import DeciLMAttention, DeciLMMLP
from puzzle.slices import ParentSlice, parent_activations

CHUNK_VALUES = 2**24
"""Values [tokens, channels] or [tokens, hidden] that are looked at at once: 64 MiB each."""


@dataclass(frozen=True, kw_only=True)
class Rankings:
    """Channels and KV heads by block, dearest first.

    One ranking serves all widths of a block, so that a narrower FFN is contained in every wider one.
    """

    channels: dict[int, Tensor]
    """Indices [ffn_dim] (CPU) of every block that has a SwiGLU."""
    kv_heads: dict[int, Tensor]
    """Indices [num_kv_heads] (CPU) of every block that has a grouped-query attention; empty if not asked for."""
    criterion: str
    """Of :func:`channel_criterion`: what the channels were ranked by."""


def channel_criterion(config: LibraryConfig) -> str:
    """Name of what ranks the channels: settings that rank them alike share it."""
    if config.ffn_importance == "independent" or config.importance_rounds == 1:
        return "independent"
    return f"iterative in {config.importance_rounds} rounds"


def measure_rankings(parent: ParentSlice, sequences: Tensor, *, batch_size: int, config: LibraryConfig) -> Rankings:
    """Rank the channels, and where ``library.kv_init=select`` the KV heads, of the slice's own blocks.

    The iterative ranking removes an equal share of the channels after every round, the cheapest first, and every round
    has an equal share of the sequences to itself (larger shares first where they do not divide). Channels that have
    gone count in all later rounds: a channel is worth the error that its removal would leave beside theirs.

    Args:
        parent: unchanged by this. All processes of a replica must call it with the same arguments.
        sequences: token ids [num_sequences, seq].
        batch_size: sequences per forward.
        config: criterion, rounds, and whether KV heads are selected.
    """
    num_rounds = config.importance_rounds if config.ffn_importance == "iterative" else 1
    channels = {
        index: _ChannelMeter(block.mlp.down_proj, num_rounds)
        for index, block in parent.own_blocks()
        if isinstance(block.mlp, DeciLMMLP)
    }
    heads = {
        index: _HeadMeter(block.self_attn)
        for index, block in parent.own_blocks()
        if isinstance(block.self_attn, DeciLMAttention) and config.kv_init == "select"
    }
    batches = [
        (number, batch)
        for number, share in enumerate(sequences.tensor_split(num_rounds))
        for batch in share.split(batch_size)
    ]
    meters: list[_ChannelMeter | _HeadMeter] = [*channels.values(), *heads.values()]
    with ExitStack() as hooks:
        for meter in meters:
            hooks.enter_context(meter.projection.register_forward_pre_hook(partial(_observe, meter)))
        for number, batch in tqdm(batches, desc="importance", unit="batch", leave=False):
            for ranked in channels.values():
                ranked.begin_round(number)
            for _ in parent_activations(parent, batch):
                pass
    return Rankings(
        channels={index: meter.ranking() for index, meter in channels.items()},
        kv_heads={index: meter.ranking() for index, meter in heads.items()},
        criterion=channel_criterion(config),
    )


class _ChannelMeter:
    """Ranks the inputs of one down projection, round by round."""

    def __init__(self, projection: nn.Linear, num_rounds: int) -> None:
        self.projection = projection
        ffn_dim = projection.in_features
        self._removals = [len(share) for share in torch.arange(ffn_dim).tensor_split(num_rounds)]
        self._round = 0
        self._removed = torch.empty(0, dtype=torch.long, device=projection.weight.device)
        """Channels that have gone, the first to go first."""
        self._sums = torch.zeros(ffn_dim, device=projection.weight.device)

    @torch.no_grad()
    def add(self, activations: Tensor) -> None:
        """Count ``activations [tokens, ffn_dim]``."""
        self._sums += channel_contributions(activations, self.projection.weight, self._removed)

    def begin_round(self, number: int) -> None:
        """Remove the share of every round before ``number``."""
        while self._round < number:
            self._removed = torch.cat((self._removed, self._cheapest_first()[: self._removals[self._round]]))
            self._sums.zero_()
            self._round += 1

    def ranking(self) -> Tensor:
        """Channels, dearest first; equal ones keep their order."""
        return torch.cat((self._removed, self._cheapest_first())).flip(0).cpu()

    def _cheapest_first(self) -> Tensor:
        """Channels that are left; of equal ones the last comes first."""
        left = torch.ones_like(self._sums, dtype=torch.bool)
        left[self._removed] = False
        order = self._sums.argsort(descending=True, stable=True).flip(0)
        return order[left[order]]


class _HeadMeter:
    """Ranks the KV heads of one attention by what reaches the output projection through them."""

    def __init__(self, attention: DeciLMAttention) -> None:
        self.projection = attention.o_proj
        self._num_kv_heads = self.projection.in_features // (attention.num_key_value_groups * attention.head_dim)
        self._sums = torch.zeros(self._num_kv_heads, device=self.projection.weight.device)

    @torch.no_grad()
    def add(self, outputs: Tensor) -> None:
        """Count ``outputs [tokens, num_heads * head_dim]`` of the heads."""
        self._sums += kv_head_contributions(outputs, self.projection.weight, self._num_kv_heads)

    def ranking(self) -> Tensor:
        """KV heads, dearest first; equal ones keep their order."""
        return self._sums.argsort(descending=True, stable=True).cpu()


def _observe(meter: _ChannelMeter | _HeadMeter, _: nn.Module, args: tuple[Any, ...]) -> None:
    # Autocast would have the sums in the parent's precision.
    with torch.autocast(args[0].device.type, enabled=False):
        meter.add(args[0].flatten(0, -2))


def channel_contributions(activations: Tensor, down_proj: Tensor, removed: Tensor) -> Tensor:
    """How much farther the FFN's output moves when a channel is removed as well: sums over tokens ``[ffn_dim]``, fp32.

    With x the activations of a token, w_i the column of channel i and s = sum of x_r w_r over the removed channels, the
    error of removing i too is ||s + x_i w_i||, and its increase that less ||s||. With nothing removed this is Puzzle's
    |x_i| ||w_i|| (appendix A). The increase is computed as such, not as a difference of two norms, and s from the
    removed channels, not as a difference of two outputs: both would be mostly rounding.

    Args:
        activations: [tokens, ffn_dim].
        down_proj: weight [hidden, ffn_dim].
        removed: indices of channels; their own entries mean nothing.
    """
    lengths = torch.linalg.vector_norm(down_proj, dim=0, dtype=torch.float32)
    if len(removed) == 0:
        return activations.abs().sum(dim=0, dtype=torch.float32) * lengths
    weight, gone = down_proj.float(), down_proj[:, removed].float()
    sums = torch.zeros_like(lengths)
    for x in _chunks(activations, max(down_proj.shape)):
        error = x[:, removed] @ gone.T
        norm = error.norm(dim=1, keepdim=True)
        growth = 2 * x * (error @ weight) + (x * lengths).square()
        total = norm + (norm.square() + growth).clamp(min=0).sqrt()
        sums += (growth / total.clamp(min=torch.finfo(torch.float32).tiny)).sum(dim=0)
    return sums


def kv_head_contributions(outputs: Tensor, o_proj: Tensor, num_kv_heads: int) -> Tensor:
    """Norm of what every KV head's group of query heads adds to the output: sums over tokens ``[num_kv_heads]``, fp32.

    Args:
        outputs: [tokens, num_heads * head_dim], what the heads return; groups lie one after the other.
        o_proj: weight [hidden, num_heads * head_dim].
        num_kv_heads: number of groups.
    """
    columns = o_proj.float().chunk(num_kv_heads, dim=1)
    sums = o_proj.new_zeros(num_kv_heads, dtype=torch.float32)
    for x in _chunks(outputs, max(o_proj.shape)):
        for group, (values, weight) in enumerate(zip(x.chunk(num_kv_heads, dim=1), columns, strict=True)):
            sums[group] += (values @ weight.T).norm(dim=1).sum()
    return sums


def _chunks(values: Tensor, width: int) -> Iterator[Tensor]:
    """``values [tokens, channels]`` in fp32, as many tokens at once as :data:`CHUNK_VALUES` allows."""
    for chunk in values.split(max(1, CHUNK_VALUES // width)):
        yield chunk.float()

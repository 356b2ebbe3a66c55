"""Contributions against their definition in fp64, and rankings through a parent's forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import OptimConfig, TrainConfig
from puzzle import importance
from puzzle.config import LibraryConfig
from puzzle.importance import channel_contributions, kv_head_contributions, measure_rankings
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.slices import ParentSlice

TOKENS, FFN, HIDDEN = 40, 24, 12
NOTHING = torch.empty(0, dtype=torch.long)


def config(**settings: Any) -> LibraryConfig:
    train = TrainConfig(max_tokens=64, seq_len=8, batch_size=8, eval_every_tokens=64, eval_sequences=2)
    return LibraryConfig(importance_sequences=6, bld=train, optim=OptimConfig(lr=1e-3), **settings)


def random_ffn(*, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Activations [tokens, ffn] and the down projection [hidden, ffn], fp64."""
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(TOKENS, FFN, generator=generator, dtype=torch.float64)
    return activations, torch.randn(HIDDEN, FFN, generator=generator, dtype=torch.float64) * scale


def error_without(activations: Tensor, weight: Tensor, channels: list[int]) -> Tensor:
    """Norm per token of what the output loses with ``channels``."""
    whole = activations @ weight.T
    left = activations.clone()
    left[:, channels] = 0
    return (whole - left @ weight.T).norm(dim=1)


@pytest.mark.parametrize("removed", [[], [3], [5, 0, 17, 8]])
def test_contribution_is_the_added_error_of_removing_the_channel_too(removed: list[int]) -> None:
    activations, weight = random_ffn()
    found = channel_contributions(activations.float(), weight.float(), torch.tensor(removed, dtype=torch.long))
    before = error_without(activations, weight, removed)
    for channel in set(range(FFN)) - set(removed):
        # The norm of every token, then the sum: not the norm of a sum.
        added = (error_without(activations, weight, [*removed, channel]) - before).sum()
        assert found[channel].item() == pytest.approx(added.item(), rel=1e-4, abs=1e-4)


def test_an_orthogonal_channel_counts_less_beside_a_large_error() -> None:
    # |x| ||w|| of channels 1 and 2 is equal; beside channel 0, which channel 1 makes worse and channel 2 cancels, not.
    activations, weight = torch.ones(1, 3), torch.tensor([[10.0, 1.0, -1.0]])
    found = channel_contributions(activations, weight, torch.tensor([0]))
    assert found[1:].tolist() == pytest.approx([1.0, -1.0])
    assert channel_contributions(activations, weight, NOTHING).tolist() == [10.0, 1.0, 1.0]


def test_contributions_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    activations, weight = (tensor.float() for tensor in random_ffn())
    gone = torch.tensor([2, 9])
    whole = channel_contributions(activations, weight, gone), kv_head_contributions(activations, weight, 4)
    monkeypatch.setattr(importance, "CHUNK_VALUES", 7 * FFN)
    parts = channel_contributions(activations, weight, gone), kv_head_contributions(activations, weight, 4)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_small_differences_beside_a_large_error_survive_bf16_activations() -> None:
    """A difference of two products in bf16 would be mostly rounding where the channels' own effects are small."""
    activations, weight = random_ffn()
    weight[:, 0] *= 1e4
    gone = torch.tensor([0])
    exact = channel_contributions(activations.bfloat16(), weight.float(), gone)
    rounded = activations.bfloat16().double()
    before = error_without(rounded, weight, [0])
    added = torch.stack([(error_without(rounded, weight, [0, c]) - before).sum() for c in range(1, FFN)])
    # fp32 values ~1e4 times larger than the differences enter; still every channel is in its place
    torch.testing.assert_close(exact[1:].double(), added, rtol=1e-3, atol=1e-3)
    assert torch.equal(exact[1:].argsort(), added.argsort())


def test_kv_head_contribution_is_the_norm_of_what_its_group_adds() -> None:
    outputs, weight = random_ffn()
    found = kv_head_contributions(outputs.float(), weight.float(), 4)
    for head in range(4):
        alone = torch.zeros_like(outputs)
        alone[:, head * 6 : head * 6 + 6] = outputs[:, head * 6 : head * 6 + 6]
        assert found[head].item() == pytest.approx((alone @ weight.T).norm(dim=1).sum().item(), rel=1e-5)


def activations_of(model: DeciLMForCausalLM, sequences: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """What the down and the output projection of one block read, [tokens, channels], from a plain forward."""
    seen: dict[str, Tensor] = {}
    block = model.model.layers[index]
    hooks = [
        projection.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)}))
        for name, projection in (("down", block.mlp.down_proj), ("out", block.self_attn.o_proj))
    ]
    with torch.no_grad():
        model(sequences)
    for hook in hooks:
        hook.remove()
    return seen["down"], seen["out"]


def test_independent_ranking_follows_the_contributions(lively_parent: DeciLMForCausalLM, sequences: Tensor) -> None:
    settings = config(kv_init="select")
    rankings = measure_rankings(ParentSlice.whole(lively_parent), sequences, batch_size=4, config=settings)
    assert list(rankings.channels) == list(rankings.kv_heads) == [0, 1, 2, 3]
    for index, block in enumerate(lively_parent.model.layers):
        down, out = activations_of(lively_parent, sequences, index)
        channels = down.abs().mean(0) * block.mlp.down_proj.weight.norm(dim=0)
        assert torch.equal(rankings.channels[index], channels.argsort(descending=True, stable=True))
        heads = kv_head_contributions(out, block.self_attn.o_proj.weight, 2)
        assert torch.equal(rankings.kv_heads[index], heads.argsort(descending=True))


def test_iterative_ranking_is_the_rounds_done_by_hand(lively_parent: DeciLMForCausalLM, sequences: Tensor) -> None:
    settings = config(ffn_importance="iterative", importance_rounds=3)
    rankings = measure_rankings(ParentSlice.whole(lively_parent), sequences, batch_size=1, config=settings)
    # 512 channels and 6 sequences in 3 equal shares, the larger ones first
    shares, weight = (171, 171, 170), lively_parent.model.layers[2].mlp.down_proj.weight
    gone: list[int] = []
    for share, part in zip(shares, sequences.split(2), strict=True):
        down, _ = activations_of(lively_parent, part, 2)
        values = channel_contributions(down, weight, torch.tensor(gone, dtype=torch.long))
        values[gone] = torch.inf
        gone += values.argsort()[:share].tolist()
    found = rankings.channels[2].flip(0).tolist()
    assert sorted(found) == list(range(512))
    # The order within a round is that of sums in another order: neighbours may swap, shares may not.
    for first, share in ((0, 171), (171, 171), (342, 170)):
        assert set(found[first : first + share]) == set(gone[first : first + share])


def test_one_round_of_the_iterative_ranking_is_the_independent_one(
    lively_parent: DeciLMForCausalLM, sequences: Tensor
) -> None:
    parent = ParentSlice.whole(lively_parent)
    one, plain = (
        measure_rankings(parent, sequences, batch_size=4, config=settings).channels
        for settings in (config(ffn_importance="iterative", importance_rounds=1), config())
    )
    assert all(torch.equal(one[index], plain[index]) for index in plain)


@pytest.mark.parametrize("rounds", [1, 4, 5, 6])
def test_any_number_of_rounds_and_batches_ranks_every_channel_once(
    lively_parent: DeciLMForCausalLM, sequences: Tensor, rounds: int
) -> None:
    """Neither the batches nor the channels need divide into the rounds."""
    settings = config(ffn_importance="iterative", importance_rounds=rounds)
    rankings = measure_rankings(ParentSlice.whole(lively_parent), sequences, batch_size=4, config=settings)
    assert all(sorted(ranking.tolist()) == list(range(512)) for ranking in rankings.channels.values())


@pytest.mark.parametrize("criterion", ["independent", "iterative"])
def test_padded_channels_rank_last(lively_parent: DeciLMForCausalLM, sequences: Tensor, criterion: str) -> None:
    with torch.no_grad():
        lively_parent.model.layers[1].mlp.up_proj.weight[10:20] = 0
    settings = config(ffn_importance=criterion, importance_rounds=3)
    rankings = measure_rankings(ParentSlice.whole(lively_parent), sequences, batch_size=6, config=settings)
    assert rankings.channels[1][-10:].tolist() == list(range(10, 20))
    assert rankings.kv_heads == {}


@pytest.mark.parametrize("criterion", ["independent", "iterative"])
def test_bf16_parent_ranks_as_fp32_does(lively_parent: DeciLMForCausalLM, sequences: Tensor, criterion: str) -> None:
    settings = config(ffn_importance=criterion, importance_rounds=2)
    full = measure_rankings(ParentSlice.whole(lively_parent), sequences, batch_size=6, config=settings).channels
    half_parent = ParentSlice.whole(lively_parent.to(torch.bfloat16))
    half = measure_rankings(half_parent, sequences, batch_size=6, config=settings).channels
    for index in full:
        # bf16 has 8 bits of mantissa: channels at the edge may swap, the bulk may not
        assert len(set(full[index][:256].tolist()) & set(half[index][:256].tolist())) >= 248


def test_only_a_slices_own_subblocks_are_ranked_and_no_hook_stays(heterogeneous_architecture: Architecture) -> None:
    model = build_model(heterogeneous_architecture, seed=0)
    ids = torch.zeros(1, 8, dtype=torch.long)
    rankings = measure_rankings(ParentSlice.whole(model), ids, batch_size=1, config=config(kv_init="select"))
    assert {index: len(values) for index, values in rankings.channels.items()} == {0: 512, 1: 256, 2: 512}
    assert {index: len(values) for index, values in rankings.kv_heads.items()} == {0: 2, 3: 1, 5: 2}
    assert not any(module._forward_pre_hooks for module in model.modules())

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.importance import channel_contributions, rank_channels
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM


def test_contribution_is_the_change_of_the_output_without_the_channel(
    lively_parent: DeciLMForCausalLM, sequences: Tensor
) -> None:
    contributions = channel_contributions(lively_parent, sequences, batch_size=2)
    assert list(contributions) == [0, 1, 2, 3]
    states = lively_parent.model(sequences, output_hidden_states=True).hidden_states
    block = lively_parent.model.layers[2]
    with torch.no_grad():
        hidden = states[2] + block.attention_update(states[2], **lively_parent.model.attention_inputs(states[2]))
        whole = block.ffn_update(hidden)
        for channel in (0, 100, 511):
            column = block.mlp.down_proj.weight[:, channel].clone()
            block.mlp.down_proj.weight[:, channel] = 0
            distance = (whole - block.ffn_update(hidden)).norm(dim=-1).mean()
            block.mlp.down_proj.weight[:, channel] = column
            # the direct way subtracts two fp32 sums of 512 channels, hence no more than three digits
            torch.testing.assert_close(contributions[2][channel], distance, rtol=1e-3, atol=1e-6)


def test_contributions_do_not_depend_on_the_batch_size(lively_parent: DeciLMForCausalLM, sequences: Tensor) -> None:
    one, all_at_once = (channel_contributions(lively_parent, sequences, batch_size=size) for size in (1, 6))
    for index in one:
        torch.testing.assert_close(one[index], all_at_once[index], rtol=1e-5, atol=0)


def test_padded_channels_rank_last(lively_parent: DeciLMForCausalLM, sequences: Tensor) -> None:
    with torch.no_grad():
        lively_parent.model.layers[1].mlp.up_proj.weight[10:20] = 0
    ranking = rank_channels(channel_contributions(lively_parent, sequences, batch_size=6)[1])
    assert ranking[-10:].tolist() == list(range(10, 20))
    assert sorted(ranking.tolist()) == list(range(512))


def test_bf16_parent_ranks_as_fp32_does(lively_parent: DeciLMForCausalLM, sequences: Tensor) -> None:
    full = channel_contributions(lively_parent, sequences, batch_size=6)
    half = channel_contributions(lively_parent.to(torch.bfloat16), sequences, batch_size=6)
    for index in full:
        kept, kept_half = (set(rank_channels(values[index])[:256].tolist()) for values in (full, half))
        # bf16 has 8 bits of mantissa: channels at the edge may swap, the bulk may not
        assert len(kept & kept_half) >= 248


def test_only_swiglu_blocks_are_measured_and_no_hook_stays(heterogeneous_architecture: Architecture) -> None:
    model = build_model(heterogeneous_architecture, seed=0)
    contributions = channel_contributions(model, torch.zeros(1, 8, dtype=torch.long), batch_size=1)
    assert {index: len(values) for index, values in contributions.items()} == {0: 512, 1: 256, 2: 512}
    assert not any(module._forward_pre_hooks for module in model.modules())

"""One rank's share against sums that are done by hand, and against the whole where there is one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.config import RopeConfig
from puzzle.model import stats
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, FFNConfig, dense_blocks
from puzzle.model.tensor_layout import attention_shapes, ffn_shapes
from puzzle.shard import Shard

LLAMA_70B = Architecture(
    vocab_size=128_256,
    hidden_dim=8192,
    num_heads=64,
    head_dim=128,
    blocks=dense_blocks(80, num_kv_heads=8, ffn_dim=28_672),
    max_positions=131_072,
    rope=RopeConfig(theta=500_000.0),
)
SUBBLOCKS = (
    AttentionConfig(num_kv_heads=2),
    AttentionConfig(num_kv_heads=1),
    AttentionConfig(kind="linear"),
    NO_ATTENTION,
    FFNConfig(ffn_dim=512),
    FFNConfig(kind="linear"),
    NO_FFN,
)


def test_one_rank_holds_everything(pico_architecture):
    architecture = replace(pico_architecture, qkv_bias=True, qk_norm=True)
    shard = Shard(parent=architecture, num_ranks=1)
    for subblock in SUBBLOCKS:
        shapes = attention_shapes if isinstance(subblock, AttentionConfig) else ffn_shapes
        assert shard.shapes(subblock) == shapes(architecture, subblock)
    assert shard.num_other_weights() == stats.other_params(architecture)


def test_a_share_of_a_70b_attention():
    shard = Shard(parent=LLAMA_70B, num_ranks=4)
    attention = AttentionConfig(num_kv_heads=8)
    shapes = shard.shapes(attention)
    assert shapes["self_attn.q_proj.weight"] == (16 * 128, 8192)
    assert shapes["self_attn.k_proj.weight"] == (2 * 128, 8192)
    assert shapes["self_attn.o_proj.weight"] == (8192, 16 * 128)
    assert shapes["input_layernorm.weight"] == (8192,)
    assert shard.num_weights(attention) == 8192 + 2 * 8192 * 128 * (16 + 2)
    assert shard.kv_values_per_token(attention) == 2 * 2 * 128


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_fewer_kv_heads_than_ranks_are_copied(heads):
    """A rank cannot hold less than a head: eight ranks hold as much cache for one KV head as for eight."""
    shard = Shard(parent=LLAMA_70B, num_ranks=8)
    assert shard.num_kv_heads(AttentionConfig(num_kv_heads=heads)) == 1
    assert shard.kv_values_per_token(AttentionConfig(num_kv_heads=heads)) == 2 * 128


def test_a_share_of_an_ffn_need_not_be_a_width_of_the_format():
    shapes = Shard(parent=LLAMA_70B, num_ranks=8).shapes(FFNConfig(ffn_dim=5632))
    assert shapes["mlp.gate_proj.weight"] == (704, 8192)
    assert shapes["mlp.up_proj.weight"] == (704, 8192)
    assert shapes["mlp.down_proj.weight"] == (8192, 704)
    assert shapes["post_attention_layernorm.weight"] == (8192,)


def test_linear_subblocks_are_split_by_their_input():
    shard = Shard(parent=LLAMA_70B, num_ranks=8)
    assert shard.shapes(AttentionConfig(kind="linear"))["self_attn.linear_attn.weight"] == (8192, 1024)
    assert shard.shapes(FFNConfig(kind="linear"))["mlp.linear_mlp.weight"] == (8192, 1024)
    assert shard.kv_values_per_token(AttentionConfig(kind="linear")) == 0


def test_biases_follow_their_heads_and_head_norms_stand_on_every_rank():
    shapes = Shard(parent=replace(LLAMA_70B, qkv_bias=True, qk_norm=True), num_ranks=8).shapes(
        AttentionConfig(num_kv_heads=8)
    )
    assert shapes["self_attn.q_proj.bias"] == (8 * 128,)
    assert shapes["self_attn.v_proj.bias"] == (128,)
    assert shapes["self_attn.q_norm.weight"] == (128,)


def test_a_no_op_has_no_share_either():
    shard = Shard(parent=LLAMA_70B, num_ranks=8)
    assert [shard.num_weights(subblock) for subblock in (NO_ATTENTION, NO_FFN)] == [0, 0]
    assert [shard.kv_values_per_token(subblock) for subblock in (NO_ATTENTION, NO_FFN)] == [0, 0]


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_dealt_and_filled_up(tied):
    shard = Shard(parent=replace(LLAMA_70B, vocab_size=1001, num_heads=8, tie_embeddings=tied), num_ranks=8)
    matrices = 1 if tied else 2
    assert shard.num_other_weights() == matrices * 126 * 8192 + 8192


def test_what_cannot_be_dealt(pico_architecture):
    with pytest.raises(ValueError, match=r"workload.tensor_parallel=3 does not divide the 4 query heads"):
        Shard(parent=pico_architecture, num_ranks=3)
    six_kv_heads = replace(LLAMA_70B, num_heads=12, blocks=dense_blocks(1, 6, 512))
    with pytest.raises(ValueError, match=r"tensor_parallel=4 and the 6 KV heads of attention kv6: one must divide"):
        Shard(parent=six_kv_heads, num_ranks=4).shapes(AttentionConfig(num_kv_heads=6))
    odd = Shard(parent=replace(LLAMA_70B, num_heads=48), num_ranks=3)
    with pytest.raises(ValueError, match=r"tensor_parallel=3 does not divide the 512 channels of ffn w512"):
        odd.num_weights(FFNConfig(ffn_dim=512))
    with pytest.raises(ValueError, match=r"tensor_parallel=3 does not divide the 8192 input channels of a linear"):
        odd.num_weights(FFNConfig(kind="linear"))

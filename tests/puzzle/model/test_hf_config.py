from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from distill.config import RopeConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.configuration_decilm import DeciLMConfig
from puzzle.model.hf_config import architecture_from_config, ffn_dim, ffn_mult, hf_config, rope_from_config

ATTENTION_KEYS = {
    "n_heads_in_group",
    "no_op",
    "num_sink_tokens",
    "replace_with_linear",
    "sparsify",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
    "window_length",
}
FFN_KEYS = {"ffn_mult", "no_op", "replace_with_linear", "sparsify"}
FORMAT_KEYS = {
    "architectures",
    "attention_bias",
    "attention_dropout",
    "auto_map",
    "block_configs",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "pretraining_tp",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
    "vocab_size",
}

LLAMA3 = RopeConfig(
    theta=500_000.0,
    kind="llama3",
    factor=16.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
)


def through_json(config: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(config))
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "norm_eps": 1e-6},
        {"qkv_bias": True, "family": "qwen2", "source_ffn_dim": 500},
        {"qk_norm": True, "head_dim": 32, "family": "qwen3"},
        {"sliding_window": 64, "family": "mistral"},
        {"rope": LLAMA3},
        {"rope": RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_positions=64)},
        {"rope": RopeConfig(theta=1e4, kind="linear", factor=2.0)},
        {"token_ids": {"bos_token_id": 1, "eos_token_id": [2, 3]}},
        {"token_ids": {}},
    ],
)
def test_round_trip_is_exact(heterogeneous_architecture: Architecture, changes: dict[str, Any]) -> None:
    architecture = replace(heterogeneous_architecture, **changes)
    assert architecture_from_config(through_json(hf_config(architecture, "bfloat16"))) == architecture


def test_fused_block_keeps_the_parents_it_stands_for(heterogeneous_architecture: Architecture) -> None:
    fused = BlockConfig(attention=NO_ATTENTION, ffn=FFNConfig(ffn_dim=1024), parent_block_indices=(1, 2, 3))
    architecture = heterogeneous_architecture.with_blocks((heterogeneous_architecture.blocks[0], fused))
    config = hf_config(architecture, "float32")
    assert config["parent_block_indices"] == [[0], [1, 2, 3]]
    assert architecture_from_config(config) == architecture


def test_what_was_removed_is_told_apart_from_what_was_fused(heterogeneous_architecture: Architecture) -> None:
    fused = BlockConfig(
        attention=NO_ATTENTION,
        ffn=FFNConfig(ffn_dim=1024),
        parent_block_indices=(1, 2, 3),
        dropped_parent_indices=(2,),
    )
    heir = replace(fused, dropped_parent_indices=(2, 3))
    architecture = heterogeneous_architecture.with_blocks((heterogeneous_architecture.blocks[0], fused, heir))
    config = through_json(hf_config(architecture, "float32"))
    assert config["dropped_parent_indices"] == [[], [2], [2, 3]]
    assert architecture_from_config(config) == architecture
    assert [block.member_indices for block in architecture.blocks] == [(0,), (1, 3), (1,)]
    assert [block.is_fused for block in architecture.blocks] == [False, True, False]
    assert "dropped_parent_indices" not in hf_config(heterogeneous_architecture, "float32")


def test_blocks_that_do_not_rotate_are_listed(heterogeneous_architecture: Architecture) -> None:
    blocks = heterogeneous_architecture.blocks
    still = replace(blocks[3], attention=replace(blocks[3].attention, rope=False))
    architecture = heterogeneous_architecture.with_block(3, still)
    config = through_json(hf_config(architecture, "float32"))
    assert config["no_rope_blocks"] == [3]
    assert architecture_from_config(config) == architecture
    assert json.loads(DeciLMConfig(**config).to_json_string())["no_rope_blocks"] == [3]
    assert "no_rope_blocks" not in hf_config(heterogeneous_architecture, "float32")
    assert "no_rope_blocks" not in DeciLMConfig(**hf_config(heterogeneous_architecture, "float32")).to_dict()
    with pytest.raises(ValueError, match="no_rope_blocks names block 1, which has no attention"):
        architecture_from_config(config | {"no_rope_blocks": [1]})
    with pytest.raises(ValueError, match="attention of kind no_op with rope=false"):
        AttentionConfig(kind="no_op", rope=False)


def test_a_block_with_attention_is_never_fused(heterogeneous_architecture: Architecture) -> None:
    first = heterogeneous_architecture.blocks[0]
    assert not first.attention.is_no_op
    assert not replace(first, parent_block_indices=(0, 1)).is_fused
    assert not BlockConfig(attention=NO_ATTENTION, ffn=NO_FFN, parent_block_indices=(0, 1)).is_fused


def test_keys_are_exactly_those_of_the_format(heterogeneous_architecture: Architecture) -> None:
    config = hf_config(heterogeneous_architecture, "bfloat16")
    assert config.keys() == FORMAT_KEYS
    assert config["intermediate_size"] is None
    assert config["num_key_value_heads"] is None
    for block in config["block_configs"]:
        assert block.keys() == {"attention", "ffn"}
        assert block["attention"].keys() == ATTENTION_KEYS
        assert block["ffn"].keys() == FFN_KEYS
    kinds = [(block["attention"]["n_heads_in_group"], block["ffn"]["ffn_mult"]) for block in config["block_configs"]]
    assert kinds == [(2, 12.0), (None, 6.0), (None, 12.0), (4, None), (None, None), (2, None)]
    # llama.cpp asserts that the first multiplier is a float.
    assert isinstance(config["block_configs"][0]["ffn"]["ffn_mult"], float)


def test_width_rule_round_trips_and_gives_the_published_widths() -> None:
    for hidden_dim in (64, 576, 2048, 5120, 8192, 16_384):
        for width in (*range(256, 40_000, 256), 399_360, 425_984):
            assert ffn_dim(ffn_mult(width, hidden_dim), hidden_dim) == width
    # Super-49B (hidden 8192) and Ultra-253B (hidden 16384), as in their config.json.
    published = [5.25, 2.625, 3.28125, 1.3125, 1.0, 0.5]
    assert [ffn_dim(mult, 8192) for mult in published] == [28_672, 14_336, 17_920, 7168, 5632, 2816]
    assert [ffn_dim(mult, 16_384) for mult in (36.5625, 39.0, 31.40625, 27.5625)] == [
        399_360,
        425_984,
        343_040,
        301_056,
    ]


def third_party_config() -> dict[str, Any]:
    """What NVIDIA's Ultra-253B says, three blocks of it: grouped-query, fused FFN, dummy."""
    attention = {
        "n_heads_in_group": None,
        "no_op": True,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    ffn = {"ffn_mult": None, "no_op": True, "replace_with_linear": False, "sparsify": None}
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": 16_384,
        "num_hidden_layers": 3,
        "num_attention_heads": 128,
        "vocab_size": 128_256,
        "intermediate_size": None,
        "num_key_value_heads": None,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.48.3",
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008, 128_009],
        "block_configs": [
            {"attention": attention | {"n_heads_in_group": 16, "no_op": False}, "ffn": ffn},
            {"attention": attention, "ffn": ffn | {"ffn_mult": 39.0, "no_op": False}},
            {"attention": attention, "ffn": ffn},
        ],
    }


def test_reads_third_party_configuration() -> None:
    architecture = architecture_from_config(third_party_config())
    assert architecture.rope == LLAMA3
    assert architecture.head_dim == 128
    assert architecture.blocks == (
        BlockConfig(attention=AttentionConfig(num_kv_heads=8), ffn=NO_FFN, parent_block_indices=(0,)),
        BlockConfig(attention=NO_ATTENTION, ffn=FFNConfig(ffn_dim=425_984), parent_block_indices=(1,)),
        BlockConfig(attention=NO_ATTENTION, ffn=NO_FFN, parent_block_indices=(2,)),
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_type",), "llama", "model_type is 'llama', expected 'nemotron-nas'"),
        (("hidden_act",), "gelu", "hidden_act='gelu' is not supported"),
        (("attention_bias",), True, "attention_bias=True is not supported"),
        (("num_hidden_layers",), 4, "num_hidden_layers=4 differs from 3 block_configs"),
        (("block_configs", 0, "attention", "window_length"), 1024, "block 0: attention: window_length=1024"),
        (("block_configs", 0, "attention", "n_heads_in_group"), 3, "n_heads_in_group=3 must divide"),
        (("block_configs", 1, "ffn", "ffn_mult"), None, "block 1: ffn: ffn_mult=None must be a number"),
        (("rope_scaling", "rope_type"), "longrope", "rope_type='longrope' is not supported"),
        (("rope_scaling", "beta_fast"), 16, "beta_fast"),
        (
            ("rope_scaling", "partial_rotary_factor"),
            0.5,
            "partial_rotary_factor=0.5 is not supported: heads are rotated",
        ),
        (("partial_rotary_factor",), 0.5, "partial_rotary_factor=0.5 is not supported"),
        (("parent_block_indices",), [[0]], "1 parent_block_indices differ from 3 block_configs"),
        (("dropped_parent_indices",), [[], []], "2 dropped_parent_indices differ from 3 block_configs"),
        (("dropped_parent_indices",), [[], [2], []], r"\[2\] are not among parent_block_indices=\[1\]"),
    ],
)
def test_what_the_model_has_not_is_an_error_of_one_line(path: tuple[Any, ...], value: Any, message: str) -> None:
    config = through_json(third_party_config())
    node: Any = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ValueError, match=message) as error:
        architecture_from_config(config)
    assert "\n" not in str(error.value)


def test_missing_key_is_named() -> None:
    config = third_party_config()
    del config["hidden_size"]
    with pytest.raises(ValueError, match="lacks the key 'hidden_size'"):
        architecture_from_config(config)


def test_rope_in_every_spelling() -> None:
    keys = third_party_config()["rope_scaling"]
    legacy_type = {("type" if key == "rope_type" else key): value for key, value in keys.items()}
    assert rope_from_config({"rope_theta": 500_000.0, "rope_scaling": keys}) == LLAMA3
    assert rope_from_config({"rope_theta": 500_000.0, "rope_scaling": legacy_type}) == LLAMA3
    assert rope_from_config({"rope_parameters": keys | {"rope_theta": 500_000.0}}) == LLAMA3
    assert rope_from_config({"rope_theta": 1e6, "rope_scaling": None}) == RopeConfig(theta=1e6)


def test_config_object_has_blocks_with_attributes(heterogeneous_architecture: Architecture) -> None:
    config = DeciLMConfig(**hf_config(heterogeneous_architecture, "float32"))
    assert [block.attention.no_op for block in config.block_configs] == [False, True, False, False, True, False]
    assert config.block_configs[3].ffn.replace_with_linear
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    with pytest.raises(ValueError, match="num_hidden_layers=2 differs from 0 block_configs"):
        DeciLMConfig(num_hidden_layers=2)


def test_saving_the_config_object_keeps_the_legacy_spelling(heterogeneous_architecture: Architecture) -> None:
    architecture = replace(heterogeneous_architecture, rope=LLAMA3)
    written = json.loads(DeciLMConfig(**hf_config(architecture, "float32")).to_json_string())
    assert "rope_parameters" not in written
    assert written["rope_scaling"]["rope_type"] == "llama3"
    assert architecture_from_config(written) == architecture


def test_planning_modules_import_without_torch() -> None:
    modules = "puzzle.model.architecture, puzzle.model.hf_config, puzzle.model.stats, puzzle.model.tensor_layout"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from puzzle.model.architecture import NO_ATTENTION, Architecture
from puzzle.model.families import FAMILIES, dense_config, parent_layout
from puzzle.model.foreign_families import REASONS

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 300,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def dense_architecture(config: dict[str, Any]) -> Architecture:
    return parent_layout(config).architecture


def test_llama_config_in_both_spellings_is_one_architecture() -> None:
    legacy = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING | {"rope_type": "llama3"}}
    current = LLAMA | {"rope_parameters": LLAMA3_SCALING | {"rope_type": "llama3", "rope_theta": 5e5}}
    architecture = dense_architecture(legacy)
    assert dense_architecture(current) == architecture
    assert (architecture.rope.kind, architecture.rope.theta, architecture.rope.factor) == ("llama3", 5e5, 8.0)
    assert architecture.rope.original_max_positions == 128


def test_width_is_rounded_up_and_remembered() -> None:
    architecture = dense_architecture(LLAMA)
    assert {block.ffn.ffn_dim for block in architecture.blocks} == {512}
    assert architecture.source_ffn_dim == 300
    assert dense_architecture(LLAMA | {"intermediate_size": 512}).source_ffn_dim is None


def test_absent_keys_have_the_defaults_of_the_family() -> None:
    bare = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "tie_word_embeddings")}
    architecture = dense_architecture(bare)
    assert architecture.blocks[0].attention.num_kv_heads == 4
    assert not architecture.tie_embeddings
    assert architecture.rope.theta == 10_000.0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_exported_config_means_the_same_architecture(model_type: str) -> None:
    architecture = dense_architecture(LLAMA | {"model_type": model_type, "head_dim": 32})
    exported = dense_config(architecture, dtype="float32")
    assert exported["model_type"] == model_type
    assert exported["intermediate_size"] == 300
    assert dense_architecture(exported) == architecture


def test_sliding_window_counts_only_where_the_family_uses_it() -> None:
    windowed = LLAMA | {"sliding_window": 16}
    assert dense_architecture(windowed).sliding_window is None
    assert dense_architecture(windowed | {"model_type": "mistral"}).sliding_window == 16
    assert dense_architecture(windowed | {"model_type": "mistral", "sliding_window": None}).sliding_window is None
    assert dense_architecture(windowed | {"model_type": "qwen2"}).sliding_window is None
    every_block = windowed | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}
    assert dense_architecture(every_block).sliding_window == 16
    assert dense_architecture(dense_config(dense_architecture(every_block), dtype="float32")).sliding_window == 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"model_type=gpt2 is not supported \(norms subtract the mean.*supported are llama, mistral, qwen2, qwen3, ",
        ),
        ({"model_type": "mine", "auto_map": {}}, r"model_type=mine is not supported \(its own code.*never run"),
        ({"model_type": "gemma2"}, "gemma2 is not supported .*GeGLU.* soft-capped"),
        ({"model_type": "gemma3_text"}, "gemma3_text is not supported .*1 . weight.* windows and rotary"),
        ({"model_type": "mistral3", "text_config": {}}, "mistral3 .* several modalities; save its language model"),
        ({"model_type": "deci"}, "older DeciLM format; nemotron-nas is the one"),
        ({"per_layer_config": {}}, "per_layer_config is not supported; write each block into block_configs"),
        ({"model_type": "smollm3", "use_sliding_window": True}, "use_sliding_window=true of model_type=smollm3"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers=\[1\] does not say for each of 3 blocks"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75 is not supported"),
        (
            {
                "model_type": "phi3",
                "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            },
            "rope_type='longrope' is not supported",
        ),
        ({"num_attention_heads": "four"}, "transformers reads no llama from it: .*num_attention_heads"),
        ({"attention_bias": True}, "attention_bias=true of model_type=llama"),
        ({"mlp_bias": True}, "mlp_bias=true of model_type=llama"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=true of model_type=qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
            "layer_types mixes full_attention, sliding_attention",
        ),
    ],
)
def test_what_is_not_supported_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        dense_architecture(LLAMA | changed)
    assert "\n" not in str(error.value)


def test_reasons_are_given_for_families_that_are_none() -> None:
    assert not REASONS.keys() & FAMILIES.keys()


def test_blocks_without_rope_are_named_or_counted() -> None:
    smollm3 = LLAMA | {"model_type": "smollm3", "num_hidden_layers": 5, "pad_token_id": 2, "eos_token_id": 2}
    fourth = dense_architecture(smollm3)
    assert [block.attention.rope for block in fourth.blocks] == [True, True, True, False, True]
    assert fourth.blocks[3].name == "kv2_nope+w512"
    named = dense_architecture(smollm3 | {"no_rope_layers": [0, 1, 1, 1, 0]})
    assert [block.attention.rope for block in named.blocks] == [False, True, True, True, False]
    assert dense_architecture(dense_config(named, dtype="float32")) == named
    with pytest.raises(ValueError, match=r"family llama needs equal blocks .* got kv2\+w512, kv2_nope\+w512"):
        dense_config(replace(named, family="llama"), dtype="float32")


def test_heterogeneous_model_has_no_dense_config() -> None:
    architecture = dense_architecture(LLAMA)
    pruned = architecture.blocks[1].__class__(
        attention=NO_ATTENTION, ffn=architecture.blocks[1].ffn, parent_block_indices=(1,)
    )
    with pytest.raises(ValueError, match=r"needs equal blocks .* got kv2\+w512, no_op\+w512; stage export"):
        dense_config(architecture.with_block(1, pruned), dtype="float32")


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_head_dim_without_a_key_divides_the_hidden_dimension(config_class: type) -> None:
    config = config_class(hidden_size=64, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1).to_dict()
    config.pop("head_dim", None)
    expected = config_class(**config).to_dict().get("head_dim", 8)
    assert dense_architecture(config).head_dim == expected

"""The dense decoder families that can be parents, one row each.

All of them name their tensors as Llama does (``model.layers.{i}.self_attn.q_proj.weight``), and so does the
nemotron-nas format: import and export rename nothing (:mod:`puzzle.model.tensor_layout` has the names). What differs is
which tensors exist and which configuration keys mean what, and that is what a row says. Defaults of absent keys and the
two spellings of rotary settings (``rope_theta`` with ``rope_scaling``, or ``rope_parameters``) are left to
transformers' own configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import CONFIG_MAPPING, PreTrainedConfig

from distill.config import require
from puzzle.model.architecture import Architecture, dense_blocks, require_sequential, round_up_ffn_dim
from puzzle.model.hf_config import MODEL_TYPE, TOKEN_ID_KEYS, hf_config, rope_from_config


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of dense parents."""

    model_type: str
    """``model_type`` of its config.json."""
    model_class: str
    """transformers class that loads it."""
    qkv_bias: bool = False
    """The query, key and value projections have biases (and the output projection has none)."""
    qk_norm: bool = False
    """An RMS norm per head on queries and keys."""
    sliding_window: Literal["never", "every_block", "by_block"] = "never"
    """every_block: ``sliding_window`` holds in all blocks unless null; by_block: where ``layer_types`` says so."""
    off: tuple[str, ...] = ()
    """Settings that must be false: the nemotron-nas format has no tensors for them."""


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", model_class="LlamaForCausalLM", off=("attention_bias", "mlp_bias")),
        Family(model_type="mistral", model_class="MistralForCausalLM", sliding_window="every_block"),
        Family(model_type="qwen2", model_class="Qwen2ForCausalLM", qkv_bias=True, sliding_window="by_block"),
        Family(
            model_type="qwen3",
            model_class="Qwen3ForCausalLM",
            qk_norm=True,
            sliding_window="by_block",
            off=("attention_bias",),
        ),
    )
}

_FORMAT_KEYS = {
    "auto_map",
    "block_configs",
    "qkv_bias",
    "qk_norm",
    "model_family",
    "source_ffn_dim",
    "parent_block_indices",
    "dropped_parent_indices",
}
"""Keys of our own format that no dense family has."""


def dense_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a dense parent, from the content of its config.json.

    FFN widths that the nemotron-nas format cannot express are rounded up; ``source_ffn_dim`` then is the parent's own.

    Raises:
        ValueError: the family is not supported, or a setting of it is not (named with its value).
    """
    family = _family(config)
    full: Any = CONFIG_MAPPING[family.model_type].from_dict(dict(config))
    _check_settings(config, full, family)
    ffn_dim = round_up_ffn_dim(full.intermediate_size)
    return Architecture(
        vocab_size=full.vocab_size,
        hidden_dim=full.hidden_size,
        num_heads=full.num_attention_heads,
        head_dim=getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads,
        blocks=dense_blocks(full.num_hidden_layers, full.num_key_value_heads, ffn_dim),
        max_positions=full.max_position_embeddings,
        rope=rope_from_config({"rope_parameters": full.rope_parameters}),
        norm_eps=full.rms_norm_eps,
        tie_embeddings=full.tie_word_embeddings,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(full, family),
        family=family.model_type,
        source_ffn_dim=None if ffn_dim == full.intermediate_size else full.intermediate_size,
        token_ids={name: getattr(full, name, None) for name in TOKEN_ID_KEYS},
    )


def dense_config(architecture: Architecture, *, dtype: str) -> dict[str, Any]:
    """config.json of a dense model in its own family's format, the inverse of :func:`dense_architecture`.

    Rotary settings are spelt as before transformers 5 (``rope_theta``, ``rope_scaling``): every version and every
    engine reads that. The FFN width is the parent's own where it was padded.

    Raises:
        ValueError: the blocks differ, one of them lacks attention or SwiGLU FFN, or some run in parallel.
    """
    require_sequential(architecture.parallel_windows, f"the {architecture.family} format")
    family = FAMILIES[architecture.family]
    num_kv_heads, ffn_dim = _dense_shape(architecture)
    ours = hf_config(architecture, dtype)
    config = {
        **{key: value for key, value in ours.items() if key not in _FORMAT_KEYS},
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": ffn_dim,
        "head_dim": architecture.head_dim,
    }
    if family.sliding_window != "never":
        config["sliding_window"] = architecture.sliding_window
    if family.sliding_window == "by_block":
        config |= {"use_sliding_window": architecture.sliding_window is not None, "max_window_layers": 0}
    return config


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    own_code = " (its own code, named in auto_map, is never run by an import)" if "auto_map" in config else ""
    supported = ", ".join((*FAMILIES, MODEL_TYPE))
    require(
        model_type in FAMILIES,
        f"config.json: model_type={model_type} is not supported{own_code}; supported are {supported}",
    )
    return FAMILIES[str(model_type)]


def _check_settings(config: Mapping[str, Any], full: PreTrainedConfig, family: Family) -> None:
    activation = getattr(full, "hidden_act", None)
    require(activation == "silu", f"config.json: hidden_act={activation} is not supported; SwiGLU FFNs need silu")
    for name in family.off:
        require(
            not getattr(full, name, False),
            f"config.json: {name}=true of model_type={family.model_type} is not supported; only false is",
        )
    require(
        config.get("quantization_config") is None,
        "config.json has a quantization_config; import the unquantized checkpoint of this model",
    )


def _sliding_window(full: Any, family: Family) -> int | None:
    if family.sliding_window == "never":
        return None
    if family.sliding_window == "every_block":
        return full.sliding_window
    kinds = set(full.layer_types)
    require(
        len(kinds) == 1,
        f"config.json: layer_types mixes {', '.join(sorted(kinds))}; all blocks must have the sliding window, or none",
    )
    return full.sliding_window if kinds == {"sliding_attention"} else None


def _dense_shape(architecture: Architecture) -> tuple[int, int]:
    """KV heads and FFN width that all blocks share."""
    names = sorted({block.name for block in architecture.blocks})
    block = architecture.blocks[0]
    require(
        len(names) == 1 and block.attention.kind == "gqa" and block.ffn.kind == "swiglu",
        f"family {architecture.family} needs equal blocks with attention and FFN, got {', '.join(names[:3])}; "
        "stage export writes heterogeneous models",
    )
    num_kv_heads, ffn_dim = block.attention.num_kv_heads, block.ffn.ffn_dim
    assert num_kv_heads is not None
    assert ffn_dim is not None
    own = architecture.source_ffn_dim
    return num_kv_heads, own if own is not None and round_up_ffn_dim(own) == ffn_dim else ffn_dim

"""The decoder families that can be parents, one row each.

All of them name their tensors as Llama does (``model.layers.{i}.self_attn.q_proj.weight``), and so does the
nemotron-nas format: import and export rename nothing (:mod:`puzzle.model.tensor_layout` has the names). What differs is
which tensors exist and which configuration keys mean what, and that is what a row says. Defaults of absent keys and the
two spellings of rotary settings (``rope_theta`` with ``rope_scaling``, or ``rope_parameters``) are left to
transformers' own configuration classes.

A configuration of a family that has ``block_configs`` beside its own keys is ModelOpt's AnyModel: the family's model,
block by block with its own KV head count and FFN width, or with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import CONFIG_MAPPING, PreTrainedConfig

from distill.config import require
from puzzle.model.architecture import Architecture, BlockConfig, dense_blocks, require_sequential, round_up_ffn_dim
from puzzle.model.foreign_families import why_not
from puzzle.model.hf_config import TOKEN_ID_KEYS, hf_config, own_ffn_dim, read_entry, rope_from_config
from puzzle.model.parent_layout import ParentLayout


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of parents."""

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
    rope_by_block: bool = False
    """``no_rope_layers`` says which blocks rotate queries and keys (1) and which do not (0)."""
    fused_projections: bool = False
    """Queries, keys and values are one matrix, and so are gate and up."""
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
        Family(
            model_type="smollm3",
            model_class="SmolLM3ForCausalLM",
            rope_by_block=True,
            off=("attention_bias", "mlp_bias", "use_sliding_window"),
        ),
        Family(
            model_type="phi3",
            model_class="Phi3ForCausalLM",
            sliding_window="every_block",
            fused_projections=True,
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
    "no_rope_blocks",
}
"""Keys of our own format that no dense family has."""


def parent_layout(config: Mapping[str, Any]) -> ParentLayout:
    """What a parent will be in our format and how its file lays that out, from the content of its config.json.

    FFN widths that the nemotron-nas format cannot express are rounded up; ``source_ffn_dim`` of the architecture then
    is the parent's own, where it has but one.

    Raises:
        ValueError: the family is not supported, or a setting of it is not (named with its value).
    """
    family = _family(config)
    entries = config.get("block_configs")
    full = _with_defaults(config, family)
    _check_settings(config, full, family)
    blocks = _dense_blocks(full) if entries is None else _own_blocks(config, entries)
    widths = tuple(full.intermediate_size if entries is None else own_ffn_dim(entries[i]) for i in range(len(blocks)))
    padded = tuple(None if width == block.ffn.ffn_dim else width for width, block in zip(widths, blocks, strict=True))
    architecture = Architecture(
        vocab_size=full.vocab_size,
        hidden_dim=full.hidden_size,
        num_heads=full.num_attention_heads,
        head_dim=getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads,
        blocks=_without_rope(blocks, full.no_rope_layers) if family.rope_by_block else blocks,
        max_positions=full.max_position_embeddings,
        rope=rope_from_config({"rope_parameters": full.rope_parameters}),
        norm_eps=full.rms_norm_eps,
        tie_embeddings=full.tie_word_embeddings,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(full, family),
        family=family.model_type,
        source_ffn_dim=padded[0] if len(set(padded)) == 1 else None,
        token_ids={name: getattr(full, name, None) for name in TOKEN_ID_KEYS},
    )
    return ParentLayout(architecture=architecture, ffn_dims=padded, fused=family.fused_projections)


def dense_config(architecture: Architecture, *, dtype: str) -> dict[str, Any]:
    """config.json of a dense model in its own family's format, the inverse of :func:`parent_layout`.

    Rotary settings are spelt as before transformers 5 (``rope_theta``, ``rope_scaling``): every version and every
    engine reads that. The FFN width is the parent's own where it was padded.

    Raises:
        ValueError: the blocks differ, one of them lacks attention or SwiGLU FFN, or some run in parallel.
    """
    require_sequential(architecture.parallel_windows, f"the {architecture.family} format")
    family = FAMILIES[architecture.family]
    num_kv_heads, ffn_dim = _dense_shape(architecture, family)
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
    if family.rope_by_block:
        config["no_rope_layers"] = [int(block.attention.rope) for block in architecture.blocks]
    return config


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json: {why_not(config, supported=tuple(FAMILIES))}")
    return FAMILIES[str(model_type)]


def _with_defaults(config: Mapping[str, Any], family: Family) -> Any:
    """transformers' own configuration object of ``config``."""
    require(
        "per_layer_config" not in config,
        "config.json: per_layer_config is not supported; write each block into block_configs, as ModelOpt's AnyModel "
        "checkpoints do",
    )
    named, num_blocks = config.get("no_rope_layers"), config.get("num_hidden_layers")
    require(
        not family.rope_by_block or named is None or num_blocks is None or len(named) >= num_blocks,
        f"config.json: no_rope_layers={named} does not say for each of {num_blocks} blocks whether it rotates",
    )
    own_keys = {key: value for key, value in config.items() if key != "block_configs"}
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(own_keys)
    except Exception as error:  # transformers' checks raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"config.json: transformers reads no {family.model_type} from it: {reason}") from error


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


def _dense_blocks(full: Any) -> tuple[BlockConfig, ...]:
    return dense_blocks(full.num_hidden_layers, full.num_key_value_heads, round_up_ffn_dim(full.intermediate_size))


def _own_blocks(config: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> tuple[BlockConfig, ...]:
    """The blocks of an AnyModel configuration."""
    num_blocks = config.get("num_hidden_layers")
    require(
        num_blocks == len(entries),
        f"config.json: num_hidden_layers={num_blocks} differs from {len(entries)} block_configs",
    )
    blocks = []
    for index, entry in enumerate(entries):
        try:
            attention, ffn = read_entry(config, entry, index)
        except KeyError as error:
            raise ValueError(f"config.json: block {index} of block_configs lacks the key {error}") from error
        require(
            attention.kind != "linear" and ffn.kind != "linear",
            f"config.json: block {index}: replace_with_linear=true is not supported in AnyModel checkpoints, which "
            "have no name for its weight; give the model in the nemotron-nas format",
        )
        blocks.append(BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(index,)))
    return tuple(blocks)


def _without_rope(blocks: Sequence[BlockConfig], no_rope_layers: Sequence[int]) -> tuple[BlockConfig, ...]:
    return tuple(
        replace(block, attention=replace(block.attention, rope=bool(rotates) or block.attention.kind != "gqa"))
        for block, rotates in zip(blocks, no_rope_layers, strict=False)
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


def _dense_shape(architecture: Architecture, family: Family) -> tuple[int, int]:
    """KV heads and FFN width that all blocks share."""
    kinds = {(block.attention.num_kv_heads, block.ffn.ffn_dim) for block in architecture.blocks}
    rotations = {block.attention.rope for block in architecture.blocks}
    num_kv_heads, ffn_dim = next(iter(kinds))
    if len(kinds) > 1 or num_kv_heads is None or ffn_dim is None or (len(rotations) > 1 and not family.rope_by_block):
        names = sorted({block.name for block in architecture.blocks})
        raise ValueError(
            f"family {architecture.family} needs equal blocks with attention and FFN, got {', '.join(names[:3])}; "
            "stage export writes heterogeneous models"
        )
    own = architecture.source_ffn_dim
    return num_kv_heads, own if own is not None and round_up_ffn_dim(own) == ffn_dim else ffn_dim

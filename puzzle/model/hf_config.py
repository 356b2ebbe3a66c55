"""Architecture <-> ``config.json`` of a nemotron-nas checkpoint. Torch-free.

The file is written by hand in the legacy spelling (``rope_theta``, ``rope_scaling``, ``torch_dtype``): transformers 5
would write ``rope_parameters``, which engines that read the JSON themselves ignore, silently falling back to another
base frequency. Keys beyond the format stand there only where they are not at their default, so that a Llama-shaped
model has exactly the keys that NVIDIA's own checkpoints have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distill.config import RopeConfig, require
from puzzle.model.architecture import (
    FFN_DIM_MULTIPLE,
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionConfig,
    BlockConfig,
    FFNConfig,
    round_up_ffn_dim,
)

MODEL_TYPE = "nemotron-nas"
NEUTRAL = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "o_proj_bias": False,
    "position_embedding_type": "rope",
}
"""Keys of config.json that must be null or as here; the last two are those of a newer dialect."""
ATTENTION_NEUTRAL = {
    "num_sink_tokens": None,
    "sparsify": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
    "window_length": None,
    "mamba": None,
    "llama4": None,
}
FFN_NEUTRAL = {"sparsify": None, "moe": None, "gated": True, "hidden_act": "silu"}
TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}
"""Field of RopeConfig -> key of ``rope_scaling``."""


def ffn_mult(ffn_dim: int, hidden_dim: int) -> float:
    """The number that stands for a width of ``ffn_dim`` channels; always a float, six decimals."""
    return round(3 * ffn_dim / (2 * hidden_dim), 6)


def ffn_dim(mult: float, hidden_dim: int) -> int:
    """The width that every reader of the format derives from ``mult``, in channels."""
    return -(-int(2 * mult * hidden_dim / 3) // FFN_DIM_MULTIPLE) * FFN_DIM_MULTIPLE


def hf_config(architecture: Architecture, dtype_name: str) -> dict[str, Any]:
    """``config.json`` of ``architecture`` whose weights are stored as ``dtype_name``, for example ``bfloat16``."""
    a = architecture
    config: dict[str, Any] = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_dim,
        "num_hidden_layers": a.num_blocks,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_positions,
        "rope_theta": float(a.rope.theta),
        "rope_scaling": _rope_scaling(a.rope),
        "rms_norm_eps": a.norm_eps,
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": a.tie_embeddings,
        "torch_dtype": dtype_name,
        "use_cache": True,
        **{key: a.token_ids[key] for key in TOKEN_ID_KEYS if key in a.token_ids},
        "block_configs": [_block_entry(a, block) for block in a.blocks],
    }
    return config | _extensions(a)


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    values = {key: getattr(rope, name) for name, key in ROPE_KEYS.items() if getattr(rope, name) is not None}
    return {**values, "rope_type": rope.kind}


def _block_entry(architecture: Architecture, block: BlockConfig) -> dict[str, Any]:
    attention, ffn = block.attention, block.ffn
    return {
        "attention": {
            "n_heads_in_group": architecture.num_heads // attention.num_kv_heads if attention.num_kv_heads else None,
            "no_op": attention.is_no_op,
            "num_sink_tokens": None,
            "replace_with_linear": attention.kind == "linear",
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {
            "ffn_mult": ffn_mult(ffn.ffn_dim, architecture.hidden_dim) if ffn.ffn_dim else None,
            "no_op": ffn.is_no_op,
            "replace_with_linear": ffn.kind == "linear",
            "sparsify": None,
        },
    }


def _extensions(architecture: Architecture) -> dict[str, Any]:
    """The keys that the format does not have, where they are not at their default."""
    a = architecture
    parents = [list(block.parent_block_indices) for block in a.blocks]
    dropped = [list(block.dropped_parent_indices) for block in a.blocks]
    keys_and_defaults: dict[str, tuple[Any, Any]] = {
        "head_dim": (a.head_dim, a.hidden_dim // a.num_heads),
        "qkv_bias": (a.qkv_bias, False),
        "qk_norm": (a.qk_norm, False),
        "sliding_window": (a.sliding_window, None),
        "model_family": (a.family, "llama"),
        "source_ffn_dim": (a.source_ffn_dim, None),
        "parent_block_indices": (parents, [[index] for index in range(a.num_blocks)]),
        "dropped_parent_indices": (dropped, [[] for _ in a.blocks]),
        "no_rope_blocks": ([index for index, block in enumerate(a.blocks) if not block.attention.rope], []),
        "parallel_windows": ([list(window) for window in a.parallel_windows], []),
    }
    return {key: value for key, (value, default) in keys_and_defaults.items() if value != default}


def architecture_from_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture that ``config.json`` of a nemotron-nas checkpoint describes, ours or a third party's.

    Raises:
        ValueError: not a nemotron-nas configuration, a key is missing, or it asks for something that this model has not
            (sink attention, biases, another activation, experts or parallel blocks of a newer dialect).
    """
    model_type = config.get("model_type")
    require(model_type == MODEL_TYPE, f"config.json: model_type is {model_type!r}, expected {MODEL_TYPE!r}")
    try:
        return _read(config)
    except KeyError as error:
        raise ValueError(f"config.json of a {MODEL_TYPE} model lacks the key {error}") from error


def _read(config: Mapping[str, Any]) -> Architecture:
    _require_neutral(config, NEUTRAL, "config.json")
    hidden_dim, num_heads = config["hidden_size"], config["num_attention_heads"]
    entries = config["block_configs"]
    require(
        config["num_hidden_layers"] == len(entries),
        f"config.json: num_hidden_layers={config['num_hidden_layers']} differs from {len(entries)} block_configs",
    )
    parents = _per_block(config, "parent_block_indices", [[index] for index in range(len(entries))])
    dropped = _per_block(config, "dropped_parent_indices", [[] for _ in entries])
    unrotated = set(config.get("no_rope_blocks") or [])
    subblocks = [read_entry(config, entry, index) for index, entry in enumerate(entries)]
    return Architecture(
        vocab_size=config["vocab_size"],
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        head_dim=config.get("head_dim") or hidden_dim // num_heads,
        blocks=tuple(
            BlockConfig(
                attention=_unrotated(attention, index) if index in unrotated else attention,
                ffn=ffn,
                parent_block_indices=tuple(parents[index]),
                dropped_parent_indices=tuple(dropped[index]),
            )
            for index, (attention, ffn) in enumerate(subblocks)
        ),
        max_positions=config["max_position_embeddings"],
        rope=rope_from_config(config),
        norm_eps=config["rms_norm_eps"],
        tie_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=config.get("qkv_bias", False),
        qk_norm=config.get("qk_norm", False),
        sliding_window=config.get("sliding_window"),
        family=config.get("model_family", "llama"),
        source_ffn_dim=config.get("source_ffn_dim"),
        token_ids={key: config[key] for key in TOKEN_ID_KEYS if key in config},
        parallel_windows=_parallel_windows(config.get("parallel_windows") or []),
    )


def _per_block(config: Mapping[str, Any], key: str, default: list[list[int]]) -> list[list[int]]:
    """Parent blocks of every block under ``key``, ``default`` where it is absent."""
    values: list[list[int]] = config.get(key) or default
    require(len(values) == len(default), f"config.json: {len(values)} {key} differ from {len(default)} block_configs")
    return values


def _parallel_windows(entries: Any) -> tuple[tuple[int, int], ...]:
    windows = [entry for entry in entries if isinstance(entry, list | tuple) and len(entry) == 2]
    require(
        len(windows) == len(entries) and all(isinstance(block, int) for window in windows for block in window),
        f"config.json: parallel_windows={entries!r} must be a list of [first block, last block]",
    )
    return tuple((first, last) for first, last in windows)


def _require_neutral(values: Mapping[str, Any], neutral: Mapping[str, Any], where: str) -> None:
    """Every key of ``neutral`` that ``values`` has must be null or as given there: anything else is not supported."""
    for key, expected in neutral.items():
        value = values.get(key)
        require(value is None or value == expected, f"{where}: {key}={value!r} is not supported, only {expected!r}")


def read_entry(config: Mapping[str, Any], entry: Mapping[str, Any], index: int) -> tuple[AttentionConfig, FFNConfig]:
    """Attention and FFN of one entry of ``block_configs``, in the spelling of nemotron-nas or in that of AnyModel.

    A width that is no multiple of 256 channels, which AnyModel alone can say, is rounded up (:func:`own_ffn_dim`).

    Args:
        config: ``config.json``, for its hidden size and its attention heads.
        entry: the block's.
        index: of the block, for errors.

    Raises:
        ValueError: it asks for something that this model has not.
        KeyError: a key is missing.
    """
    where = f"config.json: block {index}"
    _require_neutral(entry, {"parallel_blocks": None}, where)
    return (
        _attention(entry["attention"], config["num_attention_heads"], f"{where}: attention"),
        _ffn(entry["ffn"], config["hidden_size"], f"{where}: ffn"),
    )


def own_ffn_dim(entry: Mapping[str, Any]) -> int | None:
    """Channels of the SwiGLU that ``entry`` of ``block_configs`` names outright; None: it has none, or ``ffn_mult``."""
    ffn = entry["ffn"]
    return None if ffn.get("no_op") or ffn.get("replace_with_linear") else ffn.get("intermediate_size")


def _attention(entry: Mapping[str, Any], num_heads: int, where: str) -> AttentionConfig:
    _require_known(entry, ATTENTION_NEUTRAL, ("n_heads_in_group", "num_key_value_heads"), where)
    if entry.get("no_op"):
        return NO_ATTENTION
    if entry.get("replace_with_linear"):
        return AttentionConfig(kind="linear")
    name = "n_heads_in_group" if entry.get("num_key_value_heads") is None else "num_key_value_heads"
    divisor = entry[name]
    require(
        isinstance(divisor, int) and divisor > 0 and num_heads % divisor == 0,
        f"{where}: {name}={divisor} must divide num_attention_heads={num_heads}",
    )
    return AttentionConfig(num_kv_heads=divisor if name == "num_key_value_heads" else num_heads // divisor)


def _unrotated(attention: AttentionConfig, index: int) -> AttentionConfig:
    require(attention.kind == "gqa", f"config.json: no_rope_blocks names block {index}, which has no attention")
    return replace(attention, rope=False)


def _ffn(entry: Mapping[str, Any], hidden_dim: int, where: str) -> FFNConfig:
    _require_known(entry, FFN_NEUTRAL, ("ffn_mult", "intermediate_size"), where)
    if entry.get("no_op"):
        return NO_FFN
    if entry.get("replace_with_linear"):
        return FFNConfig(kind="linear")
    name = "ffn_mult" if entry.get("intermediate_size") is None else "intermediate_size"
    value = entry[name]
    require(isinstance(value, int | float) and value > 0, f"{where}: {name}={value} must be a number > 0")
    return FFNConfig(ffn_dim=ffn_dim(value, hidden_dim) if name == "ffn_mult" else round_up_ffn_dim(value))


def _require_known(entry: Mapping[str, Any], neutral: Mapping[str, Any], own: tuple[str, ...], where: str) -> None:
    """Beside its ``own`` keys ``entry`` may say what is ``neutral`` and nothing else: more would change the model."""
    require(isinstance(entry, Mapping), f"{where} is {entry!r}, expected a JSON object")
    known = (*own, "no_op", "replace_with_linear", "weights_precision")
    further = {key: None for key in entry if key not in known}
    _require_neutral(entry, further | dict(neutral), where)


def rope_from_config(config: Mapping[str, Any]) -> RopeConfig:
    """Rotary settings of any Hugging Face ``config.json``, in the legacy spelling or in that of transformers 5.

    Raises:
        ValueError: a scaling rule or a parameter of it that RopeConfig has no field for.
    """
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", config.get("rope_theta", 10_000.0))
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    supported = ("default", "linear", "llama3", "yarn")
    require(kind in supported, f"config.json: rope_type={kind!r} is not supported, only {', '.join(supported)}")
    rotated = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    require(
        rotated == 1,
        f"config.json: partial_rotary_factor={rotated} is not supported: heads are rotated whole, not in part",
    )
    values = {name: scaling.pop(key, None) for name, key in ROPE_KEYS.items()}
    further = {key: value for key, value in scaling.items() if value is not None}
    known = ", ".join(ROPE_KEYS.values())
    require(not further, f"config.json: rope scaling with {further} is not supported, only with {known}")
    return RopeConfig(theta=theta, kind=kind, **(values if kind != "default" else {}))

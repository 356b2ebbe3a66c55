"""Families that cannot be parents, and what is in the way: for the error of an import. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puzzle.model.hf_config import MODEL_TYPE

_GEMMA = "embeddings are scaled, FFNs are GeGLU and norms multiply by 1 + weight"
_GEMMA_2 = f"{_GEMMA}, a norm stands after attention and FFN too"
_EXPERTS = "FFNs are mixtures of experts"
_LAYER_NORM = "norms subtract the mean and have a bias"
_MULTIPLIERS = "embeddings, attention, residuals and logits are scaled by multipliers"
_POST_NORMS = "norms stand after attention and FFN, where the nemotron-nas format has them before"

REASONS: Mapping[str, str] = {
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA_2}, attention scores and logits are soft-capped, and every other block has a window",
    "gemma3": f"{_GEMMA_2}, and windows and rotary frequencies differ between blocks",
    "gemma3_text": f"{_GEMMA_2}, and windows and rotary frequencies differ between blocks",
    "gemma3n": f"{_GEMMA_2}, and blocks share KV caches and have embeddings of their own",
    "gemma3n_text": f"{_GEMMA_2}, and blocks share KV caches and have embeddings of their own",
    "olmo": "norms have no weights",
    "olmo2": _POST_NORMS,
    "olmo3": f"{_POST_NORMS}, and windows differ between blocks",
    "exaone4": f"{_POST_NORMS}, and windows differ between blocks",
    "glm": "heads are rotated in part and in neighbouring pairs",
    "glm4": f"{_POST_NORMS} alone, and heads are rotated in part",
    "granite": _MULTIPLIERS,
    "granitemoe": f"{_MULTIPLIERS}, and {_EXPERTS}",
    "cohere": f"{_LAYER_NORM}, and attention and FFN read the same input",
    "cohere2": f"{_LAYER_NORM}, attention and FFN read the same input, and windows differ between blocks",
    "phi": f"{_LAYER_NORM}, and attention and FFN read the same input",
    "stablelm": _LAYER_NORM,
    "starcoder2": _LAYER_NORM,
    "gpt2": f"{_LAYER_NORM}, positions are embeddings, and FFNs have no gate",
    "gpt_neox": f"{_LAYER_NORM}, and FFNs have no gate",
    "falcon": f"{_LAYER_NORM}, and FFNs have no gate",
    "nemotron": "norms subtract the mean, and FFNs are squared ReLUs without a gate",
    "nemotron_h": "most blocks are state-space layers",
    "arcee": "FFNs are squared ReLUs without a gate",
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": f"{_EXPERTS}, and attention has sinks",
    "phimoe": _EXPERTS,
    "deepseek_v2": f"{_EXPERTS}, and keys and values are latent (MLA)",
    "deepseek_v3": f"{_EXPERTS}, and keys and values are latent (MLA)",
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "deci": f"this is the older DeciLM format; {MODEL_TYPE} is the one with block_configs",
}
"""``model_type`` -> what blocks of the nemotron-nas format cannot express."""


def why_not(config: Mapping[str, Any], *, supported: Sequence[str]) -> str:
    """One line that says why the model of ``config`` is no parent, and which families are."""
    model_type = str(config.get("model_type"))
    reason = REASONS.get(model_type)
    if reason is None and any(key in config for key in ("text_config", "vision_config", "audio_config")):
        reason = "it is a model of several modalities; save its language model by itself"
    if reason is None and "auto_map" in config:
        reason = "its own code, named in auto_map, is never run by an import"
    because = f" ({reason})" if reason else ""
    return f"model_type={model_type} is not supported{because}; supported are {', '.join((*supported, MODEL_TYPE))}"

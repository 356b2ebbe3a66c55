"""Published nemotron-nas checkpoints in their own spelling: Super-49B (Llama-3_3-Nemotron-Super-49B-v1) and Ultra-253B
(Llama-3_1-Nemotron-Ultra-253B-v1), whole or with every dimension scaled down and the pattern of blocks kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Block = tuple[bool, float]
"""Whether the block has attention, and its ``ffn_mult`` (0: none)."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What differs between the two configurations."""

    name: str
    hidden_size: int
    num_attention_heads: int
    rope_factor: float
    transformers_version: str
    blocks: tuple[Block, ...]
    heads_in_group: int
    vocab_size: int = 128_256


def _mults(ratios: str) -> list[tuple[int, float]]:
    """``"0-5:100 6:50"`` -> block and percentage of the parent's FFN."""
    found = []
    for entry in ratios.split():
        span, _, percentage = entry.partition(":")
        first, _, last = span.partition("-")
        found += [(block, float(percentage)) for block in range(int(first), int(last or first) + 1)]
    return found


def _super_blocks() -> tuple[Block, ...]:
    """80 blocks; ``ffn_mult`` is 5.25 at the parent's 28,672 channels, and rounded to widths at 20 and 10 percent."""
    removed = {6, 7, 11, *range(42, 52), *range(53, 71)}
    ratios = dict(
        _mults(
            "0:50 6-7:50 11:62.5 42:25 43-44:50 45:25 46:100 47:25 48:50 49-51:25 53:25 54-55:20 56:25 57-59:20 "
            "60-61:25 62-63:10 64-65:20 66-67:10 68:20 69-70:10"
        )
    )
    mults = {100.0: 5.25, 62.5: 3.28125, 50.0: 2.625, 25.0: 1.3125, 20.0: 1.0, 10.0: 0.5}
    return tuple((block not in removed, mults[ratios.get(block, 100.0)]) for block in range(80))


def _ultra_blocks() -> tuple[Block, ...]:
    """81 blocks dealt over 18 pipeline stages of 9, each stage filled up with dummies in front."""
    ratios = _mults(
        "0:10 1:20 2-7:30 8-11:40 12-19:100 20:50 21-24:40 25-43:100 44-46:70 47:60 48-61:50 62:60 63-65:100"
    )
    removed = {24, 26, 51, 52, *range(54, 61), 64}
    before = [(block not in removed, percentage * 0.04875) for block, percentage in ratios]
    fused = [(False, mult) for mult in (36.5625, 39.0, 31.40625, 27.5625)]
    after = [
        (block != 115, percentage * 0.04875)
        for block, percentage in _mults("115-116:40 117-119:50 120:70 121-124:100 125:50")
    ]
    real, blocks = iter((*before, *fused, *after)), list[Block]()
    for dummies in (0, 4, 6, 5, 3, 5, 5, 5, 5, 5, 2, 1, 5, 8, 8, 8, 5, 1):
        blocks += [(False, 0.0)] * dummies + [next(real) for _ in range(9 - dummies)]
    assert next(real, None) is None
    return tuple((attention, round(mult, 6)) for attention, mult in blocks)


SUPER_49B = Published(
    name="Super-49B",
    hidden_size=8192,
    num_attention_heads=64,
    rope_factor=8.0,
    transformers_version="4.48.3",
    blocks=_super_blocks(),
    heads_in_group=8,
)
ULTRA_253B = Published(
    name="Ultra-253B",
    hidden_size=16_384,
    num_attention_heads=128,
    rope_factor=16.0,
    transformers_version="4.45.1",
    blocks=_ultra_blocks(),
    heads_in_group=16,
)


def tiny(published: Published) -> Published:
    """The same pattern at 32 channels and 4 heads, the widest FFNs 16 times as wide as the narrowest."""
    hidden = 32
    scaled = tuple(
        (attention, 0.0 if mult == 0 else 3 * 256 * max(1, round(mult / 2.6)) / (2 * hidden))
        for attention, mult in published.blocks
    )
    return replace(
        published, hidden_size=hidden, num_attention_heads=4, blocks=scaled, heads_in_group=2, vocab_size=320
    )


def config_json(published: Published) -> dict[str, Any]:
    """Content of config.json, every key of the published one."""
    return {
        "_name_or_path": "./ckpts/model",
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": [_entry(published, *block) for block in published.blocks],
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008, 128_009],
        "hidden_act": "silu",
        "hidden_size": published.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": 131_072,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": published.num_attention_heads,
        "num_hidden_layers": len(published.blocks),
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": published.rope_factor,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": published.transformers_version,
        "use_cache": True,
        "vocab_size": published.vocab_size,
    }


def _entry(published: Published, attention: bool, mult: float) -> dict[str, Any]:
    return {
        "attention": {
            "n_heads_in_group": published.heads_in_group if attention else None,
            "no_op": not attention,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {"ffn_mult": mult or None, "no_op": mult == 0, "replace_with_linear": False, "sparsify": None},
    }

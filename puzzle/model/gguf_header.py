"""What the header of a GGUF file says of its model, key by key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from distill.config import RopeConfig, require
from puzzle.model.architecture import (
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionConfig,
    BlockConfig,
    FFNConfig,
    round_up_ffn_dim,
)
from puzzle.model.parent_layout import ParentLayout

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of what the rotary base frequencies are divided by: llama3 scaling, worked out."""

_KINDS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "deci": gguf.MODEL_ARCH.DECI,
}
_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_READ = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}
"""Keys of an architecture that are understood; others must be neutral."""
_LLAMA3 = RopeConfig(
    theta=500_000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)
"""All but base and factor is that of all Llama 3.1, 3.2 and 3.3 models; a file has but the factors that follow."""
_LLAMA3_TOLERANCE = 1e-5
"""Relative difference of factors that were worked out in fp32 in another order."""
_INSTEAD = "import the Hugging Face checkpoint instead"


class GGUFHeader:
    """The header of the GGUF file ``source`` that ``reader`` has opened.

    Raises:
        ValueError: the architecture is not supported, the file is one of several, or its header says something that is
            not understood.
    """

    def __init__(self, reader: gguf.GGUFReader, source: Path) -> None:
        self._reader = reader
        self._source = source
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        name = self._field("general.architecture")
        require(
            name in _KINDS, f"model.source={source} has architecture {name}; read from GGUF are {', '.join(_KINDS)}"
        )
        self._name = str(name)
        parts = int(self._field("split.count") or 1)
        require(
            parts == 1,
            f"model.source={source} is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge`",
        )
        prefix = f"{name}."
        for key in (key.removeprefix(prefix) for key in reader.fields if key.startswith(prefix)):
            value = self._get(key)
            require(
                key in _READ or not value,
                f"model.source={source} has {prefix}{key}={value}, which this import does not know; {_INSTEAD}",
            )

    @property
    def kind(self) -> gguf.MODEL_ARCH:
        """The architecture, in the terms of package gguf."""
        return _KINDS[self._name]

    @property
    def turns_neighbours(self) -> bool:
        """Whether rotary pairs are neighbouring rows; else, as in transformers, rows of the two halves."""
        return self._name in ("llama", "deci")

    def layout(self) -> ParentLayout:
        """The architecture, and the widths that the file has.

        Raises:
            ValueError: a key is missing, or says what the nemotron-nas format cannot express.
        """
        hidden_dim, num_blocks = int(self._required("embedding_length")), int(self._required("block_count"))
        heads = self._per_block("attention.head_count", num_blocks)
        kv_heads = self._per_block("attention.head_count_kv", num_blocks, default=heads)
        widths = self._per_block("feed_forward_length", num_blocks)
        num_heads = max(heads)
        require(
            num_heads > 0 and set(heads) <= {0, num_heads},
            f"model.source={self._source} has {sorted(set(heads))} attention heads in its blocks; one count is needed",
        )
        blocks = tuple(
            BlockConfig(attention=_attention(*counts), ffn=_ffn(width), parent_block_indices=(index,))
            for index, (*counts, width) in enumerate(zip(heads, kv_heads, widths, strict=True))
        )
        padded = tuple(
            None if width == (block.ffn.ffn_dim or 0) else width for width, block in zip(widths, blocks, strict=True)
        )
        embedding = self._tensors.get("token_embd.weight")
        require(embedding is not None, f"model.source={self._source} has no tensor token_embd.weight; is it complete?")
        assert embedding is not None
        has_bias = any(name.endswith("attn_q.bias") for name in self._tensors)
        head_dim = int(self._get("attention.key_length") or hidden_dim // num_heads)
        self._require_whole_heads(head_dim)
        architecture = Architecture(
            vocab_size=int(embedding.shape[1]),
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            head_dim=head_dim,
            blocks=blocks,
            max_positions=int(self._required("context_length")),
            rope=self._rope(head_dim),
            norm_eps=_short(self._required("attention.layer_norm_rms_epsilon")),
            tie_embeddings="output.weight" not in self._tensors,
            qkv_bias=self._name == "qwen2" or (self._name == "deci" and has_bias),
            qk_norm=self._name == "qwen3",
            family="qwen2" if self._name == "deci" and has_bias else self._name.replace("deci", "llama"),
            source_ffn_dim=padded[0] if len(set(padded)) == 1 else None,
            token_ids={name: self._field(key) for name, key in _TOKEN_IDS.items()},
        )
        return ParentLayout(architecture=architecture, ffn_dims=padded)

    def _require_whole_heads(self, head_dim: int) -> None:
        for key in ("attention.value_length", "rope.dimension_count"):
            value = self._get(key)
            require(
                value is None or int(value) == head_dim,
                f"model.source={self._source} has {self._name}.{key}={value} where heads have {head_dim} channels; "
                f"both must be equal; {_INSTEAD}",
            )

    def _rope(self, head_dim: int) -> RopeConfig:
        kind = self._get("rope.scaling.type") or "none"
        require(
            kind in ("none", "linear", "yarn"),
            f"model.source={self._source} has rotary scaling {kind}, not none, linear or yarn; {_INSTEAD}",
        )
        theta = _short(self._get("rope.freq_base") or 10_000.0)
        factors = self._tensors.get(ROPE_FACTORS)
        if factors is not None:
            require(
                kind == "none", f"model.source={self._source} has both {ROPE_FACTORS} and scaling {kind}; {_INSTEAD}"
            )
            return self._llama3(theta, np.asarray(factors.data, dtype=np.float64), head_dim)
        if kind == "none":
            return RopeConfig(theta=theta)
        factor = _short(self._required("rope.scaling.factor"))
        if kind == "linear":
            return RopeConfig(theta=theta, kind="linear", factor=factor)
        original = int(self._required("rope.scaling.original_context_length"))
        return RopeConfig(theta=theta, kind="yarn", factor=factor, original_max_positions=original)

    def _llama3(self, theta: float, factors: np.ndarray, head_dim: int) -> RopeConfig:
        """The llama3 scaling that ``factors [head_dim / 2]`` were worked out from."""
        if (factors == 1).all():
            return RopeConfig(theta=theta)
        # The file's factors went through fp32, so that the largest may be 7.9999995.
        rope = replace(_LLAMA3, theta=theta, factor=float(f"{factors.max():.5g}"))
        expected = _llama3_factors(rope, head_dim)
        require(
            factors.shape == expected.shape and np.allclose(factors, expected, rtol=_LLAMA3_TOLERANCE, atol=0),
            f"model.source={self._source} has {ROPE_FACTORS} that are not those of llama3 scaling of 8192 positions; "
            f"{_INSTEAD}",
        )
        return rope

    def _per_block(self, key: str, num_blocks: int, *, default: list[int] | None = None) -> list[int]:
        value = self._required(key) if default is None else self._get(key)
        if value is None:
            assert default is not None
            return default
        values = [int(one) for one in value] if isinstance(value, list) else [int(value)] * num_blocks
        require(
            len(values) == num_blocks,
            f"model.source={self._source} has {len(values)} values of {self._name}.{key} for {num_blocks} blocks",
        )
        return values

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _get(self, key: str) -> Any:
        return self._field(f"{self._name}.{key}")

    def _required(self, key: str) -> Any:
        value = self._get(key)
        require(value is not None, f"model.source={self._source} has no {self._name}.{key}; is the file complete?")
        return value


def _attention(num_heads: int, num_kv_heads: int) -> AttentionConfig:
    if num_heads == 0:
        return NO_ATTENTION
    return AttentionConfig(num_kv_heads=num_kv_heads) if num_kv_heads else AttentionConfig(kind="linear")


def _ffn(width: int) -> FFNConfig:
    return FFNConfig(ffn_dim=round_up_ffn_dim(width)) if width else NO_FFN


def _llama3_factors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """What llama3 scaling divides the base frequencies by, [head_dim / 2].

    Wavelengths beyond the original positions are stretched by the whole factor, short ones not at all, and between the
    two bounds the frequency is mixed linearly (Llama 3.1's model card).
    """
    assert rope.factor is not None
    assert rope.low_freq_factor is not None
    assert rope.high_freq_factor is not None
    assert rope.original_max_positions is not None
    wavelengths = 2 * np.pi * rope.theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope.original_max_positions / wavelengths
    whole = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return 1 / ((1 - whole) / rope.factor + whole)


def _short(value: float) -> float:
    """The shortest decimal that is this fp32 number: GGUF holds 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))

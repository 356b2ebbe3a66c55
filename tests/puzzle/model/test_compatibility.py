from __future__ import annotations

from dataclasses import replace

import pytest

from distill.config import RopeConfig
from puzzle.config import ExportConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.compatibility import TARGETS, compatibility

LLAMA3 = RopeConfig(
    theta=5e5, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
)
KV2, KV1 = AttentionConfig(num_kv_heads=2), AttentionConfig(num_kv_heads=1)
FFN = FFNConfig(ffn_dim=512)


def _cannot(architecture: Architecture) -> set[str]:
    return {report.target for report in compatibility(architecture) if report.status == "cannot"}


def _with(architecture: Architecture, index: int, attention: AttentionConfig, ffn: FFNConfig) -> Architecture:
    block = BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(index,))
    return architecture.with_block(index, block)


@pytest.fixture
def safe(pico_architecture: Architecture) -> Architecture:
    """The intersection that every engine loads: Llama-shaped, one KV head count, llama3 scaling."""
    return replace(pico_architecture, rope=LLAMA3)


def test_targets_are_those_of_the_configuration() -> None:
    assert ExportConfig(targets=TARGETS).targets == TARGETS


def test_llama_with_pruned_attention_loads_everywhere(safe: Architecture) -> None:
    pruned = _with(_with(safe, 1, NO_ATTENTION, FFNConfig(ffn_dim=1024)), 3, NO_ATTENTION, FFN)
    assert [report.target for report in compatibility(pruned)] == list(TARGETS)
    assert _cannot(pruned) == set()


@pytest.mark.parametrize(
    ("index", "attention", "ffn", "cannot"),
    [
        (0, NO_ATTENTION, FFN, {"vllm", "sglang", "llama_cpp", "megatron"}),
        (1, KV1, FFN, {"sglang", "megatron"}),
        (1, AttentionConfig(kind="linear"), FFN, {"vllm", "sglang", "mlx", "megatron"}),
        (1, KV2, FFNConfig(kind="linear"), {"vllm", "sglang", "llama_cpp", "mlx", "megatron"}),
        (1, KV2, NO_FFN, {"llama_cpp"}),
        (1, NO_ATTENTION, NO_FFN, set()),
        (3, NO_ATTENTION, NO_FFN, {"llama_cpp"}),
    ],
)
def test_blocks_that_readers_refuse(
    safe: Architecture, index: int, attention: AttentionConfig, ffn: FFNConfig, cannot: set[str]
) -> None:
    assert _cannot(_with(safe, index, attention, ffn)) == cannot


@pytest.mark.parametrize(
    ("changed", "cannot"),
    [
        ({"qk_norm": True}, {"vllm", "sglang", "llama_cpp", "mlx", "megatron"}),
        ({"qkv_bias": True}, {"sglang", "llama_cpp", "mlx", "megatron"}),
        ({"head_dim": 32}, {"llama_cpp", "mlx", "megatron"}),
        ({"sliding_window": 16}, {"sglang", "llama_cpp", "mlx", "megatron"}),
        ({"sliding_window": 256}, set()),
        ({"rope": RopeConfig(theta=1e4)}, {"megatron"}),
        ({"rope": RopeConfig(theta=1e4, kind="linear", factor=2.0)}, {"llama_cpp", "megatron"}),
        ({"tie_embeddings": True}, set()),
    ],
)
def test_settings_that_readers_refuse(safe: Architecture, changed: dict[str, object], cannot: set[str]) -> None:
    assert _cannot(replace(safe, **changed)) == cannot


def test_every_reason_is_given(safe: Architecture) -> None:
    architecture = _with(_with(safe, 1, KV1, FFN), 2, AttentionConfig(kind="linear"), FFN)
    (sglang,) = (report for report in compatibility(architecture) if report.target == "sglang")
    assert len(sglang.reasons) == 2
    assert "different KV head counts" in sglang.reasons[0]
    assert sglang.as_json()["status"] == "cannot"


def test_llama_cpp_warns_of_a_vocabulary_that_is_not_llama_3s(safe: Architecture) -> None:
    def notes(vocab_size: int) -> tuple[str, ...]:
        reports = compatibility(replace(safe, vocab_size=vocab_size))
        return next(report.notes for report in reports if report.target == "llama_cpp")

    assert notes(128_256) == ()
    assert "SentencePiece" in notes(49_152)[0]

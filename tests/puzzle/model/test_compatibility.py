from __future__ import annotations

from dataclasses import replace

import pytest

from distill.config import RopeConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.compatibility import compatibility, report, require_loadable
from puzzle.model.config import ExportConfig
from puzzle.model.rewrites import kept_blocks, rewritten
from puzzle.model.targets import TARGETS, Target

LLAMA3 = RopeConfig(
    theta=5e5, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)
KV4, KV2, KV1 = (AttentionConfig(num_kv_heads=heads) for heads in (4, 2, 1))
LINEAR = AttentionConfig(kind="linear")
FFN = FFNConfig(ffn_dim=512)
ALL = set(TARGETS)


def _status(architecture: Architecture, status: str) -> set[str]:
    return {report.target for report in compatibility(architecture) if report.status == status}


def _with(architecture: Architecture, index: int, attention: AttentionConfig, ffn: FFNConfig) -> Architecture:
    block = BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(index,))
    return architecture.with_block(index, block)


def _form(target: Target, architecture: Architecture) -> list[str]:
    return [block.name for block in rewritten(target, architecture)[0].blocks]


@pytest.fixture
def safe(pico_architecture: Architecture) -> Architecture:
    """The intersection that every engine loads: Llama-shaped, one KV head count, Llama 3's scaling."""
    return replace(pico_architecture, rope=LLAMA3)


def test_targets_are_those_of_the_configuration() -> None:
    assert ExportConfig(targets=TARGETS).targets == TARGETS


def test_llama_with_pruned_attention_loads_everywhere_as_it_is(safe: Architecture) -> None:
    pruned = _with(_with(safe, 1, NO_ATTENTION, FFNConfig(ffn_dim=1024)), 3, NO_ATTENTION, FFN)
    assert [report.target for report in compatibility(pruned)] == list(TARGETS)
    assert _status(pruned, "loads") == ALL


@pytest.mark.parametrize(
    ("index", "attention", "ffn", "cannot", "loads_rewritten"),
    [
        (0, NO_ATTENTION, FFN, set(), {"vllm", "sglang", "llama_cpp", "megatron"}),
        (1, KV1, FFN, set(), {"sglang", "megatron"}),
        (1, replace(KV2, rope=False), FFN, ALL - {"transformers"}, set()),
        (1, LINEAR, FFN, {"vllm", "sglang", "mlx", "megatron"}, set()),
        (0, LINEAR, FFN, {"vllm", "sglang", "mlx", "megatron"}, set()),
        (1, KV2, FFNConfig(kind="linear"), {"vllm", "sglang", "llama_cpp", "mlx", "megatron"}, set()),
        (1, KV2, NO_FFN, set(), {"llama_cpp"}),
        (1, NO_ATTENTION, NO_FFN, set(), ALL),
        (3, NO_ATTENTION, NO_FFN, set(), ALL),
    ],
)
def test_blocks_that_readers_refuse_or_get_rewritten(
    safe: Architecture,
    index: int,
    attention: AttentionConfig,
    ffn: FFNConfig,
    cannot: set[str],
    loads_rewritten: set[str],
) -> None:
    model = _with(safe, index, attention, ffn)
    assert _status(model, "cannot") == cannot
    assert _status(model, "loads_rewritten") == loads_rewritten


@pytest.mark.parametrize(
    ("changed", "cannot"),
    [
        ({"qk_norm": True}, {"vllm", "sglang", "llama_cpp", "mlx", "megatron"}),
        ({"parallel_windows": ((1, 2),)}, {"vllm", "sglang", "llama_cpp", "mlx", "megatron"}),
        ({"qkv_bias": True}, {"sglang", "mlx", "megatron"}),
        ({"head_dim": 32}, {"mlx", "megatron"}),
        ({"sliding_window": 16}, {"sglang", "llama_cpp", "mlx", "megatron"}),
        ({"sliding_window": 256}, set()),
        ({"rope": RopeConfig(theta=1e4)}, set()),
        ({"rope": RopeConfig(theta=1e4, kind="linear", factor=2.0)}, {"megatron"}),
        ({"rope": RopeConfig(theta=1e4, kind="yarn", factor=2.0, original_max_positions=128)}, {"megatron"}),
        ({"rope": replace(LLAMA3, original_max_positions=64)}, {"megatron"}),
        ({"rope": replace(LLAMA3, theta=1234.5)}, {"megatron"}),
        ({"tie_embeddings": True}, set()),
    ],
)
def test_settings_that_readers_refuse(safe: Architecture, changed: dict[str, object], cannot: set[str]) -> None:
    assert _status(replace(safe, **changed), "cannot") == cannot


def test_every_reason_is_given(safe: Architecture) -> None:
    found = report("sglang", replace(_with(safe, 2, LINEAR, FFN), qkv_bias=True))
    assert len(found.reasons) == 2
    assert "biases" in found.reasons[0]
    assert "linear layer" in found.reasons[1]
    assert found.as_json()["status"] == "cannot"


def test_refusal_names_key_engines_reasons_and_way_out(safe: Architecture) -> None:
    expected = r"search\.targets: vllm cannot load this model: .*normalised.*; mlx cannot .*; leave vllm, mlx out of"
    with pytest.raises(ValueError, match=expected):
        require_loadable(replace(safe, qk_norm=True), ("transformers", "vllm", "mlx"), name="search.targets")
    require_loadable(replace(safe, qk_norm=True), ("transformers",), name="search.targets")


def test_dummies_are_dropped_and_windows_follow(safe: Architecture) -> None:
    model = replace(_with(_with(safe, 0, NO_ATTENTION, NO_FFN), 3, KV2, FFN), parallel_windows=((2, 3),))
    form, done = rewritten("transformers", model)
    assert kept_blocks(model) == (1, 2, 3)
    assert [block.parent_block_indices for block in form.blocks] == [(1,), (2,), (3,)]
    assert form.parallel_windows == ((1, 2),)
    assert [what for _, what in done] == ["without the 1 dummy block 0"]


def test_block_0_gets_the_smallest_attention_that_the_model_has(safe: Architecture) -> None:
    model = _with(_with(safe, 0, NO_ATTENTION, FFN), 2, KV1, FFN)
    assert _form("vllm", model) == ["kv1+w512", "kv2+w512", "kv1+w512", "kv2+w512"]
    assert _form("mlx", model) == [block.name for block in model.blocks]
    assert "block 0 with an attention of zeros and 1 KV heads" in report("vllm", model).rewrites


def test_model_without_attention_gets_one_wherever_a_reader_counts_on_it(safe: Architecture) -> None:
    model = safe
    for index in range(4):
        model = _with(model, index, NO_ATTENTION, FFN)
    assert _status(model, "loads") == {"transformers"}
    assert all(_form(target, model)[0] == "kv1+w512" for target in ALL - {"transformers"})


def test_model_of_dummies_alone_stays_a_model(safe: Architecture) -> None:
    model = safe
    for index in range(4):
        model = _with(model, index, NO_ATTENTION, NO_FFN)
    assert kept_blocks(model) == (0, 1, 2, 3)
    assert _form("llama_cpp", model) == ["kv1+w256", "no_op+w256", "no_op+w256", "no_op+w256"]


def test_kv_heads_become_their_least_common_multiple(safe: Architecture) -> None:
    model = _with(_with(safe, 1, KV1, FFN), 2, KV4, NO_FFN)
    assert _form("megatron", model) == ["kv4+w512", "kv4+w512", "kv4+no_op", "kv4+w512"]
    twelve = replace(model, num_heads=12, hidden_dim=192)
    assert _form("sglang", _with(twelve, 1, AttentionConfig(num_kv_heads=3), FFN))[0] == "kv12+w512"
    (what,) = report("sglang", model).rewrites
    assert what.startswith("KV heads repeated to 4 in every attention (they were 1, 2, 4)")

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml

from distill.config import EngineConfig, RopeConfig
from distill.engine.dealing import StepShape, num_model_ranks
from distill.engine.layout import check_layout
from puzzle.model.architecture import Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.parallelism import num_real_blocks, refuses

# The pico parent: 4 heads, 2 KV heads, FFN 512, vocabulary 320. The heterogeneous model: KV heads 2 and 1, FFNs 512 and
# 256, six blocks of which one is a dummy.


def _check(architecture: Architecture, engine: EngineConfig, *, world_size: int | None = None) -> None:
    """At the processes that the settings ask for, unless stated, and sizes that everything divides."""
    processes = world_size or num_model_ranks(engine)
    shape = StepShape(node="distill", batch_size=processes, seq_len=720_720 * 512)
    check_layout(engine, world_size=processes, steps=[shape], models=[refuses(architecture, role="student")])


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_parallel": 2},
        # Two KV heads over four ranks: each is repeated.
        {"sequence_parallel": 4},
        {"name": "megatron", "tensor_parallel": 4},
        {"name": "megatron", "tensor_parallel": 2, "pipeline_parallel": 4},
    ],
)
def test_models_that_can_be_dealt(
    pico_architecture: Architecture, heterogeneous_architecture: Architecture, options: dict[str, Any]
) -> None:
    for architecture in (pico_architecture, heterogeneous_architecture):
        _check(architecture, EngineConfig(**options))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {},
            {"sequence_parallel": 3},
            "engine.sequence_parallel=3: it does not divide the 4 attention heads of the student; "
            "set engine.sequence_parallel=2 or 4",
        ),
        ({}, {"sequence_parallel": 8}, r"does not divide the 4 attention heads .*set engine.sequence_parallel=4$"),
        (
            {"sliding_window": 128},
            {"sequence_parallel": 2},
            r"128 tokens that attention looks back .*sequence_parallel=1$",
        ),
        (
            {"num_heads": 6, "vocab_size": 510},
            {"name": "megatron", "tensor_parallel": 3},
            r"engine.tensor_parallel=3: the 2 KV heads of block 0 are neither a multiple .*tensor_parallel=2$",
        ),
        (
            {"vocab_size": 321},
            {"name": "megatron", "tensor_parallel": 2},
            r"engine.tensor_parallel=2: it does not divide the vocabulary of 321 rows of the student; "
            r"set engine.tensor_parallel=1$",
        ),
        (
            {},
            {"name": "megatron", "pipeline_parallel": 5},
            r"engine.pipeline_parallel=5: more stages than the 4 blocks with attention or FFN of the student; "
            r"set engine.pipeline_parallel=4",
        ),
        (
            {"parallel_windows": ((1, 2),)},
            {"name": "megatron"},
            r"the student runs blocks 1-2 in parallel; set engine.name=torch engine.shard=true",
        ),
    ],
)
def test_models_that_cannot_be_dealt_name_the_nearest_setting(
    pico_architecture: Architecture, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _check(replace(pico_architecture, **changes), EngineConfig(**options), world_size=120)
    assert "\n" not in str(caught.value)


def test_ffn_widths_and_heads_of_every_block_count(heterogeneous_architecture: Architecture) -> None:
    wide = replace(heterogeneous_architecture, num_heads=512, vocab_size=512, hidden_dim=512)
    with pytest.raises(ValueError, match=r"does not divide the 256 channels of the FFN in block 1 .*=256$"):
        _check(wide, EngineConfig(name="megatron", tensor_parallel=512))


def test_a_model_without_attention_needs_no_heads(heterogeneous_architecture: Architecture) -> None:
    attention_free = replace(heterogeneous_architecture, blocks=heterogeneous_architecture.blocks[1:3])
    _check(attention_free, EngineConfig(sequence_parallel=3))


def test_megatron_asks_for_heads_and_rows_where_blocks_have_no_heads(
    heterogeneous_architecture: Architecture,
) -> None:
    linear = replace(
        heterogeneous_architecture.blocks[0], attention=AttentionConfig(kind="linear"), ffn=FFNConfig(kind="linear")
    )
    headless = replace(heterogeneous_architecture, blocks=(linear,), num_heads=6, vocab_size=512)
    with pytest.raises(ValueError, match=r"=4: it does not divide the 6 attention heads .*tensor_parallel=2$"):
        _check(headless, EngineConfig(name="megatron", tensor_parallel=4))
    odd = replace(headless, num_heads=4, hidden_dim=66)
    with pytest.raises(ValueError, match=r"divide the 66 rows of the linear replacement in block 0 .*=2$"):
        _check(odd, EngineConfig(name="megatron", tensor_parallel=4))


def test_dummies_are_no_stage(heterogeneous_architecture: Architecture) -> None:
    assert num_real_blocks(heterogeneous_architecture) == 5
    with pytest.raises(ValueError, match="more stages than the 5 blocks"):
        _check(heterogeneous_architecture, EngineConfig(name="megatron", pipeline_parallel=6))


# Heads, KV heads, vocabulary, FFN widths: SmolLM2-135M and Llama shapes, and some that few numbers divide.
SHAPES = [
    (9, 3, 49_152, (1536,)),
    (9, 3, 49_152, (1536, 768)),
    (32, 8, 128_256, (8192, 2560)),
    (24, 8, 128_256, (8192,)),
    (24, 8, 50_257, (8192,)),
    (32, 8, 32_004, (8192, 11_008)),
]
SIZES = list(itertools.product(range(1, 9), (1, 4, 6, 8), (63, 1000, 4096)))
"""Processes, sequences, tokens per sequence."""


def _shaped(heads: int, kv_heads: int, vocab_size: int, widths: tuple[int, ...]) -> Architecture:
    blocks = tuple(
        BlockConfig(
            attention=AttentionConfig(num_kv_heads=kv_heads),
            ffn=FFNConfig(ffn_dim=width),
            parent_block_indices=(index,),
        )
        for index, width in enumerate((*widths, widths[0]))
    )
    return Architecture(
        vocab_size=vocab_size,
        hidden_dim=64 * heads,
        num_heads=heads,
        head_dim=64,
        blocks=blocks,
        max_positions=4096,
        rope=RopeConfig(theta=10_000.0),
    )


def _engines(megatron_pairs: Iterable[tuple[int, int]]) -> Iterator[EngineConfig]:
    for ranks in (1, 2, 3, 4, 6, 8):
        yield EngineConfig(sequence_parallel=ranks)
    for tensor, pipeline in megatron_pairs:
        yield EngineConfig(name="megatron", tensor_parallel=tensor, pipeline_parallel=pipeline)


def _suggestions(message: str) -> Iterator[dict[str, str]]:
    """Every way out that ``message`` names: setting -> value, with ``processes``."""
    ways = message.rpartition("; ")[2].partition(" (torchrun")[0]
    for way in ways.split(", or "):
        settings, _, start = way.removeprefix("set ").partition(" and start ")
        if settings.startswith("start "):
            settings, start = "", settings.removeprefix("start ")
        fixed = {"processes": start.split()[0]} if start else {}
        name, _, values = settings.partition("=")
        if " or " in values:
            yield from ({**fixed, name: value} for value in values.split(" or "))
        else:
            yield {**fixed, **dict(text.split("=") for text in settings.split())}


def _checked(architecture: Architecture, engine: EngineConfig, world_size: int, batch_size: int, seq_len: int) -> None:
    shape = StepShape(node="distill", batch_size=batch_size, seq_len=seq_len, max_seq_len=4096)
    check_layout(engine, world_size=world_size, steps=[shape], models=[refuses(architecture)])


def _refusal(
    architecture: Architecture, engine: EngineConfig, world_size: int, batch_size: int, seq_len: int
) -> str | None:
    try:
        _checked(architecture, engine, world_size, batch_size, seq_len)
    except ValueError as error:
        return str(error)
    return None


def _applied(engine: EngineConfig, settings: dict[str, str]) -> EngineConfig:
    given = {name.removeprefix("engine."): yaml.safe_load(text) for name, text in settings.items() if "engine." in name}
    return replace(engine, **given)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_suggested_settings_work(shape: tuple[int, int, int, tuple[int, ...]]) -> None:
    architecture, refused = _shaped(*shape), 0
    for engine in _engines([(1, 2), (1, 5), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (8, 1)]):
        for world_size, batch_size, seq_len in SIZES:
            message = _refusal(architecture, engine, world_size, batch_size, seq_len)
            if message is None:
                continue
            refused += 1
            for way in _suggestions(message):
                others = _refusal(
                    architecture,
                    _applied(engine, way),
                    int(way.get("processes", world_size)),
                    int(way.get("distill.batch_size", batch_size)),
                    int(way.get("distill.seq_len", seq_len)),
                )
                assert others is None, f"{message} -> {way} -> {others}"
    assert refused > 100


def test_three_heads_and_two_processes_are_no_loop() -> None:
    """Heads ask for 3 and processes for 2: 1 is left."""
    smollm = _shaped(*SHAPES[0])
    for ranks, processes, settings in (
        (2, 2, "engine.sequence_parallel=1"),
        (3, 2, "engine.sequence_parallel=1, or start 3 processes"),
        (4, 4, "engine.sequence_parallel=1"),
        (2, 6, "engine.sequence_parallel=1 or 3"),
    ):
        with pytest.raises(ValueError, match=rf"; set {settings}( \(torchrun .*)?$"):
            _checked(smollm, EngineConfig(sequence_parallel=ranks), processes, 12, 1024 * 3)
        tensor = settings.replace("sequence", "tensor")
        with pytest.raises(ValueError, match=rf"; set {tensor}( \(torchrun .*)?$"):
            _checked(smollm, EngineConfig(name="megatron", tensor_parallel=ranks), processes, 12, 1024 * 3)


def test_a_model_that_megatron_cannot_build_gets_an_engine_that_can(pico_architecture: Architecture) -> None:
    windows = replace(pico_architecture, parallel_windows=((1, 2),))
    engine = EngineConfig(name="megatron", tensor_parallel=2)
    for processes, batch_size, further in ((2, 4, ""), (2, 3, " distill.batch_size=2"), (3, 6, "")):
        with pytest.raises(ValueError, match=r"; set engine.name=torch .*, or engine.name=deepspeed ") as caught:
            _checked(windows, engine, processes, batch_size, 1024)
        whole = f"engine.tensor_parallel=1{further}"
        assert (
            str(caught.value)
            .split(" (torchrun")[0]
            .endswith(f"; set engine.name=torch engine.shard=true {whole}, or engine.name=deepspeed {whole}")
        )
        for way in _suggestions(str(caught.value)):
            _checked(windows, _applied(engine, way), processes, int(way.get("distill.batch_size", batch_size)), 1024)

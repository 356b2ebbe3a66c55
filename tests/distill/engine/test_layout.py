from __future__ import annotations

from typing import Any

import pytest

from distill.config import EngineConfig, ObjectiveConfig
from distill.engine.base import ENGINES
from distill.engine.dealing import StepShape, around, num_model_ranks
from distill.engine.layout import check_layout, check_objective_memory, check_options


@pytest.mark.parametrize(
    ("options", "world_size"),
    [
        ({}, 1),
        ({}, 8),
        ({"shard": True, "offload_optimizer": True, "compile": True}, 2),
        ({"sequence_parallel": 4, "recompute": True, "offload_activations": True}, 8),
        ({"name": "deepspeed", "zero_stage": 3, "offload_optimizer": True, "sequence_parallel": 2}, 4),
        ({"teacher_device": "cuda:1"}, 1),
        ({"name": "megatron", "tensor_parallel": 2, "pipeline_parallel": 2, "recompute": True}, 8),
    ],
)
def test_layouts_that_work(options: dict[str, Any], world_size: int) -> None:
    check_layout(EngineConfig(**options), world_size=world_size, steps=[_shape(batch_size=8, seq_len=64)])


def _shape(**sizes: Any) -> StepShape:
    return StepShape(node="distill", **sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "deepspeed", "shard": True},
            r"engine.shard=true is no option of engine.name=deepspeed; .*zero_stage=3",
        ),
        ({"name": "megatron", "offload_optimizer": True}, r"engine.offload_optimizer=true is no option .*=megatron"),
        ({"name": "megatron", "ffn_tile_tokens": 512}, r"engine.ffn_tile_tokens=512 is no option .*set it to 0"),
        ({"name": "megatron", "sequence_parallel": 2}, r"engine.tensor_parallel=2 engine.sequence_parallel=1"),
        ({"tensor_parallel": 2}, r"set engine.name=megatron, or both to 1 and engine.shard=true"),
        (
            {"name": "deepspeed", "pipeline_parallel": 2},
            r"set engine.name=megatron, or both to 1 and engine.zero_stage=3",
        ),
        ({"offload_activations": True}, r"set engine.recompute=true"),
        ({"teacher_device": "gpu1"}, r"engine.teacher_device=gpu1 is not a place; give same, cpu or .* cuda:1"),
        ({"name": "megatron", "teacher_device": "cpu"}, r"set engine.teacher_device=same"),
    ],
)
def test_options_that_an_engine_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_options(EngineConfig(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "step", "message"),
    [
        (
            {},
            {"world_size": 4, "batch_size": 6, "seq_len": 64},
            r"distill.batch_size=6 cannot be dealt evenly over 4 data ranks \(4 processes\); "
            r"set distill.batch_size=4 or 8, or start 3 processes",
        ),
        ({}, {"world_size": 8, "batch_size": 2, "seq_len": 64}, r"set distill.batch_size=8, or start 2 processes"),
        (
            {"sequence_parallel": 2},
            {"world_size": 8, "batch_size": 6, "seq_len": 64},
            r"over 4 data ranks \(8 processes, 2 to a sequence\); set distill.batch_size=4 or 8, or start 6 processes",
        ),
        (
            {"sequence_parallel": 3},
            {"world_size": 4, "batch_size": 4, "seq_len": 72},
            r"engine.sequence_parallel=3 needs a multiple of 3 processes, got 4; set engine.sequence_parallel=2 or 4, "
            r"or start 3 processes",
        ),
        (
            # Neither 2 nor 4 divides the sequence.
            {"sequence_parallel": 3},
            {"world_size": 4, "batch_size": 4, "seq_len": 63},
            r"got 4; set engine.sequence_parallel=1, or start 3 processes",
        ),
        (
            # 4096 tokens have no three parts, and neither have the 6 processes four.
            {"sequence_parallel": 4},
            {"world_size": 6, "batch_size": 6, "seq_len": 4096},
            r"got 6; set engine.sequence_parallel=2, or start 4 processes",
        ),
        (
            {"sequence_parallel": 2},
            {"world_size": 5, "batch_size": 8, "seq_len": 64},
            r"got 5; set engine.sequence_parallel=1 distill.batch_size=5, or start 4 processes",
        ),
        (
            {"sequence_parallel": 3},
            {"world_size": 6, "batch_size": 5, "seq_len": 4096},
            r"seq_len=4096 does not divide; set distill.batch_size=4 distill.seq_len=4095$",
        ),
        (
            {"sequence_parallel": 3},
            {"world_size": 6, "batch_size": 6, "seq_len": 4096},
            r"does not divide; set distill.seq_len=4095 or 4098, or engine.sequence_parallel=2$",
        ),
        (
            {"teacher_device": "cuda:1", "sequence_parallel": 2},
            {"world_size": 3, "batch_size": 6, "seq_len": 64},
            r"got 3; set engine.sequence_parallel=1 engine.teacher_device=same$",
        ),
        (
            {"sequence_parallel": 4},
            {"world_size": 4, "batch_size": 4, "seq_len": 66},
            r"engine.sequence_parallel=4 splits every sequence .* distill.seq_len=66 .*set distill.seq_len=64 or 68",
        ),
        (
            {"name": "megatron", "tensor_parallel": 4, "pipeline_parallel": 2},
            {"world_size": 4, "batch_size": 4, "seq_len": 64},
            r"engine.tensor_parallel=4 x engine.pipeline_parallel=2 needs a multiple of 8 processes, got 4; "
            r"set engine.pipeline_parallel=1, or start 8 processes",
        ),
        (
            {"teacher_device": "cuda:1"},
            {"world_size": 2, "batch_size": 4, "seq_len": 64},
            r"would put the teachers of all 2 processes on one device; set engine.teacher_device=same or cpu",
        ),
        (
            {"name": "megatron", "tensor_parallel": 2},
            {"world_size": 2, "batch_size": 4, "seq_len": 63},
            r"engine.tensor_parallel=2 splits every sequence .* set distill.seq_len=62 or 64",
        ),
    ],
)
def test_what_cannot_be_dealt_names_the_nearest_that_can(
    options: dict[str, Any], step: dict[str, int], message: str
) -> None:
    sizes = {name: value for name, value in step.items() if name != "world_size"}
    with pytest.raises(ValueError, match=message) as caught:
        check_layout(EngineConfig(**options), world_size=step["world_size"], steps=[_shape(**sizes)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_tokens": 6 * 70}, r"set distill.seq_len=68, or engine.sequence_parallel=2$"),
        ({"max_seq_len": 70}, r"set distill.seq_len=68, or"),
        ({"min_seq_len": 70}, r"set distill.seq_len=72, or"),
        ({"min_seq_len": 70, "max_seq_len": 71}, r"divide; set engine.sequence_parallel=2$"),
    ],
)
def test_sizes_are_suggested_within_their_bounds(bounds: dict[str, int], message: str) -> None:
    shape = _shape(batch_size=6, seq_len=70, **bounds)
    with pytest.raises(ValueError, match=message):
        check_layout(EngineConfig(sequence_parallel=4), world_size=4, steps=[shape])


def test_a_suggestion_suits_every_phase() -> None:
    phases = [StepShape(node=f"phases.{index}", batch_size=6, seq_len=length) for index, length in enumerate((64, 66))]
    with pytest.raises(
        ValueError, match=r"phases.1.seq_len=66 does not divide; set phases.1.seq_len=64 or 68, or .*=2"
    ):
        check_layout(EngineConfig(sequence_parallel=4), world_size=12, steps=phases)
    # 4 processes would deal the first phase, and not the second.
    with pytest.raises(ValueError, match=r"got 6; set engine.sequence_parallel=2$"):
        check_layout(EngineConfig(sequence_parallel=4), world_size=6, steps=phases)


def test_the_last_resort_splits_nothing_and_starts_fewer_processes() -> None:
    whole = [lambda engine: "no part of it" if num_model_ranks(engine) > 1 else None]
    shape = _shape(batch_size=2, seq_len=64, max_tokens=128)
    with pytest.raises(ValueError, match=r"part of it; set engine.sequence_parallel=1 and start 2 processes$"):
        check_layout(EngineConfig(sequence_parallel=4), world_size=8, steps=[shape], models=whole)


@pytest.mark.parametrize("term", ["hidden_cosine", "hidden_mse"])
def test_offloading_what_hidden_terms_keep_is_refused(term: str) -> None:
    offload = EngineConfig(recompute=True, offload_activations=True)
    with pytest.raises(
        ValueError, match=rf"objective\.{term}=0\.5.* set objective=kld .*offload_activations=false"
    ) as e:
        check_objective_memory(offload, ObjectiveConfig(kld=1.0, **{term: 0.5}))
    assert "\n" not in str(e.value)
    check_objective_memory(offload, ObjectiveConfig(kld=1.0, lm=0.5))
    check_objective_memory(EngineConfig(recompute=True), ObjectiveConfig(hidden_cosine=1.0))


def test_sizes_next_to_a_number() -> None:
    assert around(64, 32) == (64,)
    assert around(70, 32) == (64, 96)
    assert around(10, 32) == (32,)


def test_ranks_that_share_sequences() -> None:
    assert num_model_ranks(EngineConfig()) == 1
    assert num_model_ranks(EngineConfig(sequence_parallel=2)) == 2
    assert num_model_ranks(EngineConfig(name="megatron", tensor_parallel=2, pipeline_parallel=3)) == 6


def test_every_engine_is_known() -> None:
    for name in ENGINES:
        check_options(EngineConfig(name=name))  # type: ignore[arg-type]

"""The planner's fullest moment against the peak of torch's own allocations in a real step of the torch engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill.config import EngineConfig, ObjectiveConfig, OptimConfig, RopeConfig
from distill.data.batch import Batch
from distill.engine.setup import TrainingSetup
from distill.engine.torch_engine import TorchEngine
from launch.plan_memory import training_memory
from launch.plan_step import Step
from puzzle.model.architecture import NO_ATTENTION, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import build_model, save_model
from puzzle.model.provider import DirectoryProvider

SEQ_LEN = 512
TOLERANCE = 0.06
"""Scalars, masks and rotary angles are not counted, and some gradients are freed a little earlier than planned."""
DENSE = ((True, 512),) * 6
FUSED = ((True, 512), (True, 256), (False, 2048), (False, 512), (True, 512))
NARROW = ((True, 256),) * 6
"""Whether a block has attention, and its FFN's width."""
# Small chunks: on the CPU products of chunks come out otherwise than on a GPU.
LM = ObjectiveConfig(lm=1.0, chunk_tokens=64)
KD = ObjectiveConfig(kld=1.0, chunk_tokens=64)
KD_COSINE = ObjectiveConfig(kld=1.0, hidden_cosine=1.0, chunk_tokens=64)


def architecture_of(blocks: tuple[tuple[bool, int], ...]) -> Architecture:
    return Architecture(
        vocab_size=512,
        hidden_dim=128,
        num_heads=4,
        head_dim=32,
        blocks=tuple(
            BlockConfig(
                attention=AttentionConfig(num_kv_heads=2) if attends else NO_ATTENTION,
                ffn=FFNConfig(ffn_dim=width),
                parent_block_indices=(index,),
            )
            for index, (attends, width) in enumerate(blocks)
        ),
        max_positions=4096,
        rope=RopeConfig(theta=10_000.0),
    )


def peak_bytes(runner: TorchEngine, batch: Batch, trace: Path) -> int:
    """What one step allocates at most, beside what stands before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        runner.step(batch, lr=1e-3)
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


def standing_bytes(runner: TorchEngine) -> int:
    """Weights and optimizer state of the student, and the teacher's weights."""
    tensors: list[Tensor] = list(runner.student.parameters())
    tensors += [value for state in runner._optimizer.state.values() for value in state.values() if value.ndim > 0]
    if runner._teachers.training is not None:
        tensors += runner._teachers.training.model.parameters()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("blocks", "objective", "settings"),
    [
        (DENSE, LM, {}),
        (FUSED, LM, {"recompute": True}),
        (FUSED, LM, {"recompute": True, "ffn_tile_tokens": 128}),
        (FUSED, LM, {"recompute": True, "ffn_tile_tokens": 8}),
        (NARROW, LM, {"shard": True, "recompute": True, "ffn_tile_tokens": 32}),
        (FUSED, KD, {}),
        (DENSE, KD_COSINE, {"recompute": True}),
        (FUSED, LM, {"shard": True, "recompute": True}),
        (DENSE, LM, {"precision": "bf16"}),
        (DENSE, LM, {"micro_batch_tokens": SEQ_LEN}),
    ],
    ids=[
        "plain",
        "recompute",
        "tiles",
        "tiled_norms",
        "attention",
        "kd",
        "kd_cosine",
        "shard",
        "autocast",
        "accumulation",
    ],
)
def test_a_step_allocates_what_is_planned(
    tmp_path: Path, blocks: tuple[tuple[bool, int], ...], objective: ObjectiveConfig, settings: dict[str, object]
) -> None:
    architecture = architecture_of(blocks)
    save_model(build_model(architecture, seed=0), tmp_path / "m", architecture=architecture, tokenizer_from=None)
    provider = DirectoryProvider(tmp_path / "m")
    engine = EngineConfig(device="cpu", **settings)  # type: ignore[arg-type]
    teacher = provider if objective.needs_teacher else None
    pairs = tuple(range(architecture.num_blocks)) if objective.compares_hidden else ()
    setup = TrainingSetup(student=provider, teacher=teacher, objective=objective, layer_map=pairs)
    batch_size = 2 if engine.micro_batch_tokens else 1
    runner = TorchEngine(setup, optim=OptimConfig(lr=1e-3), engine=engine, batch_size=batch_size, seq_len=SEQ_LEN)
    tokens = torch.randint(0, 512, (batch_size, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    runner.step(Batch.of(tokens), lr=1e-3)
    standing = standing_bytes(runner)
    planned = training_memory(
        Step(
            student=architecture,
            teacher=None if teacher is None else architecture,
            objective=objective,
            engine=engine,
            num_ranks=1,
            batch_size=batch_size,
            seq_len=SEQ_LEN,
        )
    )
    measured = standing + peak_bytes(runner, Batch.of(tokens), tmp_path / "trace.json")
    assert planned.total == pytest.approx(measured, rel=TOLERANCE), planned

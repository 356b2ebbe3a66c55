"""The planner's bytes against tensors that exist: what autograd saves, what engines hold; and against sums by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill import chunked_head, memory
from distill.config import EngineConfig, ObjectiveConfig, OptimConfig, ResumePointsConfig, TrainConfig
from distill.data.batch import Batch
from distill.engine import torch_state
from distill.engine.setup import TrainingSetup
from distill.engine.torch_engine import TorchEngine
from launch import plan_demands, plan_heads, plan_memory
from launch.plan_activations import Numerics, Shape, block_parts, widest_ffn
from launch.plan_advice import Limits, fits, nearest_fit, step_memory
from launch.plan_heads import chunk_rows, head_bytes
from launch.plan_megatron import megatron_memory, stage_params, stage_plan
from launch.plan_memory import training_memory
from launch.plan_models import known_architecture
from launch.plan_state import State, point_bytes, student_state, teacher_bytes
from launch.plan_step import Step
from launch.plan_time import Rates, step_flops, step_time
from puzzle import bld
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import build_model, save_model
from puzzle.model.megatron_layout import stage_layouts
from puzzle.model.provider import DirectoryProvider
from puzzle.model.stats import num_params
from puzzle.model.tensor_layout import tensor_shapes

TOKENS = 128
GQA, LINEAR = AttentionConfig(num_kv_heads=2), AttentionConfig(kind="linear")
WIDE, LINEAR_FFN = FFNConfig(ffn_dim=512), FFNConfig(kind="linear")
SUBBLOCKS = [(GQA, WIDE), (NO_ATTENTION, WIDE), (GQA, NO_FFN), (LINEAR, LINEAR_FFN)]
MODES = {
    "fp32": Numerics(residual=4, product=4),
    "bf16": Numerics(residual=2, product=2),
    "autocast": Numerics(residual=4, product=2),
}
KLD, LM = ObjectiveConfig(kld=1.0), ObjectiveConfig(lm=1.0)


def test_constants_are_those_of_the_engines() -> None:
    assert chunked_head.CHUNK_BYTES["cuda"] == plan_heads.CHUNK_BYTES
    assert memory.PIECE_BYTES == plan_memory.PIECE_BYTES
    assert bld.TRAINING_BYTES_PER_PARAM == plan_demands.TRAINEE_BYTES


def saved_bytes(model: nn.Module, mode: str) -> int:
    """Storages that autograd keeps of one block, without weights, casts of them and rotary angles."""
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    hidden = torch.randn(1, TOKENS, 64, dtype=dtype, requires_grad=True)
    inputs = model.model.attention_inputs(hidden)
    shared = [*model.parameters(), *(inputs["position_embeddings"] or ())]
    known = {tensor.untyped_storage().data_ptr() for tensor in shared}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"),
    ):
        model.model.layers[0](hidden, **inputs)
    block = model.model.layers[0]
    # Tiles forget theirs.
    cast = [module for module in (block.self_attn, block.mlp) if module is not None and "forward" not in vars(module)]
    casts = sum(2 * p.numel() for module in cast for p in module.parameters()) if mode == "autocast" else 0
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - casts


# Of 128 tokens: none in tiles, FFNs in tiles and norms not, both.
@pytest.mark.parametrize("tile_tokens", [0, 16, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("attention", "ffn"), SUBBLOCKS, ids=lambda part: part.name)
def test_activations_are_those_that_autograd_saves(
    pico_architecture: Architecture, attention: AttentionConfig, ffn: FFNConfig, mode: str, tile_tokens: int
) -> None:
    block = BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(0,))
    architecture = replace(pico_architecture, blocks=(block,))
    model = build_model(architecture, seed=0).train()
    if mode == "bf16":
        model = model.bfloat16()
    if tile_tokens > 0:
        memory.tile_ffns(model, tile_tokens)
    shape = Shape(tokens=TOKENS, seq_len=TOKENS, tile_tokens=tile_tokens, widest=widest_ffn(architecture))
    parts = block_parts(architecture, block, shape, MODES[mode])
    assert sum(part.saved for part in parts if part is not None) == saved_bytes(model, mode)


def test_tiles_keep_inputs_alone(pico_architecture: Architecture) -> None:
    block = BlockConfig(attention=NO_ATTENTION, ffn=WIDE, parent_block_indices=(0,))
    shape = Shape(tokens=TOKENS, seq_len=TOKENS, tile_tokens=8, widest=512)
    _, part = block_parts(pico_architecture, block, shape, MODES["bf16"])
    assert part is not None
    # Inputs of the norm and of the FFN, in bf16; one tile of 4 activations, 2 gradients and a norm; fp32 sums.
    assert part.saved == 2 * 2 * TOKENS * 64
    assert part.backward == 8 * (6 * 2 * 512 + 8 * 64 + 4) + 4 * (3 * 512 * 64 + 64)


@pytest.fixture
def directory(tmp_path: Path, heterogeneous_architecture: Architecture) -> Path:
    model = build_model(heterogeneous_architecture, seed=0)
    save_model(model, tmp_path / "model", architecture=heterogeneous_architecture, tokenizer_from=None)
    return tmp_path / "model"


@pytest.mark.parametrize("shard", [False, True])
def test_state_is_what_the_torch_engine_holds(
    directory: Path, heterogeneous_architecture: Architecture, shard: bool
) -> None:
    engine = EngineConfig(device="cpu", shard=shard)
    provider = DirectoryProvider(directory)
    setup = TrainingSetup(student=provider, teacher=provider, objective=KLD)
    runner = TorchEngine(setup, optim=OptimConfig(lr=1e-3), engine=engine, batch_size=2, seq_len=16)
    gradients: list[int] = []
    runner._optimizer.register_step_pre_hook(
        lambda optimizer, *_: gradients.extend(
            bytes_of(p.grad) for group in optimizer.param_groups for p in group["params"]
        )
    )
    runner.step(Batch.of(torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))), lr=1e-3)
    moments = sum(
        bytes_of(value) for state in runner._optimizer.state.values() for key, value in state.items() if key != "step"
    )
    planned = student_state(heterogeneous_architecture, engine, 1)
    assert planned.weights + planned.master == sum(bytes_of(p) for p in runner.student.parameters())
    assert planned.optimizer == moments
    assert planned.gradients == sum(gradients)
    teacher = runner._teachers.training.model
    assert teacher_bytes(heterogeneous_architecture, engine, 1) == sum(bytes_of(p) for p in teacher.parameters())


@pytest.mark.parametrize("shard", [False, True])
def test_a_resume_point_is_copied_with_the_planned_bytes(
    directory: Path, heterogeneous_architecture: Architecture, shard: bool
) -> None:
    engine = EngineConfig(device="cpu", shard=shard)
    setup = TrainingSetup(student=DirectoryProvider(directory), teacher=None, objective=LM)
    runner = TorchEngine(setup, optim=OptimConfig(lr=1e-3), engine=engine, batch_size=2, seq_len=16)
    state = torch_state.snapshot(runner.student, runner._optimizer, runner.device)
    counts = [name for name, tensor in state.tensors.items() if tensor.numel() == 1]
    copied = sum(bytes_of(tensor) for name, tensor in state.tensors.items() if name not in counts)
    assert all("step" in name for name in counts)
    assert copied == point_bytes(heterogeneous_architecture, 1) == 12 * num_params(heterogeneous_architecture)


def bytes_of(tensor: Tensor) -> int:
    """Of all elements, also of a tensor that is dealt over one rank."""
    return tensor.numel() * tensor.element_size()


def test_zero_states_by_hand(pico_architecture: Architecture) -> None:
    values = num_params(pico_architecture)
    engine = EngineConfig(name="deepspeed", precision="bf16")
    state = {stage: student_state(pico_architecture, replace(engine, zero_stage=stage), 4) for stage in (1, 2, 3)}
    assert state[1] == State(weights=2 * values, master=values, optimizer=2 * values, gradients=4 * values)
    # Two buckets of half a billion bf16 values.
    assert state[2] == State(weights=2 * values, master=values, optimizer=2 * values, gradients=values, buffers=2e9)
    assert state[3] == State(weights=values / 2, master=values, optimizer=2 * values, gradients=values, buffers=1e9)
    offloaded = student_state(pico_architecture, replace(engine, offload_optimizer=True), 4)
    assert offloaded.host == {"master weights": values, "optimizer": 2 * values, "gradients": values}
    assert offloaded.optimizer == 0


def test_logits_of_llama_3_by_hand() -> None:
    assert chunk_rows(8192, 128_256, 0) == 2048
    assert chunk_rows(8192, 128_256, 1000) == 911
    parts = head_bytes(8192, 128_256, 4096, KLD, MODES["bf16"], has_teacher=True)
    # Both models' in fp32 and their gradient in bf16; the head's gradient in fp32; that of the hidden states in bf16.
    assert parts["logits"] == 2048 * 128_256 * 10
    assert parts["gradients"] == 4 * 128_256 * 4096
    assert parts["activations"] == 2 * 8192 * 4096
    assert head_bytes(8192, 128_256, 4096, LM, MODES["bf16"], has_teacher=False)["logits"] == 2048 * 128_256 * 6


def step_on(architecture: Architecture, **engine: object) -> Step:
    return Step(
        student=architecture,
        objective=LM,
        engine=EngineConfig(**{"precision": "bf16", **engine}),  # type: ignore[arg-type]
        num_ranks=1,
        batch_size=1,
        seq_len=8192,
    )


def test_ddp_has_buckets_beside_its_gradients_by_hand(pico_architecture: Architecture) -> None:
    """In the first step's micro-batches, which accumulate outside of them, and where they are made anew."""
    values = num_params(pico_architecture)
    step = step_on(pico_architecture, micro_batch_tokens=8192)
    alone, pair = replace(step, batch_size=2), replace(step, batch_size=4, num_ranks=2)
    assert training_memory(pair).total - training_memory(alone).total == 4 * values
    short = training_memory(replace(step, batch_size=2, num_ranks=2, seq_len=2))
    assert short.moment == "buckets made anew"
    assert short.parts == {
        "weights": 4 * values,
        "optimizer": 8 * values,
        "gradients": 4 * values,
        "buffers": 4 * values,
    }


def test_the_fullest_moment_by_hand(pico_architecture: Architecture) -> None:
    """Autocast in one process: at the heads stand all that the blocks have saved, and bf16 copies of all weights."""
    memory = training_memory(step_on(pico_architecture))
    values, tokens = num_params(pico_architecture), 8192
    attention = 14 * 64 + 4 + 2 * (2 * 64 + 2 * 32) + 4 * 4
    ffn = 12 * 64 + 4 + 4 * 2 * 512
    # Final norm: input, normalised, output and inverse root mean square in fp32. Gradient of the heads' input in bf16,
    # and in fp32.
    ends = 12 * 64 + 4 + 6 * 64
    matrices = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 512 * 64) + 320 * 64
    assert memory.moment == "heads"
    assert memory.parts == {
        "weights": 4 * values,
        "optimizer": 8 * values,
        "weight casts": 2 * matrices,
        "activations": tokens * (4 * (attention + ffn) + ends),
        "logits": tokens * 320 * 6,
        "gradients": 4 * 320 * 64,
    }


@pytest.mark.parametrize(
    "change",
    [{"recompute": True}, {"shard": True}, {"offload_optimizer": True}, {"recompute": True, "ffn_tile_tokens": 1024}],
    ids=str,
)
def test_every_way_out_lowers_the_peak_of_a_large_model(change: dict[str, object]) -> None:
    model = known_architecture("llama-3.1-8b")
    assert model is not None
    assert training_memory(step_on(model, **change)).total < training_memory(step_on(model)).total


def test_offloaded_inputs_of_blocks_are_on_the_host(pico_architecture: Architecture) -> None:
    step = step_on(pico_architecture, recompute=True, offload_activations=True)
    # fp32 streams of 8,192 x 64 values are 2 MiB, which take a piece of 32 MiB each.
    assert training_memory(step).host == {"activations": 4 * 32 * 2**20}


@pytest.mark.parametrize("engine", [{}, {"shard": True}, {"name": "deepspeed"}], ids=str)
def test_the_ranks_share_the_copy_of_a_resume_point(pico_architecture: Architecture, engine: dict[str, object]) -> None:
    step = replace(step_on(pico_architecture, **engine), num_ranks=4, batch_size=4)
    beside = replace(step, background_points=True)
    assert training_memory(step).host == {}
    assert training_memory(beside).host == {"resume point's copy": 12 * num_params(pico_architecture) / 4}
    assert training_memory(beside).total == training_memory(step).total


def test_on_a_cpu_the_copy_lies_beside_the_model(pico_architecture: Architecture) -> None:
    step = step_on(pico_architecture, device="cpu")
    beside = training_memory(replace(step, background_points=True))
    assert beside.host == {}
    assert beside.total == training_memory(step).total + 12 * num_params(pico_architecture)


def test_a_megatron_rank_copies_its_part_of_the_stage_with_the_most_parameters(pico_architecture: Architecture) -> None:
    step = step_on(pico_architecture, name="megatron", tensor_parallel=2, pipeline_parallel=2)
    beside = megatron_memory(replace(step, num_ranks=8, batch_size=8, background_points=True))
    # Two of the four blocks and the final norm, and the tied table, on two tensor and two data ranks.
    blocks = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 512 * 64 + 2 * 64)
    assert beside.host == {"resume point's copy": 12 * (blocks + 320 * 64 + 64) / 4}


def test_cpu_memory_that_lacks_for_the_copy_is_named_with_the_way_out() -> None:
    model = known_architecture("llama-3.1-8b")
    assert model is not None
    step = step_on(model, shard=True, recompute=True, micro_batch_tokens=8192)
    step = replace(step, num_ranks=8, batch_size=8, background_points=True)
    # 8.03e9 parameters of 12 bytes: 90 GiB on the one node.
    limits = replace(GPU, host_bytes=80 * 2**30)
    assert fits(step, step_memory(step), GPU)
    assert not fits(step, step_memory(step), limits)
    assert nearest_fit(step, limits, node="distill") == "distill.resume_points.background=false"
    node = "extend_context.phases.1"
    assert nearest_fit(step, limits, node=node) == "extend_context.resume_points.background=false"
    # Over two nodes each has half.
    assert fits(replace(step, num_ranks=16, batch_size=16), step_memory(replace(step, num_ranks=16)), limits)


def train_config(*, newest: int = 2, every: int = 0, resume_every_tokens: int = 0) -> TrainConfig:
    """100 steps of 32 tokens."""
    points = ResumePointsConfig(newest=newest, every=every)
    return TrainConfig(
        max_tokens=3200, seq_len=16, batch_size=2, resume_points=points, resume_every_tokens=resume_every_tokens
    )


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ({}, 3),
        ({"newest": 1}, 2),
        ({"newest": 4}, 5),
        # Of ten, when the last is written: numbers 3 and 6, and the newest two, 8 and 9.
        ({"every": 3}, 5),
        # Numbers 1 to 9, of which the newest are two.
        ({"every": 1}, 10),
        # One point, at the end.
        ({"resume_every_tokens": 3200}, 1),
        # After steps 63 and 100.
        ({"resume_every_tokens": 2000}, 2),
        # At every step.
        ({"resume_every_tokens": 5, "newest": 200}, 100),
    ],
    ids=str,
)
def test_points_on_disk_follow_the_retention(settings: dict[str, int], points: int) -> None:
    assert plan_demands.points_on_disk(train_config(**settings)) == points


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_hold_the_parameters_of_their_tensors(heterogeneous_architecture: Architecture, stages: int) -> None:
    step = step_on(heterogeneous_architecture, name="megatron", pipeline_parallel=stages)
    plan = stage_plan(replace(step, num_ranks=stages))
    shapes, first = tensor_shapes(heterogeneous_architecture), 0
    for index, number in enumerate(plan.student):
        layouts = stage_layouts(heterogeneous_architecture, first, number)
        counted = sum(prod(shapes[source]) for layout in layouts for source in layout.sources)
        blocks = range(first, first + number)
        ends = {"first": index == 0, "last": index == stages - 1}
        assert stage_params(heterogeneous_architecture, blocks, **ends) == counted
        first += number
    assert first == heterogeneous_architecture.num_blocks


def test_megatron_state_by_hand(pico_architecture: Architecture) -> None:
    step = step_on(pico_architecture, name="megatron", tensor_parallel=2)
    parts = megatron_memory(replace(step, num_ranks=8, batch_size=4)).parts
    half = num_params(pico_architecture) / 2
    # Four data ranks share masters and moments.
    assert parts["weights"] == 2 * half
    assert parts["master weights"] == half
    assert parts["optimizer"] == 2 * half
    assert parts["gradients"] >= 4 * half


def test_stages_keep_activations_of_fewer_micro_batches_the_later_they_are(pico_architecture: Architecture) -> None:
    step = step_on(pico_architecture, name="megatron", pipeline_parallel=2, micro_batch_tokens=8192)
    one = megatron_memory(replace(step, num_ranks=2, batch_size=1)).parts["activations"]
    two = megatron_memory(replace(step, num_ranks=2, batch_size=2)).parts["activations"]
    assert one < two <= 2 * one
    assert megatron_memory(replace(step, num_ranks=2, batch_size=8)).parts["activations"] == two


def test_time_by_hand(pico_architecture: Architecture) -> None:
    step = step_on(pico_architecture)
    matrices = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 512 * 64) + 320 * 64
    # Tokens attend to 1 to 8,192 tokens.
    per_token = 2 * matrices + 4 * 4 * 64 * 8193 / 2
    assert step_flops(step) == 3 * per_token * 8192
    again = step_on(pico_architecture, recompute=True)
    assert step_flops(again) == (4 * per_token - 2 * 320 * 64) * 8192
    # No head runs where no term is on the logits.
    hidden = replace(step, teacher=pico_architecture, objective=ObjectiveConfig(hidden_cosine=1.0))
    assert step_flops(hidden) == (3 + 1) * (per_token - 2 * 320 * 64) * 8192
    rates = Rates(flops_per_s=1e9, link_bytes_per_s=1e6, gpus_per_node=8)
    alone = step_time(step, rates)
    assert alone.total_s == alone.compute_s == step_flops(step) / 1e9
    # DDP: an all-reduce of fp32 gradients, twice (n - 1) / n of them through the links.
    assert (
        step_time(replace(step, num_ranks=4, batch_size=4), rates).link_s
        == 1.5 * 4 * num_params(pico_architecture) / 1e6
    )


def test_a_pipeline_waits_for_its_first_micro_batches(pico_architecture: Architecture) -> None:
    rates = Rates(flops_per_s=1e9, link_bytes_per_s=1e12, gpus_per_node=8)
    step = step_on(pico_architecture, name="megatron", pipeline_parallel=4, micro_batch_tokens=8192)
    step = replace(step, num_ranks=4, batch_size=12)
    assert step_time(step, rates).compute_s == pytest.approx(step_flops(step) / 4e9 * (12 + 3) / 12)


GPU = Limits(gpu_bytes=79.1 * 2**30, host_bytes=2048 * 2**30, gpus_per_node=8)


@pytest.mark.parametrize("name", ["torch", "deepspeed", "megatron"])
def test_advice_fits(name: str) -> None:
    model = known_architecture("llama-3.1-8b")
    assert model is not None
    step = replace(step_on(model, name=name, micro_batch_tokens=8192), num_ranks=8, batch_size=64)
    assert not fits(step, step_memory(step), GPU)
    text = nearest_fit(step, GPU, node="distill")
    assert text is not None
    settings = dict(part.removeprefix("engine.").split("=") for part in text.split())
    read: dict[str, Callable[[str], object]] = {"true": lambda _: True, "false": lambda _: False}
    engine = replace(step.engine, **{key: read.get(value, int)(value) for key, value in settings.items()})
    changed = replace(step, engine=engine)
    assert fits(changed, step_memory(changed), GPU)


def test_no_advice_where_nothing_helps() -> None:
    model = known_architecture("llama-3.1-405b")
    assert model is not None
    assert (
        nearest_fit(step_on(model), Limits(gpu_bytes=2**30, host_bytes=2**30, gpus_per_node=8), node="distill") is None
    )

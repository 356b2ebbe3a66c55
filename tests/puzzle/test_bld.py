from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.config import EngineConfig, OptimConfig, TrackingConfig, TrainConfig
from distill.engine.base import resolve_dtype
from distill.losses import normalized_mse
from distill.tracking import Tracker
from puzzle import bld
from puzzle.bld import BldSettings, distill_library, plan_groups
from puzzle.blockwise import build_block
from puzzle.child_init import checkpoint_init
from puzzle.config import SpaceConfig
from puzzle.importance import channel_contributions, rank_channels
from puzzle.library import BlockLibrary, inherited_names, space_replacements
from puzzle.model.architecture import NO_ATTENTION
from puzzle.model.checkpoint import TensorReader, load_model, read_architecture
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.stats import attention_params, ffn_params
from puzzle.trainees import Trainees, output_power

TRAIN = TrainConfig(max_tokens=12 * 96, seq_len=24, batch_size=4, resume_every_tokens=5 * 96, eval_every_tokens=6 * 96)
OPTIM = OptimConfig(lr=1e-3)


class ToyBatches:
    """Random tokens, a pure function of the step; killed at ``dies_at``."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.steps: list[int] = []

    def batch(self, step: int) -> Tensor:
        if step == self.dies_at:
            raise KeyboardInterrupt
        self.steps.append(step)
        return torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(step))


@pytest.fixture
def settings(sequences: Tensor) -> BldSettings:
    return BldSettings(
        train=TRAIN, optim=OPTIM, engine=EngineConfig(device="cpu"), batches=ToyBatches(), held_out=sequences
    )


def build(
    directory: Path, parent_dir: Path, space: SpaceConfig, settings: BldSettings, *, blocks: Sequence[int] = range(4)
) -> BlockLibrary:
    """The library of ``blocks``, as the stage builds it."""
    parent = load_model(parent_dir, dtype=resolve_dtype(settings.engine))
    architecture = read_architecture(parent_dir)
    contributions = channel_contributions(parent, settings.held_out, batch_size=6)
    rankings = {index: rank_channels(values) for index, values in contributions.items()}
    replacements = [item for item in space_replacements(architecture, space) if item.block in blocks]
    directory.mkdir(exist_ok=True)
    tracking = {"run_name": "run", "step_name": "step", "stage": "build_library", "settings": {}}
    with (
        TensorReader(parent_dir) as reader,
        Tracker(directory / "metrics.jsonl", TrackingConfig(), **tracking) as tracker,
    ):
        index = directory / "library" / "library.json"
        library = (
            BlockLibrary.open(index.parent)
            if index.exists()
            else BlockLibrary.create(index.parent, architecture, dtype=torch.float32)
        )
        init = checkpoint_init(reader, architecture, rankings)
        distill_library(library, parent, replacements, init, settings, resume_dir=directory / "resume", tracker=tracker)
    return library


def contents(library: BlockLibrary) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(library.directory.rglob("*")) if path.is_file()}


def rows(directory: Path) -> list[dict[str, float]]:
    """The curve without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("perf", "mem"))} for line in lines]


def make_trainees(
    parent_dir: Path,
    space: SpaceConfig,
    sequences: Tensor,
    optim: OptimConfig = OPTIM,
    *,
    power_factor: float = 1.0,
    device: str = "cpu",
) -> Trainees:
    """All replacements of blocks 1 and 2, untrained; narrower FFNs keep the first channels."""
    architecture = read_architecture(parent_dir)
    with TensorReader(parent_dir) as reader:
        init = checkpoint_init(reader, architecture, dict.fromkeys(range(4), torch.arange(512)))
        inits = {item: init(item) for item in space_replacements(architecture, space) if item.block in (1, 2)}
    parent = load_model(parent_dir, device=device).requires_grad_(False)
    power = power_factor * output_power(parent, sequences, batch_size=6)
    return Trainees(parent, architecture, inits, optim, power)


def test_held_out_error_is_the_nmse_of_the_whole_block(
    lively_parent: DeciLMForCausalLM, lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor
) -> None:
    architecture = read_architecture(lively_parent_dir)
    trainees = make_trainees(lively_parent_dir, space, sequences)
    states = lively_parent.model(sequences, output_hidden_states=True).hidden_states
    shared = lively_parent.model.attention_inputs(states[0])
    errors = trainees.held_out_nmse(sequences, batch_size=4)
    assert len(errors) == 2 * 7
    for item, nmse in zip(trainees.replacements, errors, strict=True):
        own = architecture.blocks[item.block]
        block = replace(own, **{item.subblock: item.variant})
        if item.beside == "no_op":
            block = replace(block, attention=NO_ATTENTION)
        replaced = trainees.tensors(item)
        inherited = lively_parent.model.layers[item.block].state_dict()
        tensors = {name: inherited[name] for name in inherited_names(inherited, own, block, replaced)} | replaced
        with torch.no_grad():
            output = build_block(lively_parent, architecture, block, tensors)(states[item.block], **shared)
            expected = normalized_mse(output, states[item.block + 1]).item()
        # means over batches of 4 and 2 sequences against one over all, in fp32
        assert nmse == pytest.approx(expected, rel=1e-4, abs=1e-9), item.name


def test_micro_batches_add_up_to_the_batch(lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor) -> None:
    losses, errors = [], []
    for micro_batch in (4, 1):
        trainees = make_trainees(lively_parent_dir, space, sequences)
        steps = [trainees.step(ToyBatches().batch(i), lr=1e-3, micro_batch=micro_batch) for i in range(3)]
        losses.append([metrics["nmse"].item() for metrics in steps])
        errors.append(trainees.held_out_nmse(sequences, batch_size=6))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # Adam turns rounding noise in near-zero gradients into whole steps, so weights agree less closely than losses
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_learning_does_not_slow_down_where_a_blocks_output_is_huge(
    lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor
) -> None:
    errors = []
    for factor in (1.0, 1e8):
        optim = OptimConfig(lr=1e-3, grad_clip=0.0)
        trainees = make_trainees(lively_parent_dir, space, sequences, optim, power_factor=factor)
        for step in range(5):
            trainees.step(ToyBatches().batch(step), lr=1e-3, micro_batch=4)
        errors.append([error * factor for error in trainees.held_out_nmse(sequences, batch_size=6)])
    # equal but for what fp32 keeps of gradients of 1e-12
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.parametrize("grad_clip", [0.0, 0.01])
def test_a_replacement_learns_the_same_alone_and_in_company(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings, grad_clip: float
) -> None:
    settings = replace(settings, optim=replace(OPTIM, grad_clip=grad_clip))
    alone = contents(build(tmp_path / "alone", lively_parent_dir, space, settings, blocks=[2]))
    company = contents(build(tmp_path / "company", lively_parent_dir, space, settings))
    shared = [name for name in alone if name.startswith("2.")]
    assert len(shared) == 7
    assert all(company[name] == alone[name] for name in shared)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bld_reduces_the_held_out_error_of_every_replacement(
    tmp_path: Path,
    lively_parent_dir: Path,
    space: SpaceConfig,
    settings: BldSettings,
    precision: Literal["fp32", "bf16"],
) -> None:
    engine = EngineConfig(device="cpu", precision=precision)
    longer = replace(settings, engine=engine, train=replace(TRAIN, max_tokens=40 * 96))
    library = build(tmp_path, lively_parent_dir, space, longer)
    assert len(library.entries) == 3 + 3 * 7
    assert all(entry.bld_nmse < entry.bld_nmse_init for entry in library.entries.values())
    curve = rows(tmp_path)
    assert curve[-1]["eval/nmse"] < 0.9 * curve[0]["eval/nmse"]
    assert sum("train/nmse" in row for row in curve) == 40


def test_killed_bld_goes_on_to_the_same_library_bit_for_bit(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings
) -> None:
    whole = build(tmp_path / "whole", lively_parent_dir, space, settings)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", lively_parent_dir, space, replace(settings, batches=ToyBatches(dies_at=8)))
    again = ToyBatches()
    resumed = build(tmp_path / "killed", lively_parent_dir, space, replace(settings, batches=again))
    assert again.steps[0] == 5  # the resume point, not the start
    assert contents(resumed) == contents(whole)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert list((tmp_path / "killed" / "resume").glob("**/*.safetensors")) == []


@pytest.mark.parametrize(("frac", "num_saves"), [(1e-9, 1), (1e9, 9)])
def test_resume_points_take_a_bounded_share_of_the_time(
    tmp_path: Path,
    lively_parent_dir: Path,
    space: SpaceConfig,
    settings: BldSettings,
    monkeypatch: pytest.MonkeyPatch,
    frac: float,
    num_saves: int,
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(bld, "MAX_SAVING_FRAC", frac)
    monkeypatch.setattr(bld.resume, "save", lambda directory, step, **_: saved.append(step))
    train = replace(TRAIN, max_tokens=10 * 96, resume_every_tokens=0)
    build(tmp_path, lively_parent_dir, space, replace(settings, train=train), blocks=[1])
    assert saved == list(range(1, num_saves + 1))  # never after the last step, which is followed by the library


def test_a_replacement_that_training_made_worse_keeps_its_init(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings
) -> None:
    settings = replace(settings, optim=replace(OPTIM, lr=30.0))
    library = build(tmp_path, lively_parent_dir, space, settings, blocks=[1])
    parents_ffn = next(item for item in library.entries if item.name == "1.ffn.w512.beside_no_op")
    entry = library.entries[parents_ffn]
    assert entry.bld_nmse == entry.bld_nmse_init
    stored = load_file(library.directory / entry.file)
    with TensorReader(lively_parent_dir) as reader:
        for name, tensor in stored.items():
            assert torch.equal(tensor, reader.read(f"model.layers.1.{name}"))


def test_groups_of_blocks_give_the_same_library(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = build(tmp_path / "at_once", lively_parent_dir, space, settings)
    monkeypatch.setattr(bld, "memory_budget", lambda parent: 1.0)
    batches = ToyBatches(dies_at=12)
    grouped = build(tmp_path / "grouped", lively_parent_dir, space, replace(settings, batches=batches))
    assert batches.steps == list(range(12)) * 4
    assert contents(grouped) == contents(at_once)
    tokens = [row["tokens"] for row in rows(tmp_path / "grouped")]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 4 * TRAIN.max_tokens
    # a finished group is not trained again
    build(tmp_path / "grouped", lively_parent_dir, space, replace(settings, batches=ToyBatches(dies_at=0)))
    assert [row["tokens"] for row in rows(tmp_path / "grouped")] == tokens


def test_plan_groups_fills_the_budget_with_neighbouring_blocks(lively_parent_dir: Path, space: SpaceConfig) -> None:
    architecture = read_architecture(lively_parent_dir)
    replacements = space_replacements(architecture, space)
    num_params = {
        index: sum(
            (attention_params if item.subblock == "attention" else ffn_params)(architecture, item.variant)
            for item in replacements
            if item.block == index
        )
        for index in range(4)
    }
    budget = 16 * (num_params[1] + num_params[2])
    groups = plan_groups(replacements, architecture, budget)
    assert [sorted({item.block for item in group}) for group in groups] == [[0, 1], [2, 3]]
    assert [item for group in groups for item in group] == list(replacements)


def test_training_leaves_the_parent_alone_and_reports_divergence(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings
) -> None:
    trainees = make_trainees(lively_parent_dir, space, settings.held_out, replace(OPTIM, grad_clip=0.0))
    trainees.step(ToyBatches().batch(0), lr=1e-3, micro_batch=4)
    fresh = load_model(lively_parent_dir).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in trainees.parent.state_dict().items())
    with pytest.raises(ValueError, match=r"no replacement has a finite error .* lower library\.optim\.lr"):
        build(tmp_path, lively_parent_dir, space, replace(settings, optim=OptimConfig(lr=1e30)))


@pytest.mark.gpu
def test_steps_on_a_gpu_learn_as_on_a_cpu_and_never_wait(
    lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor
) -> None:
    errors = []
    for device in ("cpu", "cuda"):
        trainees = make_trainees(lively_parent_dir, space, sequences, device=device)
        for step in range(4):
            # the first step allocates; from then on nothing may wait for the device
            torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")
            trainees.step(ToyBatches().batch(step), lr=1e-3, micro_batch=2)
        torch.cuda.set_sync_debug_mode("default")
        errors.append(trainees.held_out_nmse(sequences, batch_size=6))
    # Adam turns rounding noise in near-zero gradients into whole steps
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)

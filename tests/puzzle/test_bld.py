from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.config import EngineConfig, OptimConfig, TrackingConfig, TrainConfig
from distill.data.batch import Batch
from distill.engine.base import resolve_dtype
from distill.tracking import Tracker
from puzzle import bld, group_training
from puzzle.bld import distill_library, plan_groups
from puzzle.child_init import CheckpointInit, LibraryInit
from puzzle.config import LibraryConfig, SpaceConfig
from puzzle.group_training import BldSettings
from puzzle.importance import measure_rankings
from puzzle.library import BlockLibrary, LibraryEntry, Mode, Replacement, library_replacements
from puzzle.model.checkpoint import TensorReader, load_model, read_architecture
from puzzle.model.stats import attention_params, ffn_params
from puzzle.pool import ReplacementPool
from puzzle.slices import ParentSlice
from puzzle.space import block_variants
from puzzle.trainees import HeldOut, Trainees

TRAIN = TrainConfig(max_tokens=12 * 96, seq_len=24, batch_size=4, resume_every_tokens=5 * 96, eval_every_tokens=6 * 96)
OPTIM = OptimConfig(lr=1e-3)
RANKING = LibraryConfig(importance_sequences=6, bld=TRAIN, optim=OPTIM)


class ToyBatches:
    """Random tokens, a pure function of the step; killed at ``dies_at``."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.steps: list[int] = []

    def batch(self, step: int) -> Batch:
        if step == self.dies_at:
            raise KeyboardInterrupt
        self.steps.append(step)
        return Batch.of(torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(step)))


@pytest.fixture
def settings(sequences: Tensor) -> BldSettings:
    return BldSettings(
        train=TRAIN, optim=OPTIM, engine=EngineConfig(device="cpu"), batches=ToyBatches(), held_out=sequences
    )


def build(
    directory: Path,
    parent_dir: Path,
    space: SpaceConfig,
    settings: BldSettings,
    *,
    blocks: Sequence[int] = range(4),
    mode: Mode = "decoupled",
    pool: Path | None = None,
    earlier: BlockLibrary | None = None,
) -> BlockLibrary:
    """The library of ``blocks``, as the stage builds it. A pool of its own unless one is given."""
    parent = ParentSlice.whole(load_model(parent_dir, dtype=resolve_dtype(settings.engine)))
    architecture = read_architecture(parent_dir)
    rankings = measure_rankings(parent, settings.held_out, batch_size=6, config=RANKING)
    variants = tuple(
        block_variants(architecture, index, space) if index in blocks else architecture.blocks[index : index + 1]
        for index in range(4)
    )
    tracking = {"run_name": "run", "step_name": "step", "stage": "build_library", "settings": {}}
    tracking |= {"resume_dir": directory}
    library = BlockLibrary.create(directory / "library", architecture, variants, dtype=torch.float32, mode=mode)
    with (
        TensorReader(parent_dir) as reader,
        Tracker(directory / "metrics.jsonl", TrackingConfig(), **tracking) as tracker,
    ):
        own_init = CheckpointInit(reader, architecture, rankings, "mean_pool")
        distill_library(
            library,
            parent,
            library_replacements(architecture, variants, mode),
            LibraryInit(earlier, reader) if earlier else own_init,
            settings,
            pool=ReplacementPool(directory=pool or directory / "pool", facts={"lr": settings.optim.lr}),
            resume_dir=directory / "resume",
            tracker=tracker,
        )
    return BlockLibrary.open(library.directory)


def entry_of(library: BlockLibrary, name: str) -> LibraryEntry:
    (entry,) = (entry for item, entry in library.entries.items() if item.name == name)
    return entry


def contents(library: BlockLibrary) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(library.directory.rglob("*")) if path.is_file()}


def rows(directory: Path) -> list[dict[str, float]]:
    """The curve without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("perf", "mem"))} for line in lines]


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
    assert len(library.entries) == 2 + 3 * 7
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


@pytest.mark.parametrize(("frac", "num_saves"), [(1e-9, 0), (1e9, 9)])
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
    monkeypatch.setattr(group_training, "MAX_SAVING_FRAC", frac)
    monkeypatch.setattr(group_training.resume, "save", lambda directory, step, **_: saved.append(step))
    train = replace(TRAIN, max_tokens=10 * 96, resume_every_tokens=0)
    build(tmp_path, lively_parent_dir, space, replace(settings, train=train), blocks=[1])
    assert saved == list(range(1, num_saves + 1))  # never after the last step, which is followed by the library


def test_a_replacement_that_training_made_worse_keeps_its_init(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings
) -> None:
    settings = replace(settings, optim=replace(OPTIM, lr=30.0))
    library = build(tmp_path, lively_parent_dir, space, settings, blocks=[1])
    entry = entry_of(library, "1.ffn.w512.beside_no_op")
    assert entry.bld_nmse == entry.bld_nmse_init
    assert not entry.trained
    stored = load_file(library.directory / entry.file)
    with TensorReader(lively_parent_dir) as reader:
        for name, tensor in stored.items():
            assert torch.equal(tensor, reader.read(f"model.layers.1.{name}"))


@pytest.mark.parametrize(("nmse", "loss", "trained"), [(2.0, 0.5, True), (0.5, 2.0, False), (0.5, math.nan, False)])
def test_the_held_out_value_of_the_trained_loss_decides_and_the_tensor_nmse_is_reported(
    tmp_path: Path,
    lively_parent_dir: Path,
    space: SpaceConfig,
    settings: BldSettings,
    monkeypatch: pytest.MonkeyPatch,
    nmse: float,
    loss: float,
    trained: bool,
) -> None:
    measured = iter([HeldOut(nmse=1.0, loss=1.0), HeldOut(nmse=nmse, loss=loss)])

    def held_out(trainees: Trainees, *_: object, **__: object) -> list[HeldOut]:
        return [next(measured)] * len(trainees.replacements)

    monkeypatch.setattr(Trainees, "held_out", held_out)
    settings = replace(settings, nmse="token", train=replace(TRAIN, eval_every_tokens=0))
    library = build(tmp_path, lively_parent_dir, space, settings, blocks=[1])
    assert {entry.trained for entry in library.entries.values()} == {trained}
    assert {entry.bld_nmse for entry in library.entries.values()} == {nmse if trained else 1.0}


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
    variants = [block_variants(architecture, index, space) for index in range(4)]
    replacements = library_replacements(architecture, variants)
    num_params = dict.fromkeys(range(4), 0)
    for item in replacements:
        if item.attention is not None:
            num_params[item.block] += attention_params(architecture, item.attention)
        if item.ffn is not None:
            num_params[item.block] += ffn_params(architecture, item.ffn)
    budget = 16 * (num_params[1] + num_params[2])
    groups = plan_groups(replacements, architecture, budget)
    assert [sorted({item.block for item in group}) for group in groups] == [[0, 1], [2, 3]]
    assert [item for group in groups for item in group] == list(replacements)


def test_another_library_takes_what_the_pool_has_and_trains_the_rest(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings
) -> None:
    pool = tmp_path / "pool"
    narrow = replace(space, attention_linear=False, ffn_linear=False)
    first = build(tmp_path / "first", lively_parent_dir, narrow, settings, pool=pool)
    times = {path.name: path.stat().st_mtime_ns for path in pool.iterdir()}
    wider = build(tmp_path / "wider", lively_parent_dir, space, settings, pool=pool)
    assert len(wider.entries) == 23 > len(first.entries) == len(times) == 13
    # by content, never by index: places in the lists of the two libraries differ
    assert {path.name: path.stat().st_mtime_ns for path in pool.iterdir() if path.name in times} == times
    assert len(list(pool.iterdir())) == 23
    # nothing is learnt again, and what is taken is what would have been learnt
    batches = ToyBatches(dies_at=0)
    again = build(tmp_path / "again", lively_parent_dir, space, replace(settings, batches=batches), pool=pool)
    alone = build(tmp_path / "alone", lively_parent_dir, space, settings)
    assert contents(again) == contents(wider) == contents(alone)


def test_damaged_file_of_the_pool_is_trained_again(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings
) -> None:
    pool = tmp_path / "pool"
    whole = contents(build(tmp_path / "whole", lively_parent_dir, space, settings, blocks=[1], pool=pool))
    damaged = sorted(pool.iterdir())[0]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(RuntimeWarning, match="is damaged and not used"):
        again = build(tmp_path / "again", lively_parent_dir, space, settings, blocks=[1], pool=pool)
    assert contents(again) == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(tmp_path / "third", lively_parent_dir, space, settings, blocks=[1], pool=pool)


def test_first_weights_are_made_once_and_only_for_what_is_trained(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, made = tmp_path / "pool", list[str]()

    def counting_call(init: CheckpointInit, item: Replacement, plain: Any = CheckpointInit.__call__) -> Any:
        made.append(item.name)
        return plain(init, item)

    monkeypatch.setattr(CheckpointInit, "__call__", counting_call)
    first = build(tmp_path / "first", lively_parent_dir, space, settings, blocks=[1], pool=pool)
    assert made == [item.name for item in first.entries]
    build(tmp_path / "again", lively_parent_dir, space, settings, blocks=[1], pool=pool)
    assert len(made) == len(first.entries)


def test_kill_while_a_group_is_put_away_costs_no_more_than_since_the_last_resume_point(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(tmp_path / "whole", lively_parent_dir, space, settings)
    put, num_put = ReplacementPool.put, 0

    def dying_put(*args: object, **options: object) -> None:
        nonlocal num_put
        num_put += 1
        if num_put == 4:
            raise KeyboardInterrupt
        put(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ReplacementPool, "put", dying_put)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", lively_parent_dir, space, settings)
    monkeypatch.undo()
    again = ToyBatches()
    resumed = build(tmp_path / "killed", lively_parent_dir, space, replace(settings, batches=again))
    assert again.steps == [10, 11]
    assert contents(resumed) == contents(whole)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_without_training_the_library_holds_the_inits_and_their_errors(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings
) -> None:
    batches = ToyBatches(dies_at=0)
    untrained = build(tmp_path / "a", lively_parent_dir, space, replace(settings, learns=False, batches=batches))
    trained = build(tmp_path / "b", lively_parent_dir, space, settings)
    assert not any(entry.trained for entry in untrained.entries.values())
    for item, entry in untrained.entries.items():
        assert entry.bld_nmse == entry.bld_nmse_init == trained.entries[item].bld_nmse_init
    stored = load_file(untrained.directory / entry_of(untrained, "1.ffn.w512.beside_no_op").file)
    with TensorReader(lively_parent_dir) as reader:
        assert all(torch.equal(tensor, reader.read(f"model.layers.1.{name}")) for name, tensor in stored.items())


def test_decoupled_then_coupled(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings
) -> None:
    decoupled = build(tmp_path / "decoupled", lively_parent_dir, space, settings, blocks=[1])
    coupled = build(tmp_path / "coupled", lively_parent_dir, space, settings, blocks=[1], mode="coupled")
    further = build(
        tmp_path / "further", lively_parent_dir, space, settings, blocks=[1], mode="coupled", earlier=decoupled
    )
    assert coupled.entries.keys() == further.entries.keys()
    assert len(coupled.entries) == 4 * 4 - 2  # 4 attentions x 4 FFNs; not the parent's, not the empty one
    assert all(entry.trained for entry in coupled.entries.values())
    # composed of trained parts, every pair begins nearer to the parent than composed of untrained ones
    for item, entry in coupled.entries.items():
        if item.attention is not None and item.ffn is not None:
            assert further.entries[item].bld_nmse_init < entry.bld_nmse_init, item.name
    # what was trained alone is the starting point of what is trained alone
    own = entry_of(decoupled, "1.ffn.w256.beside_no_op")
    assert entry_of(further, "1.ffn.w256.beside_no_op").bld_nmse_init == pytest.approx(own.bld_nmse, rel=1e-6)


def test_divergence_is_reported(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, settings: BldSettings
) -> None:
    with pytest.raises(ValueError, match=r"none of what learns here has a finite error .* lower library\.optim\.lr"):
        build(tmp_path, lively_parent_dir, space, replace(settings, optim=OptimConfig(lr=1e30)))

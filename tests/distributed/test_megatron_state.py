"""What the Megatron engine keeps and writes, and what its stages send, on a CPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill import distributed
from distill.config import ObjectiveConfig
from distill.engine.setup import TrainingSetup
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import load_model
from puzzle.model.provider import DirectoryProvider
from tests.distributed.conftest import RunInProcesses
from tests.distributed.megatron_models import (
    Models,
    in_process,
    make_engine,
    save_models,
    save_seeded,
    student_blocks,
    tokens,
    train_steps,
)

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stands in for CUDA where there is none")

LR = 1e-6
SPLITS = ("tensor", "pipeline", "data")


@pytest.fixture(scope="module")
def models(pico_architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    """Teacher and student with and without tied embeddings."""
    return save_models(pico_architecture, tmp_path_factory.mktemp("models"))


def _weights(directory: Path) -> dict[str, Tensor]:
    return load_model(directory).state_dict()


def _one_bf16_step(setup: TrainingSetup, out: Path) -> None:
    def run() -> None:
        for split in SPLITS:
            engine = make_engine(setup, split, precision="bf16")
            engine.export(out / split / "before")
            train_steps(engine, 0, 1, lr=LR)
            engine.export(out / split / "after")

    in_process(run)


@pytest.mark.parametrize("objective", [ObjectiveConfig(lm=1.0), ObjectiveConfig(hidden_cosine=1.0)])
def test_under_bf16_the_fp32_weights_are_trained_and_written(
    models: dict[str, Models], objective: ObjectiveConfig, run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    stored = _weights(models["untied"].student)
    run_in_processes(2, _one_bf16_step, models["untied"].setup(objective), tmp_path)
    for split in SPLITS:
        before, after = _weights(tmp_path / split / "before"), _weights(tmp_path / split / "after")
        for name, weight in stored.items():
            assert torch.equal(before[name], weight), f"{split}: {name}"
            # AdamW's first step is at most lr, besides the decay, and far below a step of bf16 at these weights.
            moved = (after[name] - weight).abs()
            bound = LR * (1 + 0.1 * weight.abs()) + 2**-23 * weight.abs()
            assert (moved <= 1.01 * bound).all(), f"{split}: {name}"
            trained = objective.lm > 0 or name != "lm_head.weight"
            rows = moved.flatten(1).amax(1) if moved.ndim == 2 else moved
            assert (rows > 0).float().mean() > 0.2 if trained else not moved.any(), f"{split}: {name}"


def _chain_of_layouts(setup: TrainingSetup, root: Path) -> None:
    def run() -> None:
        engine = make_engine(setup, "data", precision="bf16")
        train_steps(engine, 0, 2)
        for index, split in enumerate(("data", "tensor", "pipeline", "tensor", "data")):
            if index > 0:
                engine = make_engine(setup, split, precision="bf16")
                engine.load(root / str(index - 1))
            if distributed.is_main():
                (root / str(index)).mkdir()
                (root / f"{index}_late").mkdir()
            distributed.barrier()
            engine.save(root / str(index))
            write = engine.snapshot()
            train_steps(engine, 2, 3)
            write(root / f"{index}_late")

    in_process(run)


def _state(directory: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted((directory / "megatron").iterdir())}


def test_state_stays_the_same_bit_for_bit_from_layout_to_layout(
    models: dict[str, Models], run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    setup = models["tied"].setup(ObjectiveConfig(lm=1.0))
    run_in_processes(2, _chain_of_layouts, setup, tmp_path)
    first, last = _state(tmp_path / "0"), _state(tmp_path / "4")
    assert list(first) == list(last) == ["rank_00000.safetensors", "rank_00001.safetensors"]
    for name, tensors in first.items():
        assert tensors.keys() == last[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(last[name][key], tensor), f"{name}: {key}"
    for index in range(5):
        then, late = _state(tmp_path / str(index)), _state(tmp_path / f"{index}_late")
        assert all(torch.equal(late[name][key], tensor) for name in then for key, tensor in then[name].items())
    # Each data rank keeps half of the master weights and of two moments.
    stored = _weights(models["tied"].student)
    total = 3 * sum(weight.numel() for name, weight in stored.items() if name != "lm_head.weight")
    sizes = [sum(tensor.numel() for tensor in tensors.values()) for tensors in first.values()]
    assert sum(sizes) == total
    assert max(sizes) < 0.55 * total


def _refusals(setup: TrainingSetup, other: TrainingSetup, root: Path) -> list[str]:
    def run() -> list[str]:
        engine = make_engine(setup, "data")
        engine.save(root / "whole")
        distributed.barrier()
        if distributed.is_main():
            for name in ("missing", "cut"):
                shutil.copytree(root / "whole", root / name)
            (root / "missing/megatron/rank_00001.safetensors").unlink()
            path = root / "cut/megatron/rank_00001.safetensors"
            path.write_bytes(path.read_bytes()[:-100])
        distributed.barrier()
        messages = []
        for name in ("none", "missing", "cut"):
            with pytest.raises(ValueError, match="start anew") as caught:
                engine.load(root / name)
            messages.append(str(caught.value))
        engine = make_engine(other, "tensor")
        with pytest.raises(ValueError, match="start anew") as caught:
            engine.load(root / "whole")
        return [*messages, str(caught.value)]

    return in_process(run)


def test_state_that_is_not_whole_or_of_another_model_names_the_way_out(
    models: dict[str, Models], pico_architecture: Architecture, run_in_processes: RunInProcesses, tmp_path: Path
) -> None:
    wide = replace(pico_architecture.with_blocks(student_blocks()), vocab_size=640)
    other = TrainingSetup(
        student=DirectoryProvider(save_seeded(wide, tmp_path / "wide", seed=0)), objective=ObjectiveConfig(lm=1.0)
    )
    (tmp_path / "whole").mkdir()
    setup = models["untied"].setup(ObjectiveConfig(lm=1.0))
    for none, missing, cut, foreign in run_in_processes(2, _refusals, setup, other, tmp_path):
        assert "has no megatron state: another engine wrote it" in none
        assert "holds the state of 1 ranks, not of 2" in missing
        assert "rank_00001.safetensors cannot be read" in cut
        assert "model.embed_tokens.weight" in foreign
        assert "it is of another model" in foreign


def _lm_beside_a_teacher(setup: TrainingSetup, kd: TrainingSetup) -> tuple[list[dict], dict, set[int], set[int]]:
    def run() -> tuple[list[dict], dict, set[int], set[int]]:
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        original = P2PCommunicator._communicate
        forward: set[int] = set()
        backward: set[int] = set()

        def communicate(self: Any, **arguments: Any) -> Any:
            for name, widths in (("tensor_send_next", forward), ("tensor_send_prev", backward)):
                if arguments[name] is not None:
                    widths.add(arguments[name].shape[-1])
            return original(self, **arguments)

        engine = make_engine(setup, "pipeline")
        with mock.patch.object(P2PCommunicator, "_communicate", communicate):
            with mock.patch.object(engine._stage.teacher, "forward", side_effect=AssertionError("the teacher ran")):
                metrics = train_steps(engine, 0, 3)
            lm_widths = forward | backward
            held_out = engine.evaluate(tokens(5, seed=99))
            forward.clear()
            train_steps(make_engine(kd, "pipeline"), 0, 1)
        return metrics, held_out, lm_widths, forward | {-width for width in backward}

    return in_process(run)


def test_stages_send_the_teacher_where_it_is_needed_and_forward_alone(
    models: dict[str, Models], run_in_processes: RunInProcesses
) -> None:
    kd = models["untied"].setup()
    setup = replace(kd, objective=ObjectiveConfig(lm=1.0), layer_map=())
    engine = make_engine(setup, None)
    expected = train_steps(engine, 0, 3)
    held_out = engine.evaluate(tokens(5, seed=99))
    assert "kld" in held_out
    hidden = 64
    for rank, (metrics, found, lm_widths, kd_widths) in enumerate(run_in_processes(2, _lm_beside_a_teacher, setup, kd)):
        # fp32 sums in another order, over three steps.
        assert [pytest.approx(step, rel=1e-4, abs=1e-5) for step in expected] == metrics
        assert found == pytest.approx(held_out, rel=1e-4, abs=1e-5)
        assert lm_widths == {hidden}
        assert kd_widths == ({2 * hidden} if rank == 0 else {-hidden})

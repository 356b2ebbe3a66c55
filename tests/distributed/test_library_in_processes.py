"""build_library and score_library come out the same however many processes share them, and however it is dealt."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.data.tokenizer import tokenizer_sha256
from launch.__main__ import main
from launch.artifact import Recipe
from launch.stage import StageContext, StageResult
from launch.store import Job, Store
from puzzle.tables import ScoreTable
from puzzle.trainees import Trainees
from tests.distributed.conftest import RunInProcesses

TOLERANCE = 1e-6
"""Absolute and relative. The same kernels run on the same numbers; only the number of sequences and variants in one
matrix product may depend on how the work is dealt."""
LIBRARY = (
    "space.kv_heads=[1] space.ffn_fracs=[0.5] library.kv_init=select library.importance_sequences=4 engine.device=cpu "
    "library.bld.max_tokens=192 library.bld.seq_len=24 library.bld.batch_size=2 library.bld.eval_sequences=4 "
    "library.optim.lr=1e-3"
)
SCORES = "scores.num_sequences=5 scores.seq_len=24 scores.batch_size=4 engine.device=cpu"


def data_files(directory: Path, tokenizer_dir: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("train", "validation", "calibration"):
        np.save(directory / f"{name}.npy", generator.integers(0, 320, 480).astype(np.uint16))
    summary = {"vocab_size": 320, "eos_token_id": 0, "unigram_entropy_nats": 5.0}
    summary["tokenizer_sha256"] = tokenizer_sha256(tokenizer_dir)
    (directory / "data.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def inputs(pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Artifacts ``parent`` and ``data``, as overrides."""
    root = tmp_path_factory.mktemp("inputs")

    def artifact(kind: str, write: Any) -> str:
        def body(context: StageContext) -> StageResult:
            write(context.out)
            return StageResult(headline=kind)

        job = Job(
            recipe=Recipe(stage=kind, stage_version=1, config={}),
            kind=kind,
            inputs={},
            body=body,
            context=lambda out, resume: StageContext(
                out=out, resume=resume, pool=root / "pool", run_name="test", step_name=kind
            ),
        )
        return str(Store(root).get_or_compute(job, on_wait=print)[0].path)

    parent = artifact("model", lambda out: shutil.copytree(pico_parent_dir, out, dirs_exist_ok=True))
    data = artifact("data", lambda out: data_files(out, pico_parent_dir))
    return [f"inputs.parent={parent}", f"inputs.data={data}"]


def launch(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        return main(arguments), err.getvalue()


def only(root: Path, stage: str) -> Path:
    (path,) = (root / "store").glob(f"{stage}-*")
    return path


def build(run: RunInProcesses, root: Path, inputs: list[str], processes: int, *further: str) -> Path:
    arguments = ["build_library", f"run.root={root}", *LIBRARY.split(), *inputs, *further]
    assert [status for status, _ in run(processes, launch, arguments)] == [0] * processes
    return only(root, "build_library")


def score(run: RunInProcesses, root: Path, library: Path, inputs: list[str], processes: int, *further: str) -> Path:
    arguments = ["score_library", f"run.root={root}", *SCORES.split(), *inputs, f"inputs.library={library}", *further]
    assert [status for status, _ in run(processes, launch, arguments)] == [0] * processes
    return only(root, "score_library")


def assert_close(found: float | torch.Tensor, expected: float | torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def assert_same_library(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in (expected / "replacements").iterdir())
    assert sorted(path.name for path in (found / "replacements").iterdir()) == names
    for name in names:
        one, other = (load_file(path / "replacements" / name) for path in (found, expected))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert_close(tensor, other[key])
    one, other = (json.loads((path / "library.json").read_text()) for path in (found, expected))
    for entry, wanted in zip(one.pop("replacements"), other.pop("replacements"), strict=True):
        assert entry.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_close(entry[key], value) if isinstance(value, float) else None
            assert isinstance(value, float) or entry[key] == value
    assert one == other


def assert_same_scores(found: Path, expected: Path) -> None:
    one, other = (ScoreTable.read(path / "scores.json") for path in (found, expected))
    assert len(one.rows) == len(other.rows)
    for row, wanted in zip(one.rows, other.rows, strict=True):
        assert (row.block, row.variant, row.values.keys()) == (wanted.block, wanted.variant, wanted.values.keys())
        for metric, value in wanted.values.items():
            assert_close(row.values[metric], value)
            assert_close(row.stderr[metric], wanted.stderr[metric])
    per_sequence, wanted_tensors = (load_file(path / "scores.safetensors") for path in (found, expected))
    for metric, tensor in wanted_tensors.items():
        assert_close(per_sequence[metric], tensor)


@pytest.fixture(scope="module")
def library(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process."""
    root = tmp_path_factory.mktemp("library")
    assert launch(["build_library", f"run.root={root}", *LIBRARY.split(), *inputs])[0] == 0
    return only(root, "build_library")


@pytest.fixture(scope="module")
def scores(inputs: list[str], library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process."""
    root = tmp_path_factory.mktemp("scores")
    assert launch(["score_library", f"run.root={root}", *SCORES.split(), *inputs, f"inputs.library={library}"])[0] == 0
    return only(root, "score_library")


DEALT = pytest.mark.parametrize(("processes", "slices"), [(2, 2), (3, 3), (2, 1), (4, 2)])


@DEALT
def test_library_is_that_of_one_process(
    tmp_path: Path, inputs: list[str], library: Path, run_in_processes: RunInProcesses, processes: int, slices: int
) -> None:
    found = build(run_in_processes, tmp_path, inputs, processes, f"engine.slices={slices}")
    assert_same_library(found, library)


@DEALT
def test_scores_are_those_of_one_process(
    tmp_path: Path,
    inputs: list[str],
    library: Path,
    scores: Path,
    run_in_processes: RunInProcesses,
    processes: int,
    slices: int,
) -> None:
    found = score(run_in_processes, tmp_path, library, inputs, processes, f"engine.slices={slices}")
    assert_same_scores(found, scores)


@pytest.mark.parametrize(("processes", "slices"), [(3, 3), (4, 2)])
def test_scores_of_iterative_removals_are_those_of_one_process(
    tmp_path: Path, inputs: list[str], library: Path, run_in_processes: RunInProcesses, processes: int, slices: int
) -> None:
    further = "scores.iterative_removals=2"
    expected = score(run_in_processes, tmp_path / "one", library, inputs, 1, further)
    found = score(run_in_processes, tmp_path / "all", library, inputs, processes, further, f"engine.slices={slices}")
    assert_same_scores(found, expected)


def test_replicas_without_a_sequence_or_a_replacement_of_their_own(
    tmp_path: Path, inputs: list[str], run_in_processes: RunInProcesses
) -> None:
    """Two FFNs at one block for three replicas, and two sequences."""
    few = ["space.keep_ffn=[0,2,3]", "space.kv_heads=[]", "space.attention_no_op=false", "space.ffn_fracs=[0.75,0.5]"]
    libraries, tables = [], []
    for processes in (1, 3):
        root = tmp_path / str(processes)
        libraries.append(build(run_in_processes, root, inputs, processes, *few))
        sequences = "scores.num_sequences=2"
        tables.append(score(run_in_processes, root, libraries[0], inputs, processes, sequences))
    assert_same_library(*libraries)
    assert_same_scores(*tables)


def test_coupled_library_from_a_decoupled_one_is_that_of_one_process(
    tmp_path: Path, inputs: list[str], library: Path, run_in_processes: RunInProcesses
) -> None:
    coupled = ["library.mode=coupled", f"inputs.library={library}"]
    expected = build(run_in_processes, tmp_path / "one", inputs, 1, *coupled)
    found = build(run_in_processes, tmp_path / "all", inputs, 2, *coupled, "engine.slices=2")
    assert_same_library(found, expected)


def launch_and_fail_on_the_second(arguments: list[str], after_steps: int) -> tuple[int, str]:
    """The second process fails in the middle of its training."""
    if os.environ["RANK"] == "1":
        step, steps_left = Trainees.step, iter(range(after_steps))

        def failing(self: Trainees, *args: Any, **settings: Any) -> Any:
            if next(steps_left, None) is None:
                raise ValueError("the second process has had enough")
            return step(self, *args, **settings)

        Trainees.step = failing  # type: ignore[method-assign]
    return launch(arguments)


def test_goes_on_where_one_process_failed(
    tmp_path: Path, inputs: list[str], library: Path, run_in_processes: RunInProcesses
) -> None:
    further = ["engine.slices=2", "library.bld.resume_every_tokens=48"]
    arguments = ["build_library", f"run.root={tmp_path}", *LIBRARY.split(), *inputs, *further]
    (first, said_first), (second, said_second) = run_in_processes(2, launch_and_fail_on_the_second, arguments, 3)
    assert (first, second) == (2, 2)
    assert "error" not in said_first
    assert said_second.strip() == "error: process 1 of 2: the second process has had enough"
    assert not list(tmp_path.glob("store/build_library-*"))
    assert list(tmp_path.glob("store/.resume/build_library-*/**/*.safetensors"))
    found = build(run_in_processes, tmp_path, inputs, 2, *further)
    assert_same_library(found, library)


@pytest.mark.slow
def test_behind_torchrun_itself(tmp_path: Path, inputs: list[str], library: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "launch"]
    settings = ["build_library", f"run.root={tmp_path}", *LIBRARY.split(), *inputs]

    def run(*further: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*torchrun, *settings, *further], capture_output=True, text=True, check=False)

    refused = run("engine.slices=3")
    assert refused.returncode != 0
    assert refused.stderr.count("error: engine.slices=3 needs a multiple of 3 processes, got 2") == 1
    done = run("engine.slices=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("artifact: ") == 1
    assert_same_library(only(tmp_path, "build_library"), library)

"""The dependency matrix comes out the same however many processes measure it, and none of them holds the model."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import distributed
from distill.config import EngineConfig, RopeConfig
from distill.data.tokenizer import tokenizer_sha256
from fusion.config import Average
from fusion.dependency import measure_dependency
from launch.__main__ import main
from launch.artifact import Recipe
from launch.stage import StageContext, StageResult
from launch.store import Job, Store
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import build_model, copy_tokenizer, load_model, save_model
from puzzle.slices import MAX_SENDS, ParentSlice, load_slice
from tests.distributed.conftest import RunInProcesses

CPU = EngineConfig(device="cpu")
SEQUENCES = torch.randint(0, 320, (7, 20), generator=torch.Generator().manual_seed(0))
BATCH_SIZE = 2
TOLERANCE = {"rtol": 1e-5, "atol": 1e-9}
"""The same kernels run on the same numbers, which travel as they are; replicas batch the sequences otherwise."""
SETTINGS = "dependency.num_sequences=7 dependency.seq_len=20 dependency.batch_size=2 engine.device=cpu"


def architecture() -> Architecture:
    """More blocks than hidden states may be on their way at once, and an identity in each half."""
    attention, ffn = AttentionConfig(num_kv_heads=2), FFNConfig(ffn_dim=256)
    subblocks = [
        (attention, ffn),
        (NO_ATTENTION, ffn),
        (NO_ATTENTION, NO_FFN),
        (attention, NO_FFN),
        *[(NO_ATTENTION, FFNConfig(ffn_dim=256 * (1 + n % 2))) for n in range(MAX_SENDS)],
        (NO_ATTENTION, NO_FFN),
        (attention, ffn),
    ]
    return Architecture(
        vocab_size=320,
        hidden_dim=64,
        num_heads=4,
        head_dim=16,
        max_positions=64,
        rope=RopeConfig(theta=10_000.0),
        blocks=tuple(
            BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(index,))
            for index, (attention, ffn) in enumerate(subblocks)
        ),
    )


@pytest.fixture(scope="module")
def model_dir(pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dependency") / "model"
    model = build_model(architecture(), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.15, generator=generator)
    save_model(model, directory, architecture=architecture(), tokenizer_from=pico_parent_dir)
    return directory


def measure_slice(directory: Path, engine: EngineConfig, num_sequences: int, average: Average) -> dict[str, Any]:
    distributed.join()
    with distributed.together():
        parent = load_slice(directory, engine)
        dependency = measure_dependency(parent, SEQUENCES[:num_sequences], batch_size=BATCH_SIZE, average=average)
    return {
        "matrix": dependency.matrix.numpy(),
        "direction_change": dependency.direction_change.numpy(),
        "contribution_ratio": dependency.contribution_ratio.numpy(),
        "num_tokens": dependency.num_tokens,
        "num_parameters": sum(parameter.numel() for parameter in parent.model.parameters()),
    }


@pytest.mark.parametrize(
    ("processes", "slices", "num_sequences", "average"),
    [(2, 2, 7, "token"), (3, 3, 7, "sequence"), (2, 1, 7, "sequence"), (4, 2, 5, "token"), (3, 1, 2, "token")],
    ids=["2 slices", "3 slices", "2 replicas", "2 replicas of 2 slices", "a replica without a sequence"],
)
def test_every_process_has_what_one_measures(
    model_dir: Path,
    run_in_processes: RunInProcesses,
    processes: int,
    slices: int,
    num_sequences: int,
    average: Average,
) -> None:
    whole = ParentSlice.whole(load_model(model_dir))
    expected = measure_dependency(whole, SEQUENCES[:num_sequences], batch_size=BATCH_SIZE, average=average)
    assert expected.matrix.nan_to_num().max() > 0.1
    engine = replace(CPU, slices=slices)
    results = run_in_processes(processes, measure_slice, model_dir, engine, num_sequences, average)
    for result in results:
        for name in ("matrix", "direction_change", "contribution_ratio"):
            found = torch.from_numpy(result[name])
            torch.testing.assert_close(found, getattr(expected, name), equal_nan=True, **TOLERANCE)
            assert (result[name] == results[0][name])[~np.isnan(result[name])].all()
        assert result["num_tokens"] == expected.num_tokens == 20 * num_sequences
    num_parameters = [result["num_parameters"] for result in results[:slices]]
    assert sum(num_parameters) == sum(parameter.numel() for parameter in whole.model.parameters())
    assert slices == 1 or max(num_parameters) < 0.7 * sum(num_parameters)


def test_slices_alone_change_no_bit(model_dir: Path, run_in_processes: RunInProcesses) -> None:
    expected = measure_dependency(ParentSlice.whole(load_model(model_dir)), SEQUENCES, batch_size=BATCH_SIZE)
    first, _ = run_in_processes(2, measure_slice, model_dir, replace(CPU, slices=2), len(SEQUENCES), "token")
    np.testing.assert_array_equal(first["matrix"], expected.matrix.numpy())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("slices", [1, 2])
def test_gpus_measure_what_a_cpu_does(model_dir: Path, run_in_processes: RunInProcesses, slices: int) -> None:
    expected = measure_dependency(ParentSlice.whole(load_model(model_dir)), SEQUENCES, batch_size=BATCH_SIZE)
    engine = EngineConfig(device="cuda", slices=slices)
    for result in run_in_processes(2, measure_slice, model_dir, engine, len(SEQUENCES), "token"):
        # Other kernels, and other orders of fp32 sums.
        found = torch.from_numpy(result["matrix"])
        torch.testing.assert_close(found, expected.matrix, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.fixture(scope="module")
def inputs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Artifacts ``model`` and ``data``, as overrides."""
    root = tmp_path_factory.mktemp("inputs")

    def write_model(out: Path) -> None:
        save_model(load_model(model_dir), out, architecture=architecture(), tokenizer_from=None)
        copy_tokenizer(model_dir, out)

    def write_data(out: Path) -> None:
        for name in ("train", "validation", "calibration"):
            np.save(out / f"{name}.npy", SEQUENCES.flatten().numpy().astype(np.uint16))
        summary = {"vocab_size": 320, "eos_token_id": 0, "unigram_entropy_nats": 5.0}
        (out / "data.json").write_text(json.dumps({**summary, "tokenizer_sha256": tokenizer_sha256(model_dir)}))

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

    return [f"inputs.model={artifact('model', write_model)}", f"inputs.data={artifact('data', write_data)}"]


def launch(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        return main(arguments), err.getvalue()


def measured(run: RunInProcesses, root: Path, inputs: list[str], processes: int, *further: str) -> Path:
    arguments = ["measure_dependency", f"run.root={root}", *SETTINGS.split(), *inputs, *further]
    for status, said in run(processes, launch, arguments):
        assert status == 0, said
    (path,) = (root / "store").glob("measure_dependency-*")
    return path


def test_the_stage_is_that_of_one_process(tmp_path: Path, inputs: list[str], run_in_processes: RunInProcesses) -> None:
    alone = measured(run_in_processes, tmp_path / "one", inputs, 1)
    found = measured(run_in_processes, tmp_path / "all", inputs, 4, "engine.slices=2")
    # The same fingerprint: how the work is dealt does not count.
    assert found.name == alone.name
    assert sorted(path.name for path in found.iterdir()) == [
        "artifact.json",
        "contributions.svg",
        "dependency.json",
        "dependency.npy",
        "dependency.svg",
    ]
    matrices = [np.load(path / "dependency.npy", allow_pickle=False) for path in (found, alone)]
    np.testing.assert_allclose(*matrices, **TOLERANCE)
    contents = [json.loads((path / "dependency.json").read_text()) for path in (found, alone)]
    assert contents[0]["num_tokens"] == contents[1]["num_tokens"] == 140
    metrics = [json.loads((path / "artifact.json").read_text())["metrics"] for path in (found, alone)]
    assert metrics[0]["attention_free_runs"][0]["largest_dependency"] == pytest.approx(
        metrics[1]["attention_free_runs"][0]["largest_dependency"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["dependency.seq_len=65"], "dependency.seq_len=65 is beyond the 64 positions of the model; lower it"),
        (["dependency.num_sequences=8"], "8 sequences of 20 tokens asked of the calibration split"),
        (["dependency.average=words"], "average"),
    ],
)
def test_bad_input_ends_all_processes_with_one_message(
    tmp_path: Path, inputs: list[str], run_in_processes: RunInProcesses, further: list[str], message: str
) -> None:
    arguments = ["measure_dependency", f"run.root={tmp_path}", *SETTINGS.split(), *inputs, *further]
    results = run_in_processes(2, launch, arguments)
    assert [status for status, _ in results] == [2, 2]
    # The process that fails first says why, whichever it is, and no other does.
    assert [message in said for _, said in results].count(True) == 1
    assert not list(tmp_path.glob("store/measure_dependency-*"))

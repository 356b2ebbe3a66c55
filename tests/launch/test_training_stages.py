"""The three training stages through their bodies, on pico models and a learnable toy language."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from distill import resume
from distill.config import (
    EngineConfig,
    ObjectiveConfig,
    OptimConfig,
    RopeConfig,
    TrainConfig,
)
from distill.context_phases import ExtendContextConfig, PhaseConfig
from distill.data.batch import IGNORE_INDEX, Batch
from distill.data.dataset import Batches, TokenDataset, TokenSplit
from distill.data.tokenizer import load_tokenizer, train_tokenizer
from distill.engine.setup import TrainingSetup
from distill.teacher_cache import TeacherCacheConfig
from launch import training
from launch.artifact import Artifact
from launch.stage import StageContext, StageResult
from launch.stage_configs import CacheTeacherStage, DistillStage, ExtendContextStage, PretrainStage
from launch.stages import cache_teacher, distill, extend_context, pretrain
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, load_model, read_architecture
from puzzle.model.config import PretrainConfig
from puzzle.model.provider import DirectoryProvider
from puzzle.model.stats import flops_per_token
from tests.launch.training_inputs import commit_artifact, write_data, write_student, write_teacher

OPTIM = OptimConfig(lr=5e-4)
ENGINE = EngineConfig(device="cpu")
GKD = ObjectiveConfig(kld=1.0, hidden_cosine=1.0, chunk_tokens=64)
LM = ObjectiveConfig(lm=1.0, chunk_tokens=64)
DISTILL = DistillStage(
    distill=TrainConfig(
        max_tokens=1280, seq_len=16, batch_size=4, eval_every_tokens=512, eval_sequences=4, resume_every_tokens=256
    ),
    objective=GKD,
    optim=OPTIM,
    engine=ENGINE,
    seed=1,
)


@pytest.fixture(scope="module")
def data(pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_data(tmp_path_factory.mktemp("data") / "artifact", pico_parent_dir)


@pytest.fixture(scope="module")
def teacher(pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "artifact", pico_parent_dir)


@pytest.fixture(scope="module")
def student(teacher: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_student(tmp_path_factory.mktemp("student") / "artifact", teacher.path)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    return _context(tmp_path)


def _context(root: Path) -> StageContext:
    for name in ("out", "resume"):
        (root / name).mkdir(parents=True, exist_ok=True)
    return StageContext(
        out=root / "out", resume=root / "resume", pool=root / "pool", run_name="pico", step_name="distill_child"
    )


def _curve(context: StageContext) -> list[dict[str, float]]:
    return [json.loads(line) for line in (context.out / "metrics.jsonl").read_text().splitlines()]


def _weights_sha256(context: StageContext) -> str:
    return hashlib.sha256((context.out / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where weights are loaded: errors of configuration come before that."""
    monkeypatch.setattr(training, "create_engine", lambda *_, **__: pytest.fail("weights were loaded"))


# pretrain

PRETRAIN = PretrainStage(
    pretrain=PretrainConfig(
        num_blocks=2,
        hidden_dim=32,
        num_heads=2,
        num_kv_heads=1,
        ffn_dim=256,
        max_positions=32,
        train=TrainConfig(max_tokens=4096, seq_len=32, batch_size=8, eval_sequences=8),
        optim=OptimConfig(lr=1e-2),
    ),
    engine=ENGINE,
    seed=0,
)


def test_pretrain_learns_the_language(data: Artifact, context: StageContext) -> None:
    result = pretrain.run(PRETRAIN, {"data": data}, context)
    start, end = result.metrics["start"]["lm_loss"], result.metrics["end"]["lm_loss"]
    assert start == pytest.approx(np.log(len(load_tokenizer(data.path))), abs=0.3)  # next to nothing is known yet
    assert end < 0.8 * start
    assert result.headline.startswith(f"LM loss {start:.2f} -> {end:.2f}")
    assert result.tokens == 4096
    assert load_tokenizer(context.out).get_vocab() == load_tokenizer(data.path).get_vocab()

    architecture = read_architecture(context.out)
    assert (architecture.num_blocks, architecture.hidden_dim, architecture.head_dim) == (2, 32, 16)
    assert architecture.vocab_size == len(load_tokenizer(data.path))
    assert architecture.token_ids["eos_token_id"] == load_tokenizer(data.path).eos_token_id
    assert load_model(context.out).dtype == torch.float32
    assert [row["tokens"] for row in _curve(context) if "eval/lm_loss" in row] == [0, 4096]


def test_pretrain_begins_anew_where_the_first_model_was_half_written(
    data: Artifact, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object, directory: Path, **__: object) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(PRETRAIN, {"data": data}, context)
    assert not (context.resume / "initial").exists()
    assert pretrain.run(PRETRAIN, {"data": data}, context).tokens == 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn_dim": 300}, r"pretrain.ffn_dim=300 is not a multiple of 256"),
        ({"hidden_dim": 30}, r"pretrain.hidden_dim=30 over pretrain.num_heads=2 gives heads of 15"),
    ],
)
def test_pretrain_refuses_shapes_that_cannot_be_saved(
    data: Artifact, context: StageContext, change: dict[str, int], message: str
) -> None:
    config = replace(PRETRAIN, pretrain=replace(PRETRAIN.pretrain, **change))
    with pytest.raises(ValueError, match=message):
        pretrain.run(config, {"data": data}, context)


# distill


@pytest.fixture
def inputs(student: Artifact, teacher: Artifact, data: Artifact) -> dict[str, Artifact]:
    return {"student": student, "teacher": teacher, "data": data}


def test_distill_recovers(inputs: dict[str, Artifact], context: StageContext) -> None:
    result = distill.run(DISTILL, inputs, context)
    start, end, teacher = (result.metrics[name] for name in ("start", "end", "teacher"))
    assert end["kld"] < start["kld"]
    assert result.headline == (
        f"KLD {start['kld']:.2f} -> {end['kld']:.2f}, LM loss {start['lm_loss']:.2f} -> {end['lm_loss']:.2f} "
        f"(teacher {teacher['lm_loss']:.2f})"
    )
    assert result.tokens == 1280
    # The recovery curve goes on where the student's distillation left off; other training does not count.
    assert [row["tokens"] for row in _curve(context) if "eval/kld" in row] == [100, 612, 1124, 1380]


def test_utilization_is_of_a_stated_peak_and_left_out_without_one(
    inputs: dict[str, Artifact], context: StageContext, tmp_path: Path
) -> None:
    peak = 1e12
    distill.run(DISTILL, inputs, context)
    assert not any("perf/mfu_frac" in row for row in _curve(context))
    stated = _context(tmp_path / "stated")
    distill.run(replace(DISTILL, engine=replace(DISTILL.engine, peak_flops_per_s=peak)), inputs, stated)
    assert _weights_sha256(stated) == _weights_sha256(context)
    student, teacher = (read_architecture(inputs[role].path) for role in ("student", "teacher"))
    seq_len = DISTILL.distill.seq_len
    positions = range(1, seq_len + 1)
    flops = sum(3 * flops_per_token(student, n) + flops_per_token(teacher, n) for n in positions)
    rows = [row for row in _curve(stated) if "perf/tokens_per_s" in row]
    assert rows
    for row in rows:
        assert row["perf/mfu_frac"] == pytest.approx(row["perf/tokens_per_s"] * flops / seq_len / peak)


@pytest.mark.parametrize(
    ("engine", "objective", "teacher_counts", "heads"),
    [
        ({}, {"kld": 1.0}, True, (True, True)),
        ({}, {"lm": 1.0}, False, (True, True)),
        ({}, {"lm": 1.0, "hidden_cosine": 1.0}, True, (True, False)),
        ({}, {"hidden_cosine": 1.0}, True, (False, False)),
        # That device is not among those whose peak counts.
        ({"teacher_device": "cpu"}, {"kld": 1.0}, False, (True, True)),
    ],
)
def test_a_model_counts_where_it_runs_on_the_same_devices_and_a_head_where_it_runs(
    inputs: dict[str, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    engine: dict[str, str],
    objective: dict[str, float],
    teacher_counts: bool,
    heads: tuple[bool, bool],
) -> None:
    student, teacher = (DirectoryProvider(inputs[role].path) for role in ("student", "teacher"))
    setup = TrainingSetup(student=student, objective=ObjectiveConfig(**objective), teacher=teacher)
    config = EngineConfig(device="cpu", peak_flops_per_s=1e9, **engine)  # type: ignore[arg-type]
    monkeypatch.setattr(training.distributed, "world_size", lambda: 4)
    budget = DISTILL.distill
    own, other = (
        model.sequence_flops(budget.seq_len, head=head) for model, head in zip((student, teacher), heads, strict=True)
    )
    flops = 3 * own + teacher_counts * other
    seconds = training._step_s_at_peak(setup, budget, config, torch.device("cpu"))
    assert seconds == pytest.approx(flops * budget.batch_size / 4e9)


def test_distill_keeps_the_architecture_and_data_type_of_the_student(
    inputs: dict[str, Artifact], context: StageContext
) -> None:
    distill.run(DISTILL, inputs, context)
    assert read_architecture(context.out) == read_architecture(inputs["student"].path)
    with TensorReader(context.out) as reader, TensorReader(inputs["student"].path) as before:
        assert reader.names() == before.names()
        assert {reader.dtype(name) for name in reader.names()} == {torch.bfloat16}
        assert not torch.equal(*(r.read("model.layers.1.mlp.up_proj.weight") for r in (reader, before)))
    assert load_tokenizer(context.out).get_vocab() == load_tokenizer(inputs["student"].path).get_vocab()


@pytest.mark.usefixtures("_no_weights")
def test_distill_refuses_sequences_beyond_the_positions(inputs: dict[str, Artifact], context: StageContext) -> None:
    config = replace(DISTILL, distill=replace(DISTILL.distill, seq_len=512, batch_size=1))
    with pytest.raises(ValueError, match=r"distill.seq_len=512 is beyond the 256 positions of the student"):
        distill.run(config, inputs, context)


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize(
    ("train_tokens", "validation_tokens", "message"),
    [
        (15, 1024, "longer than the train split of 15 tokens"),
        (4096, 60, "4 sequences of 16 tokens .* which has 3"),
        (1024, 1024, "distill.max_tokens=1280 is beyond the data: 64 sequences .* distill.data_end=repeat"),
    ],
)
def test_distill_refuses_data_that_is_too_short(
    inputs: dict[str, Artifact],
    context: StageContext,
    pico_parent_dir: Path,
    train_tokens: int,
    validation_tokens: int,
    message: str,
) -> None:
    counts = {"train_tokens": train_tokens, "validation_tokens": validation_tokens}
    short = write_data(context.out.parent / "short", pico_parent_dir, **counts)
    with pytest.raises(ValueError, match=message):
        distill.run(DISTILL, {**inputs, "data": short}, context)


@pytest.mark.usefixtures("_no_weights")
def test_distill_refuses_data_of_another_tokenizer(inputs: dict[str, Artifact], context: StageContext) -> None:
    other = context.out.parent / "other"
    shutil.copytree(inputs["teacher"].path, other)
    train_tokenizer(["entirely different text"], 300, other)
    with pytest.raises(ValueError, match="the tokenizer of teacher"):
        distill.run(DISTILL, {**inputs, "teacher": Artifact.load(other)}, context)


def test_blocks_are_paired_by_the_last_parent_block_that_they_stand_for(pico_architecture: Architecture) -> None:
    first, _, third, last = pico_architecture.blocks
    fused = pico_architecture.with_blocks((first, replace(third, parent_block_indices=(1, 2)), last))
    assert training.paired_blocks(fused, pico_architecture, GKD) == (0, 2, 3)
    assert training.paired_blocks(fused, fused, GKD) == (0, 1, 2)
    assert training.paired_blocks(fused, pico_architecture, ObjectiveConfig(kld=1.0)) == ()


def test_models_that_cannot_be_paired_are_refused(pico_architecture: Architecture) -> None:
    blocks = pico_architecture.blocks
    shallow = pico_architecture.with_blocks(blocks[:3])
    for student, teacher, message in (
        (pico_architecture, shallow, "student block 2 stands for parent block 2, which the teacher's 3 blocks"),
        (shallow, pico_architecture, "student block 2 stands for parent block 2, which the teacher's 4 blocks"),
        (replace(pico_architecture, vocab_size=64), pico_architecture, "student's vocabulary has 64 rows .* 320"),
        (replace(pico_architecture, hidden_dim=32), pico_architecture, "hidden states of 32 channels .* and 64"),
    ):
        with pytest.raises(ValueError, match=message):
            training.paired_blocks(student, teacher, GKD)


def test_distill_on_one_pass_of_short_data(
    inputs: dict[str, Artifact], context: StageContext, pico_parent_dir: Path
) -> None:
    short = write_data(context.out.parent / "short", pico_parent_dir, train_tokens=1050)
    config = replace(DISTILL, distill=replace(DISTILL.distill, data_end="stop"))
    assert distill.run(config, {**inputs, "data": short}, context).tokens == 1024


def test_distill_writes_what_the_parent_says_of_the_held_out_tokens(
    inputs: dict[str, Artifact], context: StageContext
) -> None:
    result = distill.run(DISTILL, inputs, context)
    points = [row for row in _curve(context) if "eval/kld" in row]
    names = {"eval/lm_loss", "eval/kld", "eval/top1_agreement_frac", "eval/teacher_lm_loss"}
    assert all(names <= row.keys() for row in points)
    # The teacher does not move, and its loss is told once.
    assert {row["eval/teacher_lm_loss"] for row in points} == {result.metrics["teacher"]["lm_loss"]}
    assert result.metrics["end"].keys() == {"lm_loss", "kld", "top1_agreement_frac"}


def test_signals_teach_as_the_teacher_that_they_are_of(
    inputs: dict[str, Artifact], data: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    """With all of the vocabulary but one token cached."""
    cache = TeacherCacheConfig(seq_len=16, max_tokens=8192, top_k=319, eval_sequences=4)
    cached = _context(tmp_path / "cache")
    cache_teacher.run(CacheTeacherStage(teacher_cache=cache, engine=ENGINE), {"teacher": teacher, "data": data}, cached)
    signals = commit_artifact(cached.out, "teacher_signals")
    config = replace(DISTILL, objective=ObjectiveConfig(kld=1.0))
    from_signals, online = _context(tmp_path / "signals"), _context(tmp_path / "online")
    given = {"student": inputs["student"], "data": data, "signals": signals}
    result = distill.run(config, given, from_signals)
    expected = distill.run(config, inputs, online)
    for name, value in expected.metrics["end"].items():
        # fp16 log-probabilities: 11 bits of values up to about 10.
        found = result.metrics["end"]["kld_top_k" if name == "kld" else name]
        assert found == pytest.approx(value, abs=5e-3), name
    assert result.headline.startswith(f"KLD (top k) {result.metrics['start']['kld_top_k']:.2f} -> ")
    assert result.metrics["teacher"]["lm_loss"] == pytest.approx(expected.metrics["teacher"]["lm_loss"], abs=1e-4)
    with pytest.raises(ValueError, match=r"either inputs.teacher=.* or inputs.signals=.* got .* and inputs.signals"):
        distill.run(config, {**given, "teacher": teacher}, _context(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"objective.hidden_cosine=1.0 compares hidden states"):
        distill.run(DISTILL, given, _context(tmp_path / "hidden"))


def test_held_out_documents_are_apart_where_those_of_the_training_are(data: Artifact) -> None:
    dataset = replace(TokenDataset.open(data.path), eos_token_id=3)
    for separate in (True, False):
        budget = replace(DISTILL.distill, separate_documents=separate)
        held_out = training.training_data(dataset, budget, seed=0, node="distill").held_out
        ends = held_out.input_ids == 3
        assert ends.any()
        assert held_out.separate_documents is separate
        assert bool((held_out.labels[ends] == IGNORE_INDEX).all()) is separate


# SIGKILL


def run_until_killed(root: str, moment: str, *inputs: str) -> None:
    """Body of the process that is killed: distil, say ``ready`` on reaching the moment, and wait there."""

    def wait() -> NoReturn:
        print("ready", flush=True)
        sys.stdin.read()
        raise AssertionError("nobody killed this process")

    torch.set_num_threads(1)
    if moment == "within a step":
        batch = Batches.batch
        Batches.batch = lambda self, step, *ranks: wait() if step == 13 else batch(self, step, *ranks)  # type: ignore[method-assign]
    else:
        resume.flush_to_disk = lambda path: wait() if path.parent.name == "step_12.tmp" else None
    artifacts = dict(argument.split("=", 1) for argument in inputs)
    distill.run(DISTILL, {name: Artifact.load(Path(path)) for name, path in artifacts.items()}, _context(Path(root)))


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Sums in one order, as in the killed process."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(
    ("moment", "points"),
    [
        # That of step 12 may still be on its way.
        ("within a step", {"step_8"}),
        pytest.param("within a resume point", {"step_4", "step_8", "step_12.tmp"}, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    inputs: dict[str, Artifact], tmp_path: Path, moment: str, points: set[str]
) -> None:
    reference, killed = _context(tmp_path / "reference"), _context(tmp_path / "killed")
    distill.run(DISTILL, inputs, reference)

    paths = [f"{name}={artifact.path}" for name, artifact in inputs.items()]
    with subprocess.Popen(
        [sys.executable, __file__, str(tmp_path / "killed"), moment, *paths],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in killed.resume.iterdir()} >= points

    shutil.rmtree(killed.out)  # as the store does with an attempt that was not committed
    distill.run(DISTILL, inputs, _context(tmp_path / "killed"))
    assert _weights_sha256(killed) == _weights_sha256(reference)
    assert _evaluations(killed) == _evaluations(reference)


def _evaluations(context: StageContext) -> list[dict[str, float]]:
    return [row for row in _curve(context) if "eval/kld" in row]


# extend_context

EXTEND = ExtendContextStage(
    extend_context=ExtendContextConfig(
        phases=(
            PhaseConfig(seq_len=32, max_tokens=512, batch_size=2),
            PhaseConfig(seq_len=512, max_tokens=2048, batch_size=1, rope=RopeConfig(theta=40_000.0)),
        ),
        eval_sequences=2,
    ),
    objective=LM,
    optim=OPTIM,
    engine=ENGINE,
    seed=1,
)
SHORT_PHASES = replace(EXTEND.extend_context, phases=(EXTEND.extend_context.phases[0],))


def _extend(config: ExtendContextStage, inputs: dict[str, Artifact], context: StageContext) -> StageResult:
    return extend_context.run(config, inputs, context)


def test_extend_context_changes_positions_and_rope(student: Artifact, data: Artifact, context: StageContext) -> None:
    result = _extend(EXTEND, {"student": student, "data": data}, context)
    before, after = read_architecture(student.path), read_architecture(context.out)
    assert after == replace(before, max_positions=512, rope=RopeConfig(theta=40_000.0))
    assert result.tokens == 512 + 2048
    assert [phase["seq_len"] for phase in result.metrics["phases"]] == [32, 512]
    assert result.metrics["phases"][1]["teacher"] == {}
    assert result.metrics["phases"][0]["end"]["lm_loss"] < result.metrics["phases"][0]["start"]["lm_loss"]
    assert result.headline.endswith("at 512 tokens of context")
    # What the second phase starts from is not rounded to the data type that the student came in.
    for directory, dtype in ((context.resume / "phase_0_model", torch.float32), (context.out, torch.bfloat16)):
        with TensorReader(directory) as reader:
            assert {reader.dtype(name) for name in reader.names()} == {dtype}
    assert [row["tokens"] for row in _curve(context) if "eval/lm_loss" in row] == [100, 612, 612, 2660]


def test_the_second_phase_trains_with_its_own_rope(student: Artifact, data: Artifact, context: StageContext) -> None:
    result = _extend(EXTEND, {"student": student, "data": data}, context)
    first, second = EXTEND.extend_context.phases
    same_rope = replace(EXTEND.extend_context, phases=(first, replace(second, rope=None)))
    other = _extend(
        replace(EXTEND, extend_context=same_rope), {"student": student, "data": data}, _context(context.out / "other")
    )
    assert result.metrics["phases"][0]["end"] == other.metrics["phases"][0]["end"]
    assert result.metrics["phases"][1]["start"] != other.metrics["phases"][1]["start"]


def test_a_phase_may_learn_from_a_teacher(inputs: dict[str, Artifact], context: StageContext) -> None:
    result = _extend(replace(EXTEND, objective=GKD, extend_context=SHORT_PHASES), inputs, context)
    (phase,) = result.metrics["phases"]
    assert phase["end"]["kld"] < phase["start"]["kld"]
    assert result.headline.endswith(f"(teacher {phase['teacher']['lm_loss']:.2f}) at 32 tokens of context")


def test_finished_phases_are_not_repeated(
    student: Artifact, data: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"student": student, "data": data}
    reference, interrupted = _context(tmp_path / "reference"), _context(tmp_path / "interrupted")
    _extend(EXTEND, inputs, reference)

    batch, seen = Batches.batch, []

    def interrupting(self: Batches, step: int, *ranks: int) -> Batch:
        sequences = batch(self, step, *ranks)
        seen.append((sequences.input_ids.shape[1], step))
        if seen[-1] == (512, 2):
            raise KeyboardInterrupt
        return sequences

    monkeypatch.setattr(Batches, "batch", interrupting)
    with pytest.raises(KeyboardInterrupt):
        _extend(EXTEND, inputs, interrupted)
    monkeypatch.setattr(Batches, "batch", lambda self, step, *ranks: seen.append(step) or batch(self, step, *ranks))
    seen.clear()
    shutil.rmtree(interrupted.out)
    result = _extend(EXTEND, inputs, _context(tmp_path / "interrupted"))
    assert seen == [2, 3]
    assert result.tokens == 512 + 2048
    assert _weights_sha256(interrupted) == _weights_sha256(reference)
    assert [row["tokens"] for row in _curve(interrupted)] == [row["tokens"] for row in _curve(reference)]


def test_every_phase_is_probed_by_length(student: Artifact, data: Artifact, context: StageContext) -> None:
    """A probe before the phases and after each, once, also where the run is resumed."""
    extend = replace(EXTEND.extend_context, lengths=(256, 512), num_needles=2)
    config, inputs = replace(EXTEND, extend_context=extend), {"student": student, "data": data}
    result = _extend(config, inputs, context)
    tables = [result.metrics["before"]["by_length"], *(phase["by_length"] for phase in result.metrics["phases"])]
    # Of the student's 256 positions only the last phase makes 512.
    assert [table["512"]["lm_loss"] is None for table in tables] == [True, True, False]
    assert tables[0]["256"]["lm_loss"] > tables[2]["256"]["lm_loss"] > 0
    assert all(0 <= table["256"]["retrieval_accuracy_frac"] <= 1 for table in tables)
    rows = [row for row in _curve(context) if "length_256/lm_loss" in row]
    assert [row["tokens"] for row in rows] == [100, 612, 2660]
    assert [row["length_256/lm_loss"] for row in rows] == [table["256"]["lm_loss"] for table in tables]
    before = _curve(context)
    shutil.rmtree(context.out)
    assert _extend(config, inputs, _context(context.out.parent)).metrics == result.metrics
    assert _curve(context) == before


def test_a_phase_trains_on_what_the_earlier_ones_left(
    student: Artifact, data: Artifact, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, set[int]] = {32: set(), 512: set()}
    sequences = TokenSplit.sequences
    train = np.load(data.path / "train.npy")

    def recording(self: TokenSplit, seq_len: int, indices: Sequence[int]) -> torch.Tensor:
        found = sequences(self, seq_len, indices)
        if self.name == "train":
            first = len(train) - len(self.tokens)
            seen[seq_len] |= {first + index * seq_len + i for index in indices for i in range(seq_len)}
        return found

    monkeypatch.setattr(TokenSplit, "sequences", recording)
    _extend(EXTEND, {"student": student, "data": data}, context)
    assert len(seen[32]) == 512
    assert len(seen[512]) == 2048
    assert max(seen[32]) < min(seen[512])


@pytest.mark.usefixtures("_no_weights")
def test_extend_context_says_what_earlier_phases_leave(
    student: Artifact, context: StageContext, pico_parent_dir: Path
) -> None:
    short = write_data(context.out.parent / "short", pico_parent_dir, train_tokens=2304)
    message = (
        r"extend_context.phases.1.max_tokens=2048 is beyond the data: 3 sequences of 512 tokens that the 512 tokens of "
        r"earlier phases leave .* extend_context.phases.1.data_end=repeat .* raise data.train_tokens to 2560"
    )
    with pytest.raises(ValueError, match=message):
        _extend(EXTEND, {"student": student, "data": short}, context)


def test_a_phase_that_is_shorter_than_a_step_is_refused_in_its_name() -> None:
    with pytest.raises(ValueError, match=r"extend_context.phases.1: max_tokens=100 is less than one step"):
        ExtendContextConfig(
            phases=(EXTEND.extend_context.phases[0], PhaseConfig(seq_len=512, max_tokens=100, batch_size=1))
        )
    with pytest.raises(ValueError, match=r"extend_context.lengths must be in 2..512 .* got \[1024\]"):
        replace(EXTEND.extend_context, lengths=(1024,))


def test_a_teacher_that_the_objective_does_not_need_is_what_the_student_is_held_against(
    inputs: dict[str, Artifact], context: StageContext
) -> None:
    result = _extend(replace(EXTEND, extend_context=SHORT_PHASES), inputs, context)
    (phase,) = result.metrics["phases"]
    assert {"lm_loss", "kld", "top1_agreement_frac"} == phase["end"].keys()
    assert phase["teacher"]["lm_loss"] > 0


@pytest.mark.usefixtures("_no_weights")
def test_extend_context_refuses_an_objective_without_its_teacher(
    student: Artifact, data: Artifact, context: StageContext
) -> None:
    with pytest.raises(ValueError, match=r"need the input `teacher`; name one, or train .* objective=lm"):
        _extend(replace(EXTEND, objective=GKD), {"student": student, "data": data}, context)


@pytest.mark.usefixtures("_no_weights")
def test_extend_context_refuses_a_teacher_beyond_its_positions(
    inputs: dict[str, Artifact], context: StageContext
) -> None:
    with pytest.raises(ValueError, match=r"reach seq_len=512, beyond the 256 positions of the teacher"):
        _extend(replace(EXTEND, objective=GKD), inputs, context)


if __name__ == "__main__":
    run_until_killed(*sys.argv[1:])

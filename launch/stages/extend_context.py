"""Stage extend_context: student, data, perhaps a teacher -> the student at a longer context, phase after phase.

Between two phases the model is a directory, whatever the engine: the next one starts from it with the rotary settings
and positions of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill import distributed
from distill.config import TrainConfig, require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.setup import TrainingSetup
from distill.tracking import Tracker
from distill.trainer import TrainResult
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import ExtendContextStage
from launch.training import (
    TrainingData,
    curve_ends,
    only_whole,
    paired_blocks,
    recovery_headline,
    run_engine,
    tracking,
    training_data,
    uptraining_tokens,
)
from puzzle.model.architecture import Architecture
from puzzle.model.parallelism import check_parallelism
from puzzle.model.provider import DirectoryProvider

RESULT_FILE = "result.json"
"""Beside the model of a finished phase: its curve."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase, ready to run."""

    index: int
    architecture: Architecture
    """The student's from this phase on."""
    data: TrainingData


@dataclass(frozen=True, kw_only=True)
class _Models:
    """What the phases share."""

    student: DirectoryProvider
    """As it came in."""
    teacher: DirectoryProvider | None
    layer_map: tuple[int, ...]


def run(config: ExtendContextStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Run the phases, each with its own resume points. Writes the model and ``metrics.jsonl`` with all phases."""
    config.check_processes(distributed.world_size())
    dataset = TokenDataset.open(inputs["data"].path)
    models = _models(config, inputs, dataset)
    phases = list(_phases(config, models.student.architecture, dataset))
    results: list[TrainResult] = []
    with tracking(context, stage="extend_context", config=config) as tracker:
        source = models.student.directory
        for phase in phases:
            offset = uptraining_tokens(inputs["student"]) + sum(result.tokens for result in results)
            is_last = phase is phases[-1]
            source, result = _run_phase(phase, source, models, config, context, tracker, offset, is_last=is_last)
            results.append(result)
    seq_len = phases[-1].data.train.seq_len
    return StageResult(
        headline=f"{recovery_headline(curve_ends(results[-1]))} at {seq_len:,} tokens of context",
        metrics={"phases": [_phase_metrics(*pair) for pair in zip(phases, results, strict=True)]},
        tokens=sum(result.tokens for result in results),
    )


def _models(config: ExtendContextStage, inputs: Inputs, dataset: TokenDataset) -> _Models:
    """The student and, where the objective needs one, the teacher, checked against the data and the longest phase."""
    student = DirectoryProvider(inputs["student"].path)
    require_same_tokenizer(dataset, student.directory, "student")
    check_parallelism(student.architecture, config.engine, role="student")
    if not config.objective.needs_teacher:
        return _Models(student=student, teacher=None, layer_map=())
    config.check_inputs(inputs)
    teacher = DirectoryProvider(inputs["teacher"].path)
    require_same_tokenizer(dataset, teacher.directory, "teacher")
    check_parallelism(teacher.architecture, config.engine, role="teacher")
    longest = max(phase.seq_len for phase in config.extend_context.phases)
    require(
        longest <= teacher.architecture.max_positions,
        f"extend_context.phases reach seq_len={longest}, beyond the {teacher.architecture.max_positions} positions of "
        "the teacher; train that phase with objective=lm, or take a teacher that was made for it",
    )
    pairs = paired_blocks(student.architecture, teacher.architecture, config.objective)
    return _Models(student=student, teacher=teacher, layer_map=pairs)


def _phases(config: ExtendContextStage, architecture: Architecture, dataset: TokenDataset) -> Iterator[Phase]:
    """The phases in order, with the student's architecture and the data of each."""
    extend = config.extend_context
    for index, phase in enumerate(extend.phases):
        architecture = replace(
            architecture,
            max_positions=max(architecture.max_positions, phase.seq_len),
            rope=phase.rope or architecture.rope,
        )
        budget = TrainConfig(
            max_tokens=phase.max_tokens,
            seq_len=phase.seq_len,
            batch_size=phase.batch_size,
            eval_every_tokens=extend.eval_every_tokens,
            eval_sequences=extend.eval_sequences,
            data_end=phase.data_end,
            separate_documents=phase.separate_documents,
        )
        node = f"extend_context.phases[{index}]"
        data = training_data(dataset, budget, seed=config.seed + index, node=node)
        yield Phase(index=index, architecture=architecture, data=data)


def _run_phase(
    phase: Phase,
    source: Path,
    models: _Models,
    config: ExtendContextStage,
    context: StageContext,
    tracker: Tracker | None,
    tokens_before: int,
    *,
    is_last: bool,
) -> tuple[Path, TrainResult]:
    """Train one phase from the model in ``source``. Returns the directory of the trained one, and the curve.

    What comes between two phases is in fp32, as engines train it; a phase that is there already is not repeated.
    """
    student = DirectoryProvider(
        source,
        phase.architecture,
        tokenizer_from=models.student.directory,
        written_dtype=models.student.dtype if is_last else torch.float32,
    )
    setup = TrainingSetup(
        student=student, teacher=models.teacher, objective=config.objective, layer_map=models.layer_map
    )

    def trained(out: Path) -> TrainResult:
        return run_engine(
            setup,
            phase.data,
            optim=config.optim,
            engine=config.engine,
            seed=config.seed + phase.index,
            resume_dir=context.resume / f"phase_{phase.index}",
            tracker=tracker,
            tokens_before=tokens_before,
            desc=f"{context.step_name} at {phase.data.train.seq_len}",
            out=out,
        )

    if is_last:
        return context.out, trained(context.out)
    directory = context.resume / f"phase_{phase.index}_model"
    with only_whole(directory) as partial:
        if partial is not None:
            result = trained(partial)
            if distributed.is_main():
                (partial / RESULT_FILE).write_text(json.dumps(asdict(result)))
    if partial is None:
        result = TrainResult(**json.loads((directory / RESULT_FILE).read_text()))
        if tracker is not None:
            tracker.restore(result.curve)
    return directory, result


def _phase_metrics(phase: Phase, result: TrainResult) -> dict[str, Any]:
    return {"seq_len": phase.data.train.seq_len, "teacher": {}, **curve_ends(result)}

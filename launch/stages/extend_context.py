"""Stage extend_context: student, data, perhaps a teacher -> the student at a longer context, phase after phase.

Between two phases the model is a directory, whatever the engine: the next one starts from it with the rotary settings
and positions of its own. Each trains on what the phases before left of the train split. Before the first and after each
the model may be probed by length, by the first process alone on its device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill import distributed
from distill.config import require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import resolve_device, resolve_dtype
from distill.engine.setup import TrainingSetup
from distill.files import write_whole
from distill.metrics import Row
from distill.retrieval import NUM_CANDIDATES, LengthProbe, make_probe, measure_lengths
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
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.model.provider import DirectoryProvider

RESULT_FILE = "result.json"
"""Beside the model of a finished phase: its curve, and what it does by length."""
START_FILE = "start_by_length.json"
"""In the stage's private directory: what the student does by length as it comes in."""

ByLength = dict[str, dict[str, float | None]]
"""Columns of :data:`distill.retrieval.LENGTH_COLUMNS` by length."""


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
    probes: dict[int, LengthProbe]
    """By length."""


@dataclass(frozen=True, kw_only=True)
class _PhaseResult:
    """What a finished phase leaves."""

    training: TrainResult
    by_length: ByLength


def run(config: ExtendContextStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Run the phases, each with its own resume points. Writes the model and ``metrics.jsonl`` with all phases."""
    dataset = TokenDataset.open(inputs["data"].path)
    models = _models(config, inputs, dataset)
    phases = list(_phases(config, models.student.architecture, dataset))
    results: list[_PhaseResult] = []
    with tracking(context, stage="extend_context", config=config) as tracker:
        source = models.student.directory
        tokens = uptraining_tokens(inputs["student"])
        at_start = _start_by_length(models, config, context, tracker, tokens)
        for phase in phases:
            is_last = phase is phases[-1]
            source, result = _run_phase(phase, source, models, config, context, tracker, tokens, is_last=is_last)
            results.append(result)
            tokens += result.training.tokens
    seq_len = phases[-1].data.train.seq_len
    measured = {"before": {"by_length": at_start}, "retrieval_chance_frac": 1 / NUM_CANDIDATES} if at_start else {}
    return StageResult(
        headline=f"{recovery_headline(curve_ends(results[-1].training))} at {seq_len:,} tokens of context",
        metrics={"phases": [_phase_metrics(*pair) for pair in zip(phases, results, strict=True)], **measured},
        tokens=sum(result.training.tokens for result in results),
    )


def _models(config: ExtendContextStage, inputs: Inputs, dataset: TokenDataset) -> _Models:
    """The student and, where there is one, the teacher, checked against the data and the longest phase.

    A teacher that the objective has no use for is what the student is held against, as in stage distill.
    """
    config.check_inputs(inputs)
    models = {role: DirectoryProvider(inputs[role].path) for role in ("student", "teacher") if role in inputs}
    for role, model in models.items():
        require_same_tokenizer(dataset, model.directory, role)
    student, teacher = models["student"], models.get("teacher")
    longest = max(phase.seq_len for phase in config.extend_context.phases)
    reach = longest if teacher is None else teacher.architecture.max_positions
    require(
        longest <= reach,
        f"extend_context.phases reach seq_len={longest}, beyond the {reach} positions of the teacher; train that phase "
        "with objective=lm and without inputs.teacher, or take a teacher that was made for it",
    )
    config.check_processes(distributed.world_size(), {role: model.architecture for role, model in models.items()})
    probes = _probes(config, dataset)
    pairs = paired_blocks(student.architecture, teacher.architecture, config.objective) if teacher else ()
    return _Models(student=student, teacher=teacher, layer_map=pairs, probes=probes)


def _probes(config: ExtendContextStage, dataset: TokenDataset) -> dict[int, LengthProbe]:
    probe = config.extend_context.probe
    return {
        length: make_probe(dataset, probe, length=length, seed=config.seed, node="extend_context")
        for length in probe.lengths
    }


def _phases(config: ExtendContextStage, architecture: Architecture, dataset: TokenDataset) -> Iterator[Phase]:
    """The phases in order, with the student's architecture and the data of each."""
    extend = config.extend_context
    used_tokens = 0
    for index, phase in enumerate(extend.phases):
        architecture = replace(
            architecture,
            max_positions=max(architecture.max_positions, phase.seq_len),
            rope=phase.rope or architecture.rope,
        )
        data = training_data(
            dataset, extend.train(index), seed=config.seed + index, node=extend.node(index), used_tokens=used_tokens
        )
        used_tokens += data.train.spent_tokens
        yield Phase(index=index, architecture=architecture, data=data)


def _start_by_length(
    models: _Models, config: ExtendContextStage, context: StageContext, tracker: Tracker | None, tokens: int
) -> ByLength:
    """What the student does by length as it comes in; it is measured once."""
    if not models.probes:
        return {}
    file = context.resume / START_FILE
    if file.is_file():
        measured: ByLength = json.loads(file.read_text())
        if tracker is not None:
            tracker.restore([_length_row(measured, tokens)])
        return measured
    measured = _by_length(models, models.student.directory, config)
    if tracker is not None:
        tracker.log(_length_row(measured, tokens))
        write_whole(file, json.dumps(measured))
    return measured


def _by_length(models: _Models, directory: Path, config: ExtendContextStage) -> ByLength:
    """What the model in ``directory`` does by length; the first process measures it, the others wait."""
    measured: ByLength = {}
    if models.probes and distributed.is_main():
        model = load_model(directory, device=resolve_device(config.engine), dtype=resolve_dtype(config.engine))
        measured = measure_lengths(
            model,
            models.probes,
            max_positions=read_architecture(directory).max_positions,
            chunk_tokens=config.objective.chunk_tokens,
        )
    return distributed.gather_objects(measured)[0]


def _length_row(by_length: ByLength, tokens: int) -> Row:
    """``by_length`` as a row of ``metrics.jsonl``."""
    values = {
        f"length_{length}/{column}": value
        for length, columns in by_length.items()
        for column, value in columns.items()
        if value is not None
    }
    return {"tokens": tokens, **values}


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
) -> tuple[Path, _PhaseResult]:
    """Train one phase from the model in ``source``. Returns the directory of the trained one, and what it does.

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

    def trained(out: Path) -> _PhaseResult:
        training = run_engine(
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

        result = _PhaseResult(training=training, by_length=_by_length(models, out, config))
        if tracker is not None and result.by_length:
            tracker.log(_length_row(result.by_length, tokens_before + training.tokens))
        return result

    if is_last:
        return context.out, trained(context.out)
    directory = context.resume / f"phase_{phase.index}_model"
    with only_whole(directory) as partial:
        if partial is not None:
            result = trained(partial)
            if distributed.is_main():
                (partial / RESULT_FILE).write_text(json.dumps(asdict(result)))
    if partial is None:
        known = json.loads((directory / RESULT_FILE).read_text())
        result = _PhaseResult(training=TrainResult(**known["training"]), by_length=known["by_length"])
        if tracker is not None:
            tracker.restore(result.training.curve)
            if result.by_length:
                tracker.restore([_length_row(result.by_length, tokens_before + result.training.tokens)])
    return directory, result


def _phase_metrics(phase: Phase, result: _PhaseResult) -> dict[str, Any]:
    by_length = {"by_length": result.by_length} if result.by_length else {}
    return {"seq_len": phase.data.train.seq_len, "teacher": {}, **curve_ends(result.training), **by_length}

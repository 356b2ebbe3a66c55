"""Stage extend_context: student, data, perhaps a teacher -> the student at a longer context, phase after phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.config import TrainConfig, require
from distill.data.dataset import Batches, TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import micro_batch_size, resolve_device
from distill.evaluate import evaluate_model
from distill.objective import Objective
from distill.tracking import Tracker
from distill.trainer import TrainResult, train
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import ExtendContextStage
from launch.stages.distill import online_teacher, paired_blocks, recovery_headline, stored_dtype, uptraining_tokens
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model, load_model, read_architecture, save_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase, ready to run."""

    index: int
    train: TrainConfig
    architecture: Architecture
    """The student's from this phase on."""
    batches: Batches
    sequences: Tensor
    """Held-out token ids [num_sequences, seq]."""


def run(config: ExtendContextStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Run the phases, each with its own resume points. Writes the model and ``metrics.jsonl`` with all phases."""
    student_dir = inputs["student"].path
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, student_dir, "student")
    pairs = _require_teacher(config, inputs, dataset)
    phases = list(_phases(config, read_architecture(student_dir), dataset))
    device = resolve_device(config.engine)
    with Tracker(
        context.out / "metrics.jsonl",
        context.tracking,
        run_name=context.run_name,
        step_name=context.step_name,
        stage="extend_context",
        settings=asdict(config),
    ) as tracker:
        teacher = None
        if config.objective.needs_teacher:
            teacher = online_teacher(inputs["teacher"].path, config.engine)
        objective = Objective(config=config.objective, teacher=teacher, layer_map=pairs)
        student = load_model(student_dir, dtype=torch.float32)
        tokens, rows = 0, []
        for phase in phases:
            student = _rebuilt(student, phase.architecture).to(device)
            offset = uptraining_tokens(inputs["student"]) + tokens
            result, teacher_metrics = _run_phase(phase, student, objective, config, context, tracker, offset)
            tokens += result.tokens
            rows.append(_phase_metrics(phase, result, teacher_metrics))
    architecture = phases[-1].architecture
    save_model(
        student, context.out, architecture=architecture, tokenizer_from=student_dir, dtype=stored_dtype(student_dir)
    )
    headline = recovery_headline(result, teacher_lm_loss=teacher_metrics.get("lm_loss"))
    return StageResult(
        headline=f"{headline} at {phases[-1].train.seq_len:,} tokens of context",
        metrics={"phases": rows},
        tokens=tokens,
    )


def _require_teacher(config: ExtendContextStage, inputs: Inputs, dataset: TokenDataset) -> tuple[int, ...]:
    """Check the teacher that the objective needs, if it does. Returns its blocks by student block."""
    objective = config.objective
    if not objective.needs_teacher:
        return ()
    config.check_inputs(inputs)
    teacher_dir = inputs["teacher"].path
    require_same_tokenizer(dataset, teacher_dir, "teacher")
    teacher = read_architecture(teacher_dir)
    longest = max(phase.seq_len for phase in config.extend_context.phases)
    require(
        longest <= teacher.max_positions,
        f"extend_context.phases reach seq_len={longest}, beyond the {teacher.max_positions} positions of the teacher; "
        "train that phase with objective=lm, or take a teacher that was made for it",
    )
    return paired_blocks(read_architecture(inputs["student"].path), teacher, objective)


def _phases(config: ExtendContextStage, architecture: Architecture, dataset: TokenDataset) -> Iterator[Phase]:
    """The phases in order, with the student's architecture and the data of each."""
    extend = config.extend_context
    for index, phase in enumerate(extend.phases):
        architecture = replace(
            architecture,
            max_positions=max(architecture.max_positions, phase.seq_len),
            rope=phase.rope or architecture.rope,
        )
        yield Phase(
            index=index,
            train=TrainConfig(
                max_tokens=phase.max_tokens,
                seq_len=phase.seq_len,
                batch_size=phase.batch_size,
                eval_every_tokens=extend.eval_every_tokens,
                eval_sequences=extend.eval_sequences,
            ),
            architecture=architecture,
            batches=Batches(
                dataset.split("train"),
                seq_len=phase.seq_len,
                batch_size=phase.batch_size,
                seed=config.seed + index,
            ),
            sequences=dataset.split("validation").first(extend.eval_sequences, phase.seq_len),
        )


def _rebuilt(model: DeciLMForCausalLM, architecture: Architecture) -> DeciLMForCausalLM:
    """``model``'s weights in a module with the positions and rotary settings of ``architecture``."""
    rebuilt = build_model(architecture, seed=0)
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt


def _run_phase(
    phase: Phase,
    student: DeciLMForCausalLM,
    objective: Objective,
    config: ExtendContextStage,
    context: StageContext,
    tracker: Tracker,
    tokens_before: int,
) -> tuple[TrainResult, dict[str, float]]:
    """Train one phase, or restore it where it is finished. Returns its result and the teacher's held-out metrics."""
    evaluate = partial(
        evaluate_model,
        sequences=phase.sequences,
        batch_size=micro_batch_size(config.engine, batch_size=phase.train.batch_size, seq_len=phase.train.seq_len),
        chunk_tokens=config.objective.chunk_tokens,
    )
    teacher = objective.teacher.model if objective.teacher is not None else None
    result = train(
        model=student,
        objective=objective,
        batches=phase.batches,
        train=phase.train,
        optim=config.optim,
        engine=config.engine,
        seed=config.seed + phase.index,
        resume_dir=context.resume / f"phase_{phase.index}",
        tracker=tracker,
        evaluate=partial(evaluate, student, teacher=teacher),
        tokens_before=tokens_before,
        desc=f"{context.step_name} at {phase.train.seq_len}",
    )
    return result, {} if teacher is None else evaluate(teacher)


def _phase_metrics(phase: Phase, result: TrainResult, teacher_metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "seq_len": phase.train.seq_len,
        "start": result.evaluations[0],
        "end": result.evaluations[-1],
        "teacher": teacher_metrics,
    }

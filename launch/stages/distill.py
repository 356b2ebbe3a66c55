"""Stage distill: student, teacher, data -> the student after global knowledge distillation, and its recovery curve."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from distill.config import EngineConfig, ObjectiveConfig, require
from distill.data.dataset import Batches, TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import compile_blocks, micro_batch_size, resolve_device, resolve_dtype
from distill.evaluate import evaluate_model
from distill.objective import Objective
from distill.teacher import Teacher
from distill.tracking import Tracker
from distill.trainer import TrainResult, train
from launch.artifact import Artifact
from launch.recovery import TRAINING_STAGES
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import DistillStage
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, load_model, read_architecture, save_model


def run(config: DistillStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Train the student against the teacher. Writes the model, in the data type it came in, and ``metrics.jsonl``."""
    student_dir, teacher_dir = inputs["student"].path, inputs["teacher"].path
    architecture, teacher_architecture = read_architecture(student_dir), read_architecture(teacher_dir)
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, student_dir, "student")
    require_same_tokenizer(dataset, teacher_dir, "teacher")
    pairs = paired_blocks(architecture, teacher_architecture, config.objective)
    seq_len, batch_size = config.distill.seq_len, config.distill.batch_size
    for role, model in (("student", architecture), ("teacher", teacher_architecture)):
        require(
            seq_len <= model.max_positions,
            f"distill.seq_len={seq_len} is beyond the {model.max_positions} positions of the {role}; lower it, or "
            "train longer contexts with stage extend_context",
        )
    batches = Batches(dataset.split("train"), seq_len=seq_len, batch_size=batch_size, seed=config.seed)
    sequences = dataset.split("validation").first(config.distill.eval_sequences, seq_len)
    device = resolve_device(config.engine)
    with Tracker(
        context.out / "metrics.jsonl",
        context.tracking,
        run_name=context.run_name,
        step_name=context.step_name,
        stage="distill",
        settings=asdict(config),
    ) as tracker:
        teacher = online_teacher(teacher_dir, config.engine)
        student = load_model(student_dir, device=device, dtype=torch.float32)
        evaluate = partial(
            evaluate_model,
            sequences=sequences,
            batch_size=micro_batch_size(config.engine, batch_size=batch_size, seq_len=seq_len),
            chunk_tokens=config.objective.chunk_tokens,
        )
        teacher_metrics = evaluate(teacher.model)
        result = train(
            model=student,
            objective=Objective(config=config.objective, teacher=teacher, layer_map=pairs),
            batches=batches,
            train=config.distill,
            optim=config.optim,
            engine=config.engine,
            seed=config.seed,
            resume_dir=context.resume,
            tracker=tracker,
            evaluate=partial(evaluate, student, teacher=teacher.model),
            tokens_before=uptraining_tokens(inputs["student"]),
            desc=context.step_name,
        )
    save_model(
        student, context.out, architecture=architecture, tokenizer_from=student_dir, dtype=stored_dtype(student_dir)
    )
    metrics = {"start": result.evaluations[0], "end": result.evaluations[-1], "teacher": teacher_metrics}
    return StageResult(
        headline=recovery_headline(result, teacher_lm_loss=teacher_metrics["lm_loss"]),
        metrics=metrics,
        tokens=result.tokens,
    )


def online_teacher(directory: Path, engine: EngineConfig) -> Teacher:
    """The model in ``directory`` as a teacher that runs beside the student, in the engine's precision."""
    model = load_model(directory, device=resolve_device(engine), dtype=resolve_dtype(engine))
    if engine.compile:
        compile_blocks(model)
    return Teacher(model)


def paired_blocks(student: Architecture, teacher: Architecture, objective: ObjectiveConfig) -> tuple[int, ...]:
    """Teacher block of every student block: the one that stands for the same last parent block.

    Raises:
        ValueError: the vocabularies differ or, where the objective compares hidden states, the two models do not come
            from one parent.
    """
    require(
        student.vocab_size == teacher.vocab_size,
        f"the student's vocabulary has {student.vocab_size} rows and the teacher's {teacher.vocab_size}; "
        "distil from the model that the student was made of",
    )
    if objective.hidden_cosine == 0:
        return ()
    way_out = "distil from the model that the student was made of, or set objective.hidden_cosine=0"
    require(
        student.hidden_dim == teacher.hidden_dim,
        f"hidden states of {student.hidden_dim} channels (student) and {teacher.hidden_dim} (teacher) cannot be "
        f"compared; {way_out}",
    )
    teacher_blocks = {block.parent_block_indices[-1]: index for index, block in enumerate(teacher.blocks)}
    pairs = [teacher_blocks.get(block.parent_block_indices[-1]) for block in student.blocks]
    last_pair = (student.num_blocks - 1, teacher.num_blocks - 1)
    for index, block in enumerate(pairs):
        require(
            block is not None and (index == last_pair[0]) == (block == last_pair[1]),
            f"student block {index} stands for parent block {student.blocks[index].parent_block_indices[-1]}, which "
            f"the teacher's {teacher.num_blocks} blocks do not have in the same place; {way_out}",
        )
    return tuple(block for block in pairs if block is not None)


def uptraining_tokens(student: Artifact) -> int:
    """Tokens of distillation and context extension that the student has seen: where its recovery curve goes on."""
    return sum(tokens for stage, tokens in student.manifest.tokens.items() if stage in TRAINING_STAGES)


def stored_dtype(model_dir: Path) -> torch.dtype:
    """Data type of the weights in ``model_dir``."""
    with TensorReader(model_dir) as reader:
        return reader.dtype(reader.names()[0])


def recovery_headline(result: TrainResult, *, teacher_lm_loss: float | None) -> str:
    """Held-out metrics from the start of the training to its end."""
    start, end = result.evaluations[0], result.evaluations[-1]
    parts = [f"LM loss {start['lm_loss']:.2f} -> {end['lm_loss']:.2f}"]
    if "kld" in end:
        parts.insert(0, f"KLD {start['kld']:.2f} -> {end['kld']:.2f}")
    suffix = "" if teacher_lm_loss is None else f" (teacher {teacher_lm_loss:.2f})"
    return ", ".join(parts) + suffix

"""What the training stages share: the tracker, the checks, one run of an engine, and what is said of it."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distill import distributed
from distill.config import EngineConfig, ObjectiveConfig, OptimConfig, TrainConfig, require
from distill.data.batch import Batch
from distill.data.budget import stretch
from distill.data.dataset import Batches, TokenDataset, documents_apart
from distill.engine.base import create_engine
from distill.engine.setup import TrainingSetup
from distill.recovered import Recovery
from distill.tracking import Tracker
from distill.trainer import TrainResult, train
from distill.utilization import peak_flops_per_s, training_flops
from launch import preemption
from launch.artifact import Artifact
from launch.recovery import TRAINING_STAGES
from launch.stage import StageContext
from puzzle.model.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains on, and what its curve is measured on."""

    train: TrainConfig
    """With the budget that the data allows."""
    batches: Batches
    held_out: Batch
    """``eval_sequences`` sequences, their documents kept apart where those of the training data are."""


def training_data(
    dataset: TokenDataset,
    train_config: TrainConfig,
    *,
    seed: int,
    node: str,
    num_cached: int | None = None,
    used_tokens: int | None = None,
) -> TrainingData:
    """Batches and held-out sequences of ``train_config``.

    Args:
        dataset: a data artifact.
        train_config: budget, sequence length, batch.
        seed: of the order.
        node: configuration node of ``train_config``, for errors.
        num_cached: as in :func:`distill.data.budget.stretch`.
        used_tokens: the same.

    Raises:
        ValueError: a split is too short.
    """
    split = dataset.split("train")
    drawn = stretch(train_config, split.num_tokens, where=node, num_cached=num_cached, used_tokens=used_tokens)
    batches = Batches(
        split.beyond(drawn.first_token),
        seq_len=train_config.seq_len,
        batch_size=train_config.batch_size,
        seed=seed,
        separate_documents=train_config.separate_documents,
        eos_token_id=dataset.eos_token_id,
        num_sequences=drawn.num_sequences,
    )
    held_out = Batch.of(dataset.split("validation").first(train_config.eval_sequences, train_config.seq_len))
    return TrainingData(
        train=drawn.train,
        batches=batches,
        held_out=documents_apart(held_out, dataset.eos_token_id) if train_config.separate_documents else held_out,
    )


def check_positions(
    architecture: Architecture, train_config: TrainConfig, *, role: str, node: str, way_out: str
) -> None:
    """Raise ``ValueError`` where sequences are beyond a model's positions; nothing has been loaded."""
    require(
        train_config.seq_len <= architecture.max_positions,
        f"{node}.seq_len={train_config.seq_len} is beyond the {architecture.max_positions} positions of the {role}; "
        f"{way_out}",
    )


def run_engine(
    setup: TrainingSetup,
    data: TrainingData,
    *,
    optim: OptimConfig,
    engine: EngineConfig,
    seed: int,
    resume_dir: Path,
    tracker: Tracker | None,
    tokens_before: int = 0,
    desc: str,
    out: Path,
) -> TrainResult:
    """Train ``setup.student`` on all processes and write it to ``out``, which the first process alone touches.

    A run that is finished is restored, without a step. The engine's memory is free again afterwards.

    Args:
        setup: student, objective, teacher.
        data: batches and held-out sequences.
        optim: optimizer and learning rate.
        engine: engine and layout; it fits the processes.
        seed: of torch's generators at the first step.
        resume_dir: private directory of this run's resume points.
        tracker: receives every row; None in all processes but the first.
        tokens_before: tokens of earlier training, added to the curve's x.
        desc: label of the progress bar and of errors.
        out: directory of the trained model, without weights so far.
    """
    budget = data.train
    _free_device()  # of an engine whose training failed before this one
    runner = create_engine(setup, optim=optim, engine=engine, batch_size=budget.batch_size, seq_len=budget.seq_len)
    with preemption.polled():
        result = train(
            engine=runner,
            batches=data.batches,
            train=budget,
            optim=optim,
            seed=seed,
            resume_dir=resume_dir,
            tracker=tracker,
            held_out=data.held_out,
            tokens_before=tokens_before,
            desc=desc,
            should_stop=preemption.should_stop,
            step_s_at_peak=_step_s_at_peak(setup, budget, engine, runner.device),
        )
    if result.tokens < budget.spent_tokens:
        raise preemption.Preempted(f"{desc} stopped at {result.tokens:,} tokens, with its state saved")
    runner.export(out)
    distributed.barrier()
    del runner
    _free_device()
    return result


def _free_device() -> None:
    """Let go of engines that are no longer used: those of libraries refer to themselves, and would stand beside the
    next one on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _step_s_at_peak(
    setup: TrainingSetup, budget: TrainConfig, engine: EngineConfig, device: torch.device
) -> float | None:
    """Seconds of an optimizer step at the peak of all processes' devices; None: it is not known.

    A teacher on a device of its own counts for nothing, as that device does. Documents that are kept apart count as
    whole sequences.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_flops_per_s(name, engine)
    if peak is None:
        return None
    objective, teacher = setup.objective, 0
    if setup.teacher is not None and objective.needs_teacher and engine.teacher_device == "same":
        teacher = setup.teacher.sequence_flops(budget.seq_len, head=objective.kld > 0)
    flops = training_flops(setup.student.sequence_flops(budget.seq_len, head=objective.reads_logits), teacher)
    return flops * budget.batch_size / (peak * distributed.world_size())


@contextmanager
def only_whole(directory: Path) -> Iterator[Path | None]:
    """A place for what all processes write together, which becomes ``directory`` once it is whole.

    Yields None, in all of them, where ``directory`` is there already.
    """
    partial = directory.with_name(f"{directory.name}.tmp")
    found = distributed.gather_objects(directory.is_dir())[0]
    if found:
        yield None
        return
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    yield partial
    distributed.barrier()
    if distributed.is_main():
        partial.rename(directory)
    distributed.barrier()


@contextmanager
def tracking(
    context: StageContext, *, stage: str, config: Any, starts_untrained: bool = False
) -> Iterator[Tracker | None]:
    """The tracker of ``stage`` in the first process, None in the others.

    Rows of evaluations say what is recovered; ``starts_untrained`` as in :class:`distill.recovered.Recovery`.
    """
    if not distributed.is_main():
        yield None
        return
    with Tracker(
        context.out / "metrics.jsonl",
        context.tracking,
        run_name=context.run_name,
        step_name=context.step_name,
        stage=stage,
        settings=asdict(config),
        resume_dir=context.resume,
        further=Recovery(starts_untrained=starts_untrained),
    ) as tracker:
        yield tracker


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
    if not objective.compares_hidden:
        return ()
    way_out = (
        "distil from the model that the student was made of, or set objective.hidden_cosine=0 objective.hidden_mse=0"
    )
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


def curve_ends(result: TrainResult) -> dict[str, dict[str, float]]:
    """``start`` and ``end``: the student's held-out metrics; ``teacher``: its LM loss, where one ran beside it."""
    ends = {"start": dict(result.evaluations[0]), "end": dict(result.evaluations[-1])}
    teacher = [metrics.pop("teacher_lm_loss", None) for metrics in ends.values()][-1]
    return ends if teacher is None else {**ends, "teacher": {"lm_loss": teacher}}


def recovery_headline(ends: dict[str, dict[str, float]]) -> str:
    """Held-out metrics from the start of the training to its end (:func:`curve_ends`)."""
    start, end = ends["start"], ends["end"]
    parts = [f"LM loss {start['lm_loss']:.2f} -> {end['lm_loss']:.2f}"]
    for name, label in (("kld", "KLD"), ("kld_top_k", "KLD (top k)")):
        if name in end:
            parts.insert(0, f"{label} {start[name]:.2f} -> {end[name]:.2f}")
    return ", ".join(parts) + (f" (teacher {ends['teacher']['lm_loss']:.2f})" if "teacher" in ends else "")

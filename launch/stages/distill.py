"""Stage distill: student, data, a teacher or its cached signals -> the student after global knowledge distillation.

All processes train. The recovery curve stands in ``metrics.jsonl``.
"""

from __future__ import annotations

from distill import distributed
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.setup import TrainingSetup
from distill.teacher_cache import SPLITS, check_run, check_tokens
from distill.teacher_store import SignalStore
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import DistillStage
from launch.training import (
    check_positions,
    curve_ends,
    paired_blocks,
    recovery_headline,
    run_engine,
    tracking,
    training_data,
    uptraining_tokens,
)
from puzzle.model.provider import DirectoryProvider


def run(config: DistillStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Train the student against the teacher. Writes the model, in the data type it came in, and ``metrics.jsonl``."""
    config.check_inputs(inputs)
    dataset = TokenDataset.open(inputs["data"].path)
    models = {role: _model(role, config, inputs, dataset) for role in ("student", "teacher") if role in inputs}
    architectures = {role: model.architecture for role, model in models.items()}
    config.check_processes(distributed.world_size(), architectures, inputs)
    student = models["student"]
    if "signals" in inputs:
        signals = _signals(config, inputs, dataset, student)
        setup = TrainingSetup(
            student=student, objective=config.objective, store=signals.train, held_out_store=signals.validation
        )
        num_cached = signals.train.num_sequences
    else:
        teacher = models["teacher"]
        pairs = paired_blocks(student.architecture, teacher.architecture, config.objective)
        setup = TrainingSetup(student=student, objective=config.objective, teacher=teacher, layer_map=pairs)
        num_cached = None
    data = training_data(dataset, config.distill, seed=config.seed, node="distill", num_cached=num_cached)
    tokens_before = uptraining_tokens(inputs["student"])
    with tracking(context, stage="distill", config=config, starts_untrained=tokens_before == 0) as tracker:
        result = run_engine(
            setup,
            data,
            optim=config.optim,
            engine=config.engine,
            seed=config.seed,
            resume_dir=context.resume,
            tracker=tracker,
            tokens_before=tokens_before,
            desc=context.step_name,
            out=context.out,
        )
    ends = curve_ends(result)
    return StageResult(headline=recovery_headline(ends), metrics=ends, tokens=result.tokens)


def _model(role: str, config: DistillStage, inputs: Inputs, dataset: TokenDataset) -> DirectoryProvider:
    """The input ``role``, checked against the data."""
    model = DirectoryProvider(inputs[role].path)
    require_same_tokenizer(dataset, model.directory, role)
    way_out = "lower it, or train longer contexts with stage extend_context"
    check_positions(model.architecture, config.distill, role=role, node="distill", way_out=way_out)
    return model


def _signals(config: DistillStage, inputs: Inputs, dataset: TokenDataset, student: DirectoryProvider) -> SignalStore:
    """The teacher's cached signals, checked against the student, the data and the run."""
    signals = SignalStore.open(inputs["signals"].path)
    check_run(
        signals.index,
        config.distill,
        vocab_size=student.architecture.vocab_size,
        tokenizer_sha256=dataset.tokenizer_sha256,
    )
    for split in SPLITS:
        check_tokens(signals.index, split, dataset.split(split).tokens)
    return signals

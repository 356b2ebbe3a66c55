"""Whether the data that a pipeline prepares is enough for what its steps read of it. Torch-free.

Every stage checks its splits itself before it loads a model. Here that is foretold: before the first step, by the
tokens that stage prepare_data is asked for, and again when the data is there, whose text may have ended before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.config import EvaluateConfig, TrainConfig
from distill.data.budget import SPLITS, Stretch, require_sequences, stretch
from distill.teacher_cache import check_shape
from launch.artifact import Artifact
from launch.stage_configs import (
    BuildLibraryStage,
    CacheTeacherStage,
    CheckAdditivityStage,
    DistillGroupsStage,
    DistillStage,
    EvaluateStage,
    ExtendContextStage,
    MeasureDependencyStage,
    PrepareDataStage,
    PretrainStage,
    PruneAttentionStage,
    ScoreGroupsStage,
    ScoreLibraryStage,
)

if TYPE_CHECKING:
    from launch.pipeline import PlannedStep


def require_enough_data(steps: Sequence[PlannedStep], made: Mapping[str, Artifact]) -> None:
    """Raise ``ValueError``, which names both steps, where a step asks more of its data than there will be.

    Args:
        steps: of one pipeline, in order.
        made: artifacts of steps that are there, by step name.
    """
    by_name = {step.name: step for step in steps}
    for step in steps:
        source = by_name.get(step.inputs.get("data", ""))
        if source is None or not isinstance(source.config, PrepareDataStage):
            continue
        asked = {split: getattr(source.config.data, f"{split}_tokens") for split in SPLITS}
        there = made.get(source.name)
        num_tokens = asked if there is None else {split: there.manifest.metrics[f"{split}_tokens"] for split in SPLITS}
        has_ended = num_tokens["train"] < asked["train"]
        signals = by_name.get(step.inputs.get("signals", ""))
        try:
            check_data(step.config, num_tokens, signals.config if signals else None, has_ended=has_ended)
        except ValueError as error:
            ended = f", whose text ended after {num_tokens['train']} of data.train_tokens={asked['train']}"
            origin = f"the data of step {source.name}{ended if has_ended else ''}"
            raise ValueError(f"step {step.name} on {origin}: {error}") from error


def check_data(
    config: Any, num_tokens: Mapping[str, int], signals: CacheTeacherStage | None = None, *, has_ended: bool = False
) -> None:
    """Raise ``ValueError`` where a stage with ``config`` asks more of its data than there is.

    Args:
        config: of the stage.
        num_tokens: of the data, by split.
        signals: made the cached signals that the stage trains on; it sees no more sequences than they have.
        has_ended: the sources have no more text.
    """
    more = "extend the text of data.sources" if has_ended else "raise data.train_tokens"

    def calibration(n: int, seq_len: int) -> None:
        require_sequences(n, seq_len, split="calibration", num_tokens=num_tokens["calibration"])

    def validation(n: int, seq_len: int) -> None:
        require_sequences(n, seq_len, split="validation", num_tokens=num_tokens["validation"])

    def training(train: TrainConfig, node: str, **drawn: int | None) -> Stretch:
        return stretch(train, num_tokens["train"], where=node, more=more, **drawn)

    def lengths(evaluate: EvaluateConfig) -> None:
        for length in evaluate.lengths:
            validation(evaluate.num_sequences_at(length), length)

    match config:
        case BuildLibraryStage(library=library):
            calibration(library.num_calibration, library.bld.seq_len)
            if library.train:
                training(library.bld, "library.bld")
        case ScoreLibraryStage(scores=scores) | CheckAdditivityStage(scores=scores):
            calibration(scores.num_calibration, scores.seq_len)
        case (
            PruneAttentionStage(prune_attention=sample)
            | MeasureDependencyStage(dependency=sample)
            | ScoreGroupsStage(group_scores=sample)
        ):
            calibration(sample.num_sequences, sample.seq_len)
        case DistillGroupsStage(group_distillation=local):
            training(local.train, "group_distillation.train")
            calibration(local.train.eval_sequences, local.train.seq_len)
        case CacheTeacherStage(teacher_cache=cache):
            cache.check_data(num_tokens)
        case PretrainStage(pretrain=pretrain):
            training(pretrain.train, "pretrain.train")
            validation(pretrain.train.eval_sequences, pretrain.train.seq_len)
        case DistillStage(distill=train):
            num_cached = None
            if signals is not None:
                cache, num_cached = signals.teacher_cache, signals.teacher_cache.num_sequences
                check_shape(
                    train,
                    seq_len=cache.seq_len,
                    separate_documents=cache.separate_documents,
                    eval_sequences=cache.eval_sequences,
                )
            training(train, "distill", num_cached=num_cached)
            validation(train.eval_sequences, train.seq_len)
        case ExtendContextStage(extend_context=extend):
            used_tokens = 0
            for index in range(len(extend.phases)):
                phase = extend.train(index)
                used_tokens += training(phase, extend.node(index), used_tokens=used_tokens).train.spent_tokens
                validation(phase.eval_sequences, phase.seq_len)
            lengths(extend.probe)
        case EvaluateStage(evaluate=evaluate):
            validation(evaluate.num_sequences, evaluate.seq_len)
            lengths(evaluate)

"""Stage distill_groups: model, data -> its fused form, or the model itself, after block-local distillation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.config import require
from distill.data.budget import stretch
from distill.data.dataset import Batches, TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import resolve_device, resolve_dtype
from distill.tracking import Tracker
from fusion.config import Norm
from fusion.group_distillation import GroupOutcome, distill_groups, learning_blocks
from fusion.grouping import Group, format_groups, fused_architecture, fusion_groups, validate_groups
from launch.artifact import require_made_from
from launch.fusion_inputs import FUSION_NAME, measured
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import DistillGroupsStage
from launch.store import json_metrics
from puzzle.group_training import BldSettings
from puzzle.model.architecture import Architecture, require_sequential
from puzzle.model.checkpoint import TensorReader, copy_tokenizer, has_tokenizer, load_model, read_architecture
from puzzle.model.tensor_layout import EMBEDDING
from puzzle.slices import ParentSlice

DISTILLATION_NAME = "group_distillation.json"
BEFORE_DISTILLATION = "_before_distillation"
"""Suffix of what ``fusion.json`` says of fused FFNs that still were the parallel sum of their members."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What learns."""

    source_dir: Path
    """Checkpoint that learns: the fused model, or the unfused one."""
    groups: tuple[Group, ...]
    """In blocks of the unfused model."""
    norm: Norm
    """Of the groups' parallel form."""
    fusion: dict[str, Any] | None
    """``fusion.json`` of the fused model; None where the unfused one learns."""


def run(config: DistillGroupsStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Train the fused FFNs of input ``fused``; without it, the members of the groups that ``config.fuse`` chooses.

    Writes the model and ``metrics.jsonl``; with ``fused`` its ``fusion.json``, the errors added under ``distilled`` and
    what was measured of the untrained fused FFNs renamed (:data:`BEFORE_DISTILLATION`), otherwise
    ``group_distillation.json`` with groups and errors. Dependency and group scores serve the choice of groups alone.
    """
    model_dir = inputs["model"].path
    architecture = read_architecture(model_dir)
    require_sequential(architecture.parallel_windows, "distill_groups")
    plan = _fused_plan(inputs, architecture) if "fused" in inputs else _run_plan(config, inputs, architecture)
    source_dir = plan.source_dir
    require(has_tokenizer(source_dir), f"{source_dir} has no tokenizer, and the result needs one; make it anew")
    settings = _settings(config, inputs, architecture)
    # Blocks behind the last group have no part in this.
    model = load_model(
        model_dir,
        device=resolve_device(config.engine),
        dtype=resolve_dtype(config.engine),
        blocks=range(plan.groups[-1][1] + 1),
    )
    with Tracker(
        context.out / "metrics.jsonl",
        context.tracking,
        run_name=context.run_name,
        step_name=context.step_name,
        stage="distill_groups",
        settings=asdict(config),
        resume_dir=context.resume,
    ) as tracker:
        outcomes = distill_groups(
            ParentSlice.whole(model),
            source_dir,
            learning_blocks(architecture.num_blocks, plan.groups, fused=plan.fusion is not None),
            settings,
            norm=plan.norm,
            sequential_weight=config.group_distillation.sequential_weight,
            out_dir=context.out,
            resume_dir=context.resume,
            tracker=tracker,
        )
    copy_tokenizer(source_dir, context.out)
    _write_outcomes(config, plan, outcomes, context.out)
    return _result(plan, outcomes, tokens=settings.num_steps * settings.train.tokens_per_step)


def _fused_plan(inputs: Inputs, unfused: Architecture) -> Plan:
    """Of the model that stage fuse, or this one, made from input ``model``."""
    fused = inputs["fused"]
    path = fused.path / FUSION_NAME
    require(
        path.is_file(),
        f"input `fused` ({fused.path}) has no {FUSION_NAME}; give the output of stage fuse, or leave `fused` out to "
        "train the runs before they are fused",
    )
    require_made_from(fused, "model", inputs["model"], what="fused model")
    fusion = json.loads(path.read_text())
    treatment = fusion.get("treatment", "fuse")
    require(
        treatment == "fuse",
        f"input `fused` is the output of fuse.treatment={treatment}, which has no fused FFN to train; give that of "
        "fuse.treatment=fuse",
    )
    groups = tuple((group["first"], group["last"]) for group in fusion["groups"])
    validate_groups(unfused, groups)
    require(
        read_architecture(fused.path).blocks == fused_architecture(unfused, groups).blocks,
        f"the blocks of {fused.path} are not those of the model with the groups of its {FUSION_NAME} fused; fuse anew",
    )
    return Plan(source_dir=fused.path, groups=groups, norm=fusion["norm"], fusion=fusion)


def _run_plan(config: DistillGroupsStage, inputs: Inputs, architecture: Architecture) -> Plan:
    """Of the unfused model and the groups that stage fuse would choose with the same configuration."""
    fuse = config.fuse
    require(
        fuse.treatment == "fuse",
        f"fuse.treatment={fuse.treatment} leaves nothing to prepare for fusion; set fuse.treatment=fuse",
    )
    found = measured(inputs)
    model_dir = inputs["model"].path
    with TensorReader(model_dir) as reader:
        itemsize = reader.dtype(EMBEDDING).itemsize
    groups = fusion_groups(architecture, fuse, found.matrix, found.table, itemsize=itemsize)
    return Plan(source_dir=model_dir, groups=groups, norm=fuse.norm, fusion=None)


def _settings(config: DistillGroupsStage, inputs: Inputs, architecture: Architecture) -> BldSettings:
    train = config.group_distillation.train
    require(
        train.seq_len <= architecture.max_positions,
        f"group_distillation.train.seq_len={train.seq_len} is beyond the model's {architecture.max_positions} "
        "positions; lower it",
    )
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, inputs["model"].path, "model")
    split = dataset.split("train")
    batches = Batches(split, seq_len=train.seq_len, batch_size=train.batch_size, seed=config.seed)
    return BldSettings(
        train=stretch(train, split.num_tokens, where="group_distillation.train").train,
        optim=config.group_distillation.optim,
        engine=config.engine,
        batches=batches,
        # Apart from the validation split, on which models are judged later.
        held_out=dataset.split("calibration").first(train.eval_sequences, train.seq_len),
        lr_key="group_distillation.optim.lr",
    )


def _write_outcomes(config: DistillGroupsStage, plan: Plan, outcomes: Sequence[GroupOutcome], out: Path) -> None:
    rows = [asdict(outcome) for outcome in outcomes]
    if plan.fusion is not None:
        name, content = FUSION_NAME, _no_longer_holds(plan.fusion) | {"distilled": rows}
    else:
        weight = config.group_distillation.sequential_weight
        name, content = DISTILLATION_NAME, {"groups": rows, "norm": plan.norm, "sequential_weight": weight}
    (out / name).write_text(json.dumps(json_metrics(content), indent=1) + "\n")


def _no_longer_holds(fusion: Mapping[str, Any]) -> dict[str, Any]:
    """``fusion.json`` with the verification and the groups' divergences under names that say when they were taken."""
    groups = [_renamed(group, "kld") for group in fusion["groups"]]
    return _renamed(fusion, "verify") | {"groups": groups}


def _renamed(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """It has the new name already where the model was distilled before."""
    return {name + BEFORE_DISTILLATION if key == name else key: value for key, value in record.items()}


def _result(plan: Plan, outcomes: Sequence[GroupOutcome], *, tokens: int) -> StageResult:
    before = statistics.median(outcome.nmse_init for outcome in outcomes)
    after = statistics.median(outcome.nmse for outcome in outcomes)
    num_kept = sum(not outcome.trained for outcome in outcomes)
    kept = f", {num_kept} kept as before" if num_kept else ""
    what = "fused FFNs" if plan.fusion is not None else "groups prepared for fusion"
    sequential = [outcome.sequential_nmse for outcome in outcomes if outcome.sequential_nmse is not None]
    unfused = f"; members one after another up to {max(sequential):.3g}" if sequential else ""
    return StageResult(
        headline=(
            f"{len(outcomes)} {what} (blocks {format_groups(plan.groups)}), median held-out NMSE of the parallel form "
            f"{before:.3g} -> {after:.3g}{kept}{unfused}"
        ),
        metrics={
            "groups": [asdict(outcome) for outcome in outcomes],
            "median_nmse_init": before,
            "median_nmse": after,
            "num_kept_as_before": num_kept,
        },
        tokens=tokens,
    )

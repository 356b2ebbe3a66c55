"""Stage fuse: model -> model whose runs of attention-free FFNs are wide FFNs, or one of the paper's two controls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.config import require
from fusion.config import FuseConfig
from fusion.controls import ffns_to_remove, removal_saved_ms, remove_ffns, reverse_groups
from fusion.fuse import fuse_checkpoint
from fusion.group_table import GroupTable
from fusion.grouping import (
    Group,
    block_spans,
    format_groups,
    fused_architecture,
    fusion_groups,
    group_width,
    largest_dependency,
    member_widths,
)
from fusion.verify import GroupErrors, verify_fusion
from launch.fusion_inputs import FUSION_NAME, Measured, measured
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import FuseStage
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, copy_tokenizer, has_tokenizer, read_architecture
from puzzle.model.compatibility import require_loadable
from puzzle.model.tensor_layout import EMBEDDING

DURATIONS = {"decode": "per decoded token", "prefill": "of prefill", "request": "per request"}
"""What a latency of ``fuse.latency`` is the time of."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What went with the FFNs of ``Treated.removed``."""

    removed_ms: float
    """Of ``fuse.latency``, summed over them."""
    removal_kld_sum: float
    """Of their removals one by one, nats per token."""
    target_ms: float | None
    """What fusing the groups instead would save; None where that was not measured."""


@dataclass(frozen=True, kw_only=True)
class Treated:
    """The model that the stage wrote."""

    architecture: Architecture
    removed: tuple[int, ...] = ()
    """Blocks of the unfused model that are gone, the cheapest first."""
    errors: tuple[GroupErrors, ...] = ()
    """Of every fused FFN."""
    removal: Removal | None = None
    """What the removal did to it; None under another treatment."""

    @property
    def worst(self) -> dict[str, float]:
        """Largest error of any fused FFN; empty where nothing was fused."""
        names = ("max_relative_error_fp32", "max_relative_error_fp64", "max_relative_rounding")
        return {name: max(getattr(error, name) for error in self.errors) for name in names if self.errors}


def run(config: FuseStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Choose the groups, fuse them and verify every fused FFN, or reverse them, or remove FFNs of them.

    ``fusion.json`` beside the model says what was done.
    """
    model_dir = inputs["model"].path
    unfused = read_architecture(model_dir)
    require(has_tokenizer(model_dir), f"{model_dir} has no tokenizer, and the fused model needs one; import it anew")
    found = measured(inputs)
    with TensorReader(model_dir) as reader:
        itemsize = reader.dtype(EMBEDDING).itemsize
    groups = fusion_groups(unfused, config.fuse, found.matrix, found.table, itemsize=itemsize)
    is_fused = config.fuse.treatment == "fuse"
    planned = fused_architecture(unfused, groups) if is_fused else unfused
    require_loadable(planned, config.fuse.targets, name="fuse.targets")
    treated = _treat(config.fuse, model_dir, context.out, groups, found)
    copy_tokenizer(model_dir, context.out)

    records = _records(config.fuse, unfused, groups, found)
    removal = asdict(treated.removal) if treated.removal else {}
    content = {
        "groups": records,
        "norm": config.fuse.norm,
        "treatment": config.fuse.treatment,
        "latency": config.fuse.latency,
        "removed": list(treated.removed),
        **removal,
        "verify": {**treated.worst, "groups": [asdict(error) for error in treated.errors]} if treated.errors else {},
    }
    (context.out / FUSION_NAME).write_text(json.dumps(content, indent=1) + "\n")
    return StageResult(
        headline=_headline(config.fuse, unfused, treated, records),
        metrics={
            "num_blocks_before": unfused.num_blocks,
            "num_blocks": treated.architecture.num_blocks,
            "treatment": config.fuse.treatment,
            "num_fused_ffns": len(treated.errors),
            "removed": list(treated.removed),
            "groups": records,
            "kld_sum": _sum(records, "kld"),
            "saved_ms": _sum(records, "saved_ms"),
            **removal,
            **treated.worst,
        },
    )


def _treat(config: FuseConfig, model_dir: Path, out: Path, groups: Sequence[Group], measured: Measured) -> Treated:
    if config.treatment == "reverse":
        return Treated(architecture=reverse_groups(model_dir, out, groups))
    if config.treatment == "remove":
        table = measured.table
        assert table is not None
        unfused = read_architecture(model_dir)
        removed = ffns_to_remove(unfused, groups, table, config)
        saved_ms = [_saved_ms(config, unfused, group, table) for group in groups]
        return Treated(
            architecture=remove_ffns(model_dir, out, removed),
            removed=removed,
            removal=Removal(
                removed_ms=removal_saved_ms(unfused, removed, table, config),
                removal_kld_sum=sum(table.removal(index).kld for index in removed),
                target_ms=_total(saved_ms),
            ),
        )
    fused = fuse_checkpoint(model_dir, out, groups, config.norm)
    return Treated(architecture=fused, errors=verify_fusion(model_dir, out, groups, config.norm))


def _records(
    config: FuseConfig, unfused: Architecture, groups: Sequence[Group], measured: Measured
) -> list[dict[str, Any]]:
    """What is known of every group, null where it was not measured. What fusing it costs and saves says nothing of a
    model in which it is not fused, and is null there too."""
    is_fused = config.treatment == "fuse"
    spans = block_spans(unfused.num_blocks, groups)
    table = measured.table if is_fused else None
    klds = {(score.first, score.last): score.kld for score in (table.groups if table else ())}
    return [
        {
            "first": first,
            "last": last,
            "parent_block_indices": [
                index for block in unfused.blocks[first : last + 1] for index in block.parent_block_indices
            ],
            "ffn_dim": group_width(unfused, (first, last)),
            "block": spans.index((first, last)) if is_fused else None,
            "largest_dependency": largest_dependency(measured.matrix, (first, last)) if measured.matrix else None,
            "kld": klds.get((first, last)),
            "saved_ms": _saved_ms(config, unfused, (first, last), table),
        }
        for first, last in groups
    ]


def _saved_ms(config: FuseConfig, unfused: Architecture, group: Group, table: GroupTable | None) -> float | None:
    """None where no FFN as wide as the fused one was timed."""
    if table is None or group_width(unfused, group) > table.latencies[-1].ffn_dim:
        return None
    return table.saved_ms(member_widths(unfused, group), config.latency)


def _sum(records: Sequence[dict[str, Any]], name: str) -> float | None:
    return _total([record[name] for record in records])


def _total(values: Sequence[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _headline(config: FuseConfig, unfused: Architecture, treated: Treated, records: Sequence[dict[str, Any]]) -> str:
    depth = f"{unfused.num_blocks} -> {treated.architecture.num_blocks} blocks"
    num_members = sum(record["last"] - record["first"] + 1 for record in records)
    members = format_groups([(record["first"], record["last"]) for record in records])
    if treated.removal is not None:
        return f"{_removal(config, treated.removed, treated.removal, num_members, members)}; {depth}"
    if config.treatment == "reverse":
        return f"order of {num_members} FFNs reversed within blocks {members}; nothing fused"
    dependencies = [record["largest_dependency"] for record in records if record["largest_dependency"] is not None]
    dependency = f", dependency up to {max(dependencies):.2g}" if dependencies else ""
    widths = sorted({record["ffn_dim"] for record in records}, reverse=True)
    return "; ".join(
        [
            f"{num_members} FFNs -> {len(records)} fused (blocks {members}{dependency}), "
            f"width {' and '.join(map(str, widths))}",
            *_gain_and_cost(config, records),
            depth,
            f"equal to the parallel sum to {treated.worst['max_relative_error_fp32']:.0e}",
        ]
    )


def _gain_and_cost(config: FuseConfig, records: Sequence[dict[str, Any]]) -> list[str]:
    """What the groups save and cost together, where that is known of all."""
    saved_ms, kld = _sum(records, "saved_ms"), _sum(records, "kld")
    saved = [] if saved_ms is None else [f"saves {saved_ms:.3g} ms {DURATIONS[config.latency]}"]
    return saved + ([] if kld is None else [f"KLD of the groups one by one sums to {kld:.3g}"])


def _removal(config: FuseConfig, removed: Sequence[int], removal: Removal, num_members: int, members: str) -> str:
    blocks = ", ".join(map(str, sorted(removed)))
    fusing = "" if removal.target_ms is None else f" where fusing {members} would save {removal.target_ms:.3g}"
    return (
        f"{len(removed)} of {num_members} FFNs removed (blocks {blocks}), "
        f"{removal.removed_ms:.3g} ms less {DURATIONS[config.latency]}{fusing}; "
        f"KLD of the removals one by one sums to {removal.removal_kld_sum:.3g}"
    )

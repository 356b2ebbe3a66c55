"""Stage score_groups: model, data -> what fusing each group of its attention-free FFNs, alone, costs and saves."""

from __future__ import annotations

import gc
from dataclasses import asdict
from typing import Any

import torch

from distill.config import require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import resolve_device, resolve_dtype
from fusion.ffn_latency import all_reduce_ms, measure_ffns, timed_widths
from fusion.group_scores import score_groups, scored_groups
from fusion.group_table import JSON_NAME, FFNLatency, GroupScore, GroupTable
from fusion.grouping import Group
from launch.externals import hardware
from launch.quantities import serving
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import ScoreGroupsStage
from puzzle.latency import cpu_threads, require_positions
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.shard import Shard


def run(config: ScoreGroupsStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``groups.json``: scores of groups and of removals, and latencies of FFNs, measured one after the other."""
    model_dir, settings, workload = inputs["model"].path, config.group_scores, config.workload
    architecture, device = read_architecture(model_dir), resolve_device(config.engine)
    groups = scored_groups(architecture, settings.max_members)
    widths = _widths(config, architecture, groups)
    reduction_ms = all_reduce_ms(architecture, workload, settings.hardware)
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, model_dir, "model")
    sequences = dataset.split("calibration").first(settings.num_sequences, settings.seq_len)

    scores = score_groups(
        load_model(model_dir, device=device, dtype=resolve_dtype(config.engine)),
        architecture,
        sequences,
        norm=settings.norm,
        batch_size=settings.batch_size,
        max_members=settings.max_members,
        compile=config.engine.compile,
    )
    gc.collect()  # a compiled block refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
    latencies, clamped = _latencies(config, architecture, widths, device)
    table = GroupTable(
        num_tokens=sequences.numel(),
        norm=settings.norm,
        lm_loss=scores.lm_loss,
        groups=scores.groups,
        removals=scores.removals,
        latencies=latencies,
        hardware=hardware(config)["device"],
        workload=asdict(workload),
        clamped=clamped,
        all_reduce_prefill_ms=reduction_ms[0],
        all_reduce_decode_ms=reduction_ms[1],
        all_reduce_hardware=_links(config),
    )
    table.write(context.out / JSON_NAME)
    return _result(table, architecture)


def _widths(config: ScoreGroupsStage, architecture: Architecture, groups: tuple[Group, ...]) -> tuple[int, ...]:
    """FFN widths to time. Raises whatever there is to say against the configuration, before anything is loaded."""
    settings, workload = config.group_scores, config.workload
    require(
        settings.seq_len <= architecture.max_positions,
        f"group_scores.seq_len={settings.seq_len} is beyond the {architecture.max_positions} positions of the model; "
        "lower it",
    )
    require_positions(workload, architecture, "model")
    shard = Shard(parent=architecture, num_ranks=workload.tensor_parallel)
    for block in architecture.blocks:
        if block.is_attention_free:
            shard.ffn_dim(block.ffn)  # where every member can be dealt over the ranks, so can every group
    return timed_widths(architecture, groups, num_widths=settings.num_widths)


def _latencies(
    config: ScoreGroupsStage, architecture: Architecture, widths: tuple[int, ...], device: torch.device
) -> tuple[tuple[FFNLatency, ...], tuple[str, ...]]:
    with cpu_threads(config.workload.num_cpu_threads):
        return measure_ffns(
            architecture,
            widths,
            workload=config.workload,
            device=device,
            repeats=config.group_scores.repeats,
            warmup=config.group_scores.warmup,
            hardware=hardware(config)["device"],
        )


def _links(config: ScoreGroupsStage) -> str | None:
    """The device whose rates the all-reduces are modelled by; None on a single rank."""
    if config.workload.tensor_parallel == 1:
        return None
    return config.group_scores.hardware.name or "costs.hardware"


def _result(table: GroupTable, architecture: Architecture) -> StageResult:
    saved = {(group.first, group.last): _saved_ms(table, architecture, group) for group in table.groups}
    cheapest = min(table.groups, key=lambda group: group.kld)
    fastest = max(table.groups, key=lambda group: saved[group.first, group.last])
    named = [f"{kind} {_described(group, saved)}" for kind, group in (("cheapest", cheapest), ("fastest", fastest))]
    metrics: dict[str, Any] = {
        "num_groups": len(table.groups),
        "num_tokens": table.num_tokens,
        "lm_loss": table.lm_loss,
        "cheapest": asdict(cheapest) | {"saved_decode_ms": saved[cheapest.first, cheapest.last]},
        "fastest": asdict(fastest) | {"saved_decode_ms": saved[fastest.first, fastest.last]},
        "cheapest_removals": [row.block for row in sorted(table.removals, key=lambda row: row.kld)],
        "timed_widths": [row.ffn_dim for row in table.latencies],
        "workload": table.workload,
        "clamped": list(table.clamped),
        "all_reduce": _all_reduce(table),
    }
    where = f"{table.hardware}, {serving(table.workload)}"
    if table.all_reduce_hardware is not None:
        where += f", all-reduce modelled: {table.all_reduce_hardware}"
    return StageResult(headline=f"{len(table.groups)} groups; {'; '.join(named)} ({where})", metrics=metrics)


def _all_reduce(table: GroupTable) -> dict[str, Any] | None:
    if table.all_reduce_hardware is None:
        return None
    return {
        "source": "modelled",
        "hardware": table.all_reduce_hardware,
        "prefill_ms": table.all_reduce_prefill_ms,
        "decode_ms": table.all_reduce_decode_ms,
    }


def _saved_ms(table: GroupTable, architecture: Architecture, group: GroupScore) -> float:
    members = architecture.blocks[group.first : group.last + 1]
    return table.saved_ms([member.ffn.ffn_dim or 0 for member in members], "decode")


def _described(group: GroupScore, saved: dict[Group, float]) -> str:
    return f"{group.first}-{group.last}: KLD {group.kld:.3g}, {saved[group.first, group.last]:+.3g} ms of decode saved"

"""Stage export: a directory that stock engines load, and a report of which ones do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill.config import require
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import ExportStage
from puzzle.model.architecture import FFN_DIM_MULTIPLE, Architecture, BlockConfig, FFNConfig
from puzzle.model.checkpoint import CheckpointWriter, TensorReader, copy_tokenizer, read_architecture
from puzzle.model.compatibility import TargetReport, compatibility
from puzzle.model.tensor_layout import EMBEDDING, block_prefix, block_shapes, other_shapes

REPORT_NAME = "compatibility.json"


def run(config: ExportStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write the model for ``export.targets``, without dummy blocks; ``compatibility.json`` reports on all engines."""
    export, model_dir = config.export, inputs["model"].path
    source = read_architecture(model_dir)
    kept = [index for index, block in enumerate(source.blocks) if not _is_dummy(block)]
    fill_ffns = "llama_cpp" in export.targets
    exported = replace(
        source,
        blocks=tuple(_exported(source.blocks[index], fill_ffns=fill_ffns) for index in kept),
        # A window has no dummies, so both its ends are kept.
        parallel_windows=tuple((kept.index(first), kept.index(last)) for first, last in source.parallel_windows),
    )
    reports = compatibility(exported)
    _require_targets(reports, export.targets)

    with TensorReader(model_dir) as reader:
        dtype, max_shard_bytes = reader.dtype(EMBEDDING), int(export.max_shard_gib * 2**30)
        with CheckpointWriter(context.out, exported, dtype=dtype, max_shard_bytes=max_shard_bytes) as writer:
            for name, tensor in _tensors(reader, source, exported, kept):
                writer.add(name, tensor)
    copy_tokenizer(model_dir, context.out)
    content = {"targets": [report.as_json() for report in reports]}
    (context.out / REPORT_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return StageResult(
        headline=f"loads in {', '.join(export.targets)}; {exported.num_blocks} of {source.num_blocks} blocks written",
        metrics={
            "num_blocks": exported.num_blocks,
            "num_dropped_blocks": source.num_blocks - exported.num_blocks,
            "targets": {report.target: report.status for report in reports},
        },
    )


def _is_dummy(block: BlockConfig) -> bool:
    return block.attention.is_no_op and block.ffn.is_no_op


def _exported(block: BlockConfig, *, fill_ffns: bool) -> BlockConfig:
    """``block``, with an FFN of zeros in place of none: llama.cpp drops the attention of a block that has no FFN."""
    if fill_ffns and block.ffn.is_no_op:
        return replace(block, ffn=FFNConfig(ffn_dim=FFN_DIM_MULTIPLE))
    return block


def _require_targets(reports: Sequence[TargetReport], targets: Sequence[str]) -> None:
    refused = [report for report in reports if report.target in targets and report.status == "cannot"]
    reasons = "; ".join(f"{report.target} cannot load this model: {', '.join(report.reasons)}" for report in refused)
    names = ", ".join(report.target for report in refused)
    require(not refused, f"export.targets: {reasons}; leave {names} out of export.targets")


def _tensors(
    reader: TensorReader, source: Architecture, exported: Architecture, kept: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of ``exported``, whose block i is block ``kept[i]`` of ``source``."""
    for name in other_shapes(exported):
        yield name, reader.read(name)
    for index, origin in enumerate(tqdm(kept, desc="export", unit="block", leave=False)):
        stored = block_shapes(source, source.blocks[origin])
        for name, shape in block_shapes(exported, exported.blocks[index]).items():
            tensor = reader.read(block_prefix(origin) + name) if name in stored else torch.zeros(shape)
            yield block_prefix(index) + name, tensor

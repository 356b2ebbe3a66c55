"""Stage import_parent: a pretrained checkpoint, dense or heterogeneous already, becomes a model artifact."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.config import require
from launch.externals import hub_snapshot, local_model
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import ImportParentStage
from puzzle.model import stats
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TOKENIZER_FILES, has_tokenizer
from puzzle.model.config import ModelConfig
from puzzle.model.convert import import_hf, source_layout

HUB_FILES = [
    "model*.safetensors*",
    "subblocks_safetensors/*.safetensors",
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
]
"""Beside these, hubs keep the same weights in other formats and pickles that are never read. AnyModel checkpoints have
their shards in a folder."""


def run(config: ImportParentStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Fetch the checkpoint if it is on the hub, and write it in the nemotron-nas format."""
    architecture = _import(_checkpoint(config.model), context.out, getattr(torch, config.model.dtype))
    num_params = stats.num_params(architecture)
    widths = sorted({block.ffn.name for block in architecture.blocks})
    return StageResult(
        headline=f"{num_params / 1e6:,.1f}M parameters, {architecture.num_blocks} blocks, family {architecture.family}",
        metrics={"num_params": num_params, "num_blocks": architecture.num_blocks, "ffn": widths},
    )


def _checkpoint(model: ModelConfig) -> Path:
    path = local_model(model)
    if path is not None:
        return path
    assert model.source is not None
    return hub_snapshot(model.source, model.revision, allow_patterns=HUB_FILES, is_whole=_is_whole)


def _is_whole(directory: Path) -> bool:
    shards = (*directory.glob("model*.safetensors"), *directory.glob("subblocks_safetensors/*.safetensors"))
    return bool(shards) and has_tokenizer(directory)


def _import(source: Path, out: Path, dtype: torch.dtype) -> Architecture:
    if source.is_file():
        return _import_gguf(source, out, dtype)
    source_layout(source)  # What cannot be imported at all is said first.
    require(
        has_tokenizer(source),
        f"model.source={source} has no tokenizer.json or tokenizer.model; put the model's tokenizer beside its weights",
    )
    return import_hf(source, out, dtype=dtype)


def _import_gguf(source: Path, out: Path, dtype: torch.dtype) -> Architecture:
    try:
        from puzzle.model.gguf import import_gguf
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model.source={source} is a GGUF file, which needs package {error.name}; run `pip install -e '.[gguf]'`"
        ) from error
    return import_gguf(source, out, dtype=dtype)

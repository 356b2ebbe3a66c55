"""Stage build_library: parent, data -> a trained replacement for every variant that is not the parent's own."""

from __future__ import annotations

import shutil
import statistics
from dataclasses import asdict
from pathlib import Path

from distill.config import require
from distill.data.dataset import Batches, TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import resolve_device, resolve_dtype
from distill.tracking import Tracker
from launch.registry import BuildLibraryStage
from launch.stage import Inputs, StageContext, StageResult
from puzzle.bld import BldSettings, distill_library
from puzzle.child_init import checkpoint_init
from puzzle.importance import channel_contributions, rank_channels
from puzzle.library import INDEX_FILE, BlockLibrary, space_replacements
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, load_model, read_architecture
from puzzle.model.tensor_layout import EMBEDDING


def run(config: BuildLibraryStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Importance, child init, BLD. Writes ``library.json``, ``replacements/`` and ``metrics.jsonl``."""
    parent_dir, train = inputs["parent"].path, config.library.bld
    architecture = read_architecture(parent_dir)
    replacements = space_replacements(architecture, config.space)
    require(len(replacements) > 0, "space: no variant needs weights; give it ffn_fracs, kv_heads or attention_no_op")
    require(
        train.seq_len <= architecture.max_positions,
        f"library.bld.seq_len={train.seq_len} is beyond the parent's {architecture.max_positions} positions; lower it",
    )
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, parent_dir, "parent")
    # Apart from the validation split, on which children are judged later.
    num_ranking = config.library.importance_sequences
    calibration = dataset.split("calibration").first(num_ranking + train.eval_sequences, train.seq_len)
    settings = BldSettings(
        train=train,
        optim=config.library.optim,
        engine=config.engine,
        batches=Batches(dataset.split("train"), seq_len=train.seq_len, batch_size=train.batch_size, seed=config.seed),
        held_out=calibration[num_ranking:],
    )
    parent = load_model(parent_dir, device=resolve_device(config.engine), dtype=resolve_dtype(config.engine))
    contributions = channel_contributions(parent, calibration[:num_ranking], batch_size=settings.micro_batch)
    rankings = {index: rank_channels(values) for index, values in contributions.items()}
    with (
        TensorReader(parent_dir) as reader,
        Tracker(
            context.out / "metrics.jsonl",
            context.tracking,
            run_name=context.run_name,
            step_name=context.step_name,
            stage="build_library",
            settings=asdict(config),
        ) as tracker,
    ):
        library = _library_under_construction(context.resume / "library", architecture, reader)
        init = checkpoint_init(reader, architecture, rankings)
        distill_library(library, parent, replacements, init, settings, resume_dir=context.resume, tracker=tracker)
    shutil.copytree(library.directory, context.out, dirs_exist_ok=True)
    return _result(library, tokens=train.num_steps * train.tokens_per_step)


def _library_under_construction(directory: Path, parent: Architecture, reader: TensorReader) -> BlockLibrary:
    """In the resume directory, so that what an interrupted attempt has finished is kept."""
    if (directory / INDEX_FILE).is_file():
        return BlockLibrary.open(directory)
    return BlockLibrary.create(directory, parent, dtype=reader.dtype(EMBEDDING))


def _result(library: BlockLibrary, *, tokens: int) -> StageResult:
    entries = library.entries.values()
    before = statistics.median(entry.bld_nmse_init for entry in entries)
    after = statistics.median(entry.bld_nmse for entry in entries)
    num_kept = sum(entry.bld_nmse >= entry.bld_nmse_init for entry in entries)
    kept = f", {num_kept} kept as initialised" if num_kept else ""
    return StageResult(
        headline=f"{len(entries)} replacements, median held-out NMSE {before:.3g} -> {after:.3g}{kept}",
        metrics={
            "num_replacements": len(entries),
            "num_kept_as_initialised": num_kept,
            "median_nmse_init": before,
            "median_nmse": after,
        },
        tokens=tokens,
    )

"""Stage build_library: parent, data -> a replacement for every variant that the parent's own weights do not serve."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import Tensor

from distill import distributed
from distill.config import require
from distill.data.budget import stretch
from distill.data.dataset import Batches, TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.tracking import Tracker
from launch.artifact import fingerprinted_config, require_made_from
from launch.solution import read_solution
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import BuildLibraryStage
from puzzle.bld import distill_library
from puzzle.child_init import CheckpointInit, Init, LibraryInit
from puzzle.config import LibraryConfig
from puzzle.group_training import BldSettings
from puzzle.importance import measure_rankings
from puzzle.library import BlockLibrary, Variants, crossed_variants, library_replacements
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, read_architecture
from puzzle.model.tensor_layout import EMBEDDING
from puzzle.pool import ReplacementPool
from puzzle.ranking_pool import RankingPool
from puzzle.slices import ParentSlice, load_slice
from puzzle.space import block_variants

POOL_DIR = "replacements"
RANKINGS_DIR = "rankings"

KEYED_APART = ("mode", "ffn_importance", "importance_rounds", "kv_init", "max_attentions", "max_ffns")
"""Settings that decide which replacements there are and where they start, both of which a key names, and nothing
else."""


def run(config: BuildLibraryStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Importance, child init, BLD. Writes ``library.json``, ``replacements/`` and ``metrics.jsonl``."""
    if "library" in inputs:
        require_made_from(inputs["library"], "parent", inputs["parent"], what="library")
    _require_solution(config.library, inputs)
    parent_dir, train = inputs["parent"].path, config.library.bld
    architecture = read_architecture(parent_dir)
    variants = _variants(config, inputs, architecture)
    replacements = library_replacements(architecture, variants, config.library.mode)
    require(len(replacements) > 0, "space: no variant needs weights; give it ffn_fracs, kv_heads or attention_no_op")
    require(
        train.seq_len <= architecture.max_positions,
        f"library.bld.seq_len={train.seq_len} is beyond the parent's {architecture.max_positions} positions; lower it",
    )
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, parent_dir, "parent")
    # Apart from the validation split, on which children are judged later.
    num_skipped, num_ranking = config.library.skip_sequences, config.library.importance_sequences
    calibration = dataset.split("calibration").first(config.library.num_calibration, train.seq_len)[num_skipped:]
    split = dataset.split("train")
    reached = stretch(train, split.num_tokens, where="library.bld").train if config.library.train else train
    batches = Batches(split, seq_len=train.seq_len, batch_size=train.batch_size, seed=config.seed)
    settings = BldSettings(
        train=reached,
        optim=config.library.optim,
        engine=config.engine,
        batches=batches,
        held_out=calibration[num_ranking:],
        nmse=config.library.nmse,
        learns=config.library.train,
    )
    parent = load_slice(parent_dir, config.engine)
    with TensorReader(parent_dir) as reader, _tracker(config, context) as tracker:
        library = BlockLibrary.create(
            context.out, architecture, variants, dtype=reader.dtype(EMBEDDING), mode=config.library.mode
        )
        tokens = distill_library(
            library,
            parent,
            replacements,
            _init(config, inputs, context, reader, parent, calibration[:num_ranking], settings.micro_batch),
            settings,
            pool=ReplacementPool(directory=context.pool / POOL_DIR, facts=_facts(config, inputs)),
            resume_dir=context.resume,
            tracker=tracker,
        )
    return _result(library, tokens=tokens)


def _variants(config: BuildLibraryStage, inputs: Inputs, parent: Architecture) -> Variants:
    """Those of the space; with an earlier solution, those that its solutions and Pareto points made use of."""
    variants = tuple(block_variants(parent, index, config.space) for index in range(parent.num_blocks))
    if "solution" not in inputs:
        return variants
    found = read_solution(inputs["solution"], inputs["parent"])
    children = dict.fromkeys(tuple(row["blocks"]) for row in [*found["solutions"], *found["pareto"]])
    return crossed_variants(
        variants,
        (name for blocks in children for name in blocks),
        max_attentions=config.library.max_attentions,
        max_ffns=config.library.max_ffns,
    )


def _require_solution(library: LibraryConfig, inputs: Inputs) -> None:
    for name in ("max_attentions", "max_ffns"):
        value = getattr(library, name)
        require(
            value is None or "solution" in inputs,
            f"library.{name}={value} keeps what the solutions of a search use most; give the input `solution`, or set "
            f"library.{name}=null",
        )


def _init(
    config: BuildLibraryStage,
    inputs: Inputs,
    context: StageContext,
    reader: TensorReader,
    parent: ParentSlice,
    ranking_sequences: Tensor,
    micro_batch: int,
) -> Init:
    """First weights: from an earlier library where there is one, else from the parent's."""
    architecture = read_architecture(inputs["parent"].path)
    if "library" in inputs:
        earlier = BlockLibrary.open(inputs["library"].path)
        earlier.require_parent(architecture)
        return LibraryInit(earlier, reader)
    pool = RankingPool(directory=context.pool / RANKINGS_DIR, facts=_ranking_facts(config, inputs))
    rankings = pool.rankings(
        parent,
        architecture,
        config.library,
        lambda: measure_rankings(parent, ranking_sequences, batch_size=micro_batch, config=config.library),
    )
    return CheckpointInit(reader, architecture, rankings, config.library.kv_init)


def _ranking_facts(config: BuildLibraryStage, inputs: Inputs) -> dict[str, Any]:
    """What a ranking depends on beside what is ranked by which criterion."""
    return {
        "parent": inputs["parent"].manifest.fingerprint,
        "data": inputs["data"].manifest.fingerprint,
        "precision": config.engine.precision,
        "importance_sequences": config.library.importance_sequences,
        "skip_sequences": config.library.skip_sequences,
        "seq_len": config.library.bld.seq_len,
    }


def _facts(config: BuildLibraryStage, inputs: Inputs) -> dict[str, Any]:
    """What the weights of a replacement depend on beside what it is and where it starts."""
    library = {name: value for name, value in fingerprinted_config(config.library).items() if name not in KEYED_APART}
    # How often the error is looked at changes the curve, not the weights.
    library["bld"] = {name: value for name, value in library["bld"].items() if name != "eval_every_tokens"}
    return {
        "parent": inputs["parent"].manifest.fingerprint,
        "data": inputs["data"].manifest.fingerprint,
        "library": library,
        "precision": config.engine.precision,
        "seed": config.seed,
    }


@contextmanager
def _tracker(config: BuildLibraryStage, context: StageContext) -> Iterator[Tracker | None]:
    """The curve of the first process, whose replacements stand for all."""
    if not distributed.is_main():
        yield None
        return
    with Tracker(
        context.out / "metrics.jsonl",
        context.tracking,
        run_name=context.run_name,
        step_name=context.step_name,
        stage="build_library",
        settings=asdict(config),
        resume_dir=context.resume,
    ) as tracker:
        yield tracker


def _result(library: BlockLibrary, *, tokens: int) -> StageResult:
    entries = library.entries.values()
    before = statistics.median(entry.bld_nmse_init for entry in entries)
    after = statistics.median(entry.bld_nmse for entry in entries)
    num_kept = sum(not entry.trained for entry in entries)
    kept = f", {num_kept} kept as initialised" if num_kept else ""
    return StageResult(
        headline=f"{len(entries)} replacements, median held-out NMSE {before:.3g} -> {after:.3g}{kept}",
        metrics={
            "num_replacements": len(entries),
            "num_block_variants": sum(map(len, library.variants)),
            "num_kept_as_initialised": num_kept,
            "median_nmse_init": before,
            "median_nmse": after,
        },
        tokens=tokens,
    )

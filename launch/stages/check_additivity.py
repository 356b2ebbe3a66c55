"""Stage check_additivity: parent, library, scores, solution, data -> sums of scores beside what children lose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import resolve_device, resolve_dtype
from launch.artifact import Artifact, require_made_from
from launch.solution import read_solution
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import CheckAdditivityStage
from launch.stages.score_library import calibration_sequences
from puzzle.additivity import (
    Child,
    RealisedChild,
    median_ratio,
    random_children,
    rank_correlation,
    realise,
    search_children,
)
from puzzle.assemble import child_architecture
from puzzle.config import ScoreConfig
from puzzle.library import BlockLibrary
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.slices import ParentSlice
from puzzle.tables import ScoreTable

SAMPLE = ("num_sequences", "seq_len", "skip_sequences")
"""Settings of the scores that say which tokens they are measured on."""


def run(config: CheckAdditivityStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``additivity.json``. Children are realised in memory."""
    parent_dir, settings = inputs["parent"].path, config.scores
    for name, used in (("library", "parent"), ("scores", "parent"), ("scores", "library"), ("scores", "data")):
        require_made_from(inputs[name], used, inputs[used], what=name)
    architecture = read_architecture(parent_dir)
    library = BlockLibrary.open(inputs["library"].path)
    library.require_parent(architecture)
    scores = ScoreTable.read(inputs["scores"].path / "scores.json")
    _require_same_tokens(settings, inputs["scores"])
    children = search_children(read_solution(inputs["solution"], inputs["parent"]))
    children += random_children(scores, architecture, config.additivity.num_random_children, seed=config.seed)
    _require_served(children, library, architecture)
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, parent_dir, "parent")
    sequences = calibration_sequences(dataset, settings, architecture)
    parent = load_model(parent_dir, device=resolve_device(config.engine), dtype=resolve_dtype(config.engine))

    rows = realise(
        ParentSlice.whole(parent),
        architecture,
        children,
        scores,
        library.tensors,
        sequences,
        batch_size=settings.batch_size,
        compile=config.engine.compile,
    )
    result = _result(rows)
    content = {**result.metrics, "num_tokens": scores.num_tokens, "rows": [asdict(row) for row in rows]}
    (context.out / "additivity.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return result


def _require_same_tokens(settings: ScoreConfig, scores: Artifact) -> None:
    """A sum of scores and a child's KLD can be compared on one sample of text alone."""
    used = scores.manifest.config["scores"]
    different = [name for name in SAMPLE if getattr(settings, name) != used[name]]
    if different:
        asked, measured = (
            ", ".join(f"scores.{name}={value[name]}" for name in different) for value in (vars(settings), used)
        )
        raise ValueError(
            f"{asked} is another sample than that of the scores, which were measured with {measured}; give the values "
            "of the score_library step, for example in the pipeline's overrides"
        )


def _require_served(children: Sequence[Child], library: BlockLibrary, architecture: Architecture) -> None:
    blocks = [child_architecture(architecture, child.blocks).blocks for child in children]
    library.require_variants([tuple(dict.fromkeys(at_block)) for at_block in zip(*blocks, strict=True)])


def _result(rows: Sequence[RealisedChild]) -> StageResult:
    correlation, ratio = rank_correlation(rows), median_ratio(rows)
    headline = f"{len(rows)} children realised"
    if ratio is not None:
        headline = f"sum of scores / realised KLD: median {ratio:.2f} over {len(rows)} children"
    if correlation is not None:
        headline += f", rank correlation {correlation:.3f}"
    metrics: dict[str, Any] = {"rank_correlation": correlation, "median_ratio": ratio, "num_children": len(rows)}
    return StageResult(headline=headline, metrics=metrics)

"""The report of a finished run: ``report.json`` for programs, ``index.html`` for people. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.recovered import gap_closed_frac
from launch.artifact import Artifact
from launch.finished_run import PARENT, FinishedRun, num_attentions, read_architecture, read_json
from launch.page import render_page
from launch.recovery import TRAINING_STAGES, reference_model
from launch.search_section import searches
from launch.store import full_disk_explained
from puzzle.model import stats
from puzzle.model.architecture import Architecture

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}


def write_report(run_dir: Path, run_name: str, steps: Mapping[str, Artifact]) -> Path:
    """Write ``<run_dir>/report/report.json`` and ``index.html``.

    Args:
        run_dir: directory of the run.
        run_name: title of the page.
        steps: artifacts by step name, in pipeline order.

    Returns:
        The page.

    Raises:
        ValueError: the run has no model to report on, or the disk is full: an earlier report stays as it was.
    """
    run = FinishedRun(steps)
    report = build_report(run_name, run)
    directory = run_dir / "report"
    page = directory / "index.html"
    texts = {
        directory / "report.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
        page: render_page(report, run),
    }
    way_out = "free some space and give the same command again: all artifacts are there, and only the report is written"
    with full_disk_explained(run_dir, writer="the report", way_out=way_out):
        directory.mkdir(parents=True, exist_ok=True)
        _write_together(texts)
    return page


def _write_together(texts: Mapping[Path, str]) -> None:
    """Write all files, or leave all as they were."""
    partial = {path.with_name(f".{path.name}.tmp"): path for path in texts}
    try:
        for temporary, path in partial.items():
            temporary.write_text(texts[path], encoding="utf-8")
    except OSError:
        for temporary in partial:
            temporary.unlink(missing_ok=True)
        raise
    for temporary, path in partial.items():
        temporary.rename(path)


def build_report(run_name: str, run: FinishedRun) -> dict[str, Any]:
    """Content of ``report.json``: the models, the evidence, the searches and the steps of a run. Losses in nats per
    token; ``workload`` and ``hardware`` are what the latencies of the models are stated for."""
    models = _models(run)
    benchmark = run.document("benchmark", "benchmark.json") or {}
    return {
        "run": run_name,
        "workload": benchmark.get("workload"),
        "hardware": benchmark.get("hardware"),
        "final_model": run.final_name,
        "timed_model": run.timed_name,
        "distilled_model": _distilled(models),
        "recovery_reference": next((name for name, model in models.items() if model["is_recovery_reference"]), None),
        "models": models,
        "evidence": _evidence(run, models),
        "searches": searches(run),
        "steps": [_step(name, artifact) for name, artifact in run.steps.items()],
    }


def _models(run: FinishedRun) -> dict[str, dict[str, Any]]:
    evaluated = (run.document("evaluate", "evaluate.json") or {}).get("models", {})
    benchmark = run.document("benchmark", "benchmark.json") or {}
    timed = benchmark.get("models", {})
    dtype = benchmark["workload"]["dtype"] if benchmark else read_json(run.parent.path / "config.json")["torch_dtype"]
    lm_loss = {name: row["lm_loss"] for name, row in evaluated.items()}
    made_by = {name: artifact.manifest.stage for name, artifact in run.models.items()}
    reference = reference_model(lm_loss, made_by, PARENT)
    models = {}
    for name, artifact in run.models.items():
        architecture = read_architecture(artifact)
        quality, speed = evaluated.get(name, {}), timed.get(name, {})
        models[name] = {
            "step": run.step_of(artifact),
            "stage": artifact.manifest.stage,
            "num_blocks": architecture.num_blocks,
            "num_attentions": num_attentions(architecture),
            "num_params": stats.num_params(architecture),
            "kv_bytes_per_token": stats.kv_bytes_per_token(architecture, BYTES_PER_VALUE[dtype]),
            "kv_dtype": dtype,
            "memory_bytes": speed.get("memory_bytes"),
            "prefill_ms": speed.get("prefill_ms"),
            "decode_ms": speed.get("decode_ms"),
            "decode_latency_vs_parent": speed.get("decode_vs_parent"),
            "lm_loss": quality.get("lm_loss"),
            "kld": quality.get("kld"),
            "top1_agreement_frac": quality.get("top1_agreement_frac"),
            "is_recovery_reference": name == reference,
            "lm_loss_gap_closed_frac": _gap_closed(name, made_by[name], lm_loss, reference),
            "tokens": sum(artifact.manifest.tokens.values()),
        }
    return models


def _gap_closed(name: str, stage: str, lm_loss: Mapping[str, float], reference: str | None) -> float | None:
    """Of a model that was trained, and of the reference itself; surgery before the reference recovers nothing."""
    if reference is None or name not in lm_loss or not (name == reference or stage in TRAINING_STAGES):
        return None
    return gap_closed_frac(parent=lm_loss[PARENT], reference=lm_loss[reference], model=lm_loss[name])


def _distilled(models: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The last evaluated model that distillation made; what comes after it need not aim at the parent's loss."""
    made = [name for name, model in models.items() if model["stage"] == "distill" and model["lm_loss"] is not None]
    return made[-1] if made else None


def _evidence(run: FinishedRun, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    parent, final = read_architecture(run.parent), read_architecture(run.final)
    in_parent = {block.member_indices for block in parent.blocks}
    errors = [fusion["verify"]["max_relative_error_fp32"] for fusion in run.fusions]
    data = run.document("prepare_data", "data.json") or {}
    distilled = _distilled(models)
    return {
        "num_attentions_removed": num_attentions(parent) - num_attentions(final),
        "num_ffn_runs_fused": sum(block.is_fused and block.member_indices not in in_parent for block in final.blocks),
        "num_blocks_removed": _num_dropped(final) - _num_dropped(parent),
        "fused_equals_parallel_sum_max_relative_error": max(errors, default=None),
        "lm_loss_gap_closed_frac": models[distilled]["lm_loss_gap_closed_frac"] if distilled else None,
        "decode_latency_vs_parent": {
            name: model["decode_latency_vs_parent"]
            for name, model in models.items()
            if model["decode_latency_vs_parent"] is not None
        },
        "parent_validation_lm_loss": models.get(PARENT, {}).get("lm_loss"),
        "unigram_entropy_nats": data.get("unigram_entropy_nats"),
    }


def _num_dropped(architecture: Architecture) -> int:
    return sum(len(block.dropped_parent_indices) for block in architecture.blocks)


def _step(name: str, artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "step": name,
        "stage": manifest.stage,
        "headline": manifest.headline,
        "seconds": manifest.seconds,
        "created_at": manifest.created_at,
        "fingerprint": manifest.fingerprint,
        "metrics": manifest.metrics,
        "tokens": manifest.tokens,
    }

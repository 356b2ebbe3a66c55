"""The report as one self-contained HTML page. Torch-free.

A section is left out where the step that it shows is not part of the run.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from launch import figures
from launch.canvas import ROLES
from launch.cost_section import compare_costs, latency_pictures, parent_by_batch_size, run_costs
from launch.figures import Picture, picture
from launch.finished_run import FinishedRun, read_architecture, read_json
from launch.page_frame import page_template
from launch.recovery_section import forecast_pictures, recovery_pictures
from launch.search_section import other_metrics, pareto_pictures, score_pictures
from launch.strip import architecture_strip
from launch.task_section import task_table

TEMPLATE = "report.html.j2"


def render_page(report: Mapping[str, Any], run: FinishedRun) -> str:
    """The page of ``report``, with the pictures that the artifacts of ``run`` give."""
    parent, final = read_architecture(run.parent), read_architecture(run.final)
    costs = run_costs(run)
    return page_template(TEMPLATE).render(
        report=report,
        parent=next(iter(report["models"].values())),
        final=report["models"][report["final_model"]],
        tokens=run.final.manifest.tokens,
        lengths=[*_lengths(run)],
        tasks=task_table(run),
        strip=architecture_strip(parent, read_architecture(run.unfused), final),
        quality=[*_quality_against_latency(report), *pareto_pictures(run)],
        recovery=[*recovery_pictures(run), *forecast_pictures(run)],
        fusion=[*_dependency(run)],
        scores=[*score_pictures(run)],
        scores_by_other_metrics=other_metrics(run),
        costs=[*latency_pictures(run, costs)] if costs else [],
        cost_comparison=compare_costs(costs) if costs else None,
        parent_by_batch_size=parent_by_batch_size(costs, parent) if costs else [],
        provenance=_provenance(run),
        roles=ROLES,
    )


def _lengths(run: FinishedRun) -> Iterator[dict[str, Any]]:
    """Tables by context length: of every model that evaluate looked at, then phase by phase of context extensions."""
    evaluated = run.document("evaluate", "evaluate.json") or {"models": {}}
    by_length = {name: row["by_length"] for name, row in evaluated["models"].items() if row["by_length"]}
    if by_length:
        yield _length_table("model", by_length, evaluated["retrieval_chance_frac"])
    for step, artifact in run.steps.items():
        metrics = artifact.manifest.metrics
        if artifact.manifest.stage == "extend_context" and "before" in metrics:
            rows = {"before": metrics["before"]["by_length"]}
            for number, phase in enumerate(metrics["phases"], start=1):
                rows[f"phase {number}, {phase['seq_len']:,} tokens"] = phase["by_length"]
            yield _length_table(step, rows, metrics["retrieval_chance_frac"])


def _length_table(title: str, rows: Mapping[str, Mapping[str, Any]], chance_frac: float) -> dict[str, Any]:
    lengths = sorted({int(length) for row in rows.values() for length in row})
    return {"title": title, "lengths": lengths, "rows": rows, "chance_frac": chance_frac}


def _quality_against_latency(report: Mapping[str, Any]) -> Iterator[Picture]:
    points = [
        figures.ModelPoint(name=name, decode_ms=model["decode_ms"], lm_loss=model["lm_loss"])
        for name, model in report["models"].items()
        if model["decode_ms"] is not None and model["lm_loss"] is not None
    ]
    if len(points) > 1:
        yield picture(
            "Quality against latency, measured",
            "Held-out LM loss and decode latency of every model, joined in pipeline order. Down and left is better; "
            "the dotted line is the parent's loss.",
            figures.quality_against_latency(points),
        )


def _dependency(run: FinishedRun) -> Iterator[Picture]:
    artifact = run.last("measure_dependency")
    if artifact is None:
        return
    measured = read_json(artifact.path / "dependency.json")
    model = run.input_of(artifact, "model")
    assert model is not None, "every input of a pipeline's step is a step"
    attention_free = [block.is_attention_free for block in read_architecture(model).blocks]
    yield picture(
        "Block dependency",
        "How much what block j adds changes when block i is removed. Dark: j does not need i, and may run beside it.",
        figures.dependency_matrix(measured["matrix"], attention_free),
    )
    yield picture(
        "Direction change",
        "Above, how far every block turns the hidden state; below, the norm of what it adds over that of its input. "
        "Where both are small, fusion changes little of what the next FFN reads.",
        figures.direction_change(
            [block["direction_change"] for block in measured["blocks"]],
            [block["contribution_ratio"] for block in measured["blocks"]],
            attention_free,
        ),
    )


def _provenance(run: FinishedRun) -> dict[str, list[str]]:
    """Where the artifacts come from: every distinct value, as steps may be from different days and machines."""
    facts: dict[str, list[str]] = {name: [] for name in ("commit", "command", "hardware", "seed", "python", "packages")}
    for artifact in run.steps.values():
        known = artifact.manifest.provenance
        hardware = known["hardware"]
        stated = {
            "commit": _commit(known["git_commit"], known["dirty_diff_sha256"]),
            "command": _command(known["argv"]),
            "hardware": ", ".join([f"{hardware['cpu']} ({hardware['num_cores']} cores)", *hardware["gpus"]]),
            "seed": known["seed"],
            "python": known["python"],
            "packages": " ".join(f"{name}=={version}" for name, version in known["packages"].items()),
        }
        for name, value in stated.items():
            if value is not None and str(value) not in facts[name]:
                facts[name].append(str(value))
    return {name: values for name, values in facts.items() if values}


def _commit(commit: str | None, dirty_diff: str | None) -> str | None:
    return f"{commit} with local changes" if commit and dirty_diff else commit


def _command(argv: list[str]) -> str:
    program = ["python", "-m", "launch"] if argv[0].endswith("launch/__main__.py") else [argv[0]]
    return shlex.join([*program, *argv[1:]])

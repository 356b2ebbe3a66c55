"""What W&B shows of a committed step: its headline numbers, tables and figures, read from its artifact. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distill.recovered import gap_closed_frac, retained_frac
from distill.wandb_run import Table
from launch import figures
from launch.artifact import Artifact
from launch.canvas import stand_alone
from launch.finished_run import PARENT, read_architecture, read_json
from launch.recovery import reference_model
from launch.search_section import METRIC_LABELS, latency_fracs
from launch.strip import architecture_strip
from launch.strip_figure import strip_svg
from puzzle.model.hf_config import architecture_from_config
from puzzle.tables import CostFile, ScoreTable

SURGERY = frozenset({"assemble", "prune_attention", "fuse", "parallelize_blocks", "distill_groups"})
"""Stages that change the architecture, whose outputs get a strip."""

MODEL_INPUTS = ("fused", "student", "model", PARENT)
"""Inputs that a model's weights come from, the nearest first."""

MAX_SUMMARY_VALUES = 300
"""Of one step."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """Tables and figures by name, and values of the whole step."""

    summary: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    """SVG."""


def content_of(artifact: Artifact) -> Content:
    """Everything of one artifact.

    Raises:
        ValueError, KeyError, OSError: its files are not what its stage writes.
    """
    manifest = artifact.manifest
    summary = {
        "result/headline": manifest.headline,
        "result/seconds": manifest.seconds,
        "result/tokens": sum(manifest.tokens.values()),
    }
    values = [*_numbers(manifest.metrics, "result")][:MAX_SUMMARY_VALUES]
    own = _BY_STAGE[manifest.stage](artifact) if manifest.stage in _BY_STAGE else Content()
    shape = _shape(artifact) if manifest.stage in SURGERY else Content()
    return Content(
        summary={**dict(values), **summary, **own.summary},
        tables={**shape.tables, **own.tables},
        pages={**shape.pages, **own.pages},
    )


def inputs_of(artifact: Artifact) -> dict[str, Artifact]:
    """The artifacts that this one was made from, as far as they still stand beside it in the store."""
    found = {}
    for name, record in artifact.manifest.inputs.items():
        path = artifact.path.resolve().parent / record.path
        try:
            found[name] = Artifact.load(path)
        except ValueError:
            continue
    return found


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float | str | bool]]:
    """Leaves of nested mappings under paths; lists are for tables."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{path}/{key}")
    elif isinstance(value, int | float | str):
        yield path, value


def _shape(artifact: Artifact) -> Content:
    """The architecture beside that of the oldest model on its line."""
    line = [artifact]
    while source := _source(line[-1]):
        line.append(source)
    architectures = [read_architecture(model) for model in line]
    final, parent = architectures[0], architectures[-1]
    unfused = next((a for a in architectures if not any(block.is_fused for block in a.blocks)), final)
    rows = [
        (index, block.name, ", ".join(map(str, block.member_indices)), block.is_fused)
        for index, block in enumerate(final.blocks)
    ]
    return Content(
        tables={"architecture/blocks": Table(columns=("block", "variant", "stands for", "is fused"), rows=rows)},
        pages={"architecture/strip": strip_svg(architecture_strip(parent, unfused, final))},
    )


def _source(model: Artifact) -> Artifact | None:
    inputs = inputs_of(model)
    return next(
        (inputs[name] for name in MODEL_INPUTS if name in inputs and inputs[name].manifest.kind == "model"), None
    )


def _search(artifact: Artifact) -> Content:
    found = read_json(artifact.path / "solution.json")
    best, inputs = found["solutions"][0], inputs_of(artifact)
    latency, fused = latency_fracs(best)
    summary = {"score": best["score"], "latency_vs_parent": latency, "fused_latency_vs_parent": fused}
    parent = []
    if "costs" in inputs:
        costs = CostFile.read(inputs["costs"].path / "costs.json")
        parent = [block.name for block in architecture_from_config(costs.architecture).blocks]
    scores: list[Mapping[str, float]] = []
    if "scores" in inputs:
        scores = list(ScoreTable.read(inputs["scores"].path / "scores.json").by_block(found["metric"]))
    blocks = [
        (index, parent[index] if parent else None, variant, scores[index].get(variant) if scores else None)
        for index, variant in enumerate(best["blocks"])
    ]
    front, chosen = (
        [
            figures.SearchPoint(latency_frac=frac, score=solution["score"], batch_size=solution["batch_size"])
            for solution in found[key]
            if (frac := latency_fracs(solution)[1]) is not None
        ]
        for key in ("pareto", "solutions")
    )
    label = METRIC_LABELS.get(found["metric"], found["metric"])
    pages = {"search/pareto_front": stand_alone(figures.pareto_front(front, chosen, label))} if front else {}
    return Content(
        summary={f"search/{name}": value for name, value in summary.items() if value is not None},
        tables={
            "search/blocks": Table(columns=("block", "parent", "chosen", "score"), rows=blocks),
            "search/solutions": _solutions(found["solutions"]),
            "search/pareto": _solutions(found["pareto"]),
        },
        pages=pages,
    )


def _solutions(solutions: list[Mapping[str, Any]]) -> Table:
    columns = ("budget", "score", "latency", "fused latency", "batch size", "method", "status", "gap", "blocks")
    rows = [
        (
            solution.get("latency_frac"),
            solution["score"],
            *latency_fracs(solution),
            solution["batch_size"],
            solution["method"],
            solution["status"],
            solution["mip_gap"],
            " ".join(solution["blocks"]),
        )
        for solution in solutions
    ]
    return Table(columns=columns, rows=rows)


def _scores(artifact: Artifact) -> Content:
    table = ScoreTable.read(artifact.path / "scores.json")
    rows = [
        (row.block, row.variant, *(row.values.get(metric) for metric in table.metrics), row.stderr.get("kld"))
        for row in table.rows
    ]
    variants = list(dict.fromkeys(row.variant for row in table.rows))
    pages = {}
    for metric in table.metrics:
        matrix = [[scores.get(variant) for scores in table.by_block(metric)] for variant in variants]
        svg = figures.score_heat_map(
            variants, matrix, [], METRIC_LABELS.get(metric, metric), name=f"scores by {metric}"
        )
        pages[f"scores/{metric}"] = stand_alone(svg)
    columns = ("block", "variant", *table.metrics, "standard error of kld")
    return Content(tables={"scores/variants": Table(columns=columns, rows=rows)}, pages=pages)


def _costs(artifact: Artifact) -> Content:
    file = CostFile.read(artifact.path / "costs.json")
    rows = [
        (table.source, table.workload.batch_size, row.subblock, row.variant, row.prefill_ms, row.decode_ms, row.params)
        for table in file.tables
        for row in table.subblocks
    ]
    columns = ("source", "batch size", "subblock", "variant", "prefill ms", "decode ms", "params")
    return Content(tables={"costs/subblocks": Table(columns=columns, rows=rows)})


def _dependency(artifact: Artifact) -> Content:
    measured = read_json(artifact.path / "dependency.json")
    model = inputs_of(artifact).get("model")
    free = [block.is_attention_free for block in read_architecture(model).blocks] if model else []
    pairs = [
        (i, j, value) for i, line in enumerate(measured["matrix"]) for j, value in enumerate(line) if value is not None
    ]
    blocks = [
        (index, block["direction_change"], block["contribution_ratio"])
        for index, block in enumerate(measured["blocks"])
    ]
    return Content(
        tables={
            "dependency/pairs": Table(columns=("removed block", "measured block", "cosine distance"), rows=pairs),
            "dependency/blocks": Table(columns=("block", "direction change", "contribution ratio"), rows=blocks),
        },
        pages={"dependency/heat_map": stand_alone(figures.dependency_matrix(measured["matrix"], free))},
    )


def _evaluate(artifact: Artifact) -> Content:
    measured = read_json(artifact.path / "evaluate.json")["models"]
    stages = {name: source.manifest.stage for name, source in inputs_of(artifact).items()}
    losses = {name: row["lm_loss"] for name, row in measured.items()}
    reference, parent = reference_model(losses, stages, PARENT), losses[PARENT]
    columns = ("model", "lm_loss", "kld", "top1_agreement_frac", "lm_loss_gap", "retained_frac", "gap_closed_frac")
    rows = []
    for name, row in measured.items():
        loss = row["lm_loss"]
        closed = None
        if reference is not None and name != PARENT:
            closed = gap_closed_frac(parent=parent, reference=losses[reference], model=loss)
        retained = retained_frac(teacher=parent, student=loss)
        rows.append((name, loss, row["kld"], row["top1_agreement_frac"], row["lm_loss_gap"], retained, closed))
    summary = {
        f"evaluate/{row[0]}/{column}": value
        for row in rows
        for column, value in zip(columns[1:], row[1:], strict=True)
        if value is not None
    }
    lengths = [
        (name, int(length), values["lm_loss"], values["retrieval_accuracy_frac"])
        for name, row in measured.items()
        for length, values in row["by_length"].items()
    ]
    by_length = Table(columns=("model", "length", "lm_loss", "retrieval_accuracy_frac"), rows=lengths)
    tasks = _tasks(measured)
    return Content(
        summary={**summary, **tasks.summary},
        tables={
            "evaluate/models": Table(columns=columns, rows=rows),
            **({"evaluate/lengths": by_length} if lengths else {}),
            **tasks.tables,
        },
    )


def _tasks(measured: Mapping[str, Mapping[str, Any]]) -> Content:
    """lm-eval tasks of the models of ``evaluate.json``; empty where none ran."""
    done = [(name, task, result) for name, row in measured.items() for task, result in row.get("tasks", {}).items()]
    if not done:
        return Content()
    summary: dict[str, Any] = {}
    for name, task, result in done:
        values = {result["metric"]: result["value"], "recovery_frac": result["recovery_frac"]}
        summary |= {f"evaluate/{name}/tasks/{task}/{key}": value for key, value in values.items() if value is not None}
    for name, row in measured.items():
        if row["tasks_recovery_frac"] is not None:
            summary[f"evaluate/{name}/tasks_recovery_frac"] = row["tasks_recovery_frac"]
    columns = ("metric", "value", "stderr", "n", "num_truncated", "recovery_frac")
    rows = [(name, task, *(result[column] for column in columns)) for name, task, result in done]
    return Content(summary=summary, tables={"evaluate/tasks": Table(columns=("model", "task", *columns), rows=rows)})


def _benchmark(artifact: Artifact) -> Content:
    measured = read_json(artifact.path / "benchmark.json")["models"]
    columns = [name for name, value in measured[PARENT].items() if isinstance(value, int | float)]
    rows = [(name, *(row.get(column) for column in columns)) for name, row in measured.items()]
    summary = {
        f"benchmark/{name}/{column}": row[column]
        for name, row in measured.items()
        for column in columns
        if row.get(column) is not None
    }
    return Content(summary=summary, tables={"benchmark/models": Table(columns=("model", *columns), rows=rows)})


def _additivity(artifact: Artifact) -> Content:
    rows = read_json(artifact.path / "additivity.json")["rows"]
    columns = ("name", "num_replaced", "sum_of_scores", "realised_kld")
    lines = [tuple(row[column] for column in columns) for row in rows]
    return Content(tables={"additivity/children": Table(columns=columns, rows=lines)})


_BY_STAGE: dict[str, Callable[[Artifact], Content]] = {
    "search": _search,
    "score_library": _scores,
    "measure_costs": _costs,
    "measure_dependency": _dependency,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "check_additivity": _additivity,
}

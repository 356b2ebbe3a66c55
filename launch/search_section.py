"""Scores and searches of a run, for the report. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from launch import figures
from launch.artifact import Artifact
from launch.figures import Picture, picture
from launch.finished_run import FinishedRun, read_architecture, read_json
from puzzle.tables import ScoreRow, ScoreTable, parse_variant

METRIC_LABELS = {
    "kld": "KLD, nats per token",
    "lm_loss": "LM loss over the parent's, nats per token",
    "top1_disagreement": "tokens with another likeliest successor, share",
    "hidden_cosine": "cosine distance of final hidden states",
}
"""Of the metrics that we measure; any other column of scores stands under its own name."""


def child_search(run: FinishedRun) -> Artifact | None:
    """The search that chose the run's final model; the last search where the model comes from elsewhere."""
    artifact: Artifact | None = run.final
    while artifact is not None:
        solution = run.input_of(artifact, "solution")
        if solution is not None and artifact.manifest.kind == "model":
            return solution
        artifact = run.input_of(artifact, "student") or run.input_of(artifact, "model")
    return run.last("search")


def searches(run: FinishedRun) -> list[dict[str, Any]]:
    """The best solution of every search of the run, in pipeline order, for ``report.json``."""
    chosen = child_search(run)
    rows = []
    for step, artifact in run.steps.items():
        if artifact.manifest.stage != "search":
            continue
        found = read_json(artifact.path / "solution.json")
        best = found["solutions"][0]
        latency, fused = latency_fracs(best)
        removed = [parse_variant(variant)[0].is_no_op for variant in best["blocks"]] if _is_ours(best) else None
        rows.append(
            {
                "step": step,
                "made_the_child": artifact is chosen,
                "method": best["method"],
                "metric": found["metric"],
                "score": best["score"],
                "latency": found["latency"],
                "latency_vs_parent": latency,
                "fused_latency_vs_parent": fused,
                "batch_size": best["batch_size"],
                "batch_sizes": [entry["batch_size"] for entry in found["batch_sizes"]],
                "num_without_attention": sum(removed) if removed is not None else None,
                "status": best["status"],
                "mip_gap": best["mip_gap"],
                "cost_table": found["cost_table"],
                "hardware": found["hardware"],
                "workload": found["workload"],
            }
        )
    return rows


def _is_ours(solution: Mapping[str, Any]) -> bool:
    """Whether variants have names that say what they are; those of a user's own tables need not."""
    try:
        return all(parse_variant(variant) for variant in solution["blocks"])
    except ValueError:
        return False


def latency_fracs(solution: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Predicted latency as a fraction of the parent's at the same batch size: nothing fused, and after fusion."""
    parent_ms = solution["parent_costs"].get("latency_ms")
    if not parent_ms:
        return None, None
    fused_ms = solution["predicted_fused_latency_ms"]
    return solution["costs"]["latency_ms"] / parent_ms, None if fused_ms is None else fused_ms / parent_ms


def pareto_pictures(run: FinishedRun) -> Iterator[Picture]:
    """The Pareto front of the search that chose the child."""
    artifact = child_search(run)
    if artifact is None:
        return
    found = read_json(artifact.path / "solution.json")
    front, chosen = (_search_points(found[key]) for key in ("pareto", "solutions"))
    if not front:
        return
    sizes = {point.batch_size for point in front}
    by_what = "Each point solves one integer program." if found["method"] == "mip" else f"Found by {found['method']}."
    many = " Every batch size is a search of its own; latencies are relative to the parent's at the same one."
    yield picture(
        "Quality against latency, as the search predicted it",
        f"Lowest summed score at every latency budget: the Pareto front. {by_what}" + (many if len(sizes) > 1 else ""),
        figures.pareto_front(front, chosen, METRIC_LABELS.get(found["metric"], found["metric"])),
    )


def _search_points(solutions: Sequence[Mapping[str, Any]]) -> list[figures.SearchPoint]:
    """Those whose latency is known; costs of a user's own may have none."""
    return [
        figures.SearchPoint(latency_frac=fused, score=solution["score"], batch_size=solution["batch_size"])
        for solution in solutions
        if (fused := latency_fracs(solution)[1]) is not None
    ]


def score_pictures(run: FinishedRun) -> Iterator[Picture]:
    """Scores by the metric that was searched, and whether they add up."""
    search = child_search(run)
    found = read_json(search.path / "solution.json") if search else None
    table = _score_table(run, search)
    if table is not None:
        metric = found["metric"] if found else "kld"
        yield _score_picture(run, table, metric, found)
    yield from _additivity(run)


def other_metrics(run: FinishedRun) -> list[Picture]:
    """The same scores by every metric that was not searched."""
    search = child_search(run)
    found = read_json(search.path / "solution.json") if search else None
    table = _score_table(run, search)
    if table is None:
        return []
    shown = found["metric"] if found else "kld"
    return [_score_picture(run, table, metric, found) for metric in table.metrics if metric != shown]


def _score_table(run: FinishedRun, search: Artifact | None) -> ScoreTable | None:
    scored = run.input_of(search, "scores") if search else run.last("score_library") or run.last("prune_attention")
    return ScoreTable.read(scored.path / "scores.json") if scored else None


def _score_picture(run: FinishedRun, table: ScoreTable, metric: str, found: Mapping[str, Any] | None) -> Picture:
    if found is not None:
        chosen = found["solutions"][0]["blocks"]
    else:
        pruned = run.last("prune_attention")
        chosen = [block.name for block in read_architecture(pruned).blocks] if pruned else []
    by_block = table.by_block(metric)
    variants = list(dict.fromkeys(row.variant for row in table.rows))
    scored = "the parent"
    if table.base is not None:
        scored = f"a model that lacks {sum(parse_variant(name)[0].is_no_op for name in table.base)} attentions already"
    errors = [row.stderr[metric] / row.values[metric] for row in table.rows if _has_error(row, metric)]
    return picture(
        "Replace-1-block scores" if metric == "kld" else f"Replace-1-block scores: {metric}",
        f"What one variant at one block, alone, does to {scored}, on {table.num_tokens:,} tokens; lower is better. "
        "0 and below take the lowest colour, and a ring marks the choice."
        + (f" Standard error over sequences: {median(errors):.0%} of the score, median." if errors else ""),
        figures.score_heat_map(
            variants,
            [[scores.get(variant) for scores in by_block] for variant in variants],
            chosen,
            METRIC_LABELS.get(metric, metric),
            name="replace-1-block scores" if metric == "kld" else f"replace-1-block scores by {metric}",
        ),
        wide=True,
    )


def _has_error(row: ScoreRow, metric: str) -> bool:
    return metric in row.stderr and row.values[metric] > 0


def _additivity(run: FinishedRun) -> Iterator[Picture]:
    """Children by what they came from, as far as both values can stand on a log scale."""
    content = run.document("check_additivity", "additivity.json")
    if content is None:
        return
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in content["rows"]:
        pair = (row["sum_of_scores"], row["realised_kld"])
        kind = "random children" if row["name"].startswith("random") else "of the search"
        if min(pair) > 0:
            groups.setdefault(kind, []).append(pair)
    if not groups:
        return
    found = []
    if content["median_ratio"] is not None:
        found.append(f"Sum over realised KLD: {content['median_ratio']:.2f} in the median of {len(content['rows'])}.")
    if content["rank_correlation"] is not None:
        found.append(f"Rank correlation: {content['rank_correlation']:.2f}.")
    yield picture(
        "Do the scores add up?",
        "The search minimises a sum of replace-1-block scores. Each point is a child that makes all its replacements "
        "at once, measured on the same tokens: on the dotted line the sum is its KLD, above it the child is worse than "
        f"the sum says. {' '.join(found)}",
        figures.additivity(groups, "realised KLD, nats per token"),
    )

"""Stage search: scores and costs -> one variant per block, and the Pareto front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distill.config import require
from launch import result_table
from launch.modelled_fusion import require_modelled
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import SearchStage
from puzzle.baselines import METHODS, find, merit
from puzzle.config import SearchConfig
from puzzle.integer_program import TimeLimitError
from puzzle.mip import ParetoFront, pareto_front
from puzzle.model.architecture import NO_ATTENTION
from puzzle.model.hf_config import architecture_from_config
from puzzle.own_tables import Scores, read_costs, read_scores, scores_of
from puzzle.search_problem import (
    TOLERANCE,
    Costs,
    FusionRule,
    InfeasibleError,
    Problem,
    Solution,
    best_parent_throughput,
    budgets_of,
    build_problem,
    costs_of,
)
from puzzle.tables import CostFile, ScoreTable, parse_variant
from puzzle.target_space import loadable_variants


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What is searched, from wherever."""

    scores: Scores
    costs: tuple[Costs, ...]
    """One for every batch size, the workload's own first."""
    parent: tuple[str, ...]
    hardware: str | None = None
    """Device that the costs are of; None: unknown."""
    workload: Mapping[str, Any] | None = None


def run(config: SearchStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``solution.json``: solutions, best first, and the Pareto front at the given latency budgets.

    Every batch size is searched by itself, and solutions are ranked by what the method minimises; of equal ones that at
    the workload's own batch size comes first.

    Raises:
        InfeasibleError: no batch size has a choice within the budgets.
        TimeLimitError: none was found in time.
        ValueError: scores, costs and budgets do not fit together.
    """
    search = config.search
    if search.fusion_aware:
        require_modelled(config.fuse)
    _require_same_parent(inputs)
    tables = _read(search, inputs)
    throughput = None
    if search.constraint.throughput_ratio is not None:
        throughput = best_parent_throughput(tables.costs, tables.parent, search.constraint.memory_gib)
    rule = FusionRule(leave_last_out=config.fuse.leave_last_out, min_length=config.fuse.min_length)
    problems = [
        build_problem(
            tables.scores.by_block,
            costs,
            tables.parent,
            search,
            fusion=rule,
            base=tables.scores.base,
        )
        for costs in _chosen_sizes(search, tables.costs)
    ]
    solutions, tried = _solutions(problems, throughput)
    front = _front(problems, throughput)
    parent_costs = {
        problem.costs.batch_size: _costs(problem, problem.costs.total(problem.parent)) for problem in problems
    }
    rows = [_row(problems[0], solution, parent_costs) for solution in solutions]
    content = {
        "metric": search.metric,
        "latency": search.latency,
        "method": search.method,
        "cost_table": search.cost_table if search.costs is None else search.costs,
        "parent": _parent_fingerprint(inputs),
        "hardware": tables.hardware,
        "workload": tables.workload,
        "conditional": tables.scores.is_conditional,
        "batch_sizes": tried,
        "solutions": rows,
        "pareto": [
            {"latency_frac": frac, **_row(problems[0], best, parent_costs)} for frac, best in front.solutions.items()
        ],
        "pareto_out_of_reach": front.out_of_reach,
        "pareto_out_of_time": front.out_of_time,
    }
    (context.out / "solution.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    if search.scores is not None or search.costs is not None:
        result_table.show(problems[0].parent, tables.scores.by_block, rows[0], metric=search.metric)
    metrics = {key: value for key, value in rows[0].items() if key != "blocks"}
    return StageResult(
        headline=_headline(problems, solutions, rows[0]), metrics={**metrics, "num_solutions": len(solutions)}
    )


def _read(search: SearchConfig, inputs: Inputs) -> Tables:
    """Scores and costs, each from an artifact or from a file of the user's."""
    if search.scores is not None:
        scores = read_scores(Path(search.scores).expanduser(), search.metric)
    else:
        scores = scores_of(ScoreTable.read(inputs["scores"].path / "scores.json"), search.metric)
    if search.costs is not None:
        found = read_costs(Path(search.costs).expanduser(), scores)
    else:
        found = CostFile.read(inputs["costs"].path / "costs.json")
    if not isinstance(found, CostFile):
        require(
            not search.targets,
            f"search.targets=[{','.join(search.targets)}] goes by the parent's architecture, which search.costs="
            f"{search.costs} does not say; give a costs.json, or leave rows out of your table and search.targets empty",
        )
        assert scores.parent is not None
        return Tables(scores=scores, costs=found, parent=scores.parent)
    architecture = architecture_from_config(found.architecture)
    parent = tuple(block.name for block in architecture.blocks)
    require(
        len(scores.by_block) == len(parent),
        f"scores cover {len(scores.by_block)} blocks, the parent of the costs has {len(parent)}; "
        "take both from one parent",
    )
    if search.targets:
        by_block = loadable_variants(architecture, scores.by_block, search.targets, base=scores.base)
        scores = replace(scores, by_block=by_block)
    of_source = list(found.of_source(search.cost_table).values())
    return Tables(
        scores=scores,
        costs=tuple(costs_of(table, scores.by_block, parent) for table in of_source),
        parent=parent,
        hardware=of_source[0].hardware,
        workload=asdict(of_source[0].workload),
    )


def _chosen_sizes(search: SearchConfig, costs: Sequence[Costs]) -> list[Costs]:
    """The tables of ``search.batch_sizes``."""
    known = {table.batch_size: table for table in costs}
    for size in search.batch_sizes:
        require(
            size in known,
            f"search.batch_sizes={list(search.batch_sizes)}: the costs have batch size "
            f"{', '.join(map(str, known))}; measure {size} with costs.batch_sizes, or leave it out",
        )
    return [known[size] for size in search.batch_sizes or known]


def _solutions(problems: Sequence[Problem], throughput: float | None) -> tuple[list[Solution], list[dict[str, Any]]]:
    """Solutions over all batch sizes, best first and different enough, and what came of every batch size.

    Raises:
        InfeasibleError: no batch size has one; the message of the first one, and what the others say.
        TimeLimitError: none was found in time, and there may be one.
    """
    config = problems[0].config
    found: list[tuple[float, Solution]] = []
    tried: list[dict[str, Any]] = []
    failed: dict[int, ValueError] = {}
    for problem in problems:
        size, budgets = problem.costs.batch_size, budgets_of(problem, config.constraint, parent_throughput=throughput)
        row: dict[str, Any] = {"batch_size": size, "score": None, "infeasible": None, "time_limit": None}
        try:
            own = find(problem, budgets)
            row["score"] = own[0].score
            found += [(merit(problem, solution), solution) for solution in own]
        except (InfeasibleError, TimeLimitError) as error:
            failed[size] = error
            row["infeasible" if isinstance(error, InfeasibleError) else "time_limit"] = str(error)
        tried.append(row)
    if not found:
        first, *others = failed.items()
        message = str(first[1]) + "".join(f"; at batch size {size}: {error}" for size, error in others)
        is_known = all(isinstance(error, InfeasibleError) for error in failed.values())
        raise InfeasibleError(message) if is_known else TimeLimitError(message)
    kept: list[Solution] = []
    for _, solution in sorted(found, key=lambda pair: pair[0]):
        differences = (
            sum(one != other for one, other in zip(solution.blocks, earlier.blocks, strict=True)) for earlier in kept
        )
        least = config.min_different_frac * len(solution.blocks) - TOLERANCE
        if len(kept) < config.num_solutions and all(number >= least for number in differences):
            kept.append(solution)
    return kept, tried


def _front(problems: Sequence[Problem], throughput: float | None) -> ParetoFront:
    """Best solution of all batch sizes at every latency budget; empty where latencies, or those of merges, are
    unknown."""
    best: dict[float, tuple[float, Solution]] = {}
    out_of_reach, out_of_time = set[float](), set[float]()
    for problem in problems:
        known = problem.costs.total(problem.parent)
        if problem.latency not in known or not problem.is_saving_known(problem.latency):
            continue
        front = pareto_front(problem, find=METHODS[problem.config.method], parent_throughput=throughput)
        for frac, solution in front.solutions.items():
            value = merit(problem, solution)
            if frac not in best or value < best[frac][0]:
                best[frac] = value, solution
        out_of_reach.update(front.out_of_reach)
        out_of_time.update(front.out_of_time)
    return ParetoFront(
        solutions={frac: best[frac][1] for frac in sorted(best)},
        out_of_reach=tuple(sorted(out_of_reach - out_of_time - best.keys())),
        out_of_time=tuple(sorted(out_of_time - best.keys())),
    )


def _parent_fingerprint(inputs: Inputs) -> str | None:
    for name in ("scores", "costs"):
        if name in inputs:
            return inputs[name].manifest.inputs["parent"].fingerprint
    return None


def _require_same_parent(inputs: Inputs) -> None:
    if not {"scores", "costs"} <= inputs.keys():
        return
    parents = {name: inputs[name].manifest.inputs["parent"].fingerprint for name in ("scores", "costs")}
    require(
        parents["scores"] == parents["costs"],
        f"the scores are of model {parents['scores'][:12]}, the costs of model {parents['costs'][:12]}; "
        "take both from one parent",
    )


def _row(problem: Problem, solution: Solution, parent_costs: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    return {
        **asdict(solution),
        "costs": _costs(problem, solution.costs),
        "parent_costs": parent_costs[solution.batch_size],
    }


def _costs(problem: Problem, total: Mapping[str, float]) -> dict[str, float]:
    latency = {"latency_ms": total[problem.latency]} if problem.latency in total else {}
    return {**latency, **total}


def _headline(problems: Sequence[Problem], solutions: Sequence[Solution], row: Mapping[str, Any]) -> str:
    best, config, parent = solutions[0], problems[0].config, problems[0].parent
    parts = [_removed(parent, best.blocks)]
    if best.predicted_fused_latency_ms is not None:
        parent_ms = row["parent_costs"]["latency_ms"]
        plain, fused = row["costs"]["latency_ms"] / parent_ms, best.predicted_fused_latency_ms / parent_ms
        parts.append(f"predicted {config.latency} {plain:.2f}x (fused {fused:.2f}x)")
    if len(problems) > 1:
        parts.append(f"batch size {best.batch_size}")
    line = f"{', '.join(parts)}, score {best.score:.3g}"
    if best.method != "mip":
        line = f"{best.method}: {line}"
    if best.status == "time_limit":
        line += f", not proven best (gap {best.mip_gap:.1%})"
    if len(solutions) < config.num_solutions:
        line += (
            f"; {len(solutions)} of {config.num_solutions} solutions, no other differs enough within budgets and time"
        )
    return line


def _removed(parent: Sequence[str], blocks: Sequence[str]) -> str:
    """``3 of 4 attentions removed``; for names of the user's own, the number of changed blocks."""
    try:
        pairs = [(parse_variant(own)[0], parse_variant(new)[0]) for own, new in zip(parent, blocks, strict=True)]
    except ValueError:
        changed = sum(own != new for own, new in zip(parent, blocks, strict=True))
        return f"{changed} of {len(parent)} blocks changed"
    had = [chosen for own, chosen in pairs if own != NO_ATTENTION]
    return f"{had.count(NO_ATTENTION)} of {len(had)} attentions removed"

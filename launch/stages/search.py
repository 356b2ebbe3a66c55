"""Stage search: scores and costs -> one variant per block, and the Pareto front."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distill.config import require
from fusion.config import FuseConfig
from launch.registry import SearchStage
from launch.stage import Inputs, StageContext, StageResult
from puzzle.mip import Problem, Solution, budgets_of, build_problem, find_solutions, pareto_front
from puzzle.model.architecture import NO_ATTENTION
from puzzle.model.hf_config import architecture_from_config
from puzzle.tables import CostFile, ScoreTable, TotalCost, parse_variant


def run(config: SearchStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``solution.json``: solutions, best first, and the Pareto front at the given latency budgets."""
    search = config.search
    scores = ScoreTable.read(inputs["scores"].path / "scores.json")
    costs = CostFile.read(inputs["costs"].path / "costs.json")
    require(
        search.cost_table in costs.tables,
        f"search.cost_table={search.cost_table} is not in costs.json, which has {', '.join(costs.tables)}",
    )
    _require_same_parent(inputs)
    if search.fusion_aware:
        _require_modelled(config.fuse)
    parent = [block.name for block in architecture_from_config(costs.architecture).blocks]
    problem = build_problem(
        scores.by_block(search.metric),
        costs.tables[search.cost_table],
        parent,
        search,
        leave_last_out=config.fuse.leave_last_out,
    )

    solutions = find_solutions(problem, budgets_of(problem, search.constraint))
    front = pareto_front(problem)
    rows = [_row(problem, solution) for solution in solutions]
    content = {
        "metric": search.metric,
        "latency": search.latency,
        "cost_table": search.cost_table,
        "parent": inputs["scores"].manifest.inputs["parent"].fingerprint,
        "hardware": costs.hardware.get(search.cost_table),
        "workload": asdict(costs.workload),
        "solutions": rows,
        "pareto": [{"latency_frac": frac, **_row(problem, best)} for frac, best in front.items() if best is not None],
        "pareto_out_of_reach": [frac for frac, best in front.items() if best is None],
    }
    (context.out / "solution.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    metrics = {key: value for key, value in rows[0].items() if key != "blocks"}
    return StageResult(headline=_headline(problem, solutions), metrics={**metrics, "num_solutions": len(solutions)})


def _require_same_parent(inputs: Inputs) -> None:
    parents = {name: inputs[name].manifest.inputs["parent"].fingerprint for name in ("scores", "costs")}
    require(
        parents["scores"] == parents["costs"],
        f"the scores are of model {parents['scores'][:12]}, the costs of model {parents['costs'][:12]}; "
        "take both from one parent",
    )


def _require_modelled(fuse: FuseConfig) -> None:
    """The fusion-aware cost merges whole runs; settings that split or shorten them would make it a wrong promise."""
    default = FuseConfig()
    for name in ("min_length", "max_ffn_dim", "max_dependency", "groups"):
        require(
            getattr(fuse, name) == getattr(default, name),
            f"fuse.{name}={getattr(fuse, name)} is not in the search's fusion-aware cost; set it for the fuse step "
            f"alone (steps.<fuse step>.fuse.{name}=...) or set search.fusion_aware=false",
        )


def _row(problem: Problem, solution: Solution) -> dict[str, Any]:
    return {
        **asdict(solution),
        "costs": _costs(problem, solution.costs),
        "parent_costs": _costs(problem, problem.parent_costs),
    }


def _costs(problem: Problem, total: TotalCost) -> dict[str, float]:
    return {"latency_ms": problem.latency_ms(total), **asdict(total)}


def _headline(problem: Problem, solutions: Sequence[Solution]) -> str:
    best, config = solutions[0], problem.config
    parent_ms = problem.latency_ms(problem.parent_costs)
    attentions = [
        (parse_variant(own)[0], parse_variant(chosen)[0])
        for own, chosen in zip(problem.parent, best.blocks, strict=True)
    ]
    had = [chosen for own, chosen in attentions if own != NO_ATTENTION]
    plain, fused = problem.latency_ms(best.costs) / parent_ms, best.predicted_fused_latency_ms / parent_ms
    line = (
        f"{had.count(NO_ATTENTION)} of {len(had)} attentions removed, "
        f"predicted {config.latency} {plain:.2f}x (fused {fused:.2f}x), score {best.score:.3g}"
    )
    if best.status != "optimal":
        line += f", not proven best (gap {best.mip_gap:.1%})"
    if len(solutions) < config.num_solutions:
        line += f"; {len(solutions)} of {config.num_solutions} solutions, no other differs enough within the budgets"
    return line

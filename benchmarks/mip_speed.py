"""How long the search takes at the size of the largest published one: ``python benchmarks/mip_speed.py``.

Seeded tables of a parent of Llama-3.1-405B's shape: costs are the analytic ones of H100s under tensor parallelism, and
scores are shaped like measured ones: attentions get cheap to remove with depth, FFNs dear to narrow at both ends, with
noise between blocks and variants. Four budgets hold together (decode latency, throughput of requests, memory,
parameters), all of them tight: each is what the best choice under the latency alone takes, less a percent or so.
Wall time counts from the tables in memory to the proven choice; CPU time is the same without what else the machine did.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from distill.config import RopeConfig
from launch.config import compose_stage
from launch.stage_configs import MeasureCostsStage
from puzzle.analytic import analytic_table
from puzzle.config import ConstraintConfig, SearchConfig
from puzzle.mip import solve
from puzzle.model.architecture import Architecture, AttentionConfig, BlockConfig, FFNConfig, dense_blocks
from puzzle.search_problem import Problem, budgets_of, build_problem, costs_of
from puzzle.space import block_variants

WORKLOAD = ("workload.batch_size=32", "workload.prefill_tokens=2048", "workload.generated_tokens=512",
            "workload.dtype=bfloat16", "workload.tensor_parallel=8")  # fmt: skip
CASES = (("puzzle_54", False, 5.0), ("puzzle_54", True, None), ("puzzle_70b_16", True, 60.0))
"""Space, fusion awareness, and the seconds that we promise."""
SLACK = {"params_frac": 0.988, "memory_frac": 0.992, "throughput_ratio": 0.99}
"""How far each budget lies below what the search under the latency alone takes."""


def parent() -> Architecture:
    return Architecture(
        vocab_size=128256,
        hidden_dim=16384,
        num_heads=128,
        head_dim=128,
        blocks=dense_blocks(126, 8, 53248),
        max_positions=131072,
        rope=RopeConfig(theta=5e5),
    )


def seeded_scores(variants: Sequence[Sequence[BlockConfig]], seed: int) -> list[dict[str, float]]:
    """Scores of every variant of every block; the first of each block is the parent's own."""
    rng = np.random.default_rng(seed)
    depth = np.linspace(0, 1, len(variants))
    attention = 0.02 * np.exp(-4 * depth) + 0.0015 + 0.01 * (depth > 0.97) + 0.3 * (depth == 0)
    ffn = 0.05 * np.exp(-3 * depth) + 0.01 + 0.05 * (depth > 0.97) + 0.5 * (depth == 0)
    attention *= np.exp(rng.normal(0, 0.5, len(depth)))
    ffn *= np.exp(rng.normal(0, 0.35, len(depth)))
    rows = []
    for block, candidates in enumerate(variants):
        own, row = candidates[0], {}
        for variant in candidates:
            parts = (
                attention[block] * attention_loss(variant.attention, own.attention),
                ffn[block] * ffn_loss(variant.ffn, own.ffn),
            )
            # Two changes of one block do more than each alone.
            row[variant.name] = (sum(parts) + 0.6 * np.sqrt(parts[0] * parts[1])) * np.exp(rng.normal(0, 0.05))
        rows.append(row)
    return rows


def attention_loss(attention: AttentionConfig, own: AttentionConfig) -> float:
    """Relative to no attention at all."""
    if attention.num_kv_heads and own.num_kv_heads:
        return 0.08 * np.log2(own.num_kv_heads / attention.num_kv_heads)
    return {"linear": 0.6, "no_op": 1.0}[attention.kind]


def ffn_loss(ffn: FFNConfig, own: FFNConfig) -> float:
    """Relative to no FFN at all."""
    if ffn.ffn_dim and own.ffn_dim:
        return 0.8 * (1 - ffn.ffn_dim / own.ffn_dim) ** 1.6
    return {"linear": 0.85, "no_op": 1.0}[ffn.kind]


def make_problem(space: str, *, fusion_aware: bool, seed: int) -> Problem:
    stage = compose_stage(
        MeasureCostsStage, [f"space={space}", "space.keep_attention=[]", "hardware@costs.hardware=h100_sxm", *WORKLOAD]
    )
    architecture = parent()
    variants = [block_variants(architecture, index, stage.space) for index in range(architecture.num_blocks)]
    subblocks = dict.fromkeys(itertools.chain(*((v.attention, v.ffn) for v in itertools.chain(*variants))))
    table = analytic_table(architecture, tuple(subblocks), workload=stage.workload, hardware=stage.costs.hardware)
    scores = seeded_scores(variants, seed)
    names = [block.name for block in architecture.blocks]
    config = SearchConfig(constraint=ConstraintConfig(), fusion_aware=fusion_aware, time_limit_seconds=300.0)
    return build_problem(scores, costs_of(table, scores, names), names, config)


def constraint_of(problem: Problem, latency_frac: float) -> ConstraintConfig:
    """Four budgets, all of them tight."""
    first = solve(problem, budgets_of(problem, ConstraintConfig(latency_frac=latency_frac)), relative_gap=1e-3)
    own = problem.costs.total(problem.parent)

    def frac(cost: str) -> float:
        return problem.spent(first.blocks, cost) / own[cost]

    return ConstraintConfig(
        latency_frac=latency_frac,
        throughput_ratio=1 / (frac("request_ms") * SLACK["throughput_ratio"]),
        memory_frac=frac("memory_bytes") * SLACK["memory_frac"],
        params_frac=frac("params") * SLACK["params_frac"],
    )


def show(space: str, fusion_aware: bool, promised: float | None, results: Sequence[Mapping[str, float]]) -> None:
    seconds = sorted(result["seconds"] for result in results)
    proven = sum(result["gap"] <= 1e-9 for result in results)
    promise = "" if promised is None else f", promised {promised:g} s"
    cpu = median(result["cpu_seconds"] for result in results)
    print(
        f"{space}, {'fusion-aware' if fusion_aware else 'plain'}: median {median(seconds):.2f} s, CPU {cpu:.2f} s "
        f"(least {seconds[0]:.2f}, most {seconds[-1]:.2f}) over {len(seconds)} searches{promise}; "
        f"{proven} of {len(seconds)} proven optimal, largest gap {max(result['gap'] for result in results):.1e}"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--latency-fracs", type=float, nargs="+", default=[0.5, 0.65])
    chosen = options.parse_args()
    for space, fusion_aware, promised in CASES:
        results = []
        for seed, latency_frac in itertools.product(range(chosen.seeds), chosen.latency_fracs):
            problem = make_problem(space, fusion_aware=fusion_aware, seed=seed)
            constraint = constraint_of(problem, latency_frac)
            budgets = budgets_of(problem, constraint)
            start, cpu_start = time.perf_counter(), time.process_time()
            found = solve(problem, budgets)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            results.append({"seconds": seconds, "cpu_seconds": cpu_seconds, "gap": found.mip_gap or 0.0})
            print(
                f"  {len(problem.variants)} variables, seed {seed}, latency {latency_frac:g}: "
                f"{seconds:.2f} s, CPU {cpu_seconds:.2f} s, {found.status}, score {found.score:.5g}, "
                f"{found.num_merges} merges",
                flush=True,
            )
        show(space, fusion_aware, promised, results)


if __name__ == "__main__":
    main()

"""The solver against brute force, and what it says when there is no solution."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from puzzle.config import ConstraintConfig, SearchConfig, WorkloadConfig
from puzzle.mip import GIB, InfeasibleError, budgets_of, build_problem, find_solutions, num_merges, pareto_front, solve
from puzzle.tables import CostTable, MergeSaving, OverheadCost, SubblockCost

ATTENTIONS = ("kv2", "linear", "no_op")
FFNS = ("w512", "w256", "no_op")
PARENT = "kv2+w512"
VARIANTS = tuple(f"{attention}+{ffn}" for attention, ffn in itertools.product(ATTENTIONS, FFNS))
SLACK = 1e-6
"""The solver's feasibility tolerance."""


def cost_table(rng, attentions=ATTENTIONS, ffns=FFNS, *, saving_ms=0.3):
    """Random costs that fall along each list; a no-op is free."""

    def rows(subblock, variants):
        sizes = np.sort(rng.uniform(0.4, 2.0, len(variants)))[::-1]
        for variant, size in zip(variants, sizes, strict=True):
            size *= variant != "no_op"
            params = int(1000 * size)
            yield SubblockCost(
                subblock=subblock,
                variant=variant,
                prefill_ms=10 * size,
                decode_ms=size,
                params=params,
                weight_bytes=4 * params,
                kv_bytes_per_token=64 * int(variant[2:]) if variant.startswith("kv") else 0,
            )

    return CostTable(
        workload=WorkloadConfig(batch_size=2, prefill_tokens=8, generated_tokens=8),
        kv_tokens=16,
        overhead=OverheadCost(prefill_ms=3.0, decode_ms=0.7, params=500, weight_bytes=2000),
        subblocks=(*rows("attention", attentions), *rows("ffn", ffns)),
        ffn_merge_saving=MergeSaving(prefill_ms=10 * saving_ms, decode_ms=saving_ms),
    )


def random_scores(rng, num_blocks, variants=VARIANTS, parent=PARENT):
    return [{v: 0.0 if v == parent else float(rng.lognormal(-2, 1)) for v in variants} for _ in range(num_blocks)]


def make_problem(scores, table, *, leave_last_out=True, parent=PARENT, **fields):
    config = SearchConfig(**{"constraint": ConstraintConfig(), **fields})
    return build_problem(scores, table, [parent] * len(scores), config, leave_last_out=leave_last_out)


def saved_ms(blocks, table, *, leave_last_out):
    """Decode time that fusion saves, block by block."""
    merges = run = 0
    for block in (*blocks, "end"):
        if block.startswith("no_op+w"):
            run += 1
            continue
        fused = run - 1 if leave_last_out else run
        merges += max(0, fused - 1)
        run = 0
    return merges * table.ffn_merge_saving.decode_ms


def every_choice(scores, table, *, fusion_aware, leave_last_out):
    """Score, latency and memory of all combinations, [num_choices, 3]."""
    costs = {variant: table.block(variant) for row in scores for variant in row}
    outside = table.outside_blocks()
    rows = []
    for blocks in itertools.product(*scores):
        score = sum(row[block] for row, block in zip(scores, blocks, strict=True))
        latency_ms = outside.decode_ms + sum(costs[block].decode_ms for block in blocks)
        if fusion_aware:
            latency_ms -= saved_ms(blocks, table, leave_last_out=leave_last_out)
        rows.append((score, latency_ms, outside.memory_bytes + sum(costs[block].memory_bytes for block in blocks)))
    return np.array(rows)


@pytest.mark.parametrize("fusion_aware", [True, False])
@pytest.mark.parametrize("leave_last_out", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force(seed, fusion_aware, leave_last_out):
    rng = np.random.default_rng(seed)
    table, scores = cost_table(rng), random_scores(rng, 5, VARIANTS[::2] if seed % 2 else (PARENT, *VARIANTS[5:]))
    problem = make_problem(scores, table, fusion_aware=fusion_aware, leave_last_out=leave_last_out)
    choices = every_choice(scores, table, fusion_aware=fusion_aware, leave_last_out=leave_last_out)
    for latency_frac, memory_frac in ((0.8, 0.9), (0.55, 0.9), (0.35, 0.5), (0.1, 0.9)):
        budgets = budgets_of(problem, ConstraintConfig(latency_frac=latency_frac, memory_frac=memory_frac))
        limits = [latency_frac * problem.parent_costs.decode_ms, memory_frac * problem.parent_costs.memory_bytes]
        expected = choices[(choices[:, 1:] <= limits).all(1), 0].min(initial=np.inf)
        if np.isinf(expected):
            with pytest.raises(InfeasibleError):
                solve(problem, budgets)
            continue
        found = solve(problem, budgets)
        assert found.score == pytest.approx(expected, rel=1e-9)
        assert (found.status, found.mip_gap) == ("optimal", pytest.approx(0.0, abs=1e-9))
        # What is reported is what the choice costs.
        assert found.costs == table.model(found.blocks)
        saved = saved_ms(found.blocks, table, leave_last_out=leave_last_out)
        assert found.predicted_fused_latency_ms == pytest.approx(found.costs.decode_ms - saved, rel=1e-12)


def test_fusion_awareness_admits_a_run_that_separate_removals_do_not():
    """Four of six attentions must go in both cases if they are neighbours; more of them, if fusion is not counted."""
    table = cost_table(np.random.default_rng(0))
    scores = [{PARENT: 0.0, "no_op+w512": 1.0 if block % 2 else 1.1} for block in range(6)]
    neighbours = ("no_op+w512",) * 4 + (PARENT,) * 2
    latency_ms = table.model(neighbours).decode_ms - saved_ms(neighbours, table, leave_last_out=True)
    problem = make_problem(scores, table)
    found = solve(problem, budgets_of(problem, ConstraintConfig(latency_ms=latency_ms + 1e-3)))
    assert found.blocks.count("no_op+w512") == 4
    assert found.num_merges == 2
    unaware = make_problem(scores, table, fusion_aware=False)
    found = solve(unaware, budgets_of(unaware, ConstraintConfig(latency_ms=latency_ms + 1e-3)))
    assert found.blocks.count("no_op+w512") > 4


@pytest.mark.parametrize(
    ("blocks", "leaving_out", "fusing_all"),
    [
        (["no_op+w512"] * 4, 2, 3),
        (["no_op+w512", PARENT, "no_op+w512", "no_op+w256"], 0, 1),
        (["no_op+w512", "no_op+no_op", "no_op+w512"], 0, 0),
        (["no_op+w512", "no_op+linear", "linear+w512"], 0, 0),
        ([PARENT] * 3, 0, 0),
    ],
)
def test_num_merges(blocks, leaving_out, fusing_all):
    assert num_merges(blocks, leave_last_out=True) == leaving_out
    assert num_merges(blocks, leave_last_out=False) == fusing_all


def test_without_a_tight_budget_the_parent_stays():
    rng = np.random.default_rng(0)
    problem = make_problem(random_scores(rng, 4), cost_table(rng))
    for constraint in (ConstraintConfig(), ConstraintConfig(latency_frac=1.0, memory_frac=1.0, params_frac=1.0)):
        found = solve(problem, budgets_of(problem, constraint))
        assert found.blocks == (PARENT,) * 4
        assert found.score == 0
        assert found.costs == problem.parent_costs


@pytest.mark.parametrize("latency", ["decode", "prefill", "request"])
def test_budgets_are_of_the_phase_and_relative_to_the_parent_with_its_overhead(latency):
    rng = np.random.default_rng(1)
    table = cost_table(rng)
    problem = make_problem(random_scores(rng, 4), table, latency=latency)
    parent = table.model([PARENT] * 4)
    parent_ms = {"decode": parent.decode_ms, "prefill": parent.prefill_ms, "request": parent.request_ms}[latency]
    constraint = ConstraintConfig(latency_frac=0.5, memory_gib=2e-6, params_frac=0.75)
    limits = {budget.cost: budget.limit for budget in budgets_of(problem, constraint)}
    assert limits == {
        "latency_ms": pytest.approx(0.5 * parent_ms),
        "memory_bytes": pytest.approx(2e-6 * GIB),
        "params": pytest.approx(0.75 * parent.params),
    }
    found = solve(problem, budgets_of(problem, constraint))
    assert found.predicted_fused_latency_ms <= limits["latency_ms"] * (1 + SLACK)
    assert found.costs.memory_bytes <= limits["memory_bytes"] * (1 + SLACK)
    assert found.costs.params <= limits["params"] * (1 + SLACK)


def test_negative_scores_are_taken():
    """An LM loss may fall where a subblock was harmful."""
    table = cost_table(np.random.default_rng(0))
    problem = make_problem([{PARENT: 0.0, "no_op+w512": -1e-7}, {PARENT: 0.0, "no_op+w512": 1e-7}], table)
    assert solve(problem, ()).blocks == ("no_op+w512", PARENT)


def test_solutions_differ_in_enough_blocks():
    rng = np.random.default_rng(3)
    config = {"num_solutions": 3, "min_different_frac": 0.4, "constraint": ConstraintConfig(latency_frac=0.6)}
    problem = make_problem(random_scores(rng, 5), cost_table(rng), **config)
    found = find_solutions(problem, budgets_of(problem, problem.config.constraint))
    assert len(found) == 3
    assert [solution.score for solution in found] == sorted(solution.score for solution in found)
    for one, other in itertools.combinations(found, 2):
        assert sum(a != b for a, b in zip(one.blocks, other.blocks, strict=True)) >= 2


def test_fewer_solutions_where_no_other_is_different_enough():
    table = cost_table(np.random.default_rng(0))
    scores = [{PARENT: 0.0, "no_op+w512": 1.0}] * 2
    problem = make_problem(scores, table, num_solutions=9, min_different_frac=1.0)
    assert [solution.blocks for solution in find_solutions(problem, ())] == [(PARENT,) * 2, ("no_op+w512",) * 2]


def test_pareto_front():
    rng = np.random.default_rng(4)
    fracs = (1.0, 0.02, 0.5, 0.7)
    problem = make_problem(random_scores(rng, 5), cost_table(rng), pareto_latency_fracs=fracs)
    front = pareto_front(problem)
    assert list(front) == sorted(fracs)
    assert front[0.02] is None
    scores = [front[frac].score for frac in (0.5, 0.7, 1.0)]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] == 0


def stated(message):
    """The settings that an error proposes: ``latency_frac=0.4`` and the like, after "keep the others and set"."""
    pairs = re.findall(r"(\w+)=([\d.e+-]+)", message.partition("keep the others and set")[2])
    return {key: float(value) for key, value in pairs}


def test_a_budget_out_of_reach_is_named_with_what_can_be_reached():
    rng = np.random.default_rng(0)
    scores, table = random_scores(rng, 4, [v for v in VARIANTS if not v.endswith("no_op")]), cost_table(rng)
    problem = make_problem(scores, table)
    constraint = ConstraintConfig(latency_frac=0.05, memory_frac=0.9)
    with pytest.raises(
        InfeasibleError, match=r"latency_frac=0\.05 is out of reach, the least is latency_frac="
    ) as error:
        solve(problem, budgets_of(problem, constraint))
    assert "memory" not in str(error.value)
    assert "\n" not in str(error.value)
    least = float(re.findall(r"least is latency_frac=([\d.]+)", str(error.value))[0])
    assert solve(problem, budgets_of(problem, ConstraintConfig(latency_frac=least))).score > 0
    with pytest.raises(InfeasibleError):
        solve(problem, budgets_of(problem, ConstraintConfig(latency_frac=0.99 * least)))


def test_budgets_out_of_reach_together_say_what_to_relax():
    """Cheap in time is dear in parameters, and the other way round."""
    table = CostTable(
        workload=WorkloadConfig(),
        kv_tokens=256,
        overhead=OverheadCost(prefill_ms=0.0, decode_ms=0.0, params=0, weight_bytes=0),
        subblocks=tuple(
            SubblockCost(
                subblock=subblock,
                variant=variant,
                prefill_ms=ms,
                decode_ms=ms,
                params=params,
                weight_bytes=params,
                kv_bytes_per_token=0,
            )
            for subblock, variant, ms, params in (
                ("attention", "no_op", 0.0, 0),
                ("ffn", "w1024", 10.0, 100),
                ("ffn", "w512", 2.0, 100),
                ("ffn", "w256", 10.0, 20),
            )
        ),
        ffn_merge_saving=MergeSaving(prefill_ms=0.0, decode_ms=0.0),
    )
    scores = [{"no_op+w1024": 0.0, "no_op+w512": 1.0, "no_op+w256": 1.0}] * 4
    problem = make_problem(scores, table, parent="no_op+w1024")
    constraint = ConstraintConfig(latency_frac=0.4, params_frac=0.4)
    with pytest.raises(InfeasibleError, match="each budget is within reach, all together are not") as error:
        solve(problem, budgets_of(problem, constraint))
    # Params <= 160 of 400 want three w256 and one w512, 32 of 40 ms; latency <= 16 of 40 ms wants them the other way
    # round, 320 params.
    assert stated(str(error.value)) == {"latency_frac": 0.8, "params_frac": 0.8}
    assert "alone down to latency_frac=0.2" in str(error.value)
    for key, value in stated(str(error.value)).items():
        relaxed = ConstraintConfig(**{"latency_frac": 0.4, "params_frac": 0.4, key: value})
        assert solve(problem, budgets_of(problem, relaxed)).score > 0


@pytest.mark.parametrize(
    ("key", "cost", "text"),
    [
        ("latency_ms", 12.34561, "latency_ms=12.35"),
        ("memory_gib", 3.00001 * GIB, "memory_gib=3.001"),
        ("params", 123456789, "params=123456789"),
    ],
)
def test_absolute_settings_round_up(key, cost, text):
    rng = np.random.default_rng(0)
    problem = make_problem(random_scores(rng, 2), cost_table(rng))
    (budget,) = budgets_of(problem, ConstraintConfig(**{key: 5}))
    assert budget.setting(cost) == text


def test_tables_that_do_not_match():
    rng = np.random.default_rng(0)
    table, scores = cost_table(rng), random_scores(rng, 2)
    config = SearchConfig(constraint=ConstraintConfig())
    with pytest.raises(ValueError, match="scores cover 2 blocks, the parent of the costs has 3"):
        build_problem(scores, table, [PARENT] * 3, config)
    with pytest.raises(ValueError, match=r"block 0 lacks the parent's own variant kv8\+w512"):
        build_problem(scores, table, ["kv8+w512"] * 2, config)
    with pytest.raises(ValueError, match="attention variant kv1 is not in the table"):
        build_problem([{**row, "kv1+w512": 0.1} for row in scores], table, [PARENT] * 2, config)


@pytest.mark.parametrize("fusion_aware", [False, True])
def test_the_size_of_the_largest_published_search(fusion_aware):
    """126 blocks x 54 variants, checked against a bound that needs no solver."""
    rng = np.random.default_rng(7)
    attentions = ("kv8", "kv4", "kv2", "kv1", "linear", "no_op")
    ffns = (*(f"w{256 * k}" for k in (20, 17, 15, 10, 5, 4, 2)), "linear", "no_op")
    table = cost_table(rng, attentions, ffns, saving_ms=0.05)
    parent = f"{attentions[0]}+{ffns[0]}"
    variants = [f"{attention}+{ffn}" for attention, ffn in itertools.product(attentions, ffns)]
    scores = random_scores(rng, 126, variants, parent)
    problem = make_problem(scores, table, parent=parent, fusion_aware=fusion_aware)
    (budget,) = budgets_of(problem, ConstraintConfig(latency_frac=0.5))
    found = solve(problem, [budget])
    assert (found.status, found.mip_gap) == ("optimal", pytest.approx(0.0, abs=1e-9))
    latency_ms = found.predicted_fused_latency_ms if fusion_aware else found.costs.decode_ms
    assert latency_ms <= budget.limit * (1 + SLACK)

    # Lagrangian bound without fusion: whatever the price of a millisecond, no choice within budget scores less.
    matrix = np.array([list(row.values()) for row in scores])
    times_ms = np.array([table.block(variant).decode_ms for variant in variants])
    rest_ms = budget.limit - table.overhead.decode_ms
    bound = max((matrix + price * times_ms).min(1).sum() - price * rest_ms for price in np.linspace(0, 1, 2001))
    if fusion_aware:
        assert found.score <= solve(make_problem(scores, table, parent=parent, fusion_aware=False), [budget]).score
    else:
        # The bound lacks integrality, which one block of 126 can cost.
        assert bound * (1 - 1e-9) <= found.score <= bound + matrix.max()

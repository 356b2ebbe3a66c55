"""The baselines: what each promises, and the budgets that all of them keep."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from puzzle.baselines import METHODS, find, merit
from puzzle.config import ConstraintConfig, SearchConfig, WorkloadConfig
from puzzle.search_problem import TOLERANCE, InfeasibleError, budgets_of, build_problem, costs_of
from puzzle.tables import CostTable, MergeSaving, OverheadCost, SubblockCost

PARENT = "kv2+w512"
SIZES = {"kv2": 1.0, "linear": 0.4, "no_op": 0.0, "w512": 3.0, "w256": 2.0}
VARIANTS = tuple("+".join(pair) for pair in itertools.product(("kv2", "linear", "no_op"), ("w512", "w256", "no_op")))
SLACK = 2 * TOLERANCE
"""What the solver and the check of the budgets may each exceed them by, relative."""


def cost_table(*, saving_ms=0.25):
    rows = [
        SubblockCost(
            subblock=subblock,
            variant=variant,
            prefill_ms=10 * SIZES[variant],
            decode_ms=SIZES[variant],
            params=int(1000 * SIZES[variant]),
            weight_bytes=int(4000 * SIZES[variant]),
            kv_bytes_per_token=128 * (variant == "kv2"),
        )
        for subblock, names in (("attention", ("kv2", "linear", "no_op")), ("ffn", ("w512", "w256", "no_op")))
        for variant in names
    ]
    return CostTable(
        source="measured",
        hardware="here",
        workload=WorkloadConfig(prefill_tokens=8, generated_tokens=8),
        kv_tokens=16,
        overhead=OverheadCost(prefill_ms=5.0, decode_ms=0.5, params=500, weight_bytes=2000),
        subblocks=tuple(rows),
        ffn_merge_saving=MergeSaving(prefill_ms=0.0, decode_ms=saving_ms),
    )


def make_problem(scores, method, *, saving_ms=0.25, base=None, **fields):
    own = [PARENT] * len(scores)
    config = SearchConfig(constraint=ConstraintConfig(), method=method, **fields)
    return build_problem(scores, costs_of(cost_table(saving_ms=saving_ms), scores, own), own, config, base=base)


def random_scores(seed, num_blocks=8):
    rng = np.random.default_rng(seed)
    return [{v: 0.0 if v == PARENT else float(rng.lognormal(-2, 1)) for v in VARIANTS} for _ in range(num_blocks)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fusion_aware", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_every_method_keeps_every_budget_and_none_beats_the_mip(seed, fusion_aware, method):
    scores = random_scores(seed)
    problem = make_problem(scores, method, fusion_aware=fusion_aware)
    num_found = 0
    for frac in (1.0, 0.9, 0.8, 0.6, 0.3):
        constraint = ConstraintConfig(latency_frac=frac, memory_frac=min(1.0, 1.1 * frac), kv_frac=0.8)
        budgets = budgets_of(problem, constraint)
        try:
            (found,) = find(problem, budgets)
        except InfeasibleError:
            continue
        num_found += 1
        assert all(problem.spent(found.blocks, b.cost) <= b.limit * (1 + SLACK) for b in budgets)
        assert found.method == method
        assert found.score == pytest.approx(sum(row[name] for row, name in zip(scores, found.blocks, strict=True)))
        merged_ms = found.num_merges * problem.costs.merge_saving_ms["decode_ms"]
        assert found.predicted_fused_latency_ms == pytest.approx(found.costs["decode_ms"] - merged_ms)
        (best,) = METHODS["mip"](problem, budgets)
        assert best.score <= found.score + 1e-9
    assert num_found >= 1


def test_greedy_by_hand():
    """17 ms for four blocks and 0.5 outside; 12.5 leave 3 for each block. In order of mean score: block 2 keeps what
    fits at least score, and what it leaves is passed on."""
    scores = [
        {PARENT: 0.0, "kv2+w256": 5.0, "no_op+w512": 6.0},
        {PARENT: 0.0, "kv2+w256": 4.0, "no_op+w256": 4.5},
        {PARENT: 0.0, "kv2+w256": 1.0, "no_op+w256": 0.5},
        {PARENT: 0.0, "kv2+w256": 3.0, "no_op+w512": 2.0},
    ]
    problem = make_problem(scores, "greedy", fusion_aware=False)
    (found,) = find(problem, budgets_of(problem, ConstraintConfig(latency_ms=12.5)))
    # Block 2 takes 2 of 3 ms; block 3 has 4 and keeps the parent's 4; blocks 1 and 0 have 3, enough for half an FFN.
    assert found.blocks == ("kv2+w256", "kv2+w256", "no_op+w256", PARENT)
    assert (found.status, found.mip_gap) == ("heuristic", None)


def test_greedy_lets_later_blocks_pay_for_one_that_cannot_shrink():
    """The first block has the parent's own variant alone, and the least mean score."""
    scores = [{PARENT: 0.0}, {PARENT: 0.0, "no_op+w256": 1.0}, {PARENT: 0.0, "no_op+w256": 2.0}]
    problem = make_problem(scores, "greedy", fusion_aware=False)
    (found,) = find(problem, budgets_of(problem, ConstraintConfig(latency_ms=8.5)))
    assert found.blocks == (PARENT, "no_op+w256", "no_op+w256")
    with pytest.raises(InfeasibleError, match=r"search.method=greedy does not come within latency_ms=8.4, it ends at"):
        find(problem, budgets_of(problem, ConstraintConfig(latency_ms=8.4)))


def test_attention_pruning_takes_the_lowest_scores_and_no_more_than_needed():
    scores = [{PARENT: 0.0, "no_op+w512": score, "no_op+w256": 0.01} for score in (0.4, 0.1, 0.3, 0.2)]
    problem = make_problem(scores, "attention_pruning", fusion_aware=False)
    (found,) = find(problem, budgets_of(problem, ConstraintConfig(latency_ms=14.5)))
    assert found.blocks == (PARENT, "no_op+w512", PARENT, "no_op+w512")
    with pytest.raises(InfeasibleError, match="attention_pruning does not come within latency_ms=12"):
        find(problem, budgets_of(problem, ConstraintConfig(latency_ms=12)))
    # Three neighbours merge once, where fusion is counted.
    aware = make_problem(scores, "attention_pruning", saving_ms=1.0)
    (found,) = find(aware, budgets_of(aware, ConstraintConfig(latency_ms=12.5)))
    assert (found.blocks.count("no_op+w512"), found.num_merges) == (3, 1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_conditional_scores(method):
    """Scores of changes to a child that lacks an attention and an FFN: the parent's own blocks are not among them."""
    base = [PARENT, "no_op+w512", "kv2+no_op", PARENT]
    scores = [
        {PARENT: 0.0, "no_op+w512": 0.2, "kv2+w256": 0.1},
        {"no_op+w512": 0.0, "no_op+w256": 0.3},
        {"kv2+no_op": 0.0, "no_op+no_op": 0.05},
        {PARENT: 0.0, "no_op+w512": 0.1, "kv2+w256": 0.2},
    ]
    problem = make_problem(scores, method, fusion_aware=False, base=base)
    # The base takes 12.5 ms.
    (found,) = find(problem, budgets_of(problem, ConstraintConfig(latency_ms=10.6)))
    assert all(variant in row for variant, row in zip(found.blocks, scores, strict=True))
    if method == "attention_pruning":
        assert found.blocks == (PARENT, "no_op+w512", "no_op+no_op", "no_op+w512")
    (found,) = find(problem, budgets_of(problem, ConstraintConfig(latency_ms=12.5)))
    if method not in ("random", "greedy"):
        assert found.blocks == tuple(base)


def test_what_a_method_goes_by_says_which_batch_size_is_its_own():
    scores = random_scores(5)
    for method in ("mip", "no_op_only", "random", "max_params"):
        problem = make_problem(scores, method, fusion_aware=False)
        loose, tight = (find(problem, budgets_of(problem, ConstraintConfig(latency_frac=f)))[0] for f in (0.9, 0.8))
        # The wider budget is the better one by the method's own measure, whatever the scores say.
        assert merit(problem, loose) <= merit(problem, tight) + 1e-2 * (method == "random") * merit(problem, tight)
    assert merit(make_problem(scores, "max_params"), replace(loose, method="max_params")) == -loose.costs["params"]


def test_random_choices_are_seeded():
    scores = random_scores(0, 12)
    found = []
    for seed in (0, 1, 0):
        problem = make_problem(scores, "random", random_seed=seed)
        found.append(find(problem, budgets_of(problem, ConstraintConfig(latency_frac=0.7)))[0].blocks)
    assert found[0] == found[2] != found[1]
    # Without a budget all nine variants are about as likely: a third of 400 blocks keep each attention, 5 sigma.
    problem = make_problem(random_scores(1, 400), "random")
    blocks = find(problem, ())[0].blocks
    for attention in ("kv2", "linear", "no_op"):
        assert abs(sum(block.startswith(attention) for block in blocks) - 400 / 3) < 5 * np.sqrt(400 * 2 / 9)


def test_max_params_takes_the_most():
    problem = make_problem(random_scores(2, 5), "max_params", fusion_aware=False)
    (found,) = find(problem, budgets_of(problem, ConstraintConfig(kv_frac=0.4)))
    # Two attentions stay; of the others the linear ones have most parameters.
    assert sorted(found.blocks) == ["kv2+w512"] * 2 + ["linear+w512"] * 3


def test_no_op_only_keeps_or_removes_whole_subblocks():
    problem = make_problem(random_scores(3), "no_op_only", num_solutions=2)
    found = find(problem, budgets_of(problem, ConstraintConfig(latency_frac=0.6)))
    assert len(found) == 2
    assert {block for solution in found for block in solution.blocks} <= {
        f"{attention}+{ffn}" for attention in ("kv2", "no_op") for ffn in ("w512", "no_op")
    }


def test_a_baseline_is_asked_for_one_solution():
    problem = make_problem(random_scores(0), "greedy", num_solutions=3)
    with pytest.raises(ValueError, match=r"num_solutions=3, but search.method=greedy finds one"):
        find(problem, ())

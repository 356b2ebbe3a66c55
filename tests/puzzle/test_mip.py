"""The solver against brute force, and what it says when there is no solution."""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import asdict

import numpy as np
import pytest

from distill.config import RopeConfig
from fusion.config import FuseConfig
from fusion.grouping import fusion_groups
from puzzle import integer_program, mip
from puzzle.config import ConstraintConfig, SearchConfig, WorkloadConfig
from puzzle.integer_program import TimeLimitError
from puzzle.mip import find_solutions, least_cost, pareto_front, solve
from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.search_problem import (
    GIB,
    FusionRule,
    InfeasibleError,
    best_parent_throughput,
    budgets_of,
    build_problem,
    costs_of,
)
from puzzle.tables import CostTable, MergeSaving, OverheadCost, SubblockCost, parse_variant

ATTENTIONS = ("kv2", "linear", "no_op")
FFNS = ("w512", "w256", "no_op")
PARENT = "kv2+w512"
VARIANTS = tuple(f"{attention}+{ffn}" for attention, ffn in itertools.product(ATTENTIONS, FFNS))
SLACK = 1e-6
"""The solver's feasibility tolerance."""


def cost_table(rng, attentions=ATTENTIONS, ffns=FFNS, *, saving_ms=0.3, batch_size=2):
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
        source="measured",
        hardware="here",
        workload=WorkloadConfig(batch_size=batch_size, prefill_tokens=8, generated_tokens=8),
        kv_tokens=16,
        overhead=OverheadCost(prefill_ms=3.0, decode_ms=0.7, params=500, weight_bytes=2000),
        subblocks=(*rows("attention", attentions), *rows("ffn", ffns)),
        ffn_merge_saving=MergeSaving(prefill_ms=10 * saving_ms, decode_ms=saving_ms),
    )


def random_scores(rng, num_blocks, variants=VARIANTS, parent=PARENT):
    return [{v: 0.0 if v == parent else float(rng.lognormal(-2, 1)) for v in variants} for _ in range(num_blocks)]


def make_problem(scores, table, *, leave_last_out=True, min_length=2, parent=PARENT, **fields):
    config = SearchConfig(**{"constraint": ConstraintConfig(), **fields})
    own = [parent] * len(scores)
    rule = FusionRule(leave_last_out=leave_last_out, min_length=min_length)
    return build_problem(scores, costs_of(table, scores, own), own, config, fusion=rule)


def num_merges(blocks, *, leave_last_out, min_length=2):
    """Merges of the later fusion, counted on the groups that the fuse stage itself would make."""
    variants = [parse_variant(block) for block in blocks]
    architecture = Architecture(
        vocab_size=320,
        hidden_dim=32,
        num_heads=2,
        head_dim=16,
        blocks=tuple(BlockConfig(attention=a, ffn=f, parent_block_indices=(i,)) for i, (a, f) in enumerate(variants)),
        max_positions=64,
        rope=RopeConfig(theta=1e4),
    )
    try:
        config = FuseConfig(leave_last_out=leave_last_out, min_length=min_length)
        return sum(last - first for first, last in fusion_groups(architecture, config, None))
    except ValueError:  # nothing to fuse
        return 0


def every_choice(scores, table, *, fusion_aware=True, **rule):
    """Score, decode and request latency, memory, parameters and KV bytes of all combinations, [num_choices, 6]."""
    costs = {variant: table.block(variant) for row in scores for variant in row}
    merges = functools.cache(lambda free: num_merges(["no_op+w512" if f else PARENT for f in free], **rule))
    rows = []
    for blocks in itertools.product(*scores):
        parts = [table.outside_blocks(), *(costs[block] for block in blocks)]
        fused = merges(tuple(block.startswith("no_op+w") for block in blocks)) if fusion_aware else 0
        rows.append(
            (
                sum(row[block] for row, block in zip(scores, blocks, strict=True)),
                sum(part.decode_ms for part in parts) - fused * table.merge_saving_ms("decode"),
                sum(part.request_ms for part in parts) - fused * table.merge_saving_ms("request"),
                *(sum(getattr(part, name) for part in parts) for name in OTHER_COSTS),
            )
        )
    return np.array(rows)


OTHER_COSTS = ("memory_bytes", "params", "kv_bytes_per_token")


def assert_equals_brute_force(problem, choices, constraint, limits):
    """``limits``: of the costs of :func:`every_choice`, the score left out."""
    budgets = budgets_of(problem, constraint)
    within = (choices[:, 1:] <= np.array(limits) * (1 + 1e-9)).all(1)
    expected = choices[within, 0].min(initial=np.inf)
    if np.isinf(expected):
        with pytest.raises(InfeasibleError):
            solve(problem, budgets)
        return
    found = solve(problem, budgets)
    assert found.score == pytest.approx(expected, rel=1e-9)
    assert (found.status, found.mip_gap) == ("optimal", pytest.approx(0.0, abs=1e-9))
    assert all(problem.spent(found.blocks, budget.cost) <= budget.limit * (1 + SLACK) for budget in budgets)


@pytest.mark.parametrize("fusion_aware", [True, False])
@pytest.mark.parametrize("leave_last_out", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force(seed, fusion_aware, leave_last_out):
    rng = np.random.default_rng(seed)
    table, scores = cost_table(rng), random_scores(rng, 5, VARIANTS[::2] if seed % 2 else (PARENT, *VARIANTS[5:]))
    problem = make_problem(scores, table, fusion_aware=fusion_aware, leave_last_out=leave_last_out)
    choices = every_choice(scores, table, fusion_aware=fusion_aware, leave_last_out=leave_last_out)
    parent = table.model([PARENT] * 5)
    for latency_frac, memory_frac in ((0.8, 0.9), (0.55, 0.9), (0.35, 0.5), (0.1, 0.9)):
        constraint = ConstraintConfig(latency_frac=latency_frac, memory_frac=memory_frac)
        limits = [latency_frac * parent.decode_ms, np.inf, memory_frac * parent.memory_bytes, np.inf, np.inf]
        assert_equals_brute_force(problem, choices, constraint, limits)


@pytest.mark.parametrize(("leave_last_out", "min_length"), [(True, 3), (False, 3), (True, 4), (False, 4)])
@pytest.mark.parametrize("seed", range(2))
def test_fusion_of_long_runs_alone_equals_brute_force(seed, leave_last_out, min_length):
    """Removals are dear here and merges save much, so that the solver would like short runs to be fused."""
    rng = np.random.default_rng(seed)
    rule = {"leave_last_out": leave_last_out, "min_length": min_length}
    table, scores = cost_table(rng, saving_ms=0.5), random_scores(rng, 8, (PARENT, "no_op+w512", "kv2+w256"))
    problem, choices = make_problem(scores, table, **rule), every_choice(scores, table, **rule)
    parent = table.model([PARENT] * 8)
    for frac in (0.9, 0.7, 0.5, 0.4):
        limits = [frac * parent.decode_ms, *[np.inf] * 4]
        assert_equals_brute_force(problem, choices, ConstraintConfig(latency_frac=frac), limits)


@pytest.mark.parametrize("seed", range(4))
def test_all_budgets_together_equal_brute_force(seed):
    """Decoding and whole requests each with a merge saving of their own, memory, parameters and KV cache."""
    rng = np.random.default_rng(seed)
    table, scores = cost_table(rng), random_scores(rng, 5, (PARENT, *VARIANTS[4:]))
    problem, choices = make_problem(scores, table), every_choice(scores, table, leave_last_out=True)
    parent = table.model([PARENT] * 5)
    for frac in (0.9, 0.7, 0.5):
        constraint = ConstraintConfig(
            latency_frac=frac,
            throughput_ratio=1.1 / frac,
            memory_frac=1.02 * frac,
            params_frac=1.05 * frac,
            kv_frac=0.8,
        )
        limits = [
            frac * parent.decode_ms,
            frac / 1.1 * parent.request_ms,
            1.02 * frac * parent.memory_bytes,
            1.05 * frac * parent.params,
            0.8 * parent.kv_bytes_per_token,
        ]
        assert_equals_brute_force(problem, choices, constraint, limits)


@pytest.mark.parametrize("leave_last_out", [True, False])
@pytest.mark.parametrize("min_length", [2, 3, 4])
def test_merges_are_counted_as_the_fuse_stage_groups(leave_last_out, min_length):
    rule = FusionRule(leave_last_out=leave_last_out, min_length=min_length)
    for free in itertools.product((False, True), repeat=7):
        blocks = ["no_op+w512" if is_free else PARENT for is_free in free]
        assert rule.num_merges(free) == num_merges(blocks, leave_last_out=leave_last_out, min_length=min_length)


def test_fusion_awareness_admits_a_run_that_separate_removals_do_not():
    """Four of six attentions must go in both cases if they are neighbours; more of them, if fusion is not counted."""
    table = cost_table(np.random.default_rng(0))
    scores = [{PARENT: 0.0, "no_op+w512": 1.0 if block % 2 else 1.1} for block in range(6)]
    neighbours = ("no_op+w512",) * 4 + (PARENT,) * 2
    latency_ms = table.model(neighbours).decode_ms - 2 * table.ffn_merge_saving.decode_ms
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
    table = cost_table(np.random.default_rng(0), ffns=("w512", "w256", "linear", "no_op"))
    scores = [{PARENT: 0.0, block: 1.0} for block in blocks]
    for leave_last_out, expected in ((True, leaving_out), (False, fusing_all)):
        assert make_problem(scores, table, leave_last_out=leave_last_out).num_merges(blocks) == expected


def test_without_a_tight_budget_the_parent_stays():
    rng = np.random.default_rng(0)
    scores, table = random_scores(rng, 4), cost_table(rng)
    problem = make_problem(scores, table)
    for constraint in (ConstraintConfig(), ConstraintConfig(latency_frac=1.0, memory_frac=1.0, params_frac=1.0)):
        found = solve(problem, budgets_of(problem, constraint))
        assert found.blocks == (PARENT,) * 4
        assert found.score == 0
        assert found.costs == asdict(table.model([PARENT] * 4))


@pytest.mark.parametrize("latency", ["decode", "prefill", "request"])
def test_budgets_are_of_the_phase_and_relative_to_the_parent_with_its_overhead(latency):
    rng = np.random.default_rng(1)
    table = cost_table(rng)
    problem = make_problem(random_scores(rng, 4), table, latency=latency)
    parent = table.model([PARENT] * 4)
    parent_ms = {"decode": parent.decode_ms, "prefill": parent.prefill_ms, "request": parent.request_ms}[latency]
    constraint = ConstraintConfig(latency_frac=0.5, memory_gib=2e-6, params_frac=0.75)
    phase = f"{latency}_ms"
    limits = {budget.cost: budget.limit for budget in budgets_of(problem, constraint)}
    assert limits == {
        phase: pytest.approx(0.5 * parent_ms),
        "memory_bytes": pytest.approx(2e-6 * GIB),
        "params": pytest.approx(0.75 * parent.params),
    }
    found = solve(problem, budgets_of(problem, constraint))
    assert found.predicted_fused_latency_ms <= limits[phase] * (1 + SLACK)
    assert found.costs["memory_bytes"] <= limits["memory_bytes"] * (1 + SLACK)
    assert found.costs["params"] <= limits["params"] * (1 + SLACK)


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
    assert (front.out_of_reach, front.out_of_time) == ((0.02,), ())
    assert list(front.solutions) == [0.5, 0.7, 1.0]
    scores = [solution.score for solution in front.solutions.values()]
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
        source="measured",
        hardware="here",
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
    table, scores = cost_table(rng, ("kv8", *ATTENTIONS)), random_scores(rng, 2)
    config = SearchConfig(constraint=ConstraintConfig())

    def build(scores, parent):
        return build_problem(scores, costs_of(table, scores, parent), parent, config)

    with pytest.raises(ValueError, match="scores cover 2 blocks, the parent of the costs has 3"):
        build(scores, [PARENT] * 3)
    with pytest.raises(ValueError, match=r"block 0 lacks the parent's own variant kv8\+w512"):
        build(scores, ["kv8+w512"] * 2)
    with pytest.raises(ValueError, match="attention variant kv1 is not in the table"):
        build([{**row, "kv1+w512": 0.1} for row in scores], [PARENT] * 2)


def test_conditional_scores_may_lack_the_parent_but_budgets_are_relative_to_it():
    """Scores of changes to a child without its last attention: the parent's own last block is no candidate."""
    table = cost_table(np.random.default_rng(0))
    scores = [{PARENT: 0.0, "kv2+w256": 1.0}, {"no_op+w512": 0.0, "no_op+w256": 0.5}]
    own, config = [PARENT] * 2, SearchConfig(constraint=ConstraintConfig())
    costs = costs_of(table, scores, own)
    with pytest.raises(ValueError, match="block 1 lacks the parent's own variant"):
        build_problem(scores, costs, own, config)
    with pytest.raises(ValueError, match=r"block 1 lacks the base's variant kv2\+w256"):
        build_problem(scores, costs, own, config, base=[PARENT, "kv2+w256"])
    problem = build_problem(scores, costs, own, config, base=[PARENT, "no_op+w512"])
    (budget,) = budgets_of(problem, ConstraintConfig(params_frac=0.99))
    assert budget.limit == pytest.approx(0.99 * table.model(own).params)
    assert solve(problem, [budget]).blocks == (PARENT, "no_op+w512")


def test_throughput_is_a_lower_bound():
    rng = np.random.default_rng(5)
    table = cost_table(rng)
    problem = make_problem(random_scores(rng, 4), table)
    parent = table.model([PARENT] * 4)
    tokens_per_s = 2 * 8 * 1e3 / parent.request_ms
    for constraint in (
        ConstraintConfig(throughput_ratio=1.5),
        ConstraintConfig(throughput_tokens_per_s=1.5 * tokens_per_s),
    ):
        (budget,) = budgets_of(problem, constraint)
        assert budget.limit == pytest.approx(parent.request_ms / 1.5)
        assert problem.spent(solve(problem, [budget]).blocks, "request_ms") <= budget.limit * (1 + SLACK)
    (budget,) = budgets_of(problem, ConstraintConfig(throughput_ratio=1e3))
    with pytest.raises(
        InfeasibleError, match=r"throughput_ratio=1000 is out of reach, the most is throughput_"
    ) as error:
        solve(problem, [budget])
    most = float(re.findall(r"the most is throughput_ratio=([\d.]+)", str(error.value))[0])
    assert solve(problem, budgets_of(problem, ConstraintConfig(throughput_ratio=most))).score > 0
    with pytest.raises(InfeasibleError):
        solve(problem, budgets_of(problem, ConstraintConfig(throughput_ratio=1.01 * most)))


def test_throughput_is_relative_to_the_batch_size_that_suits_the_parent_best():
    scores, own = random_scores(np.random.default_rng(0), 3), [PARENT] * 3
    tables = [cost_table(np.random.default_rng(0), batch_size=size) for size in (1, 4, 16)]
    costs = [costs_of(table, scores, own) for table in tables]
    totals = [table.model(own) for table in tables]
    best = best_parent_throughput(costs, own, None)
    assert best == pytest.approx(16 * 8e3 / totals[2].request_ms)
    limit = (totals[1].memory_bytes + totals[2].memory_bytes) / 2 / GIB
    assert best_parent_throughput(costs, own, limit) == pytest.approx(4 * 8e3 / totals[1].request_ms)
    with pytest.raises(ValueError, match=r"needs .* GiB at batch size 1, .*give throughput_tokens_per_s"):
        best_parent_throughput(costs, own, totals[0].memory_bytes / GIB / 2)


def test_a_budget_relative_to_nothing_is_refused():
    """A parent without a KV cache."""
    problem = make_problem([{"linear+w512": 0.0}], cost_table(np.random.default_rng(0)), parent="linear+w512")
    with pytest.raises(ValueError, match="kv_frac is relative to the parent, whose kv_bytes_per_token is 0"):
        budgets_of(problem, ConstraintConfig(kv_frac=0.5))


@pytest.mark.parametrize("fusion_aware", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_variants_that_are_left_out_at_first_change_no_optimum(monkeypatch, seed, fusion_aware):
    rng = np.random.default_rng(seed)
    problem = make_problem(random_scores(rng, 24), cost_table(rng), fusion_aware=fusion_aware)
    budgets = budgets_of(problem, ConstraintConfig(latency_frac=0.5, memory_frac=0.6, params_frac=0.5))
    scores = []
    for num_variants in (0, 1, 3, 10**6):
        monkeypatch.setattr(integer_program, "CORE_VARIANTS", num_variants)
        scores.append(solve(problem, budgets).score)
    # The solver's absolute gap is 1e-6 of the typical score.
    assert scores == pytest.approx([scores[-1]] * 4, rel=1e-6)


def test_too_little_time():
    rng = np.random.default_rng(0)
    problem = make_problem(random_scores(rng, 60), cost_table(rng), time_limit_seconds=1e-6)
    budgets = budgets_of(problem, ConstraintConfig(latency_frac=0.5, memory_frac=0.6, params_frac=0.5))
    with pytest.raises(TimeLimitError, match=r"time_limit_seconds=1e-06 passed before any choice was found .*; raise"):
        solve(problem, budgets)


def out_of_time_after(monkeypatch, num_solved):
    """The solver finds nothing in time from its ``num_solved``-th problem on."""
    minimise, calls = mip.minimise, itertools.count()

    def limited(*args, **settings):
        if next(calls) >= num_solved:
            raise TimeLimitError("too late")
        return minimise(*args, **settings)

    monkeypatch.setattr(mip, "minimise", limited)


def test_what_was_solved_before_the_time_limit_is_kept(monkeypatch):
    rng = np.random.default_rng(4)
    config = {"num_solutions": 3, "pareto_latency_fracs": (0.5, 0.7, 0.9)}
    problem = make_problem(random_scores(rng, 5), cost_table(rng), **config)
    budgets = budgets_of(problem, ConstraintConfig(latency_frac=0.6))
    all_solutions, whole = find_solutions(problem, budgets), pareto_front(problem)
    out_of_time_after(monkeypatch, 2)
    assert find_solutions(problem, budgets) == all_solutions[:2]
    monkeypatch.undo()
    out_of_time_after(monkeypatch, 1)
    front = pareto_front(problem)
    assert front.solutions == {0.5: whole.solutions[0.5]}
    assert (front.out_of_reach, front.out_of_time) == ((), (0.7, 0.9))
    monkeypatch.undo()
    out_of_time_after(monkeypatch, 0)
    with pytest.raises(TimeLimitError):
        find_solutions(problem, budgets)


def test_nobody_explains_what_nobody_reads(monkeypatch):
    """The least costs of an explanation are searches of their own."""
    rng = np.random.default_rng(0)
    problem = make_problem(random_scores(rng, 4), cost_table(rng), pareto_latency_fracs=(0.01, 0.02, 1.0))
    asked = []
    monkeypatch.setattr(mip, "least_cost", lambda *args: asked.append(args) or least_cost(*args))
    assert pareto_front(problem).out_of_reach == (0.01, 0.02)
    assert asked == []
    with pytest.raises(InfeasibleError) as error:
        solve(problem, budgets_of(problem, ConstraintConfig(latency_ms=0.1, params=1)))
    assert asked == []
    assert str(error.value) == str(error.value)
    assert [cost for _, cost, _ in asked] == ["decode_ms", "params"]


def test_a_least_cost_without_a_proof_is_not_called_the_least(monkeypatch):
    rng = np.random.default_rng(0)
    problem = make_problem(random_scores(rng, 4, [v for v in VARIANTS if not v.endswith("no_op")]), cost_table(rng))
    budgets = budgets_of(problem, ConstraintConfig(latency_frac=0.05, params_frac=0.9))
    proven = least_cost(problem, "decode_ms", ())
    assert proven.is_least
    with pytest.raises(InfeasibleError) as error:
        solve(problem, budgets)
    minimise = mip.minimise

    def unproven(*args, **settings):
        found = minimise(*args, **settings)
        return found and (found[0], -1.0, False)

    monkeypatch.setattr(mip, "minimise", unproven)
    assert least_cost(problem, "decode_ms", ()) == mip.Reach(value=proven.value, is_least=False)
    message = str(error.value)
    assert "is out of reach, the least is" not in message
    assert "the budgets are out of reach together" in message
    assert re.search(r"latency_frac=0\.05 \(alone down to latency_frac=[\d.]+ or beyond\)", message)
    monkeypatch.undo()
    out_of_time_after(monkeypatch, 0)
    assert least_cost(problem, "decode_ms", ()) == mip.Reach(value=np.inf, is_least=False)
    with pytest.raises(InfeasibleError, match="relax several of them"):
        raise InfeasibleError(lambda: mip._explain(problem, budgets, ()))


def test_nothing_of_the_solver_reaches_the_console(capfd):
    """HiGHS prints a line of its own on some problems of this kind."""
    rng = np.random.default_rng(1)
    problem = make_problem(random_scores(rng, 40), cost_table(rng))
    solve(problem, budgets_of(problem, ConstraintConfig(latency_frac=0.5, memory_frac=0.6, params_frac=0.55)))
    print("still there")
    assert capfd.readouterr().out == "still there\n"


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
    latency_ms = found.predicted_fused_latency_ms if fusion_aware else found.costs["decode_ms"]
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

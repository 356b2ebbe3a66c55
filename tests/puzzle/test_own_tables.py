"""Tables that users bring: what is read, what follows from it, and one clear error for each thing that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from puzzle.config import ConstraintConfig, SearchConfig
from puzzle.mip import solve
from puzzle.own_tables import read_costs, read_scores
from puzzle.search_problem import budgets_of, build_problem
from puzzle.tables import ScoreRow, ScoreTable

SCORES = """block,variant,kld,accuracy_drop
0,full,0,0
0,half,0.1,0.01
1,full,0,0
1,half,0.3,0.02
1,gone,0.5,0.05
"""
COSTS = """block,variant,decode_ms,params,weight_bytes,kv_bytes_per_token
outside,,1.0,10,20,
*,full,4.0,100,200,8
*,half,2.0,50,100,8
1,half,2.5,60,120,8
*,gone,0,0,0,0
"""


@pytest.fixture
def write(tmp_path):
    def make(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return make


def read(write, scores=SCORES, costs=COSTS, metric="kld"):
    found = read_scores(write("scores.csv", scores), metric)
    return found, read_costs(write("costs.csv", costs), found)


def search(found, costs, constraint, **fields):
    problem = build_problem(found.by_block, costs, found.parent, SearchConfig(constraint=constraint, **fields))
    return solve(problem, budgets_of(problem, constraint))


def test_csv(write):
    found, (costs,) = read(write)
    assert found.by_block == ({"full": 0.0, "half": 0.1}, {"full": 0.0, "half": 0.3, "gone": 0.5})
    assert found.parent == ("full", "full")
    # A row of its own beats the row of every block; `outside` counts once.
    assert costs.total(("full", "half")) == {"decode_ms": 7.5, "params": 170, "kv_bytes_per_token": 16}
    solution = search(found, costs, ConstraintConfig(params_frac=0.55))
    assert solution.blocks == ("full", "gone")
    assert solution.costs == {"decode_ms": 5.0, "params": 110, "kv_bytes_per_token": 8}
    assert (solution.num_merges, solution.predicted_fused_latency_ms) == (0, 5.0)


def test_any_column_is_a_metric(write):
    found, _ = read(write, metric="accuracy_drop")
    assert found.by_block[1] == {"full": 0.0, "half": 0.02, "gone": 0.05}
    with pytest.raises(ValueError, match=r"scores.csv has no column lm_loss, only block, variant, kld, accuracy_drop"):
        read(write, metric="lm_loss")


def test_the_parent_is_the_first_row_or_the_one_that_is_marked(write):
    marked = "block,variant,kld,parent\n0,half,0.1,\n0,full,0,x\n1,full,0,1\n1,gone,0.5,\n"
    found, _ = read(write, scores=marked)
    assert found.parent == ("full", "full")
    with pytest.raises(ValueError, match=r"line 3: block 0 has a second parent, full"):
        read(write, scores=marked.replace("half,0.1,", "half,0.1,yes"))


def test_json_rows_are_the_same(write):
    rows = [dict(zip(SCORES.splitlines()[0].split(","), line.split(","), strict=True)) for line in SCORES.split()[1:]]
    for row in rows:
        row |= {"block": int(row["block"]), "kld": float(row["kld"])}
    assert read_scores(write("scores.json", json.dumps(rows)), "kld") == read(write)[0]


def test_scores_of_ours(write, tmp_path):
    rows = [
        ScoreRow(block=0, variant=name, values={"kld": value}, stderr={})
        for name, value in (("kv2+w512", 0.0), ("no_op+w512", 0.1))
    ]
    ScoreTable(parent={"lm_loss": 2.0}, num_tokens=8, rows=tuple(rows)).write(tmp_path / "ours.json")
    found = read_scores(tmp_path / "ours.json", "kld")
    assert (found.parent, found.is_conditional) == (("kv2+w512",), False)
    ScoreTable(parent={}, num_tokens=8, rows=tuple(rows), base=("no_op+w512",)).write(tmp_path / "conditional.json")
    found = read_scores(tmp_path / "conditional.json", "kld")
    assert (found.parent, found.base, found.is_conditional) == (None, ("no_op+w512",), True)
    with pytest.raises(ValueError, match="cannot say which variant is the parent's"):
        read_costs(write("costs.csv", COSTS), found)


def test_requests_and_memory_follow_from_the_workload_columns(write):
    costs = (
        "block,variant,batch_size,prefill_tokens,generated_tokens,prefill_ms,decode_ms,weight_bytes,kv_bytes_per_token\n"
        "*,full,1,10,5,20,4,200,8\n*,half,1,,,10,2,100,8\n*,gone,1,,,0,0,0,0\n"
        "*,full,4,10,5,80,5,200,8\n*,half,4,,,40,3,100,8\n*,gone,4,,,0,0,0,0\n"
    )
    _, (one, four) = read(write, costs=costs)
    assert (one.batch_size, four.batch_size) == (1, 4)
    total = four.total(("full", "half"))
    assert total["request_ms"] == 80 + 40 + 4 * (5 + 3)
    assert total["memory_bytes"] == 300 + 4 * 15 * 16
    assert one.total(("full", "half"))["memory_bytes"] == 300 + 15 * 16
    assert four.throughput(total["request_ms"]) == pytest.approx(4 * 5e3 / 152)


def test_fusion_needs_a_merge_row_and_names_that_it_can_read(write):
    scores = "block,variant,kld\n" + "".join(f"{i},kv8+w512,0\n{i},no_op+w512,{i + 1}\n" for i in range(4))
    costs = "block,variant,decode_ms\n*,kv8+w512,4\n*,no_op+w512,3\nmerge,,0.5\n"
    found, (table,) = read(write, scores, costs)
    # Three neighbours without attention take 13 ms, and 12.5 after one merge.
    solution = search(found, table, ConstraintConfig(latency_ms=12.5))
    assert (solution.blocks.count("no_op+w512"), solution.num_merges) == (3, 1)
    assert solution.predicted_fused_latency_ms == 12.5
    # What a merge saves of the other latencies is not known.
    request = "block,variant,decode_ms,request_ms\n*,kv8+w512,4,40\n*,no_op+w512,3,30\nmerge,,0.5,\n"
    found, (table,) = read(write, scores, request)
    with pytest.raises(
        ValueError, match=r"throughput_tokens_per_s is a budget on request_ms, of which the row `merge`"
    ):
        search(found, replace(table, generated_tokens=8), ConstraintConfig(throughput_tokens_per_s=1.0))
    with pytest.raises(
        ValueError, match=r"latency_ms is a budget on request_ms.* \(only of decode_ms\); add request_ms"
    ):
        search(found, table, ConstraintConfig(latency_ms=130), latency="request")
    unaware = search(found, table, ConstraintConfig(latency_ms=130), latency="request", fusion_aware=False)
    assert (unaware.blocks.count("no_op+w512"), unaware.predicted_fused_latency_ms) == (3, None)
    found, (table,) = read(write, costs=COSTS + "merge,,0.5,,,\n")
    with pytest.raises(ValueError, match=r"block variant 'full' is not <attention>\+<ffn>"):
        search(found, table, ConstraintConfig())


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (
            {"throughput_tokens_per_s": 1.0},
            "throughput_tokens_per_s needs request_ms, or prefill_ms, decode_ms and gen",
        ),
        ({"memory_frac": 0.5}, "memory_frac needs memory_bytes, or weight_bytes, kv_bytes_per_token, prefill_tokens"),
        ({"params_frac": 0.5}, "costs of block 0, variant half lack it"),
    ],
)
def test_a_budget_on_a_column_that_is_not_there(write, constraint, message):
    found, (costs,) = read(write, costs=COSTS.replace("half,2.0,50", "half,2.0,"))
    with pytest.raises(ValueError, match=message):
        search(found, costs, ConstraintConfig(**constraint))
    assert search(found, costs, ConstraintConfig(latency_frac=0.9)).blocks == ("half", "full")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (SCORES + "1,half,0.2,0\n", r"scores.csv, line 7: block 1 has variant half twice; keep one row"),
        (SCORES.replace("0.3", "nan"), r"scores.csv, line 5: kld is nan, not a finite number"),
        (SCORES.replace("0.3", "high"), r"line 5: kld is 'high', not a number"),
        (SCORES.replace("0.3", ""), r"line 5: kld is empty; score every variant"),
        (SCORES.replace("1,", "2,"), r"blocks must count from 0 without gaps, the rows have \[0, 2\]"),
        (SCORES.replace("1,gone", "-1,gone"), r"line 6: block is '-1', not a number from 0"),
        (SCORES.replace("gone", " "), r"line 6: variant is empty"),
        (SCORES.replace("0.02", "0.02,9"), r"line 5 has 5 cells, the header 4 columns"),
        ("block,variant,kld\n", "holds a header and no rows"),
        ("", "holds no rows"),
    ],
)
def test_wrong_scores(write, scores, message):
    with pytest.raises(ValueError, match=message):
        read(write, scores=scores)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (COSTS + "*,half,1,1,1,1\n", r"costs.csv, line 7: block \* has variant half twice; keep one row"),
        (COSTS + ",half,1,1,1,1\n", r"line 7: block \* has variant half twice"),
        (COSTS + "outside,,1,1,1,1\n", r"line 7: the row outside stands twice"),
        (COSTS.replace("4.0", "-4.0"), r"line 3: decode_ms is -4.0, below 0; measure it again"),
        (COSTS.replace("4.0", "inf"), r"line 3: decode_ms is inf, not a finite number"),
        (COSTS.replace("*,gone,0,0,0,0\n", ""), r"block 1, variant gone has a score, but no costs at batch size 1"),
        (
            COSTS.replace("1,half", "7,half"),
            r"line 5: block 7, but scores cover blocks 0..1; take both from one parent",
        ),
        (COSTS.replace("params", "parameters"), r"unknown column parameters; columns are batch_size, block, decode_ms"),
        (COSTS.replace("block,", "layer,"), r"costs.csv has no column block, only layer, variant"),
    ],
)
def test_wrong_costs(write, costs, message):
    with pytest.raises(ValueError, match=message):
        read(write, costs=costs)


def test_wrong_files(write, tmp_path):
    found = read(write)[0]
    with pytest.raises(ValueError, match=r"none.csv does not exist; give a CSV or JSON file"):
        read_scores(tmp_path / "none.csv", "kld")
    with pytest.raises(ValueError, match="is not JSON"):
        read_scores(write("a.json", "{"), "kld")
    with pytest.raises(ValueError, match="is a JSON object without rows"):
        read_scores(write("a.json", "{}"), "kld")
    with pytest.raises(ValueError, match="is a JSON object without tables"):
        read_costs(write("a.json", '{"rows": []}'), found)
    with pytest.raises(ValueError, match="every item of the list must be an object"):
        read_scores(write("a.json", "[1]"), "kld")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not text"):
        read_scores(tmp_path / "binary.csv", "kld")


def test_workloads_that_contradict_each_other(write):
    costs = "block,variant,generated_tokens,decode_ms\n*,full,5,1\n*,half,6,1\n*,gone,5,0\n"
    with pytest.raises(ValueError, match=r"line 3: generated_tokens is 6, but 5 in rows before"):
        read(write, costs=costs)
    with pytest.raises(ValueError, match=r"line 2: generated_tokens is 5.5, not a whole number above 0"):
        read(write, costs=costs.replace(",5,1", ",5.5,1"))


def test_random_tables_equal_brute_force(write):
    """Costs that differ from block to block, which no table of ours has."""
    rng = np.random.default_rng(0)
    times, scores = rng.uniform(1, 4, (4, 3)), rng.uniform(0, 1, (4, 3))
    rows = [(block, variant) for block in range(4) for variant in range(3)]
    found, (costs,) = read(
        write,
        "block,variant,kld\n" + "".join(f"{b},v{v},{scores[b, v]}\n" for b, v in rows),
        "block,variant,decode_ms\n" + "".join(f"{b},v{v},{times[b, v]}\n" for b, v in rows),
    )
    for limit in (6.0, 8.0, 10.0):
        choices = np.array(np.meshgrid(*[range(3)] * 4)).reshape(4, -1)
        total_ms, total = (sum(table[b][choices[b]] for b in range(4)) for table in (times, scores))
        expected = total[total_ms <= limit].min(initial=np.inf)
        if np.isfinite(expected):
            assert search(found, costs, ConstraintConfig(latency_ms=limit)).score == pytest.approx(expected, rel=1e-9)

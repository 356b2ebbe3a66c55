from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launch.artifact import Artifact
from launch.finished_run import FinishedRun
from launch.search_section import child_search, other_metrics, pareto_pictures, score_pictures, searches


def test_the_search_that_made_the_child_is_shown_not_a_baseline_that_came_later(
    full_steps: dict[str, Artifact],
) -> None:
    run = FinishedRun(full_steps)

    assert child_search(run) is full_steps["solution"]
    assert [(row["step"], row["method"], row["made_the_child"]) for row in searches(run)] == [
        ("solution", "mip", True),
        ("baseline", "greedy", False),
    ]
    found = searches(run)[0]
    assert (found["latency_vs_parent"], found["fused_latency_vs_parent"]) == pytest.approx((0.725, 0.7))
    assert (found["num_without_attention"], found["batch_size"], found["status"]) == (5, 1, "optimal")


def test_scores_are_shown_by_the_metric_that_was_searched_and_by_the_others(full_steps: dict[str, Artifact]) -> None:
    run = FinishedRun(full_steps)

    scores, additivity = score_pictures(run)

    assert scores.title == "Replace-1-block scores"
    assert "on 4,096 tokens" in scores.caption
    assert "Standard error over sequences: 10% of the score" in scores.caption
    assert [picture.title for picture in other_metrics(run)] == [
        "Replace-1-block scores: lm_loss",
        "Replace-1-block scores: top1_disagreement",
    ]
    assert "Sum over realised KLD: 0.67 in the median of 5. Rank correlation: 0.90." in additivity.caption
    assert "random children" in additivity.svg
    assert "of the search" in additivity.svg


def test_any_column_of_scores_can_be_shown(short: Any, new_solution: Any, new_scores: Any) -> None:
    scores = new_scores()
    rows = tuple(replace(row, values=row.values | {"my_task": 2 * row.values["kld"]}) for row in scores.rows)
    short.step("scores", "score_library", "scores", {"scores.json": replace(scores, rows=rows)}, {})
    found = new_solution() | {"metric": "my_task"}
    short.step("search", "search", "solution", {"solution.json": found}, {"scores": "scores"})
    run = FinishedRun(short.steps)

    (picture,) = score_pictures(run)

    assert picture.title == "Replace-1-block scores: my_task"
    assert ">my_task<" in picture.svg
    assert [other.title.split(": ")[-1] for other in other_metrics(run)] == [
        "Replace-1-block scores",
        "lm_loss",
        "top1_disagreement",
    ]


def test_conditional_scores_say_what_they_are_conditional_on(short: Any, new_solution: Any, new_scores: Any) -> None:
    found = new_solution()
    conditional = replace(new_scores(), base=tuple(found["solutions"][0]["blocks"]), base_values={"kld": 0.1})
    short.step("scores", "score_library", "scores", {"scores.json": conditional}, {})
    short.step("search", "search", "solution", {"solution.json": found}, {"scores": "scores"})

    picture, *_ = score_pictures(FinishedRun(short.steps))

    assert "does to a model that lacks 5 attentions already" in picture.caption


def test_a_front_over_batch_sizes_says_which_is_which(short: Any, new_solution: Any) -> None:
    short.step("search", "search", "solution", {"solution.json": new_solution(batch_sizes=(1, 8))}, {})

    (front,) = pareto_pictures(FinishedRun(short.steps))

    assert "Every batch size is a search of its own" in front.caption
    assert "optimum at a budget, batch 1<" in front.svg
    assert "optimum at a budget, batch 8<" in front.svg
    assert searches(FinishedRun(short.steps))[0]["batch_sizes"] == [1, 8]


def test_a_front_of_a_baseline_is_no_proof(short: Any, new_solution: Any) -> None:
    found = new_solution() | {"method": "greedy"}
    short.step("search", "search", "solution", {"solution.json": found}, {})

    (front,) = pareto_pictures(FinishedRun(short.steps))

    assert front.caption.endswith("Found by greedy.")


def test_a_search_over_tables_of_a_user_needs_no_names_no_latency_and_no_scores(short: Any, new_solution: Any) -> None:
    found = new_solution()
    own = {"blocks": ["big", "small"], "costs": {"params": 3}, "parent_costs": {"params": 5}}
    best = found["solutions"][0] | own | {"predicted_fused_latency_ms": None}
    content = found | {"solutions": [best], "pareto": [], "hardware": None, "workload": None}
    short.step("search", "search", "solution", {"solution.json": content}, {})
    run = FinishedRun(short.steps)

    (row,) = searches(run)

    assert (row["num_without_attention"], row["latency_vs_parent"], row["fused_latency_vs_parent"]) == (None,) * 3
    assert list(pareto_pictures(run)) == []
    assert list(score_pictures(run)) == []

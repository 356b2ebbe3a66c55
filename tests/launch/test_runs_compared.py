from __future__ import annotations

import re
from typing import Any

import pytest

from launch.quantities import MISSING
from launch.recovery import RecoveryCurve
from launch.runs_compared import pareto_front
from launch.runs_figures import recovery_of_runs
from launch.runs_settings import columns_of, settings_that_differ


def config(target: str, overrides: list[str], **steps: dict[str, Any]) -> dict[str, Any]:
    made = {name: {"stage": name, "config": own} for name, own in steps.items()}
    return {"target": target, "overrides": overrides, "steps": made}


def test_front_is_what_no_other_point_beats() -> None:
    points = {0: (1.0, 0.0), 1: (0.5, 0.2), 2: (0.6, 0.2), 3: (0.4, 0.3), 4: (0.5, 0.3), 5: (1.2, 0.1), 6: (0.5, 0.2)}
    assert pareto_front(points) == {0, 1, 3, 6}
    assert pareto_front({}) == set()


def test_settings_are_named_once_where_all_steps_of_a_run_agree() -> None:
    one = config("demo", [], fuse={"seed": 0, "fuse": {"norm": "last"}}, distill={"seed": 0, "optim": {"lr": 1.0}})
    other = config("demo", [], fuse={"seed": 1, "fuse": {"norm": "last"}}, distill={"seed": 1, "optim": {"lr": 2.0}})
    assert settings_that_differ([one, other]) == {"seed": ["0", "1"], "optim.lr": ["1.0", "2.0"]}
    other["steps"]["distill"]["config"]["seed"] = 2
    assert settings_that_differ([one, other]) == {
        "steps.fuse.seed": ["0", "1"],
        "steps.distill.seed": ["0", "2"],
        "optim.lr": ["1.0", "2.0"],
    }


def test_a_step_that_a_run_lacks_differs() -> None:
    one, other = config("demo", [], fuse={"seed": 0}, export={"seed": 0}), config("demo", [], fuse={"seed": 0})
    assert settings_that_differ([one, other]) == {"steps.export": ["export", MISSING]}


def test_columns_are_what_was_typed_differently() -> None:
    one = config("demo", ["fuse=step_1", "run.name=a"], fuse={"fuse": {"norm": "last"}}, distill={"optim": {"lr": 1.0}})
    other = config("demo", ["optim.lr=2.0", "run.name=b"], fuse={"fuse": {"norm": "a"}}, distill={"optim": {"lr": 2.0}})
    assert columns_of([one, other]) == {"fuse": ["step_1", "default"], "optim.lr": ["1.0", "2.0"]}
    assert columns_of([one, one]) == {}


def test_a_typed_default_is_no_difference() -> None:
    one = config("demo", ["steps.distill.optim.lr=1.0"], distill={"optim": {"lr": 1.0}})
    other = config("demo", [], distill={"optim": {"lr": 1.0}})
    assert columns_of([one, other]) == {}


def test_columns_of_two_pipelines_are_the_resolved_settings_unless_they_are_many() -> None:
    one, other = config("demo", ["seed=1"], fuse={"seed": 1}), config("fusion", [], fuse={"seed": 0})
    assert columns_of([one, other]) == {"pipeline": ["demo", "fusion"], "seed": ["1", "0"]}
    many = {str(number): number for number in range(9)}
    assert columns_of([config("demo", [], fuse={}), config("fusion", [], fuse=many)]) == {
        "pipeline": ["demo", "fusion"]
    }


@pytest.mark.parametrize(("num_runs", "is_named"), [(3, True), (14, False)])
def test_many_curves_are_numbered_where_a_legend_would_cover_them(num_runs: int, is_named: bool) -> None:
    curves = {
        number: [RecoveryCurve(step="distilled", metric="eval/kld", tokens=(0, 100), values=(1.0, 1 / number))]
        for number in range(1, num_runs + 1)
    }
    svg = recovery_of_runs(curves, {number: f"run-{number}" for number in curves}, "KLD", "curves")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert ("run-3" in texts) == is_named
    assert (str(num_runs) in texts) != is_named

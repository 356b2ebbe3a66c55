from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from distill.config import OptimConfig
from launch.forecast import crossing_tokens, interval, lines, make_forecast, run
from launch.forecast_curve import Schedule, TrainingCurve, last_phase, read_training, training_curve
from launch.forecast_fit import MIN_POINTS, Family, fit_family

OPTIM = OptimConfig(lr=1e-3)
FINGERPRINT = "0123456789abcdef" * 4


def power_law(
    tokens: np.ndarray, *, floor: float = 0.05, amplitude: float = 1.95, scale: float = 2e4, exponent: float = 0.8
) -> np.ndarray:
    return floor + amplitude * (1 + tokens / scale) ** -exponent


def new_curve(*, points: int = 30, noise: float = 0.0, schedule: Schedule | None = None, **law: float) -> TrainingCurve:
    tokens = np.linspace(0.0, 1e6, points)
    values = power_law(tokens, **law) * np.exp(noise * np.random.default_rng(1).standard_normal(points))
    return TrainingCurve(
        step="distilled",
        metric="kld",
        tokens_before=0,
        tokens=tokens,
        values=values,
        teacher=0.0,
        schedule=schedule,
        state="running",
    )


@pytest.fixture(scope="module")
def family() -> Family:
    return fit_family(new_curve(noise=0.01))


def test_a_known_law_is_found_again(family: Family) -> None:
    best = family.best

    assert best.exponent[0] == pytest.approx(0.8, rel=0.1)
    assert best.floor[0] == pytest.approx(0.05, abs=0.02)
    assert best.amplitude[0] + best.floor[0] == pytest.approx(2.0, rel=0.05)
    assert best.scale[0] == pytest.approx(2e4, rel=0.3)
    assert family.error == pytest.approx(0.015, abs=0.005)


def test_what_lies_beyond_the_points_is_in_the_interval(family: Family) -> None:
    far = np.array([2e6, 5e6])
    truth = power_law(far)

    for losses, true in zip(family.losses(far).T, truth, strict=True):
        found = interval(losses)
        assert found.low is not None
        assert found.high is not None
        assert found.low < true < found.high
        assert found.middle == pytest.approx(true, rel=0.12)
    widths = [
        np.ptp(np.quantile(losses / true, [0.1, 0.9])) for losses, true in zip(family.losses(far).T, truth, strict=True)
    ]
    assert widths[0] < widths[1], "less is known of what is farther away"


def test_tokens_to_a_target_are_those_of_the_law(family: Family) -> None:
    forecast = make_forecast(family, 0.95)
    true = 2e4 * (((0.1 - 0.05) / 1.95) ** (-1 / 0.8) - 1)

    needed = forecast.tokens_to_target
    assert forecast.target_loss == pytest.approx(0.05 * family.curve.reference)
    assert needed.middle is not None
    assert needed.low is not None
    assert needed.low < true < (needed.high or math.inf)
    assert needed.middle == pytest.approx(true, rel=0.5)
    assert f"tokens more reach 95 % (KLD {forecast.target_loss:.3g}" in lines(forecast)[1]


def test_a_target_that_is_reached_is_said_to_be(family: Family) -> None:
    forecast = make_forecast(family, 0.5)

    assert forecast.reached
    assert forecast.tokens_to_target.low == forecast.tokens_to_target.high
    assert lines(forecast)[1].startswith("50 % (KLD")
    assert "reached after" in lines(forecast)[1]


def test_a_target_below_the_floor_is_not_reachable() -> None:
    forecast = make_forecast(fit_family(new_curve(floor=0.4, amplitude=1.6, scale=1e4, exponent=1.5)), 0.95)

    assert forecast.tokens_to_target.middle is None
    assert forecast.floor.middle == pytest.approx(0.4, rel=0.1)
    assert f"not reachable: floor at {forecast.floor.middle:.3g}" in lines(forecast)[1]


def test_the_same_points_give_the_same_forecast() -> None:
    first, second = (make_forecast(fit_family(new_curve(noise=0.02))) for _ in range(2))

    assert first == second


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 0.5, 0.4, 0.3, 0.25], f"has 5 points in its last phase, a forecast needs {MIN_POINTS}"),
        ([1.0, 1.1, 1.2, 1.2, 1.3, 1.3, 1.4], "does not fall over its 7 points"),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], "there is nothing to recover"),
    ],
)
def test_what_says_nothing_of_the_future_is_refused(values: list[float], message: str) -> None:
    tokens = np.arange(len(values), dtype=float) * 1000
    curve = TrainingCurve(
        step="distilled",
        metric="kld",
        tokens_before=0,
        tokens=tokens,
        values=np.array(values),
        teacher=0.0,
        schedule=None,
        state="running",
    )

    with pytest.raises(ValueError, match=message):
        fit_family(curve)


def test_a_schedule_is_worth_its_learning_rate() -> None:
    schedule = Schedule(
        optim=OptimConfig(lr=2e-3, warmup_frac=0.0, min_lr_frac=0.0, schedule="linear"), max_tokens=1000
    )

    assert schedule.rate(np.array([0.0, 500.0, 1000.0, 9000.0])) == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert schedule.progress(np.array([500.0, 1000.0]), 1.0) == pytest.approx([375.0, 500.0], rel=1e-3)
    assert schedule.progress(np.array([4000.0]), 1.0) == pytest.approx([2000.0], rel=1e-3), "a run of 4,000 tokens"
    assert schedule.progress(np.array([300.0]), 0.0) == pytest.approx([300.0])


def rows_of(schedule: Schedule, *, points: int, start: int = 0, level: float = 1.0) -> list[dict[str, float]]:
    """What the trainer logs: learning rates of steps, and losses of evaluations."""
    rows: list[dict[str, float]] = []
    for point in range(points):
        tokens = 1000 * point
        if point:
            rate = float(schedule.rate(np.array([tokens]))[0]) * schedule.optim.lr
            rows.append({"tokens": start + tokens, "optim/lr": rate, "train/loss": 1.0})
        kld = level * float(power_law(np.array([float(tokens)]), scale=3e3)[0])
        rows.append({"tokens": start + tokens, "eval/kld": kld, "eval/lm_loss": 3.0 + kld, "eval/teacher_lm_loss": 3.0})
    return rows


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Path]:
    """A run whose step `distilled` is being trained, in the store's place of what is not finished."""

    def make(rows: list[dict[str, float]], *, place: str = ".unfinished", torn: str = "") -> Path:
        run_path, directory = tmp_path / "demo", f"distill-{FINGERPRINT[:16]}"
        run_path.mkdir()
        config: dict[str, Any] = {
            "optim": {"lr": 1e-3, "min_lr_frac": 0.1, "warmup_frac": 0.02, "schedule": "cosine"},
            "distill": {"max_tokens": 40_000},
        }
        step = {"stage": "distill", "inputs": {}, "config": config, "fingerprint": FINGERPRINT}
        other = {"stage": "fuse", "inputs": {}, "config": {}, "fingerprint": "f" * 64}
        (run_path / "config.yaml").write_text(yaml.safe_dump({"steps": {"fused": other, "distilled": step}}))
        where = tmp_path / "store" / place / directory
        if place == ".resume":
            for number, share in ((10, 0.5), (20, 1.0)):
                (where / f"step_{number}").mkdir(parents=True)
                state = {"curve": rows[: int(share * len(rows))]}
                (where / f"step_{number}" / "state.json").write_text(json.dumps(state))
        else:
            where.mkdir(parents=True)
            (where / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
        return run_path

    return make


SCHEDULE = Schedule(optim=OPTIM, max_tokens=40_000)


def test_a_run_that_goes_on_is_forecast(new_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    place = new_run(rows_of(SCHEDULE, points=20), torn='{"tokens": 20000, "eval/kl')

    assert run([str(place), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert (found["step"], found["state"], found["metric"]) == ("distilled", "running", "kld")
    assert (found["num_points"], found["tokens"], found["max_tokens"]) == (20, 19_000, 40_000)
    assert found["end_loss"]["low"] < found["end_loss"]["middle"] < found["loss"]
    assert found["recovered_frac"] == pytest.approx(1 - found["loss"] / found["reference"])
    assert found["interval_level"] == 0.8


def test_a_run_that_stopped_is_read_from_its_newest_resume_point(new_run: Callable[..., Path]) -> None:
    training = read_training(new_run(rows_of(SCHEDULE, points=20), place=".resume"))

    assert training.state == "stopped"
    assert len(training_curve(training).values) == 20


def test_a_step_without_a_teacher_is_passed_over(new_run: Callable[..., Path]) -> None:
    place = new_run(rows_of(SCHEDULE, points=8))
    document = yaml.safe_load((place / "config.yaml").read_text())
    document["steps"]["extended"] = {**document["steps"]["distilled"], "stage": "extend_context"}
    (place / "config.yaml").write_text(yaml.safe_dump(document))
    directory = place.parent / "store" / f"extend_context-{FINGERPRINT[:16]}"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text('{"tokens": 7000, "eval/lm_loss": 3.0}\n')

    assert read_training(place).step == "distilled"
    with pytest.raises(ValueError, match="extended has logged no held-out loss beside a teacher; there is none"):
        training_curve(read_training(place, "extended"))


def test_a_schedule_that_was_not_followed_is_none(new_run: Callable[..., Path]) -> None:
    other = Schedule(optim=OPTIM, max_tokens=25_000)
    curve = training_curve(read_training(new_run(rows_of(other, points=20))))

    assert curve.schedule is None
    assert "decay is left out of account" in lines(make_forecast(fit_family(curve)))[-1]


def test_the_last_phase_is_a_curve_of_its_own(new_run: Callable[..., Path]) -> None:
    first, second = rows_of(SCHEDULE, points=9), rows_of(SCHEDULE, points=12, start=8000, level=0.7)
    curve = training_curve(read_training(new_run([*first, *second])))

    assert curve.tokens_before == 8000
    assert curve.tokens.tolist() == [1000.0 * point for point in range(12)]
    assert curve.reference == pytest.approx(0.7 * 2.0)
    assert curve.schedule == SCHEDULE
    assert last_phase(first) == first


def test_recovery_of_each_metric_is_what_the_documentation_says(new_run: Callable[..., Path]) -> None:
    training = read_training(new_run(rows_of(SCHEDULE, points=8)))
    kld, lm_loss, retained = (training_curve(training, metric) for metric in ("kld", "lm_loss", "retained"))

    assert kld.loss_at(0.95) == pytest.approx(0.1)
    assert lm_loss.loss_at(0.95) == pytest.approx(3.0 + 0.1), "of the gap of 2 nats"
    assert retained.loss_at(0.95) == pytest.approx(3.0 - math.log(0.95))
    for curve in (kld, lm_loss, retained):
        assert curve.recovered(curve.loss_at(0.7)) == pytest.approx(0.7)


def test_a_curve_that_crosses_late_crosses_beyond_the_budget() -> None:
    curve = new_curve(schedule=Schedule(optim=OPTIM, max_tokens=1_000_000))
    family = fit_family(curve)

    found = interval(crossing_tokens(family, 0.09))

    assert found.middle is not None
    assert found.middle > 1_000_000
    assert "not within this run's 1.00M tokens; a run of" in "\n".join(lines(make_forecast(family, 1 - 0.09 / 2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "fused"], "has no training step 'fused'; it has distilled"),
        (["--metric", "kld_top_k"], "has logged no kld_top_k; there is kld, lm_loss, retained"),
        (["--target", "95"], "--target is a share between 0 and 1, got 95"),
    ],
)
def test_wrong_wishes_are_refused_with_what_there_is(
    new_run: Callable[..., Path], arguments: list[str], message: str
) -> None:
    place = new_run(rows_of(SCHEDULE, points=8))

    with pytest.raises(ValueError, match=message):
        run([str(place), *arguments])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run with a training step"):
        run([str(tmp_path)])

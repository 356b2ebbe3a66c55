"""The page's section on recovery: every curve, and what they say of the tokens that are still needed. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launch import figures
from launch.artifact import Artifact
from launch.figures import Picture, picture
from launch.finished_run import FinishedRun
from launch.forecast import LEVEL, make_forecast, target_line
from launch.forecast_curve import read_training, training_curve
from launch.forecast_figure import forecast_picture
from launch.forecast_fit import fit_family
from launch.recovery import TRAINING_STAGES, RecoveryCurve, read_curves


@dataclass(frozen=True, kw_only=True)
class HeldOutMetric:
    """How pages speak of a metric of held-out sequences."""

    title: str
    caption: str
    label: str
    """Of the axis."""
    name: str
    """What a picture is named after."""


HELD_OUT = {
    "eval/kld": HeldOutMetric(
        title="KL to the teacher",
        caption="Forward KL on held-out sequences while training goes on, against the tokens of distillation and "
        "context extension. 0 is the teacher itself.",
        label="KLD, nats per token",
        name="KLD",
    ),
    "eval/kld_top_k": HeldOutMetric(
        title="KL to the teacher's likeliest tokens",
        caption="Forward KL on the cached tokens and the rest, a lower bound of that on the whole vocabulary, on "
        "held-out sequences while training goes on.",
        label="KLD of the top k, nats per token",
        name="KLD of the top k",
    ),
    "eval/lm_loss": HeldOutMetric(
        title="LM loss",
        caption="Next-token loss on the same sequences; dashed, the teacher's.",
        label="LM loss, nats per token",
        name="LM loss",
    ),
    "eval/top1_agreement_frac": HeldOutMetric(
        title="Agreement with the teacher",
        caption="Share of held-out positions where student and teacher put the same token first.",
        label="top-1 agreement",
        name="agreement",
    ),
}
"""By name in ``metrics.jsonl``, in the order of a page."""


def trained_steps(run: FinishedRun) -> dict[str, Artifact]:
    """Steps that have a recovery curve."""
    return {step: artifact for step, artifact in run.steps.items() if artifact.manifest.stage in TRAINING_STAGES}


def held_out_curves(run: FinishedRun) -> dict[str, list[RecoveryCurve]]:
    """Curves of all training steps by metric, in the order of :data:`HELD_OUT`; metrics that none logged are left
    out."""
    steps = trained_steps(run).items()
    curves = [curve for step, a in steps for curve in read_curves(a.path / "metrics.jsonl", step, HELD_OUT)]
    by_metric = {metric: [curve for curve in curves if curve.metric == metric] for metric in HELD_OUT}
    return {metric: found for metric, found in by_metric.items() if found}


def recovery_pictures(run: FinishedRun) -> Iterator[Picture]:
    """Every held-out metric of the training steps against their tokens."""
    teachers = {
        f"teacher of {step}": artifact.manifest.metrics["teacher"]["lm_loss"]
        for step, artifact in trained_steps(run).items()
        if "teacher" in artifact.manifest.metrics
    }
    for metric, curves in held_out_curves(run).items():
        words = HELD_OUT[metric]
        svg = figures.recovery_curves(
            curves,
            levels=teachers if metric == "eval/lm_loss" else {},
            label=words.label,
            name=f"recovery of {words.name}",
        )
        yield picture(words.title, words.caption, svg)


def forecast_pictures(run: FinishedRun) -> Iterator[Picture]:
    """For every distillation with a curve that a forecast can be made of."""
    for step, artifact in run.steps.items():
        if artifact.manifest.stage != "distill":
            continue
        try:
            family = fit_family(training_curve(read_training(artifact.path)))
        except ValueError:
            # Too few points, or nothing that falls: the command says so, the page shows the curve alone.
            continue
        forecast = make_forecast(family)
        yield picture(
            f"Forecast of {step}",
            f"{target_line(forecast)}. Beyond the last point: where longer runs of the same schedule end, with the "
            f"{LEVEL:.0%} interval. Recovery counts from the step's first point.",
            forecast_picture(family, forecast, name=f"forecast of {step}"),
        )

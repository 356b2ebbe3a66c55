"""The page's section on recovery: every curve, and what they say of the tokens that are still needed. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from launch import figures
from launch.figures import Picture, picture
from launch.finished_run import FinishedRun
from launch.forecast import LEVEL, make_forecast, target_line
from launch.forecast_curve import read_training, training_curve
from launch.forecast_figure import forecast_picture
from launch.forecast_fit import fit_family
from launch.recovery import TRAINING_STAGES, read_curves


def recovery_pictures(run: FinishedRun) -> Iterator[Picture]:
    """Every held-out metric of the training steps against their tokens."""
    trained = {step: artifact for step, artifact in run.steps.items() if artifact.manifest.stage in TRAINING_STAGES}
    metrics = ("eval/kld", "eval/kld_top_k", "eval/lm_loss", "eval/top1_agreement_frac")
    curves = [curve for step, a in trained.items() for curve in read_curves(a.path / "metrics.jsonl", step, metrics)]
    kld, kld_top_k, lm_loss, top1 = ([curve for curve in curves if curve.metric == metric] for metric in metrics)
    if kld:
        yield picture(
            "KL to the teacher",
            "Forward KL on held-out sequences while training goes on, against the tokens of distillation and context "
            "extension. 0 is the teacher itself.",
            figures.recovery_curves(kld, levels={}, label="KLD, nats per token", name="recovery of KLD"),
        )
    if kld_top_k:
        yield picture(
            "KL to the teacher's likeliest tokens",
            "Forward KL on the cached tokens and the rest, a lower bound of that on the whole vocabulary, on held-out "
            "sequences while training goes on.",
            figures.recovery_curves(
                kld_top_k, levels={}, label="KLD of the top k, nats per token", name="recovery of KLD of the top k"
            ),
        )
    if lm_loss:
        levels = {
            f"teacher of {step}": artifact.manifest.metrics["teacher"]["lm_loss"]
            for step, artifact in trained.items()
            if "teacher" in artifact.manifest.metrics
        }
        yield picture(
            "LM loss",
            "Next-token loss on the same sequences; dashed, the teacher's.",
            figures.recovery_curves(
                lm_loss, levels=levels, label="LM loss, nats per token", name="recovery of LM loss"
            ),
        )
    if top1:
        yield picture(
            "Agreement with the teacher",
            "Share of held-out positions where student and teacher put the same token first.",
            figures.recovery_curves(top1, levels={}, label="top-1 agreement", name="recovery of agreement"),
        )


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

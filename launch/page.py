"""The report as one self-contained HTML page. Torch-free.

A section is left out where the step that it shows is not part of the run.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from launch import figures, quantities
from launch.canvas import ROLES, model_role
from launch.finished_run import PARENT, FinishedRun, read_architecture, read_json
from launch.recovery import TRAINING_STAGES, read_curves
from launch.strip import architecture_strip
from puzzle.model.architecture import Architecture
from puzzle.tables import CostFile, CostTable, Metric, Phase, ScoreTable

TEMPLATE = "report.html.j2"

METRIC_LABELS = {
    "kld": "KLD, nats per token",
    "lm_loss": "LM loss over the parent's, nats per token",
    "hidden_cosine": "cosine distance of final hidden states",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure of the page."""

    title: str
    caption: str
    svg: Markup
    wide: bool = False
    """Takes the page's whole width."""


def render_page(report: Mapping[str, Any], run: FinishedRun) -> str:
    """The page of ``report``, with the pictures that the artifacts of ``run`` give."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        scaled=quantities.scaled,
        num_bytes=quantities.num_bytes,
        decimals=quantities.decimals,
        ratio=quantities.ratio,
        percent=quantities.percent,
        duration=quantities.duration,
        model_role=model_role,
    )
    parent, final = read_architecture(run.parent), read_architecture(run.final)
    return environment.get_template(TEMPLATE).render(
        report=report,
        parent=next(iter(report["models"].values())),
        final=report["models"][report["final_model"]],
        tokens=run.final.manifest.tokens,
        lengths=_lengths(run),
        workload=(run.document("benchmark", "benchmark.json") or {}).get("workload"),
        strip=architecture_strip(parent, read_architecture(run.unfused), final),
        quality=[*_quality_against_latency(report), *_pareto(run)],
        recovery=[*_recovery(run)],
        fusion=[*_dependency(run)],
        search=[*_scores(run), *_latency(run)],
        provenance=_provenance(run),
        roles=ROLES,
    )


def _picture(title: str, caption: str, svg: str, *, wide: bool = False) -> Picture:
    return Picture(title=title, caption=caption, svg=Markup(svg), wide=wide)


def _lengths(run: FinishedRun) -> dict[str, Any] | None:
    """Context lengths and what every model does at each, if evaluate looked at any."""
    evaluated = run.document("evaluate", "evaluate.json") or {"models": {}}
    by_length = {name: row["by_length"] for name, row in evaluated["models"].items() if row["by_length"]}
    if not by_length:
        return None
    lengths = sorted({int(length) for rows in by_length.values() for length in rows})
    return {"lengths": lengths, "models": by_length, "chance_frac": evaluated["retrieval_chance_frac"]}


def _quality_against_latency(report: Mapping[str, Any]) -> Iterator[Picture]:
    points = [
        figures.ModelPoint(name=name, decode_ms=model["decode_ms"], lm_loss=model["lm_loss"])
        for name, model in report["models"].items()
        if model["decode_ms"] is not None and model["lm_loss"] is not None
    ]
    if len(points) > 1:
        yield _picture(
            "Quality against latency, measured",
            "Held-out LM loss and decode latency of every model, joined in pipeline order. Down and left is better; "
            "the dotted line is the parent's loss.",
            figures.quality_against_latency(points),
        )


def _pareto(run: FinishedRun) -> Iterator[Picture]:
    found = run.document("search", "solution.json")
    if not found or not found["pareto"]:
        return
    front, chosen = ([_predicted(solution) for solution in found[key]] for key in ("pareto", "solutions"))
    yield _picture(
        "Quality against latency, as the search predicted it",
        "Lowest summed score at every latency budget: the Pareto front. Each point solves one integer program.",
        figures.pareto_front(front, chosen, METRIC_LABELS[found["metric"]]),
    )


def _predicted(solution: Mapping[str, Any]) -> tuple[float, float]:
    """Latency after fusion, as a fraction of the parent's, and score."""
    return solution["predicted_fused_latency_ms"] / solution["parent_costs"]["latency_ms"], solution["score"]


def _recovery(run: FinishedRun) -> Iterator[Picture]:
    trained = {step: artifact for step, artifact in run.steps.items() if artifact.manifest.stage in TRAINING_STAGES}
    metrics = ("eval/kld", "eval/lm_loss")
    curves = [curve for step, a in trained.items() for curve in read_curves(a.path / "metrics.jsonl", step, metrics)]
    kld, lm_loss = ([curve for curve in curves if curve.metric == metric] for metric in metrics)
    if kld:
        yield _picture(
            "KL to the teacher",
            "Forward KL on held-out sequences while training goes on, against the tokens of distillation and context "
            "extension. 0 is the teacher itself.",
            figures.recovery_curves(kld, levels={}, label="KLD, nats per token", name="recovery of KLD"),
        )
    if lm_loss:
        levels = {
            f"teacher of {step}": artifact.manifest.metrics["teacher"]["lm_loss"]
            for step, artifact in trained.items()
            if "teacher" in artifact.manifest.metrics
        }
        yield _picture(
            "LM loss",
            "Next-token loss on the same sequences; dashed, the teacher's.",
            figures.recovery_curves(
                lm_loss, levels=levels, label="LM loss, nats per token", name="recovery of LM loss"
            ),
        )


def _dependency(run: FinishedRun) -> Iterator[Picture]:
    artifact = run.last("measure_dependency")
    if artifact is None:
        return
    measured = read_json(artifact.path / "dependency.json")
    model = run.input_of(artifact, "model")
    assert model is not None, "every input of a pipeline's step is a step"
    yield _picture(
        "Block dependency",
        "How much what block j adds changes when block i is removed. Dark: j does not need i, and may run beside it.",
        figures.dependency_matrix(measured["matrix"]),
    )
    yield _picture(
        "Direction change",
        "Above, how far every block turns the hidden state; below, the norm of what it adds over that of its input. "
        "Where both are small, fusion changes little of what the next FFN reads.",
        figures.direction_change(
            [block["direction_change"] for block in measured["blocks"]],
            [block["contribution_ratio"] for block in measured["blocks"]],
            [block.is_attention_free for block in read_architecture(model).blocks],
        ),
    )


def _scores(run: FinishedRun) -> Iterator[Picture]:
    search, scored = run.last("search"), run.last("score_library") or run.last("prune_attention")
    if scored is None:
        return
    table = ScoreTable.read(scored.path / "scores.json")
    metric: Metric = "kld"
    chosen: list[str] = []
    if search is not None:
        found = read_json(search.path / "solution.json")
        metric, chosen = found["metric"], found["solutions"][0]["blocks"]
    elif scored.manifest.kind == "model":
        chosen = [block.name for block in read_architecture(scored).blocks]
    by_block = table.by_block(metric)
    variants = list(dict.fromkeys(row.variant for row in table.rows))
    yield _picture(
        "Replace-1-block scores",
        "What one variant at one block, alone, does to the parent; lower is better. A ring marks the choice.",
        figures.score_heat_map(
            variants,
            [[scores.get(variant) for scores in by_block] for variant in variants],
            chosen,
            METRIC_LABELS[metric],
        ),
        wide=True,
    )


def _latency(run: FinishedRun) -> Iterator[Picture]:
    artifact = run.last("measure_costs")
    if artifact is None:
        return
    costs = CostFile.read(artifact.path / "costs.json")
    unfused = read_architecture(run.unfused)
    # A model that was trained on costs what the fused one does; the timed one has a measurement to compare with.
    fused = run.models[run.timed_name] if run.timed_name else run.final
    models = {PARENT: run.parent, "child": run.unfused} | ({} if fused is run.unfused else {"fused": fused})
    timed = (run.document("benchmark", "benchmark.json") or {}).get("models", {})
    names = {artifact.manifest.fingerprint: name for name, artifact in run.models.items()}
    panels: dict[str, list[figures.LatencyBar]] = {}
    phases: tuple[Phase, ...] = ("decode", "prefill")
    for phase, unit in zip(phases, ("token", "prompt"), strict=True):
        panels[f"{phase}, per {unit}"] = [
            figures.LatencyBar(
                name=f"{label}, {source}",
                parts=latency_parts(read_architecture(model), unfused, table, phase),
                whole_ms=timed.get(names.get(model.manifest.fingerprint), {}).get(f"{phase}_ms"),
            )
            for label, model in models.items()
            for source, table in costs.tables.items()
        ]
    yield _picture(
        "Where the time goes",
        f"Summed subblock costs on {costs.hardware.get('measured', 'the device')}, measured one by one and by the "
        "analytic model. A fused FFN costs what its members cost, less the saving of every merge.",
        figures.latency_breakdown(panels),
        wide=True,
    )


def latency_parts(model: Architecture, unfused: Architecture, table: CostTable, phase: Phase) -> dict[str, float]:
    """Predicted milliseconds of a model's attentions, its FFNs, and its embedding and head.

    Args:
        model: what runs.
        unfused: the same model before fusion, whose blocks the table knows; read for the members of fused blocks.
        table: costs of subblocks.
        phase: decode of one token, or prefill of the prompt.
    """
    members = {index: block for block in unfused.blocks for index in block.parent_block_indices}
    metric = f"{phase}_ms"
    attention = ffn = 0.0
    for block in model.blocks:
        indices = block.parent_block_indices
        parts = [members[index] for index in indices] if len(indices) > 1 else [block]
        attention += sum(getattr(table.subblock("attention", part.attention.name), metric) for part in parts)
        ffn += sum(getattr(table.subblock("ffn", part.ffn.name), metric) for part in parts)
        ffn -= (len(parts) - 1) * table.merge_saving_ms(phase)
    return {"attention": attention, "FFN": ffn, "embedding and head": getattr(table.overhead, metric)}


def _provenance(run: FinishedRun) -> dict[str, list[str]]:
    """Where the artifacts come from: every distinct value, as steps may be from different days and machines."""
    facts: dict[str, list[str]] = {name: [] for name in ("commit", "command", "hardware", "seed", "python", "packages")}
    for artifact in run.steps.values():
        known = artifact.manifest.provenance
        hardware = known["hardware"]
        stated = {
            "commit": _commit(known["git_commit"], known["dirty_diff_sha256"]),
            "command": _command(known["argv"]),
            "hardware": ", ".join([f"{hardware['cpu']} ({hardware['num_cores']} cores)", *hardware["gpus"]]),
            "seed": known["seed"],
            "python": known["python"],
            "packages": " ".join(f"{name}=={version}" for name, version in known["packages"].items()),
        }
        for name, value in stated.items():
            if value is not None and str(value) not in facts[name]:
                facts[name].append(str(value))
    return {name: values for name, values in facts.items() if values}


def _commit(commit: str | None, dirty_diff: str | None) -> str | None:
    return f"{commit} with local changes" if commit and dirty_diff else commit


def _command(argv: list[str]) -> str:
    program = ["python", "-m", "launch"] if argv[0].endswith("launch/__main__.py") else [argv[0]]
    return shlex.join([*program, *argv[1:]])

"""Recovery by global distillation: the curve over many tokens, and what each term of the objective is worth.

    python benchmarks/recovery.py [--root runs/recovery] [--num-attentions 14] [--curve-tokens 200_000_000]
        [--ablation-tokens 20_000_000] [--time-limit S] [--set KEY=VALUE ...] [--out DIR]

The student is the parent without a run of neighbouring attentions, its FFNs fused. It is distilled with the paper's
objective and, as a control, trained on next tokens alone, both for ``--curve-tokens``; and with each of the seven
objectives of the paper's loss ablation for ``--ablation-tokens``, beside the student as it is. All see the same text in
the same order, from the same weights, with the same learning rate, which falls to its end over each one's own budget.
Held-out text, which none has seen, judges them after training and draws the curves during it.

Every model comes from the real stages. Results are written after every row, the most telling ones first. A command that
is killed goes on when it is started again: steps that are done are not computed again, training goes on from its last
resume point. Text that the parent writes is a part of the data where a source says so: ``--set data=generated``.

Behind torchrun (``torchrun --nproc-per-node 2 benchmarks/recovery.py ...``) all processes train, and the first does the
rest. A step that fails there ends the program, for its processes cannot be called back.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ablation import Workbench, new_parser, write_results

from distill.config import require
from distill.recovered import gap_closed_frac
from launch import console, processes
from launch.artifact import Artifact, Manifest
from launch.canvas import stand_alone
from launch.config import PipelineConfig, StepConfig, compose_stage, step_overrides
from launch.figures import recovery_curves
from launch.pipeline import check_processes, plan
from launch.provenance import provenance
from launch.recovery import RecoveryCurve, read_curves
from launch.stage_configs import DistillStage, PrepareDataStage
from puzzle.model.checkpoint import read_architecture

STUDENT = "fused"
PAPER_KLD = {
    "lm": 0.31,
    "kld_lm": 0.14,
    "kld": 0.10,
    "cosine_lm": 0.30,
    "cosine": 0.16,
    "kld_cosine_lm": 0.14,
    "kld_cosine": 0.11,
}
"""Objectives of the paper's loss ablation in its order, and its validation KL of a 51B child of Llama-70B after 5B
tokens (Puzzle, Table 17)."""
PAPER_KLD_UNTRAINED = 0.19
FIRST_ROWS = ("kld_cosine", "lm", "kld", "cosine")
"""What tells most; the others follow in the paper's order."""
METRICS = {
    "eval/kld": "KLD to the parent, nats per token",
    "eval/lm_loss": "LM loss, nats per token",
    "eval/top1_agreement_frac": "top-1 agreement",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of the student."""

    objective: str
    """Option of the group ``objective``."""
    table: str
    """``curves`` or ``ablation``."""
    tokens: int
    """Budget."""

    @property
    def step(self) -> str:
        """Name of its step."""
        return f"{self.objective}_{self.table}"

    def distill(self, num_points: int) -> StepConfig:
        """The step, with ``num_points`` evaluations after the first one."""
        settings = (
            f"objective={self.objective}",
            f"distill.max_tokens={self.tokens}",
            f"distill.eval_every_tokens={-(-self.tokens // num_points)}",
        )
        inputs = {"student": STUDENT, "teacher": "parent", "data": "data"}
        return StepConfig(stage="distill", inputs=inputs, overrides=settings)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model, judged."""

    objective: str | None
    """None: the student as it is."""
    tokens: int
    """That it was trained on."""
    kld: float
    """To the parent, nats per token."""
    lm_loss: float
    gap_closed_frac: float | None
    """Of the student's LM loss over the parent's; None: the student's is no worse."""
    top1_agreement_frac: float
    train_s: float
    """That its step took in the call that finished it, with building, evaluation and export."""


@dataclass(kw_only=True)
class Findings:
    """What is known so far."""

    parent_lm_loss: float | None = None
    student: Row | None = None
    tables: dict[str, dict[str, Row]] = field(default_factory=lambda: {"curves": {}, "ablation": {}})
    """Rows by table and objective."""
    curves: dict[str, dict[str, list[RecoveryCurve]]] = field(default_factory=lambda: {"curves": {}, "ablation": {}})
    """Curves of every metric by table and objective."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a run has no row."""

    def rows(self, table: str) -> list[Row]:
        """Rows of ``table`` in the paper's order."""
        return [self.tables[table][name] for name in PAPER_KLD if name in self.tables[table]]


def runs(options: argparse.Namespace) -> list[Run]:
    """What is trained, in this order."""
    ordered = [*FIRST_ROWS, *(name for name in PAPER_KLD if name not in FIRST_ROWS)]
    curves = [Run(objective=name, table="curves", tokens=options.curve_tokens) for name in options.curves]
    rows = [
        Run(objective=name, table="ablation", tokens=options.ablation_tokens)
        for name in ordered
        if name in options.objectives
    ]
    return [*curves[:1], *rows, *curves[1:]]


def base_steps(options: argparse.Namespace, longest: int) -> dict[str, StepConfig]:
    """Parent, data, and the student. Data is enough for ``longest`` tokens, unless ``distill.data_end`` allows less."""
    settings = PipelineConfig(about="", steps={"data": StepConfig(stage="prepare_data")})
    data = compose_stage(PrepareDataStage, step_overrides(settings, "data", options.set)).data
    is_generated = any(source.kind == "generated" for source in data.sources)
    inputs = {"parent": "parent"} | ({"generated": "text"} if is_generated else {})
    text = {"text": StepConfig(stage="generate_text", inputs={"teacher": "parent"})} if is_generated else {}
    budget = [*step_overrides(settings, "data", options.set), f"distill.max_tokens={longest}"]
    train = compose_stage(DistillStage, budget).distill
    enough = train.spent_tokens
    tokens = max(data.train_tokens, enough) if train.data_end == "refuse" else data.train_tokens
    pruning = (f"prune_attention.num_attentions={options.num_attentions}", "prune_attention.contiguous=true")
    return {
        "parent": StepConfig(stage="import_parent"),
        **text,
        "data": StepConfig(stage="prepare_data", inputs=inputs, overrides=(f"data.train_tokens={tokens}",)),
        "pruned": StepConfig(
            stage="prune_attention", inputs={"model": "parent", "data": "data"}, overrides=tuple(pruning)
        ),
        STUDENT: StepConfig(stage="fuse", inputs={"model": "pruned"}),
    }


def evaluation(step: str) -> dict[str, StepConfig]:
    """The step that judges the model of ``step``."""
    return {f"evaluation_{step}": StepConfig(stage="evaluate", inputs={"parent": "parent", "data": "data", step: step})}


def judge(bench: Workbench, step: str) -> dict[str, dict[str, Any]]:
    """Columns of evaluate for the parent and the model of ``step``.

    Raises:
        ValueError: it could not be judged.
    """
    return json.loads((made(bench, f"evaluation_{step}").path / "evaluate.json").read_text())["models"]


def made(bench: Workbench, step: str) -> Artifact:
    """The artifact of ``step``.

    Raises:
        ValueError: it or one of its inputs failed.
    """
    artifact = bench.make(step)
    require(artifact is not None, bench.errors.get(step, ""))
    assert artifact is not None
    return artifact


def add_student(bench: Workbench, found: Findings) -> None:
    """Judge the student before training; every other row is read beside it.

    Raises:
        ValueError: there is no student.
    """
    student = bench.make(STUDENT)
    reasons = "; ".join(f"{step}: {reason}" for step, reason in bench.errors.items())
    require(student is not None, f"no student: {reasons}")
    models = judge(bench, STUDENT)
    found.parent_lm_loss = models["parent"]["lm_loss"]
    found.student = _row(models[STUDENT], found)


def add(run: Run, bench: Workbench, found: Findings) -> None:
    """Train, judge, and read the curves.

    Raises:
        ValueError: a step failed.
    """
    artifact = made(bench, run.step)
    # The curve is known before the model is judged once more.
    found.curves[run.table][run.objective] = read_curves(artifact.path / "metrics.jsonl", run.objective, METRICS)
    quality = judge(bench, run.step)[run.step]
    found.tables[run.table][run.objective] = _row(quality, found, objective=run.objective, trained=artifact.manifest)


def _row(
    quality: Mapping[str, Any], found: Findings, *, objective: str | None = None, trained: Manifest | None = None
) -> Row:
    lm_loss, parent = quality["lm_loss"], found.parent_lm_loss
    assert parent is not None
    student = lm_loss if found.student is None else found.student.lm_loss
    return Row(
        objective=objective,
        tokens=0 if trained is None else trained.tokens["distill"],
        kld=quality["kld"],
        lm_loss=lm_loss,
        gap_closed_frac=gap_closed_frac(parent=parent, reference=student, model=lm_loss),
        top1_agreement_frac=quality["top1_agreement_frac"],
        train_s=0.0 if trained is None else trained.seconds,
    )


def markdown(found: Findings, options: argparse.Namespace) -> str:
    """Both tables so far."""
    student = found.student
    assert student is not None
    lines = [f"Parent: LM loss {found.parent_lm_loss:.3f} nats per token, on the held-out text that judges all.", ""]
    titles = {
        "curves": f"Recovery with {options.curve_tokens:,} tokens",
        "ablation": f"Terms of the objective, {options.ablation_tokens:,} tokens each (Puzzle, Table 17)",
    }
    for table, title in titles.items():
        rows = [student, *found.rows(table)]
        lines += [f"## {title}", "", "| LM | cosine | KLD | KLD to parent | LM loss | gap closed | top-1 | step s |"]
        lines[-1] += " KL of the paper |" if table == "ablation" else ""
        lines += ["|" + "---|" * (8 + (table == "ablation"))]
        lines += [_line(row, with_paper=table == "ablation") for row in rows]
        lines.append("")
    lines += [f"- {name}: {reason}" for name, reason in found.missing.items()]
    return "\n".join(lines).rstrip()


def _line(row: Row, *, with_paper: bool) -> str:
    terms = [] if row.objective is None else row.objective.split("_")
    marks = ["x" if term in terms else "" for term in ("lm", "cosine", "kld")]
    closed = "-" if row.gap_closed_frac is None else f"{row.gap_closed_frac:.1%}"
    columns = [*marks, f"{row.kld:.4f}", f"{row.lm_loss:.4f}", closed, f"{row.top1_agreement_frac:.1%}"]
    columns.append(f"{row.train_s:.0f}" if row.tokens else "no training")
    if with_paper:
        columns.append(f"{PAPER_KLD_UNTRAINED if row.objective is None else PAPER_KLD[row.objective]:.2f}")
    return f"| {' | '.join(columns)} |"


def write(bench: Workbench, options: argparse.Namespace, found: Findings) -> None:
    """JSON, Markdown and pictures of what is known."""
    if options.out is None:
        return
    student = bench.artifacts[STUDENT]
    content = {
        "overrides": options.set,
        "num_processes": processes.count(),
        "student": [block.name for block in read_architecture(student.path).blocks],
        "parent_lm_loss": found.parent_lm_loss,
        "untrained": None if found.student is None else asdict(found.student),
        "tables": {name: [asdict(row) for row in found.rows(name)] for name in found.tables},
        "curves": {
            name: {objective: [asdict(curve) for curve in curves] for objective, curves in of_table.items()}
            for name, of_table in found.curves.items()
        },
        "missing": found.missing,
        "headlines": {name: artifact.manifest.headline for name, artifact in bench.artifacts.items()},
        "seconds": {name: artifact.manifest.seconds for name, artifact in bench.artifacts.items()},
        **provenance(seed=None),
    }
    write_results(options.out, "recovery", content, markdown(found, options))
    for metric, label in METRICS.items():
        curves = [curve for curves in found.curves["curves"].values() for curve in curves if curve.metric == metric]
        if curves:
            is_lm_loss = metric == "eval/lm_loss"
            levels = {"parent": _teacher_lm_loss(bench)} if is_lm_loss else {}
            svg = recovery_curves(curves, levels=levels, label=label, name=metric)
            path = options.out / f"{metric.replace('eval/', 'recovery_')}.svg"
            path.write_text(stand_alone(svg) + "\n", encoding="utf-8")


def _teacher_lm_loss(bench: Workbench) -> float:
    """The parent's, on the sequences that the curves are measured on, which may be fewer than those of evaluate."""
    trained = (artifact for artifact in bench.artifacts.values() if "teacher" in artifact.manifest.metrics)
    return next(trained).manifest.metrics["teacher"]["lm_loss"]


def recovery(bench: Workbench, options: argparse.Namespace) -> bool:
    """Train and judge one model after another, and write what is known after each; whether no stage broke down.

    Raises:
        ValueError: a setting does not suit a stage, or there is no student.
    """
    deadline = time.monotonic() + options.time_limit
    wanted = runs(options)
    require(bool(wanted), "nothing is asked for: give --curves or --objectives at least one objective")
    bench.steps.update(base_steps(options, max(run.tokens for run in wanted)) | evaluation(STUDENT))
    for run in wanted:
        bench.steps.update({run.step: run.distill(options.points)} | evaluation(run.step))
    for step in plan(PipelineConfig(about="recovery", steps=bench.steps), options.set):
        check_processes(step.stage, step.config)
    found = Findings()
    add_student(bench, found)
    write(bench, options, found)
    for run in wanted:
        if time.monotonic() > deadline:
            found.missing[run.step] = "no time was left"
        else:
            try:
                add(run, bench, found)
            except ValueError as error:
                found.missing[run.step] = str(error)
        write(bench, options, found)
        if processes.have_failed():
            break
    console.say(markdown(found, options))
    return not bench.defects and not processes.have_failed()


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, root="runs/recovery")
    parser.add_argument("--num-attentions", type=int, default=14, help="neighbouring attentions that the child lacks")
    parser.add_argument("--curve-tokens", type=int, default=200_000_000, help="of each long training")
    parser.add_argument("--curves", nargs="*", choices=PAPER_KLD, default=["kld_cosine", "lm"], help="long trainings")
    parser.add_argument("--ablation-tokens", type=int, default=20_000_000, help="of each row of the loss ablation")
    parser.add_argument("--objectives", nargs="*", choices=PAPER_KLD, default=list(PAPER_KLD), help="its rows")
    parser.add_argument("--points", type=int, default=20, help="of a curve, after the first")
    limit = "seconds after which no further training starts; results so far stand"
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="S", help=limit)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)

    def command() -> int:
        fixed = ("objective", "distill.max_tokens", "distill.eval_every_tokens")
        clash = [text for text in options.set if text.partition("=")[0] in fixed]
        require(not clash, f"--set {' '.join(clash)} would hold for every row; use --objectives, --*-tokens, --points")
        bench = Workbench(options.root, "recovery", options.set)
        with bench.directory.held():
            return 0 if recovery(bench, options) else 1

    if processes.count() == 1:
        return _status_of(command)
    return _status_of(lambda: processes.run(lambda: _status_of(command)))


def _status_of(command: Callable[[], int]) -> int:
    try:
        return command()
    except processes.AlreadyToldError:
        return 2
    except ValueError as error:
        console.complain(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""``python -m launch <stage|pipeline> [overrides] [--dry-run] [--multirun] [--step STEP]``, or behind ``torchrun -m``.

Torch-free until a stage body runs, or until several processes meet.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.markup import escape

from distill import wandb_run
from launch import console, preemption, processes
from launch.artifact import Artifact
from launch.config import (
    PipelineConfig,
    RunSettings,
    compose_pipeline,
    compose_stage,
    inputs_of,
    multirun,
    pipeline_names,
    run_name,
    run_settings,
    sweep_points,
    to_yaml,
)
from launch.pipeline import PlannedStep, check_inputs, check_processes, make_job, make_recipe, plan, run_steps
from launch.registry import STAGES
from launch.rundir import RunDirectory
from launch.single_step import finishing, run_step
from launch.stage import StageContext
from launch.store import Store
from launch.wandb_steps import get_or_compute

READING_COMMANDS = {"plan": "launch.plan_table", "dashboard": "launch.dashboard"}
"""Commands that run no stage, by the module whose ``run`` takes what stands behind them. Of use to no other command, so
they are imported when they are asked for."""
STATUS_VARIABLE = "FUSION_JOB_STATUS"
"""Environment variable: a file for the exit status of the process that knows why all of them end. Behind torchrun,
whose own status says nothing, a job script goes by it; a job that ended without a word leaves none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point, for every process of a torchrun. Returns the exit status: 0 done, 2 refused, 75 stopped with its
    state saved, 130 interrupted."""
    options, overrides = _parser().parse_known_args(arguments)
    # What went wrong is said before the other processes hear of it: torchrun ends all when one has ended.
    command = functools.partial(_status_of, functools.partial(_command, options, overrides))
    if processes.count() > 1 and not options.dry_run and options.target not in ("report", *READING_COMMANDS):
        status = _status_of(functools.partial(processes.run, command))
    else:
        status = command() if processes.is_first() else 0
    if status in (0, preemption.EXIT_STATUS) and processes.is_first():
        _tell_job(status)
    return status


def _status_of(command: Callable[[], int]) -> int:
    """Exit status of ``command``, whose errors become one line."""
    try:
        return command()
    except processes.AlreadyToldError:
        return 2
    except preemption.Preempted as error:
        if processes.is_first():
            console.say(f"{escape(str(error))}; the same command goes on from there")
        return preemption.EXIT_STATUS
    except (ValueError, OSError) as error:
        if _is_refusal(error):
            _tell_job(2)
        if os.environ.get("FUSION_TRACEBACK"):
            raise
        console.complain(_one_line(error))
        return 2
    except KeyboardInterrupt:
        if processes.is_first():
            console.complain("interrupted; the same command goes on from the last resume point")
        return 130


def _is_refusal(error: BaseException | None) -> bool:
    """Whether another attempt would end the same way: not where a disk, or another process, is behind it."""
    while error is not None:
        if isinstance(error, OSError | RuntimeError):
            return False
        error = error.__cause__
    return True


def _tell_job(status: int) -> None:
    file = os.environ.get(STATUS_VARIABLE)
    if file:
        Path(file).write_text(f"{status}\n")


def _command(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.target in READING_COMMANDS:
        status: int = importlib.import_module(READING_COMMANDS[options.target]).run(overrides)
        return status
    unknown = [text for text in overrides if text.startswith("-")]
    if unknown:
        raise ValueError(
            f"unknown option {unknown[0]}; options are --dry-run, --multirun and --step, settings are <key>=<value>"
        )
    if options.step is not None:
        _run_one_step(options, overrides)
    elif options.target == "report":
        _report_again(overrides)
    elif options.multirun:
        return _sweep(_known_target(options.target), overrides, dry_run=options.dry_run)
    else:
        _run(_known_target(options.target), overrides, dry_run=options.dry_run)
    return 0


def _one_line(error: ValueError | OSError) -> str:
    if isinstance(error, OSError):
        return escape(f"{error.filename or 'operating system'}: {error.strerror or error}")
    return escape(str(error))


def _parser() -> argparse.ArgumentParser:
    targets = f"pipelines: {', '.join(pipeline_names())}\nstages: {', '.join(STAGES)}"
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Puzzle search, attention pruning, FFN Fusion and distillation of a decoder.",
        epilog=(
            f"{targets}\nreport: `report <run directory>` writes a finished run's report again\n"
            "plan: `plan <pipeline> [overrides] [--json]` says what fits, how long it takes and what it costs\n"
            "dashboard: `dashboard <run> [project=... entity=...] [--json]` saves a W&B workspace"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="stage|pipeline", help="what to run; see below")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan; compute nothing")
    parser.add_argument("--step", metavar="STEP", help="run one step of a pipeline, from what is in the store")
    parser.add_argument("--multirun", action="store_true", help="sweep over comma-separated values")
    return parser


def _known_target(target: str) -> str:
    known = [*pipeline_names(), *STAGES, "report", *READING_COMMANDS]
    if target not in known:
        raise ValueError(f"unknown stage or pipeline {target!r}; known are {', '.join(known)}")
    return target


def _sweep(target: str, overrides: list[str], *, dry_run: bool) -> int:
    """Run every point. All are checked before the first; one that fails later does not stop the others, unless it has
    torn the processes of a torchrun apart."""
    if processes.count() > 1 and any(text.startswith("hydra/launcher=") for text in overrides):
        raise ValueError(
            "hydra/launcher starts processes of its own, which those of torchrun know nothing of; drop one"
        )
    for point in sweep_points(overrides):
        if target in STAGES:
            compose_stage(STAGES[target].config, point)
        else:
            plan(compose_pipeline(target, point), point)
    failed = []
    process = os.getpid()

    def job(point: list[str]) -> None:
        if processes.have_failed():
            return
        try:
            _run(target, point, dry_run=dry_run)
        except processes.AlreadyToldError:
            failed.append(point)
        except (ValueError, OSError) as error:
            if os.getpid() != process:
                raise
            failed.append(point)
            console.complain(f"{escape(' '.join(point))}: {_one_line(error)}")

    multirun(target, overrides, job)
    return 2 if failed else 0


def _run(target: str, overrides: list[str], *, dry_run: bool) -> None:
    if target in STAGES:
        _run_stage(target, overrides, dry_run=dry_run)
    else:
        _run_pipeline(target, overrides, dry_run=dry_run)


def _run_pipeline(name: str, overrides: list[str], *, dry_run: bool) -> None:
    pipeline = compose_pipeline(name, overrides)
    steps = plan(pipeline, overrides)
    settings, run, store = _settings(name, pipeline, overrides)
    if dry_run:
        console.print_plan(steps, store)
    if settings.cluster.kind == "slurm":
        _run_on_slurm(name, pipeline, overrides, steps, settings, run, store, dry_run=dry_run)
        return
    if dry_run:
        return
    with run.held():
        run.config_file.write_text(to_yaml({"target": name, "overrides": overrides, "steps": _resolved(steps)}))
        artifacts = run_steps(
            steps, store=store, run=run, context=_context(settings, run, store), listener=console.listener(len(steps))
        )
        _report(run, artifacts)


def _run_on_slurm(
    name: str,
    pipeline: PipelineConfig,
    overrides: list[str],
    steps: Sequence[PlannedStep],
    settings: RunSettings,
    run: RunDirectory,
    store: Store,
    *,
    dry_run: bool,
) -> None:
    from launch.slurm import plan_jobs, submit
    from launch.slurm_site import read_site

    if processes.count() > 1:
        raise ValueError("cluster.kind=slurm starts the processes of every step itself; leave out torchrun")
    jobs = plan_jobs(
        name,
        pipeline,
        steps,
        overrides=overrides,
        cluster=settings.cluster,
        site=read_site(),
        store=store,
        run=run,
    )
    if dry_run:
        console.print_scripts(jobs)
    elif jobs:
        console.print_jobs(jobs, submit(jobs, run), run)
    else:
        console.say(f"all steps of {run.name} are committed; nothing to submit")


def _run_one_step(options: argparse.Namespace, overrides: list[str]) -> None:
    name = options.target
    if name not in pipeline_names() or options.multirun or options.dry_run:
        raise ValueError(
            f"--step {options.step} runs one step of one pipeline ({', '.join(pipeline_names())}), "
            "without --multirun and --dry-run"
        )
    pipeline = compose_pipeline(name, overrides)
    steps = plan(pipeline, overrides)
    settings, run, store = _settings(name, pipeline, overrides)
    run.path.mkdir(parents=True, exist_ok=True)
    artifacts = run_step(
        steps,
        options.step,
        store=store,
        run=run,
        context=_context(settings, run, store),
        listener=console.listener(1),
    )
    if artifacts is not None:
        with finishing(run):
            run.config_file.write_text(to_yaml({"target": name, "overrides": overrides, "steps": _resolved(steps)}))
            run.write_steps({step: artifact.manifest.fingerprint for step, artifact in artifacts.items()})
            _report(run, artifacts)


def _run_stage(name: str, overrides: list[str], *, dry_run: bool) -> None:
    stage = STAGES[name]
    inputs = {key: Artifact.load(Path(path).resolve()) for key, path in inputs_of(overrides).items()}
    config = compose_stage(stage.config, overrides)
    check_inputs(stage, config, {key: artifact.manifest.kind for key, artifact in inputs.items()})
    recipe = make_recipe(name, config, {key: artifact.manifest.fingerprint for key, artifact in inputs.items()})
    settings, run, store = _settings(name, None, overrides)
    if settings.cluster.kind == "slurm":
        raise ValueError(f"cluster.kind=slurm runs pipelines; {name} is a stage: leave it out, or submit a pipeline")
    if dry_run:
        console.say(f"{store.path(recipe)}: {'committed' if store.find(recipe) else 'to compute'}")
        return
    check_processes(stage, config)
    context = _context(settings, run, store)
    job = make_job(recipe, config, inputs, context=context)
    listener = console.listener(1)
    artifact, cached = get_or_compute(job, config, store=store, context=context, say=listener.waiting)
    listener.finished(name, artifact, cached)
    console.say(f"artifact: {artifact.path}")


def _settings(
    target: str, pipeline: PipelineConfig | None, overrides: list[str]
) -> tuple[RunSettings, RunDirectory, Store]:
    settings = run_settings(pipeline, overrides)
    wandb_run.check(settings.tracking)
    root = Path(settings.run.root).expanduser().absolute()
    run = RunDirectory(root=root, name=settings.run.name or run_name(target, overrides))
    return settings, run, Store(run.store, checksums=settings.run.verify == "full")


def _context(settings: RunSettings, run: RunDirectory, store: Store) -> StageContext:
    return StageContext(
        out=run.path,
        run_dir=run.path,
        resume=run.path,
        pool=store.pool,
        run_name=run.name,
        step_name=run.name,
        tracking=settings.tracking,
    )


def _resolved(steps: Sequence[PlannedStep]) -> dict[str, object]:
    return {
        step.name: {
            "stage": step.recipe.stage,
            "inputs": dict(step.inputs),
            "config": step.recipe.config,
            "fingerprint": step.recipe.fingerprint,
        }
        for step in steps
    }


def _report_again(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError(
            f"report takes one run directory, got {len(arguments)} arguments; try: python -m launch report runs/demo"
        )
    path = Path(arguments[0]).absolute()
    run = RunDirectory(root=path.parent, name=path.name)
    _report(run, run.read_steps())


def _report(run: RunDirectory, artifacts: Mapping[str, Artifact]) -> None:
    from launch.report import write_report
    from launch.summary import print_summary

    page = write_report(run.path, run.name, artifacts)
    print_summary(json.loads((page.parent / "report.json").read_text()))
    console.say(f"report: {page}")


if __name__ == "__main__":
    preemption.install()
    sys.exit(main())

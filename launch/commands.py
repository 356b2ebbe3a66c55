"""What ``python -m launch`` does with a stage or a pipeline: plan it, run it here or submit it. Torch-free until a
stage body runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill import wandb_run
from launch import console, processes
from launch.artifact import Artifact
from launch.config import (
    PipelineConfig,
    RunSettings,
    compose_pipeline,
    compose_stage,
    inputs_of,
    pipeline_names,
    run_name,
    run_settings,
    to_yaml,
)
from launch.pipeline import PlannedStep, check_inputs, check_processes, make_job, make_recipe, plan, run_steps
from launch.registry import STAGES
from launch.rundir import RunDirectory
from launch.single_step import committed, finishing, run_step, show_all_committed
from launch.stage import StageContext
from launch.store import Store
from launch.wandb_steps import get_or_compute


def check_target(target: str, overrides: Sequence[str]) -> None:
    """Plan ``target`` and compute nothing.

    Raises:
        ValueError: a setting, an input or a stage is wrong.
    """
    if target in STAGES:
        compose_stage(STAGES[target].config, overrides)
    else:
        plan(compose_pipeline(target, overrides), overrides)


def run_target(target: str, overrides: list[str], *, dry_run: bool) -> None:
    """Run stage or pipeline ``target``, or say what would be run.

    Raises:
        ValueError: a setting is wrong, a stage refuses its input, or the disk is full.
    """
    if target in STAGES:
        _run_stage(target, overrides, dry_run=dry_run)
    else:
        _run_pipeline(target, overrides, dry_run=dry_run)


def _run_pipeline(name: str, overrides: list[str], *, dry_run: bool) -> None:
    pipeline = compose_pipeline(name, overrides)
    steps = plan(pipeline, overrides)
    settings, run, store = run_places(name, pipeline, overrides)
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
    from launch.slurm import check_submission, plan_jobs, submit, twins
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
        return
    if jobs:
        check_submission(run)
    run.path.mkdir(parents=True, exist_ok=True)
    # Before the others are submitted: what W&B refuses here it would refuse their jobs.
    show_all_committed(steps, store=store, run=run, context=_context(settings, run, store), say=console.say)
    if jobs:
        beside = twins(jobs, run)
        console.print_jobs(jobs, submit(jobs, run, beside), run, beside)
    else:
        console.say(f"all steps of {run.name} are committed; nothing to submit")
        _conclude(name, overrides, steps, run, committed(steps, store=store, run=run))


def run_one_step(options: argparse.Namespace, overrides: list[str]) -> None:
    """``<pipeline> --step STEP``, from what is in the store.

    Raises:
        ValueError: an input is not there yet, or as in :func:`run_target`.
    """
    name = options.target
    if name not in pipeline_names() or options.multirun or options.dry_run:
        raise ValueError(
            f"--step {options.step} runs one step of one pipeline ({', '.join(pipeline_names())}), "
            "without --multirun and --dry-run"
        )
    pipeline = compose_pipeline(name, overrides)
    steps = plan(pipeline, overrides)
    settings, run, store = run_places(name, pipeline, overrides)
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
        _conclude(name, overrides, steps, run, artifacts)


def _run_stage(name: str, overrides: list[str], *, dry_run: bool) -> None:
    stage = STAGES[name]
    inputs = {key: Artifact.load(Path(path).resolve()) for key, path in inputs_of(overrides).items()}
    config = compose_stage(stage.config, overrides)
    check_inputs(stage, config, {key: artifact.manifest.kind for key, artifact in inputs.items()})
    recipe = make_recipe(name, config, {key: artifact.manifest.fingerprint for key, artifact in inputs.items()})
    settings, run, store = run_places(name, None, overrides)
    if settings.cluster.kind == "slurm":
        raise ValueError(f"cluster.kind=slurm runs pipelines; {name} is a stage: leave it out, or submit a pipeline")
    if dry_run:
        console.say(f"{store.path(recipe)}: {'committed' if store.find(recipe) else 'to compute'}")
        return
    check_processes(stage, config, inputs)
    context = _context(settings, run, store)
    job = make_job(recipe, config, inputs, context=context)
    listener = console.listener(1)
    artifact, cached = get_or_compute(job, config, store=store, context=context, say=listener.waiting)
    listener.finished(name, artifact, cached)
    console.say(f"artifact: {artifact.path}")


def run_places(
    target: str, pipeline: PipelineConfig | None, overrides: list[str]
) -> tuple[RunSettings, RunDirectory, Store]:
    """Settings, directory and store of a run; nothing is made. ``pipeline`` is None for a stage."""
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


def _conclude(
    name: str,
    overrides: list[str],
    steps: Sequence[PlannedStep],
    run: RunDirectory,
    artifacts: Mapping[str, Artifact],
) -> None:
    """Write what is left to write of a run whose steps all are committed, each by a process of its own."""
    with finishing(run):
        for step, artifact in artifacts.items():
            # What was there before the run began had no process to link it.
            run.link(step, artifact)
        run.config_file.write_text(to_yaml({"target": name, "overrides": overrides, "steps": _resolved(steps)}))
        run.write_steps({step: artifact.manifest.fingerprint for step, artifact in artifacts.items()})
        _report(run, artifacts)


def _report(run: RunDirectory, artifacts: Mapping[str, Artifact]) -> None:
    # Drawing takes matplotlib, which a run that fails does not need.
    from launch.report_command import write_and_show

    write_and_show(run, artifacts)

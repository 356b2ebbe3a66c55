"""One step of a pipeline in a process of its own: its inputs are what earlier processes have committed. Torch-free.

The machine that a step runs on may be part of what its artifact depends on (measured times). Another machine finds
that artifact through the run's link to it, where the recipe is its own but for the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import filelock

from distill import wandb_run
from distill.config import require
from launch.artifact import MANIFEST_NAME, Artifact, Recipe
from launch.data_sizes import require_enough_data
from launch.pipeline import Listener, PlannedStep, check_processes, describe_change, make_job
from launch.rundir import RunDirectory
from launch.stage import StageContext
from launch.store import Store
from launch.wandb_steps import get_or_compute, show_committed

MACHINE_EXTERNALS = frozenset({"device", "threads", "torch", "all_reduce"})
"""Externals that say where something was measured, not what of."""


def committed(steps: Sequence[PlannedStep], *, store: Store, run: RunDirectory) -> dict[str, Artifact]:
    """Artifacts of the steps that need not be computed, by step name, in order. Their content is not verified."""
    found: dict[str, Artifact] = {}
    for step in steps:
        if all(source in found for source in step.inputs.values()):
            artifact = _find(step.name, _recipe(step, found), store=store, run=run)
            if artifact is not None:
                found[step.name] = artifact
    return found


def run_step(
    steps: Sequence[PlannedStep],
    name: str,
    *,
    store: Store,
    run: RunDirectory,
    context: StageContext,
    listener: Listener,
) -> dict[str, Artifact] | None:
    """Compute step ``name`` unless it is committed, show it to W&B, and link it into the run directory.

    Args:
        steps: of the whole pipeline.
        name: the step.
        store: holds its inputs.
        run: of the pipeline; other steps may run in it at the same time.
        context: template whose ``out``, ``resume`` and ``step_name`` are set.
        listener: is told of this step.

    Returns:
        Artifacts of all steps in order, if this was the last one missing.

    Raises:
        ValueError: there is no such step, an input is not committed, the processes do not suit it, it refused,
            the data is too short for one of the steps, or W&B is asked for and cannot start.
    """
    wandb_run.check(context.tracking)
    by_name = {step.name: step for step in steps}
    require(name in by_name, f"--step {name}: no such step; steps are {', '.join(by_name)}")
    step, found = by_name[name], committed(steps, store=store, run=run)
    missing = [source for source in dict.fromkeys(step.inputs.values()) if source not in found]
    require(
        not missing,
        f"step {name} needs what step {', '.join(missing)} gives, which is not in {store.root}; run that first: "
        f"the same command with --step {missing[0] if missing else ''}",
    )
    require_enough_data(steps, found)
    try:
        artifact, was_there = _compute(step, found, store=store, run=run, context=context, listener=listener)
    except ValueError as error:
        raise ValueError(f"step {name}: {error}") from error
    run.link(name, artifact)
    listener.finished(name, artifact, was_there)
    # Steps that ended meanwhile count too: the last of them sees all.
    found = {**committed(steps, store=store, run=run), name: artifact}
    # Jobs that wait for this one then end with it, instead of one after the other up to the step that lacks text.
    require_enough_data(steps, found)
    return {step.name: found[step.name] for step in steps} if found.keys() == by_name.keys() else None


def show_all_committed(
    steps: Sequence[PlannedStep],
    *,
    store: Store,
    run: RunDirectory,
    context: StageContext,
    say: Callable[[str], None],
) -> None:
    """Show W&B those steps that need no job, under the name of this run.

    Args:
        steps: of the whole pipeline.
        store: has their artifacts.
        run: of the pipeline.
        context: template whose ``step_name`` is set.
        say: is told where W&B's runs are.

    Raises:
        ValueError: W&B does not start.
    """
    found = committed(steps, store=store, run=run)
    for step in steps:
        if step.name in found:
            own = replace(context, step_name=step.name)
            show_committed(found[step.name], step.config, store=store, context=own, say=say)


def finishing(run: RunDirectory) -> filelock.FileLock:
    """Held while a run's report is written: its last two steps may end at the same time."""
    return filelock.FileLock(run.path / ".report.lock")


def _compute(
    step: PlannedStep,
    found: Mapping[str, Artifact],
    *,
    store: Store,
    run: RunDirectory,
    context: StageContext,
    listener: Listener,
) -> tuple[Artifact, bool]:
    own = replace(context, step_name=step.name)
    if step.name in found:
        store.clear_private_state(found[step.name].manifest.recipe)
        show_committed(found[step.name], step.config, store=store, context=own, say=listener.waiting)
        return found[step.name], True
    inputs = {key: found[source] for key, source in step.inputs.items()}
    check_processes(step.stage, step.config, inputs)
    recipe = _recipe(step, found)
    listener.started(step.name, recipe.stage, describe_change(run.linked(step.name), recipe))
    job = make_job(recipe, step.config, inputs, context=own)
    return get_or_compute(job, step.config, store=store, context=own, say=listener.waiting)


def _recipe(step: PlannedStep, found: Mapping[str, Artifact]) -> Recipe:
    """The step's recipe with the inputs that are there, wherever they were computed."""
    fingerprints = {key: found[source].manifest.fingerprint for key, source in step.inputs.items()}
    return replace(step.recipe, inputs=fingerprints)


def _find(name: str, recipe: Recipe, *, store: Store, run: RunDirectory) -> Artifact | None:
    linked = run.linked(name)
    if linked is not None and _without_machine(linked.manifest.recipe) == _without_machine(recipe):
        return linked
    path = store.path(recipe)
    if not (path / MANIFEST_NAME).is_file():
        return None
    artifact = Artifact.load(path)
    return artifact if artifact.manifest.fingerprint == recipe.fingerprint else None


def _without_machine(recipe: Recipe) -> str:
    """Fingerprint that is equal for one measurement on two machines."""
    externals = {key: value for key, value in recipe.externals.items() if key not in MACHINE_EXTERNALS}
    return replace(recipe, externals=externals).fingerprint

"""Steps to artifacts: plan them, skip what is committed, compute the rest, say what changed. Torch-free.

Fingerprints follow from configurations and inputs alone, so the whole plan is known, and every configuration is
checked, before the first step runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill import wandb_run
from distill.config import require
from launch import processes
from launch.artifact import Artifact, DamagedArtifactError, Manifest, Recipe, fingerprinted_config
from launch.config import (
    PipelineConfig,
    StepConfig,
    check_step_prefixes,
    compose_stage,
    step_overrides,
)
from launch.data_sizes import require_enough_data
from launch.finished_run import read_architecture
from launch.modelled_fusion import require_fused_as_modelled
from launch.registry import STAGES, Stage
from launch.rundir import RESERVED_NAMES, RunDirectory
from launch.stage import StageContext
from launch.store import Job, Store
from launch.wandb_steps import get_or_compute
from puzzle.model.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One step with its typed configuration and its fingerprint."""

    name: str
    stage: Stage
    recipe: Recipe
    config: Any
    inputs: Mapping[str, str]
    """Input name -> step name."""


def plan(pipeline: PipelineConfig, overrides: Sequence[str], *, is_fused_elsewhere: bool = False) -> list[PlannedStep]:
    """Typed configuration and fingerprint of every step, in order. Computes nothing.

    Args:
        pipeline: what to plan.
        overrides: of the command line.
        is_fused_elsewhere: a fusion-aware search may stand here without the fuse step that it counts on.

    Raises:
        ValueError: a stage, an input or a configuration is wrong, or data too short for what is read of it; names the
            step.
    """
    check_step_prefixes(pipeline, overrides)
    for name in pipeline.steps:
        if not re.fullmatch(r"[A-Za-z]\w*", name) or name in RESERVED_NAMES:
            raise ValueError(f"step name {name!r} is taken or not a plain word; choose another")
    planned: dict[str, PlannedStep] = {}
    for name, step in pipeline.steps.items():
        try:
            planned[name] = _plan_step(name, step, step_overrides(pipeline, name, overrides), planned)
        except ValueError as error:
            raise ValueError(f"step {name}: {error}") from error
    steps = list(planned.values())
    require_fused_as_modelled(steps, is_fused_elsewhere=is_fused_elsewhere)
    require_enough_data(steps, {})
    return steps


def _plan_step(
    name: str, step: StepConfig, overrides: Sequence[str], earlier: Mapping[str, PlannedStep]
) -> PlannedStep:
    if step.stage not in STAGES:
        raise ValueError(f"unknown stage {step.stage!r}; stages are {', '.join(STAGES)}")
    stage = STAGES[step.stage]
    for source in step.inputs.values():
        if source not in earlier:
            raise ValueError(
                f"input {source!r} is not an earlier step; earlier steps are {', '.join(earlier) or 'none'}"
            )
    config = compose_stage(stage.config, overrides)
    check_inputs(stage, config, {key: earlier[source].stage.output for key, source in step.inputs.items()})
    fingerprints = {key: earlier[source].recipe.fingerprint for key, source in step.inputs.items()}
    recipe = make_recipe(step.stage, config, fingerprints)
    return PlannedStep(name=name, stage=stage, recipe=recipe, config=config, inputs=step.inputs)


def make_recipe(stage_name: str, config: Any, input_fingerprints: Mapping[str, str]) -> Recipe:
    """What the stage's output will depend on."""
    stage = STAGES[stage_name]
    externals = stage.load_externals()
    return Recipe(
        stage=stage_name,
        stage_version=stage.version,
        config=fingerprinted_config(config),
        externals=externals(config) if externals else {},
        inputs=dict(input_fingerprints),
    )


def check_inputs(stage: Stage, config: Any, kinds: Mapping[str, str]) -> None:
    """Compare the inputs given (name -> kind) with those that the stage and its configuration take.

    Raises:
        ValueError: an input is missing, unknown, or of another kind.
    """
    if hasattr(config, "check_inputs"):
        config.check_inputs(kinds)
    for name in stage.inputs:
        if name not in kinds:
            raise ValueError(f"input {name!r} of kind {stage.inputs[name]} is missing; give inputs.{name}=<artifact>")
    for name, kind in kinds.items():
        wanted = {**stage.inputs, **stage.optional_inputs}.get(name, stage.further_inputs)
        if wanted is None:
            raise ValueError(
                f"input {name!r} is not taken; inputs are {', '.join([*stage.inputs, *stage.optional_inputs])}"
            )
        if kind != wanted:
            raise ValueError(f"input {name!r} must be of kind {wanted}, the artifact given is of kind {kind}")


def check_processes(
    stage: Stage, config: Any, inputs: Mapping[str, Artifact] | None = None, names: Collection[str] = ()
) -> None:
    """Raise ``ValueError`` where the processes at hand cannot be dealt as the engine, its batches and the models among
    the ``inputs``, as far as they are there, ask for. ``names`` are those of all inputs; empty: all are there."""
    inputs = inputs or {}
    if stage.distributed and hasattr(config, "engine"):
        processes.check_devices(config.engine.device)
    count = processes.count()
    if hasattr(config, "check_processes"):
        config.check_processes(count, known_models(inputs), names or inputs)
    elif stage.distributed and hasattr(config, "engine"):
        slices = config.engine.slices
        require(
            count % slices == 0,
            f"engine.slices={slices} needs a multiple of {slices} processes, got {count}; "
            f"start them with torchrun --nproc-per-node {slices} -m launch ..., or set engine.slices=1",
        )


def known_models(inputs: Mapping[str, Artifact]) -> dict[str, Architecture]:
    """Architectures of the models among ``inputs``, by name. What is damaged is left to those who verify it."""
    known = {}
    for name, artifact in inputs.items():
        if artifact.manifest.kind == "model":
            with suppress(OSError, ValueError):
                known[name] = read_architecture(artifact)
    return known


def run_steps(
    steps: Sequence[PlannedStep],
    *,
    store: Store,
    run: RunDirectory,
    context: StageContext,
    listener: Listener,
) -> dict[str, Artifact]:
    """Compute what is not committed yet and link every step's artifact into the run directory.

    Args:
        context: template whose ``out``, ``resume`` and ``step_name`` are set for every step.

    Returns:
        Artifacts by step name, in order.

    Raises:
        ValueError: a step refused its input, or the processes cannot be dealt into slices, or be dealt a batch or a
            model, which is known before the first step or when the model is there; or its data is too short, which is
            known when that is there; names the step. Or W&B is asked for and cannot start.
    """
    wandb_run.check(context.tracking)
    check_all_processes(steps, steps, store)
    artifacts: dict[str, Artifact] = {}
    for step in steps:
        change = describe_change(run.linked(step.name), step.recipe)
        listener.started(step.name, step.recipe.stage, change)
        inputs = {name: artifacts[source] for name, source in step.inputs.items()}
        own = replace(context, step_name=step.name)
        try:
            job = make_job(step.recipe, step.config, inputs, context=own)
            artifact, cached = get_or_compute(job, step.config, store=store, context=own, say=listener.waiting)
        except ValueError as error:
            kind = DamagedArtifactError if isinstance(error, DamagedArtifactError) else ValueError
            raise kind(f"step {step.name}: {error}") from error
        run.link(step.name, artifact)
        artifacts[step.name] = artifact
        listener.finished(step.name, artifact, cached)
        if artifact.manifest.kind == "model" and not cached:
            # A model that a later step cannot deal is not worth the steps between.
            check_all_processes(steps[len(artifacts) :], steps, store)
        if artifact.manifest.kind == "data":
            # Its text may have ended before it had what was asked for.
            require_enough_data(steps, artifacts)
    run.write_steps({name: artifact.manifest.fingerprint for name, artifact in artifacts.items()})
    return artifacts


def check_all_processes(to_run: Sequence[PlannedStep], steps: Sequence[PlannedStep], store: Store) -> None:
    """Compare the processes at hand with ``to_run``, of ``steps``, and with the models in ``store`` that they take.

    Raises:
        ValueError: as :func:`check_processes`; names the step.
    """
    for step in to_run:
        try:
            check_processes(step.stage, step.config, _inputs_there(step, steps, store), step.inputs)
        except ValueError as error:
            raise ValueError(f"step {step.name}: {error}") from error


def _inputs_there(step: PlannedStep, steps: Sequence[PlannedStep], store: Store) -> dict[str, Artifact]:
    """Inputs of ``step`` that are committed, unless it is itself. Their content is not verified."""
    recipes = {other.name: other.recipe for other in steps}
    there: dict[str, Artifact] = {}
    if store.has(step.recipe):
        return there
    for name, source in step.inputs.items():
        with suppress(ValueError):
            there[name] = Artifact.load(store.path(recipes[source]))
    return there


def make_job(recipe: Recipe, config: Any, inputs: Mapping[str, Artifact], *, context: StageContext) -> Job:
    """A stage bound to its configuration and inputs. ``context`` is a template for the places of the output."""
    stage = STAGES[recipe.stage]

    def body(own: StageContext) -> Any:
        result = processes.run_body(recipe.stage, config, inputs, own)
        externals = stage.load_externals()
        if externals and externals(config) != recipe.externals:
            raise ValueError(f"the source of {recipe.stage} changed while it was read; start again")
        return result

    def place(out: Path, resume: Path) -> StageContext:
        return replace(context, out=out, resume=resume)

    return Job(
        recipe=recipe,
        kind=stage.output,
        inputs=inputs,
        body=body,
        context=place,
        seed=getattr(config, "seed", None),
    )


def describe_change(before: Artifact | None, recipe: Recipe) -> str | None:
    """Why a step of the same name will not be the artifact it was in the run before; None if nothing changed."""
    if before is None or before.manifest.fingerprint == recipe.fingerprint:
        return None
    differences = list(_differences(before.manifest, recipe))
    shown = "; ".join(differences[:3])
    return shown + (f" (+{len(differences) - 3} more)" if len(differences) > 3 else "")


def _differences(before: Manifest, recipe: Recipe) -> list[str]:
    old, new = before.recipe, recipe
    if old.stage != new.stage:
        return [f"stage {old.stage} -> {new.stage}"]
    found = (
        [] if old.stage_version == new.stage_version else [f"code version {old.stage_version} -> {new.stage_version}"]
    )
    old_values, new_values = _flatten({**old.config, **old.externals}), _flatten({**new.config, **new.externals})
    for key in sorted({*old_values, *new_values}):
        if old_values.get(key) != new_values.get(key):
            found.append(f"{key} {_short(old_values.get(key))} -> {_short(new_values.get(key))}")
    found += [
        f"input {name} changed"
        for name in sorted({*old.inputs, *new.inputs})
        if old.inputs.get(name) != new.inputs.get(name)
    ]
    return found


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    pairs = (_flatten(item, f"{path}.{key}" if path else str(key)) for key, item in value.items())
    return functools.reduce(lambda left, right: {**left, **right}, pairs, {})


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Who is told how a run goes."""

    started: Callable[[str, str, str | None], None]
    """step, stage, what changed since the run before."""
    waiting: Callable[[str], None]
    """message."""
    finished: Callable[[str, Artifact, bool], None]
    """step, artifact, whether it was there already."""

"""What the ablations share: steps made by the real stages in one run directory, and their results on disk."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill.files import write_whole
from launch import console
from launch.artifact import Artifact
from launch.config import PipelineConfig, StepConfig, compose_stage, run_settings, step_overrides
from launch.pipeline import check_inputs, make_job, make_recipe, plan, run_steps
from launch.registry import STAGES
from launch.rundir import RunDirectory
from launch.stage import StageContext
from launch.store import Store


def new_parser(about: str | None, *, root: str) -> argparse.ArgumentParser:
    """Options that every ablation has."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--root", type=Path, default=Path(root), help="directory of the store")
    found.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every step")
    found.add_argument("--out", type=Path, default=None, help="directory for the results as JSON and Markdown")
    return found


def write_results(out: Path | None, name: str, content: Mapping[str, Any], text: str) -> None:
    """``<out>/<name>.json`` and ``<out>/<name>.md``, whole at any moment; nothing where ``out`` is None."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    for suffix, written in (("json", json.dumps(content, indent=1)), ("md", text)):
        write_whole(out / f"{name}.{suffix}", written + "\n")


def run(
    root: Path, name: str, steps: dict[str, StepConfig], overrides: list[str], *, is_fused_elsewhere: bool = False
) -> dict[str, Artifact]:
    """Artifacts of all steps, planned as one pipeline before the first runs (see :func:`launch.pipeline.plan`)."""
    pipeline = PipelineConfig(about=name, steps=steps)
    overrides = [*overrides, f"run.root={root}", f"run.name={name}"]
    planned = plan(pipeline, overrides, is_fused_elsewhere=is_fused_elsewhere)
    store, directory, context = _places(root, name, overrides)
    with directory.held():
        return run_steps(planned, store=store, run=directory, context=context, listener=console.listener(len(planned)))


class Workbench:
    """Makes steps when they are asked for, their inputs first. A step that fails is kept as its error, so that those
    that do not need it still run."""

    def __init__(self, root: Path, name: str, overrides: list[str]) -> None:
        self.store, self.directory, self._context = _places(root, name, overrides)
        self.overrides = overrides
        self.steps: dict[str, StepConfig] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.errors: dict[str, str] = {}
        """Why a step has no artifact."""
        self.defects: list[str] = []
        """Steps that failed otherwise than by refusing their input."""

    def check(self, stages: Iterable[str]) -> None:
        """Raise ``ValueError`` where the settings do not suit one of ``stages``, before anything is computed."""
        for stage in stages:
            compose_stage(STAGES[stage].config, self.overrides)

    def make(self, name: str) -> Artifact | None:
        """The artifact of step ``name``; None if it or one of its inputs failed, which ``errors`` then explains."""
        if name not in self.artifacts and name not in self.errors:
            inputs = {key: self.make(source) for key, source in self.steps[name].inputs.items()}
            lost = [self.steps[name].inputs[key] for key, artifact in inputs.items() if artifact is None]
            if lost:
                self.errors[name] = f"needs {lost[0]}, which failed"
            else:
                self._try(name, {key: artifact for key, artifact in inputs.items() if artifact is not None})
        return self.artifacts.get(name)

    def _try(self, name: str, inputs: dict[str, Artifact]) -> None:
        try:
            self.artifacts[name] = self._compute(name, inputs)
        except ValueError as error:
            self.errors[name] = str(error)
        except Exception as error:
            # A defect or a full device: the other rows are worth having all the same.
            traceback.print_exc()
            self.errors[name] = f"{type(error).__name__}: {error}"
            self.defects.append(name)
        if name in self.errors:
            console.say(f"{name}: {self.errors[name]}")

    def _compute(self, name: str, inputs: dict[str, Artifact]) -> Artifact:
        step = self.steps[name]
        stage = STAGES[step.stage]
        pipeline = PipelineConfig(about=name, steps={name: step})
        config = compose_stage(stage.config, step_overrides(pipeline, name, self.overrides))
        check_inputs(stage, config, {key: artifact.manifest.kind for key, artifact in inputs.items()})
        fingerprints = {key: artifact.manifest.fingerprint for key, artifact in inputs.items()}
        context = replace(self._context, step_name=name)
        job = make_job(make_recipe(step.stage, config, fingerprints), config, inputs, context=context)
        artifact, cached = self.store.get_or_compute(job, on_wait=console.say)
        # What was compiled for one model counts towards torch's limit of recompilations for the next.
        torch.compiler.reset()
        self.directory.link(name, artifact)
        time = "cached" if cached else f"{artifact.manifest.seconds:.1f} s"
        console.say(f"{name:<24} {time:>8}  {artifact.manifest.headline}")
        return artifact


def _places(root: Path, name: str, overrides: list[str]) -> tuple[Store, RunDirectory, StageContext]:
    settings = run_settings(None, [*overrides, f"run.root={root}", f"run.name={name}"])
    directory = RunDirectory(root=root.absolute(), name=name)
    store = Store(directory.store, checksums=settings.run.verify == "full")
    context = StageContext(
        out=directory.path,
        resume=directory.path,
        pool=store.pool,
        run_name=name,
        step_name=name,
        tracking=settings.tracking,
    )
    return store, directory, context

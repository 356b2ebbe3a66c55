"""Steps as W&B sees them: every one is a run from its start to its commit, with what came of it and from where.

Torch-free. Nothing here enters a fingerprint or touches an artifact.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from distill import wandb_run
from distill.wandb_run import Reference, RunIdentity, WandbRun
from launch.artifact import Artifact, Recipe
from launch.preemption import Preempted
from launch.stage import StageContext, StageResult
from launch.store import Job, Store
from launch.wandb_content import content_of, inputs_of

ALIAS_LENGTH = 16
"""Hexadecimal digits of a fingerprint, as in the store's directory names."""


def get_or_compute(
    job: Job, config: Any, *, store: Store, context: StageContext, say: Callable[[str], None]
) -> tuple[Artifact, bool]:
    """:meth:`Store.get_or_compute` under the eyes of W&B, where tracking is on.

    A step that computes is a W&B run meanwhile, to which its :class:`distill.tracking.Tracker` adds the curve. One that
    is committed already is shown once under every name of a run.

    Args:
        job: the step.
        config: its typed configuration.
        store: where its artifact is, or will be.
        context: with the names of run and step, and the run's directory.
        say: is told of waiting, and where W&B's run is.

    Raises:
        ValueError: as the store, or W&B does not start.
    """
    if wandb_run.mode(context.tracking) == "off":
        return store.get_or_compute(job, on_wait=say)
    step = _Step(job.recipe, config, store=store, context=context, say=say)
    try:
        artifact, cached = store.get_or_compute(replace(job, body=step.watched(job.body)), on_wait=say)
        step.publish(artifact)
    except BaseException as error:
        step.end(error)
        raise
    step.end(None)
    return artifact, cached


def show_committed(
    artifact: Artifact, config: Any, *, store: Store, context: StageContext, say: Callable[[str], None]
) -> None:
    """Show a step that is committed already, as :func:`get_or_compute` does, once under every name of a run.

    Args:
        artifact: of the step, wherever and whenever it was computed.
        config: its typed configuration.
        store: where it is.
        context: with the names of run and step, and the run's directory.
        say: is told where W&B's run is.

    Raises:
        ValueError: W&B does not start.
    """
    if wandb_run.mode(context.tracking) == "off":
        return
    step = _Step(artifact.manifest.recipe, config, store=store, context=context, say=say)
    try:
        step.publish(artifact)
    except BaseException as error:
        step.end(error)
        raise
    step.end(None)


class _Step:
    """The W&B run of one step, started when there is something to say."""

    def __init__(
        self, recipe: Recipe, config: Any, *, store: Store, context: StageContext, say: Callable[[str], None]
    ) -> None:
        self._recipe = recipe
        self._config = config
        self._context = context
        self._say = say
        place = store.path(recipe).name
        self._identity = RunIdentity(
            run_name=context.run_name, step_name=context.step_name, stage=recipe.stage, place=place
        )
        # Not among W&B's own files, which a user may delete once they are sent.
        directory = context.run_dir or store.root
        self._state_dir = directory / ".wandb_state"
        self._done = self._state_dir / f"{self._identity.id}.done"
        self._run: WandbRun | None = None

    def watched(self, body: Callable[[StageContext], StageResult]) -> Callable[[StageContext], StageResult]:
        """``body`` within the run."""

        def run(own: StageContext) -> StageResult:
            self._start()
            return body(own)

        return run

    def publish(self, artifact: Artifact) -> None:
        """Show the committed artifact, unless this run has shown it before."""
        if self._done.is_file():
            return
        if self._run is None:
            self._start()
        if self._run is None:
            return
        for number, row in enumerate(_rows(artifact)):
            self._run.log(row, number)
        try:
            content = content_of(artifact)
        except (ValueError, KeyError, TypeError, OSError) as error:
            # What is committed is of use without its pictures.
            warnings.warn(
                f"W&B gets no tables of step {self._identity.step_name}: {error}", RuntimeWarning, stacklevel=2
            )
            content = None
        if content is not None:
            tokens = sum(artifact.manifest.tokens.values())
            self._run.show(tables=content.tables, pages=content.pages, summary=content.summary, tokens=tokens)
        for source in inputs_of(artifact).values():
            self._run.takes(_reference(source, ()))
        names = (self._context.run_name, f"{self._context.run_name}.{self._context.step_name}")
        self._run.gives(_reference(artifact, names))
        if not wandb_run.is_lost():
            self._state_dir.mkdir(parents=True, exist_ok=True)
            self._done.touch()

    def end(self, error: BaseException | None) -> None:
        """Finish the run, if there is one."""
        if self._run is not None:
            preempted = isinstance(error, Preempted)
            self._run.finish(failed=error is not None and not preempted, preempted=preempted)

    def _start(self) -> None:
        recipe, names = self._recipe, self._context
        step = {"run": names.run_name, "name": names.step_name, "stage": recipe.stage}
        self._run = wandb_run.start(
            names.tracking,
            self._identity,
            settings={
                **asdict(self._config),
                "step": {**step, "fingerprint": recipe.fingerprint, "inputs": dict(recipe.inputs)},
            },
            state_dir=self._state_dir,
            files_dir=names.run_dir,
        )
        if self._run is not None and self._run.url:
            self._say(f"W&B: {self._run.url}")


def _rows(artifact: Artifact) -> Iterator[Mapping[str, float]]:
    """The artifact's curve, if it has one."""
    file = artifact.path / "metrics.jsonl"
    if file.is_file():
        yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def _reference(artifact: Artifact, aliases: tuple[str, ...]) -> Reference:
    """The artifact under a name that follows from it alone, so that every run that makes or reads it means the same."""
    manifest = artifact.manifest
    return Reference(
        name=manifest.stage,
        kind=manifest.kind,
        path=artifact.path,
        aliases=(manifest.fingerprint[:ALIAS_LENGTH], *aliases),
        metadata={
            "fingerprint": manifest.fingerprint,
            "headline": manifest.headline,
            "created_at": manifest.created_at,
            "num_bytes": sum(record.num_bytes for record in manifest.files),
            "tokens": dict(manifest.tokens),
        },
    )

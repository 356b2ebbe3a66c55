"""The store of artifacts, addressed by fingerprint.

Two runs that need the same artifact share it; two that need it at the same time compute it once. An artifact that is
there is never written again: a changed recipe has another fingerprint and stands beside the old one. What is being
written stands apart, and comes to its place by one rename once it is whole. Torch-free.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from launch.artifact import (
    MANIFEST_NAME,
    Artifact,
    DamagedArtifactError,
    InputRecord,
    Manifest,
    Recipe,
    commit,
    record_files,
)
from launch.provenance import provenance
from launch.stage import Inputs, StageContext, StageResult

TOKEN_LINE = ("student", "model", "fused", "library")
"""Inputs whose tokens an output inherits: the model, or the library, that this one was made from."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage, ready to run."""

    recipe: Recipe
    kind: str
    inputs: Inputs
    body: Callable[[StageContext], StageResult]
    context: Callable[[Path, Path], StageContext]
    """(out, resume) -> context."""
    seed: int | None = None


class Store:
    """Artifacts under one directory."""

    def __init__(self, root: Path, *, checksums: bool = True) -> None:
        self.root = root
        self.checksums = checksums
        self._verified: set[str] = set()

    @property
    def pool(self) -> Path:
        """Parts of artifacts that several of them may share, by content. It may be deleted at any time."""
        return self.root / ".pool"

    def path(self, recipe: Recipe) -> Path:
        """Where the artifact of ``recipe`` stands, or will."""
        return self.root / f"{recipe.stage}-{recipe.fingerprint[:16]}"

    def unfinished_path(self, recipe: Recipe) -> Path:
        """Where its stage writes until the commit. What a killed process leaves there is removed before the next."""
        return self.root / ".unfinished" / self.path(recipe).name

    def resume_path(self, recipe: Recipe) -> Path:
        """Where its stage keeps private state until the commit."""
        return self.root / ".resume" / self.path(recipe).name

    def clear_private_state(self, recipe: Recipe) -> None:
        """Remove what the stage of a committed artifact kept until then: a kill right after the commit leaves it."""
        shutil.rmtree(self.resume_path(recipe), ignore_errors=True)

    def has(self, recipe: Recipe) -> bool:
        """Whether an artifact stands where that of ``recipe`` belongs. Nothing of it is verified."""
        return (self.path(recipe) / MANIFEST_NAME).is_file()

    def find(self, recipe: Recipe) -> Artifact | None:
        """The committed artifact of ``recipe``, verified, or None.

        Raises:
            DamagedArtifactError: it is there but not whole.
        """
        path = self.path(recipe)
        if not self.has(recipe):
            return None
        artifact = Artifact.load(path)
        if artifact.manifest.fingerprint != recipe.fingerprint:
            raise DamagedArtifactError(
                f"{path} holds the artifact {artifact.manifest.fingerprint[:16]}, not the one that its name says; "
                f"remove {path} to have the step computed again"
            )
        self.verify(artifact)
        return artifact

    def verify(self, artifact: Artifact) -> None:
        """Check an artifact's files, once per process."""
        key = str(artifact.path.resolve())
        if key not in self._verified:
            artifact.verify(checksums=self.checksums)
            self._verified.add(key)

    def get_or_compute(self, job: Job, *, on_wait: Callable[[str], None]) -> tuple[Artifact, bool]:
        """The artifact of ``job``, and whether it was there already.

        Holds the artifact's lock while it computes; ``on_wait`` is told when another process holds it.

        Raises:
            ValueError: the stage refused its input, or the disk is full.
            DamagedArtifactError: the artifact or one of its inputs is not whole.
        """
        found = self.find(job.recipe)
        if found is not None:
            self.clear_private_state(job.recipe)
            return found, True
        with self._lock(job.recipe, on_wait):
            found = self.find(job.recipe)
            if found is not None:
                return found, True
            for artifact in job.inputs.values():
                self.verify(artifact)
            return self._compute(job), False

    @contextmanager
    def _lock(self, recipe: Recipe, on_wait: Callable[[str], None]) -> Iterator[None]:
        directory = self.root / ".locks"
        make_directory(directory)
        lock = filelock.FileLock(directory / f"{self.path(recipe).name}.lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            on_wait(f"another process is computing {self.path(recipe).name}; waiting for it")
            lock.acquire(poll_interval=0.5)
        try:
            yield
        finally:
            lock.release()

    def _compute(self, job: Job) -> Artifact:
        place, resume = self.path(job.recipe), self.resume_path(job.recipe)
        out = self.unfinished_path(job.recipe)
        # Torn writes of a killed attempt, or what is left of an artifact whose manifest was removed. What may be
        # resumed lies apart from them.
        for leftover in (out, place):
            if leftover.exists():
                shutil.rmtree(leftover)
        started = time.monotonic()
        way_out = (
            "free some space, or set run.root=<another disk>, and start again: earlier artifacts and resume points are "
            "whole"
        )
        with full_disk_explained(self.root, writer=job.recipe.stage, way_out=way_out):
            try:
                make_directory(out)
                make_directory(resume)
                result = job.body(job.context(out, resume))
                manifest = self._manifest(job, result, out, seconds=time.monotonic() - started)
                artifact = commit(out, manifest, to=place)
            except (Exception, KeyboardInterrupt):
                shutil.rmtree(out, ignore_errors=True)
                raise
        shutil.rmtree(resume, ignore_errors=True)
        self._verified.add(str(artifact.path.resolve()))
        return artifact

    def _manifest(self, job: Job, result: StageResult, out: Path, *, seconds: float) -> Manifest:
        return Manifest(
            kind=job.kind,
            stage=job.recipe.stage,
            stage_version=job.recipe.stage_version,
            fingerprint=job.recipe.fingerprint,
            config=job.recipe.config,
            externals=job.recipe.externals,
            inputs={
                name: InputRecord(
                    kind=artifact.manifest.kind,
                    fingerprint=artifact.manifest.fingerprint,
                    path=os.path.relpath(artifact.path, self.root),
                )
                for name, artifact in job.inputs.items()
            },
            files=record_files(out),
            headline=result.headline,
            metrics=json_metrics(result.metrics),
            tokens=_tokens(job, result),
            seconds=round(seconds, 3),
            provenance=provenance(seed=job.seed),
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def _tokens(job: Job, result: StageResult) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for name in TOKEN_LINE:
        if name in job.inputs:
            tokens.update(job.inputs[name].manifest.tokens)
    if result.tokens:
        tokens[job.recipe.stage] = tokens.get(job.recipe.stage, 0) + result.tokens
    return tokens


def make_directory(path: Path) -> None:
    """Create ``path`` and its parents.

    Raises:
        ValueError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise ValueError(
            f"cannot create {path}: {error.strerror}; set run.root to a directory that you may write to"
        ) from error


@contextmanager
def full_disk_explained(place: Path, *, writer: str, way_out: str) -> Iterator[None]:
    """Turn a failure for want of space into one line.

    Args:
        place: on the disk.
        writer: what wrote, "the report".
        way_out: what to do.

    Raises:
        ValueError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        free_gib = shutil.disk_usage(place).free / 2**30
        raise ValueError(
            f"the disk under {place} is full ({free_gib:.2f} GiB free) while {writer} wrote; {way_out}"
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error`` says that no space is left. Libraries in other languages say so in words only."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    current: BaseException | None = error
    while current is not None:
        if (isinstance(current, OSError) and current.errno in codes) or "No space left on device" in str(current):
            return True
        current = current.__cause__ or current.__context__
    return False


def json_metrics(value: Any) -> Any:
    """``value`` with non-finite floats replaced by None, so that every manifest is valid JSON."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {key: json_metrics(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_metrics(item) for item in value]
    return value

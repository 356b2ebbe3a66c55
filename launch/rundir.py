"""Every file and directory name of a run, in one place. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

from distill.files import write_whole
from launch.artifact import Artifact
from launch.store import make_directory

RESERVED_NAMES = ("report", "store", "wandb")
"""Names that a step may not have: they stand beside the steps' links."""


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """``<root>/<name>``: links to the artifacts of one run, its configuration and its report."""

    root: Path
    name: str

    @classmethod
    def at(cls, path: Path) -> RunDirectory:
        """The run whose directory is ``path``."""
        return cls(root=path.parent, name=path.name)

    @property
    def path(self) -> Path:
        """The run's own directory."""
        return self.root / self.name

    @property
    def store(self) -> Path:
        """Artifacts of all runs under the same root."""
        return self.root / "store"

    @property
    def config_file(self) -> Path:
        """What ran, resolved."""
        return self.path / "config.yaml"

    @property
    def steps_file(self) -> Path:
        """Order and fingerprints of the steps; it is there once the run has finished."""
        return self.path / "steps.json"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the directory and hold it for this process.

        Raises:
            ValueError: another process runs under the same name.
        """
        make_directory(self.path)
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise ValueError(
                f"a run named {self.name!r} is going on in {self.path}; wait for it, or give this one another name "
                "with run.name=<name>"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def link(self, step: str, artifact: Artifact) -> None:
        """Point ``<run>/<step>`` at the artifact, atomically, so that a reader never finds it missing."""
        link, temporary = self.path / step, self.path / f".{step}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(artifact.path, self.path))
        temporary.rename(link)

    def linked(self, step: str) -> Artifact | None:
        """What ``<run>/<step>`` pointed at when this run's name was last used."""
        try:
            return Artifact.load((self.path / step).resolve())
        except ValueError:
            # Removed or damaged since: the step that needs it will say so.
            return None

    def write_steps(self, steps: Mapping[str, str]) -> None:
        """Record the steps' order, so that a report can be made again from the directory alone."""
        write_whole(self.steps_file, json.dumps(dict(steps), indent=1))

    def read_steps(self) -> dict[str, Artifact]:
        """Artifacts by step, in order.

        Raises:
            ValueError: the directory is not a run, or the run has not finished.
        """
        file = self.steps_file
        if not file.is_file():
            raise ValueError(
                f"{self.path} is not a finished run: it has no steps.json; name a directory under run.root"
            )
        steps: dict[str, str] = json.loads(file.read_text())
        artifacts = {step: Artifact.load((self.path / step).resolve()) for step in steps}
        for step, artifact in artifacts.items():
            if artifact.manifest.fingerprint != steps[step]:
                raise ValueError(
                    f"{self.path} was started again and has not finished: step {step} is another now; finish it first"
                )
        return artifacts

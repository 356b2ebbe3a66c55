"""Resume points: the private state from which an interrupted training run goes on.

A resume point is a directory ``step_<n>`` that appears by one rename and never changes: safetensors files, JSON, and
the commit marker ``commit.json`` with the size and checksum of each. A kill at any moment leaves whole points and, at
worst, a ``step_<n>.tmp`` that is never read. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distill.engine.base import TensorGroups

NUM_KEPT = 2
"""Resume points that stay: the newest, and the one before in case the disk damages it."""
_MARKER = "commit.json"
_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """One whole resume point."""

    directory: Path
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """JSON values."""

    def tensors(self) -> TensorGroups:
        """The tensors that were saved, on the CPU."""
        return {path.stem: load_file(path) for path in sorted(self.directory.glob("*.safetensors"))}


def save(directory: Path, step: int, *, tensors: TensorGroups, state: dict[str, Any]) -> Path:
    """Commit the resume point of ``step`` and remove all but the last :data:`NUM_KEPT` up to it.

    Raises:
        ValueError: it could not be written, for example to a full disk. Earlier points stay as they were.
    """
    final = _point_directory(directory, step)
    partial = final.with_name(f"{final.name}.tmp")
    try:
        for leftover in directory.glob("step_*.tmp"):
            shutil.rmtree(leftover)
        _write(partial, tensors, state)
        if final.exists():  # Only a damaged point is written again.
            shutil.rmtree(final)
        partial.rename(final)
        _fsync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = [path.name for path in _points(directory).values()]
        raise ValueError(
            f"{final.name} could not be written to {directory}: {error}; make room and run again to go on from "
            f"{kept[-1] if kept else 'the start'}"
        ) from error
    _remove_all_but_last(directory, step)
    return final


def latest(directory: Path) -> ResumePoint | None:
    """The newest whole resume point in ``directory``; damaged ones are passed over with a warning."""
    for step, path in reversed(_points(directory).items()):
        damage = _damage(path)
        if damage is None:
            return ResumePoint(directory=path, step=step, state=json.loads((path / _STATE).read_text()))
        warnings.warn(f"resume point {path} is damaged and not used: {damage}", RuntimeWarning, stacklevel=2)
    return None


def _write(partial: Path, tensors: TensorGroups, state: dict[str, Any]) -> None:
    partial.mkdir(parents=True)
    for group, named in tensors.items():
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, partial / f"{group}.safetensors")
    (partial / _STATE).write_text(json.dumps(state))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(partial.iterdir())}
    (partial / _MARKER).write_text(json.dumps({"files": files}, indent=1))
    for path in (*partial.iterdir(), partial):
        _fsync(path)


def _damage(path: Path) -> str | None:
    """What is wrong with a resume point, or None."""
    try:
        files = json.loads((path / _MARKER).read_text())["files"]
        for name, expected in files.items():
            num_bytes = (path / name).stat().st_size
            if num_bytes != expected["bytes"]:
                return f"{name} has {num_bytes} bytes, not {expected['bytes']}"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _points(directory: Path) -> dict[int, Path]:
    """Directories of resume points by step, in rising order."""
    steps = [
        int(path.name.removeprefix("step_"))
        for path in directory.glob("step_*")
        if path.name.removeprefix("step_").isdigit()
    ]
    return {step: _point_directory(directory, step) for step in sorted(steps)}


def _point_directory(directory: Path, step: int) -> Path:
    return directory / f"step_{step}"


def _remove_all_but_last(directory: Path, newest_step: int) -> None:
    """Points beyond the newest are damaged ones that :func:`latest` passed over: they go too."""
    points = _points(directory)
    kept = [step for step in points if step <= newest_step][-NUM_KEPT:]
    for step, path in points.items():
        if step not in kept:
            shutil.rmtree(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

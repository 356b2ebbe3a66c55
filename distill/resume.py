"""Resume points: the private state from which an interrupted training run goes on.

A resume point is a directory ``step_<n>`` that appears by one rename and never changes: files of state, JSON, and the
commit marker ``commit.json`` with the size and checksum of each. A kill at any moment leaves whole points and, at
worst, a ``step_<n>.tmp`` that is never read.

A point belongs to one process (:func:`save`, :func:`latest`) or to all that work together (:func:`save_together`,
:func:`latest_together`), which then share the directory and deal out the checksums among them.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException

from distill import distributed
from distill.engine.base import TensorGroups
from distill.files import flush_to_disk, sha256_of

Keep = Callable[[Sequence[int]], Sequence[int]]
"""Of the steps of all points, in rising order, those whose points stay once the newest is committed."""
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
        """The tensors of :func:`save`, on the CPU."""
        return {path.stem: load_file(path) for path in sorted(self.directory.glob("*.safetensors"))}


def last_two(steps: Sequence[int]) -> Sequence[int]:
    """Keep the newest point, and the one before in case the disk damages it."""
    return steps[-2:]


def save(directory: Path, step: int, *, tensors: TensorGroups, state: dict[str, Any], keep: Keep = last_two) -> Path:
    """Commit this process's own resume point of ``step``.

    Args:
        directory: private directory of this process's run.
        step: optimizer steps done.
        tensors: come back from :meth:`ResumePoint.tensors`.
        state: JSON values.
        keep: which points stay.

    Raises:
        ValueError: it could not be written, for example to a full disk. Earlier points stay as they were.
    """

    def write(partial: Path) -> None:
        for group, named in tensors.items():
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, partial / f"{group}.safetensors")

    final, partial = _places(directory, step)
    with _explained(directory, step):
        _start(partial)
        write(partial)
        _write_state(partial, state)
        _commit(partial, final, [_described(path) for path in _files(partial)], keep)
    return final


def save_together(
    directory: Path,
    step: int,
    *,
    write: Callable[[Path], None],
    state: dict[str, Any],
    keep: Keep = last_two,
    group: ProcessGroup | None = None,
) -> Path:
    """Commit a resume point of all processes, as :func:`save`; every process calls it.

    Args:
        directory: private directory of the run, on a file system that all processes share.
        step: optimizer steps done.
        write: called in every process with an existing directory, to write files that no other one writes.
        state: JSON values, of the first process.
        keep: which points stay.
        group: :func:`distill.distributed.background_group` in a thread beside the one that trains.

    Raises:
        ValueError: as :func:`save`, in the process that could not write.
    """
    final, partial = _places(directory, step)
    # The group has its own; that of the others would be training's too.
    limited = distributed.limited(distributed.STORAGE_TIMEOUT) if group is None else nullcontext()
    with _explained(directory, step), limited:
        if distributed.is_main():
            _start(partial)
        distributed.barrier(group)
        write(partial)
        if distributed.is_main():
            _write_state(partial, state)
        distributed.barrier(group)
        # One process's list for all: others may see what is new in a shared directory only later.
        names = distributed.gather_objects([path.relative_to(partial) for path in _files(partial)], group)[0]
        described = [_described(partial / name) for name in _own_share(names)]
        files = [entry for entries in distributed.gather_objects(described, group) for entry in entries]
        if distributed.is_main():
            _commit(partial, final, sorted(files, key=lambda entry: entry[0]), keep)
        distributed.barrier(group)
    return final


def latest(directory: Path) -> ResumePoint | None:
    """The newest whole resume point in ``directory``; damaged ones are passed over with a warning."""
    for step, path in reversed(_points(directory).items()):
        if (point := _whole(path, step, _damage(path))) is not None:
            return point
    return None


def latest_together(directory: Path) -> ResumePoint | None:
    """As :func:`latest`, the same point in every process; every process calls it."""
    # What one process sees of a shared directory, all others may see later.
    points = distributed.gather_objects(list(_points(directory).items()))[0]
    with distributed.limited(distributed.STORAGE_TIMEOUT):
        for step, path in reversed(points):
            damages = distributed.gather_objects(_damage(path, own_share=True))
            if (point := _whole(path, step, next((damage for damage in damages if damage), None))) is not None:
                return point
    return None


def load_together(point: ResumePoint, load: Callable[[Path], None]) -> None:
    """Call ``load`` with the directory of ``point``; every process calls it.

    Raises:
        ValueError: its files do not hold what is asked for, or could not be read.
    """
    try:
        with distributed.limited(distributed.STORAGE_TIMEOUT):
            load(point.directory)
    except (OSError, KeyError, SafetensorError, CheckpointException) as error:
        raise ValueError(
            f"resume point {point.directory} could not be loaded: {_first_line(error)}; where the code or its "
            "libraries have changed since, go back to what wrote it; otherwise remove it, and run again to go on from "
            "the one before it, if there is one"
        ) from error


def _whole(path: Path, step: int, damage: str | None) -> ResumePoint | None:
    if damage is None:
        return ResumePoint(directory=path, step=step, state=json.loads((path / _STATE).read_text()))
    warnings.warn(f"resume point {path} is damaged and not used: {damage}", RuntimeWarning, stacklevel=3)
    return None


def _places(directory: Path, step: int) -> tuple[Path, Path]:
    """Where the point of ``step`` is to stand, and where it is written first."""
    final = _point_directory(directory, step)
    return final, final.with_name(f"{final.name}.tmp")


@contextmanager
def _explained(directory: Path, step: int) -> Iterator[None]:
    """Turn a failure to write the point of ``step`` into one line that says where the run can go on."""
    final, partial = _places(directory, step)
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = [path.name for path in _points(directory).values()]
        raise ValueError(
            f"{final.name} could not be written to {directory}: {_first_line(error)}; make room and run again to go on "
            f"from {kept[-1] if kept else 'the start'}"
        ) from error


def _first_line(error: BaseException) -> str:
    """What went wrong; of a failure in several processes, in the first of them."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _start(partial: Path) -> None:
    """Make the directory that the point is written in; leftovers of kills go."""
    for leftover in partial.parent.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _write_state(partial: Path, state: dict[str, Any]) -> None:
    (partial / _STATE).write_text(json.dumps(state))


def _commit(partial: Path, final: Path, files: Sequence[tuple[str, dict[str, Any]]], keep: Keep) -> None:
    """Write the marker over the files that are described, have the point appear, and remove those that do not stay."""
    (partial / _MARKER).write_text(json.dumps({"files": dict(files)}, indent=1))
    flush_to_disk(partial / _MARKER)
    for path in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        flush_to_disk(path)
    if final.exists():  # Only a damaged point is written again.
        shutil.rmtree(final)
    partial.rename(final)
    flush_to_disk(final.parent)
    _remove_all_but_kept(final.parent, int(final.name.removeprefix("step_")), keep)


def _files(point: Path) -> list[Path]:
    """All files of a point but the marker, at any depth."""
    return sorted(path for path in point.rglob("*") if path.is_file() and path != point / _MARKER)


def _own_share(files: Sequence[Any]) -> Sequence[Any]:
    """What this process reads to compute checksums, so that all files are read by one."""
    return files[distributed.rank() :: distributed.world_size()]


def _described(path: Path) -> tuple[str, dict[str, Any]]:
    """Name within the point, and size and checksum, of a file that is on disk from then on."""
    flush_to_disk(path)
    point = next(parent for parent in path.parents if parent.name.startswith("step_"))
    return str(path.relative_to(point)), {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _damage(path: Path, *, own_share: bool = False) -> str | None:
    """What is wrong with a resume point, or with this process's share of its files; or None."""
    try:
        files = list(json.loads((path / _MARKER).read_text())["files"].items())
        for name, expected in _own_share(files) if own_share else files:
            num_bytes = (path / name).stat().st_size
            if num_bytes != expected["bytes"]:
                return f"{name} has {num_bytes} bytes, not {expected['bytes']}"
            if sha256_of(path / name) != expected["sha256"]:
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


def _remove_all_but_kept(directory: Path, newest_step: int, keep: Keep) -> None:
    """Points beyond the newest are damaged ones that :func:`latest` passed over: they go too."""
    points = _points(directory)
    kept = keep([step for step in points if step <= newest_step])
    for step, path in points.items():
        if step not in kept:
            shutil.rmtree(path)

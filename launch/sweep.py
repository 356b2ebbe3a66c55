"""Sweeps: every point is a run of its own, wherever a launcher of Hydra runs it. Torch-free.

What became of a point is a file in the directory of the sweep, so that it reaches us from whatever process or machine
ran it, and outlives the process that started them all.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.markup import escape

from distill.files import write_whole
from launch import console, preemption, processes
from launch.cluster_config import ClusterConfig
from launch.commands import check_target, run_places, run_target
from launch.config import (
    RunSettings,
    compose_pipeline,
    is_telling,
    launchers,
    multirun,
    pipeline_names,
    run_name,
    sweep_points,
)
from launch.rundir import RunDirectory
from launch.slurm_commands import InQueueError
from launch.store import make_directory

SWEEP_FILE = "sweep.json"
PREFIX = "sweep-"
"""Of a sweep's name: one point alone would have the name of its run."""
LAUNCHER = "hydra/launcher="
PLUGINS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
"""Launcher -> the package that brings it."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    overrides: tuple[str, ...]
    run: Path
    """Its directory."""
    cluster: ClusterConfig | None = None
    """Where it is to run; unknown where the sweep is read from its directory."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """``<run.root>/sweep-<target>,<overrides>``: which runs belong together, and what became of them."""

    path: Path
    target: str
    points: tuple[Point, ...]

    @classmethod
    def planned(cls, target: str, overrides: Sequence[str]) -> Sweep:
        """The sweep of a command line; nothing is made.

        Raises:
            ValueError: an override cannot be read, or a point is wrong.
        """
        points = []
        for texts in sweep_points(overrides):
            check_target(target, texts)
            settings, run = _places(target, texts)
            points.append(Point(overrides=tuple(texts), run=run.path, cluster=settings.cluster))
        name = PREFIX + run_name(target, list(overrides))
        return cls(path=points[0].run.parent / name, target=target, points=tuple(points))

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """The sweep whose directory is ``path``."""
        content = json.loads((path / SWEEP_FILE).read_text(encoding="utf-8"))
        points = (
            Point(overrides=tuple(point["overrides"]), run=Path(os.path.normpath(path / point["run"])))
            for point in content["points"]
        )
        return cls(path=path, target=content["target"], points=tuple(points))

    @cached_property
    def swept(self) -> dict[str, tuple[str, ...]]:
        """Keys whose values are not the same in all points -> the values, point by point."""
        typed = [
            {key: value for key, _, value in (text.lstrip("+").partition("=") for text in point.overrides)}
            for point in self.points
        ]
        columns = {key: tuple(own[key] for own in typed) for key in typed[0] if is_telling(key)}
        return {key: values for key, values in columns.items() if len(set(values)) > 1}

    @property
    def submits_to(self) -> ClusterConfig | None:
        """Where its runs are chains of Slurm jobs."""
        clusters = [point.cluster for point in self.points if self.target in pipeline_names()]
        return next((cluster for cluster in clusters if cluster is not None and cluster.kind == "slurm"), None)

    def name_of(self, number: int) -> str:
        """What tells point ``number`` from the others."""
        return " ".join(f"{key}={values[number]}" for key, values in self.swept.items()) or self.target

    def write(self) -> None:
        """Make the directory, with the plan and no outcome in it."""
        make_directory(self.path / "outcomes")
        for number in range(len(self.points)):
            self._outcome(number).unlink(missing_ok=True)
        points = [
            {"overrides": list(point.overrides), "run": os.path.relpath(point.run, self.path)} for point in self.points
        ]
        content = json.dumps({"target": self.target, "points": points}, indent=1) + "\n"
        (self.path / SWEEP_FILE).write_text(content, encoding="utf-8")

    def record(self, number: int, error: str | None, *, is_stopped: bool = False) -> None:
        """What became of point ``number``: None, or why it failed or stopped with its state saved."""
        write_whole(self._outcome(number), json.dumps({"error": error, "is_stopped": is_stopped}))

    def error_of(self, number: int) -> str | None:
        """Why point ``number`` failed; None if it did not, or nothing is known of it."""
        return self._read_outcome(number)["error"]

    def has_ended(self, number: int) -> bool:
        """Whether point ``number`` has done what it could, here or elsewhere."""
        return self._outcome(number).is_file()

    def stopped(self) -> str | None:
        """What a point said that was asked to stop; None without one."""
        outcomes = (self._read_outcome(number) for number in range(len(self.points)))
        return next((outcome["error"] for outcome in outcomes if outcome["is_stopped"]), None)

    def _outcome(self, number: int) -> Path:
        return self.path / "outcomes" / f"{number}.json"

    def _read_outcome(self, number: int) -> dict:
        file = self._outcome(number)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"error": None, "is_stopped": False}


def is_sweep(path: Path) -> bool:
    """Whether ``path`` is the directory of a sweep."""
    return (path / SWEEP_FILE).is_file()


def run_sweep(target: str, overrides: list[str], *, dry_run: bool) -> int:
    """Run every point. All are checked before the first; one that fails later does not stop the others, unless it has
    torn the processes of a torchrun apart. Returns the exit status: 0, or 2 where a point failed.

    Raises:
        ValueError: a point or the launcher is wrong; nothing has run.
        Preempted: a point was asked to stop, and those behind it with it.
    """
    launcher = _check_launcher(overrides)
    sweep = Sweep.planned(target, overrides)
    if launcher not in (None, "basic") and sweep.submits_to is not None:
        raise ValueError(
            f"cluster=slurm submits every run as a chain of jobs, and {LAUNCHER}{launcher} would start each as one "
            "process elsewhere; drop one of the two"
        )
    if dry_run:
        for number, point in enumerate(sweep.points):
            console.say(_title(sweep, number))
            run_target(target, list(point.overrides), dry_run=True)
        if sweep.submits_to is not None:
            console.say(f"\n[bold]report[/], after all of them:\n{escape(_report_script(sweep, sweep.submits_to))}")
        return 0
    directory = RunDirectory.at(sweep.path)
    with directory.held():
        sweep.write()
        job = PointJob(sweep=sweep, command=tuple(sys.argv), process=_process())
        lost = None
        try:
            multirun(target, overrides, job)
        except Exception as error:
            if os.environ.get("FUSION_TRACEBACK"):
                raise
            lost = error
        if (stopped := sweep.stopped()) is not None:
            raise preemption.Preempted(stopped)
        return _finish(sweep, lost)


@dataclass(frozen=True, kw_only=True)
class PointJob:
    """One point of a sweep, in the process that it is called in: this one, or one that it was pickled for."""

    sweep: Sweep
    command: tuple[str, ...]
    """As it was typed, for the provenance of what is made elsewhere."""
    process: str
    """That started the sweep."""

    def __call__(self, number: int) -> None:
        """Run point ``number`` and record what became of it. Raises nothing that a sweep could go on after."""
        sweep, point = self.sweep, self.sweep.points[number]
        if processes.have_failed() or sweep.stopped() is not None:
            return
        if _process() != self.process:
            self._settle(number)
        console.say(_title(sweep, number))
        try:
            run_target(sweep.target, list(point.overrides), dry_run=False)
        except preemption.Preempted as error:
            sweep.record(number, str(error), is_stopped=True)
        except InQueueError as error:
            # Not what became of it: this sweep's earlier submission is still on its way.
            console.say(f"[yellow]{escape(str(error))}[/]")
            sweep.record(number, None)
        except processes.AlreadyToldError:
            sweep.record(number, "another process of the torchrun failed")
        except Exception as error:
            if os.environ.get("FUSION_TRACEBACK") or not isinstance(error, ValueError | OSError):
                traceback.print_exc()
            sweep.record(number, console.describe(error))
            console.complain_of(error, of=sweep.name_of(number))
        else:
            sweep.record(number, None)

    def _settle(self, number: int) -> None:
        """In another process, whose lines mix with those of others."""
        sys.argv[:] = self.command
        processes.silence_progress_bars()
        console.label_lines(f"{number + 1}|")


def _process() -> str:
    return f"{os.uname().nodename}:{os.getpid()}"


def _places(target: str, overrides: list[str]) -> tuple[RunSettings, RunDirectory]:
    pipeline = compose_pipeline(target, overrides) if target in pipeline_names() else None
    settings, run, _ = run_places(target, pipeline, overrides)
    return settings, run


def _check_launcher(overrides: Sequence[str]) -> str | None:
    """The launcher that is asked for, if one is.

    Raises:
        ValueError: it cannot start the points here.
    """
    chosen = [text.removeprefix(LAUNCHER) for text in overrides if text.startswith(LAUNCHER)]
    if not chosen:
        return None
    if processes.count() > 1:
        raise ValueError(
            "hydra/launcher starts processes of its own, which those of torchrun know nothing of; drop one"
        )
    name = chosen[-1]
    if name in launchers():
        return name
    if name in PLUGINS:
        raise ValueError(
            f"hydra/launcher={name} is not installed; install it with `pip install {PLUGINS[name]}`, or all of them "
            "with `pip install -e '.[sweeps]'`"
        )
    raise ValueError(f"unknown hydra/launcher={name}; known are {', '.join(sorted({*launchers(), *PLUGINS}))}")


def _title(sweep: Sweep, number: int) -> str:
    return f"[bold]run {number + 1} of {len(sweep.points)}[/]: {escape(sweep.name_of(number))}"


def _finish(sweep: Sweep, lost: Exception | None) -> int:
    numbers = range(len(sweep.points))
    if lost is not None:
        console.complain(
            f"{escape(console.describe(lost))}; runs that did not end with it may still go on elsewhere, the same "
            "command goes on with the others"
        )
    cluster = sweep.submits_to
    if sweep.target in pipeline_names() and (cluster is None or not _is_report_submitted(sweep, cluster)):
        from launch.report_command import report_sweep

        report_sweep(sweep)
    has_failed = lost is not None or any(sweep.error_of(number) is not None for number in numbers)
    return 2 if has_failed else 0


def _report_script(sweep: Sweep, cluster: ClusterConfig) -> str:
    from launch.slurm import plan_report
    from launch.slurm_site import read_site

    return plan_report(RunDirectory.at(sweep.path), sweep.target, cluster=cluster, site=read_site())


def _is_report_submitted(sweep: Sweep, cluster: ClusterConfig) -> bool:
    """Submit the job that makes the page, unless no run has a job left that it could wait for."""
    from launch.slurm import submit_report

    runs = [RunDirectory.at(point.run) for point in sweep.points]
    place = escape(str(sweep.path))
    try:
        job = submit_report(_report_script(sweep, cluster), RunDirectory.at(sweep.path), runs)
    except ValueError as error:
        # The runs are on their way; the page is not worth a sweep that fails.
        console.complain(
            f"no job for the page: {escape(str(error))}; when the runs have ended: python -m launch report {place}"
        )
        return True
    if job is None:
        return False
    console.say(
        f"job {job} writes {place}/report/index.html when all of them have ended; with those that have finished, at "
        f"any time: python -m launch report {place}"
    )
    return True

"""The command ``report``: a finished run's report again, or one page over several runs. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape

from distill.config import require
from launch import console
from launch.artifact import Artifact
from launch.finished_run import FinishedRun
from launch.report import write_report
from launch.rundir import RunDirectory
from launch.runs_compared import Comparison, common_directory, compare
from launch.runs_table import print_table, write_csv
from launch.store import make_directory
from launch.summary import print_summary
from launch.sweep import Sweep, is_sweep

USAGE = "python -m launch report <directory of a run or a sweep>... [--out <directory>]"
OUT = "--out"
NOT_FINISHED = "has not finished"


def run(arguments: Sequence[str]) -> int:
    """Write the page and print its table: of one run into its ``report/``, of a sweep into that of its directory, of
    several runs into ``--out`` or a directory beside them that is named after them. Returns the exit status.

    Raises:
        ValueError: the arguments are not as in :data:`USAGE`, or a run has not finished.
    """
    directories, out = _parse(list(arguments))
    if len(directories) == 1 and not is_sweep(directories[0]):
        require(out is None, f"{OUT} is for several runs; the report of one stands in its own directory; {USAGE}")
        only = RunDirectory.at(directories[0])
        write_and_show(only, only.read_steps())
    elif len(directories) == 1:
        report_sweep(Sweep.read(directories[0]), out)
    else:
        runs = [RunDirectory.at(path) for path in _runs_of(directories)]
        title = " and ".join(run.name for run in runs) if len(runs) == 2 else f"{len(runs)} runs"
        write_and_show_all(compare(title, dict(enumerate(runs, start=1))), out or _place_of(runs))
    return 0


def _place_of(runs: Sequence[RunDirectory]) -> Path:
    """Where the page over ``runs`` lies: a function of the set, also when all that holds them is moved."""
    common = common_directory(runs)
    names = "\n".join(sorted(run.path.relative_to(common).as_posix() for run in runs))
    return common / f"comparison-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def report_sweep(sweep: Sweep, out: Path | None = None) -> None:
    """The page and the table of the runs of a sweep that have finished; the others are named, with their errors.

    Raises:
        ValueError: ``out`` cannot be written to.
    """
    finished: dict[int, RunDirectory] = {}
    unfinished: dict[str, str] = {}
    for number, point in enumerate(sweep.points):
        directory = RunDirectory.at(point.run)
        error = sweep.error_of(number)
        if error is None:
            error = _why_missing(directory)
        if error is None:
            finished[number + 1] = directory
        else:
            unfinished[f"{number + 1}: {sweep.name_of(number)}"] = error
    if finished:
        keys = " and ".join(key.rpartition(".")[2] for key in sweep.swept)
        title = f"{sweep.target} over {keys}" if keys else sweep.target
        columns = {key: [values[number - 1] for number in finished] for key, values in sweep.swept.items()}
        comparison = compare(title, finished, columns=columns, unfinished=unfinished)
        write_and_show_all(comparison, out or sweep.path / "report")
    else:
        for name, error in unfinished.items():
            console.say(f"[yellow]missing:[/] {escape(name)}: {escape(error)}")
    waiting = sum(error == NOT_FINISHED for error in unfinished.values())
    if waiting:
        console.say(
            f"{waiting} not finished; for the table with them: python -m launch report {escape(str(sweep.path))}"
        )


def write_and_show(run_directory: RunDirectory, artifacts: Mapping[str, Artifact]) -> None:
    """Write the report of one finished run and print its summary."""
    page = write_report(run_directory.path, run_directory.name, artifacts)
    print_summary(json.loads((page.parent / "report.json").read_text()))
    console.say(f"report: {escape(str(page))}")


def write_and_show_all(comparison: Comparison, out: Path) -> None:
    """Write ``index.html``, ``runs.json``, ``runs.csv`` and ``pareto.svg`` (one per group of runs that were measured
    alike) into ``out``, and print the table. Runs without a page of their own get one, so that links lead somewhere."""
    from launch.runs_page import pareto_file, render_runs

    make_directory(out)
    page = out / "index.html"
    for compared in comparison.runs:
        if not (compared.directory.path / "report" / "index.html").is_file():
            write_report(compared.directory.path, compared.directory.name, compared.run.steps)
    content = json.dumps(comparison.as_dict(), indent=1, allow_nan=False) + "\n"
    (out / "runs.json").write_text(content, encoding="utf-8")
    write_csv(comparison, out / "runs.csv")
    for number, group in enumerate(comparison.groups, start=1):
        picture = pareto_file(group)
        if picture:
            name = "pareto.svg" if number == 1 else f"pareto-{number}.svg"
            (out / name).write_text(picture, encoding="utf-8")
    page.write_text(render_runs(comparison, page), encoding="utf-8")
    print_table(comparison)
    console.say(f"report: {escape(str(page))}")


def _parse(arguments: list[str]) -> tuple[list[Path], Path | None]:
    out = None
    if OUT in arguments:
        place = arguments.index(OUT)
        require(place + 1 < len(arguments), f"{OUT} needs a directory; {USAGE}")
        out = Path(arguments[place + 1]).absolute()
        del arguments[place : place + 2]
    unknown = [text for text in arguments if text.startswith("-")]
    require(not unknown, f"unknown option {' '.join(unknown)}; {USAGE}")
    require(bool(arguments), f"report takes the directory of a run, got none; {USAGE}")
    return list(dict.fromkeys(Path(text).absolute() for text in arguments)), out


def _runs_of(directories: Sequence[Path]) -> list[Path]:
    """Directories of runs, those of a sweep in place of its own."""
    paths: dict[Path, None] = {}
    for directory in directories:
        points = Sweep.read(directory).points if is_sweep(directory) else None
        paths |= dict.fromkeys([directory] if points is None else [point.run for point in points])
    return list(paths)


def _why_missing(directory: RunDirectory) -> str | None:
    """Why a run cannot stand in a table; None if it can."""
    if not directory.steps_file.is_file():
        return NOT_FINISHED
    try:
        assert FinishedRun(directory.read_steps()).models
    except ValueError as error:
        return str(error)
    return None

"""What a run prints. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.artifact import Artifact
from launch.pipeline import Listener, PlannedStep
from launch.rundir import RunDirectory
from launch.store import Store

if TYPE_CHECKING:
    from launch.slurm import StepJob

_console = Console(highlight=False, soft_wrap=True)
_label = ""


def listener(num_steps: int) -> Listener:
    """One line per finished step: its number, name, time and headline."""
    done = 0

    def started(step: str, stage: str, change: str | None) -> None:
        if change:
            _console.print(f"{_label}[yellow]{step}: changed since the last run of this name: {change}[/]")

    def finished(step: str, artifact: Artifact, cached: bool) -> None:
        nonlocal done
        done += 1
        time = "   cached" if cached else f"{artifact.manifest.seconds:7.1f} s"
        _console.print(
            f"{_label}[dim]{done:2d}/{num_steps}[/] [bold]{step:<14}[/] [dim]{time}[/]  {artifact.manifest.headline}"
        )

    def waiting(message: str) -> None:
        _console.print(f"{_label}[yellow]{message}[/]")

    return Listener(started=started, waiting=waiting, finished=finished)


def print_plan(steps: Sequence[PlannedStep], store: Store) -> None:
    """The table of ``--dry-run``."""
    table = Table(box=None, pad_edge=False)
    for column in ("step", "stage", "fingerprint", "state"):
        table.add_column(column)
    for step in steps:
        state = "committed" if store.find(step.recipe) else "to compute"
        table.add_row(step.name, step.recipe.stage, step.recipe.fingerprint[:16], state)
    _console.print(table)


def print_scripts(jobs: Sequence[StepJob]) -> None:
    """The job scripts, word for word, as ``--dry-run`` shows them."""
    for job in jobs:
        _console.print(f"\n[bold]{job.step}[/]: {job.nodes} x {job.processes_per_node} processes")
        _console.print(job.script, markup=False, end="")


def print_jobs(
    jobs: Sequence[StepJob], ids: Mapping[str, str], run: RunDirectory, beside: Mapping[str, str] | None = None
) -> None:
    """What has been submitted, what it waits for (also in other runs: ``beside``), and where its logs will be."""
    table = Table(box=None, pad_edge=False)
    for column in ("step", "job", "nodes", "after"):
        table.add_column(column)
    for job in jobs:
        after = [*(ids[step] for step in job.after), *([beside[job.step]] if beside and job.step in beside else [])]
        table.add_row(job.step, ids[job.step], str(job.nodes), ", ".join(after))
    _console.print(table)
    _console.print(f"logs: {run.path}/logs/<step>/latest")


def say(message: str) -> None:
    """One line on standard output."""
    _console.print(_label + message)


def label_lines(label: str) -> None:
    """Put ``label`` before every line of a run from now on: several runs talk at once."""
    global _label
    _label = f"[cyan]{escape(label)}[/] "


def complain_of(error: Exception, *, of: str = "") -> None:
    """``error``, of the run ``of``, as one line on standard error."""
    complain(escape(f"{of}: {describe(error)}" if of else describe(error)))


def describe(error: Exception) -> str:
    """What a user needs to know of an error, on one line."""
    if isinstance(error, OSError):
        return f"{error.filename or 'operating system'}: {error.strerror or error}"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def complain(message: str) -> None:
    """One error line on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {message}", markup=True)

"""What a run prints. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from launch.artifact import Artifact
from launch.pipeline import Listener, PlannedStep
from launch.store import Store

_console = Console(highlight=False, soft_wrap=True)


def listener(num_steps: int) -> Listener:
    """One line per finished step: its number, name, time and headline."""
    done = 0

    def started(step: str, stage: str, change: str | None) -> None:
        if change:
            _console.print(f"[yellow]{step}: changed since the last run of this name: {change}[/]")

    def finished(step: str, artifact: Artifact, cached: bool) -> None:
        nonlocal done
        done += 1
        time = "   cached" if cached else f"{artifact.manifest.seconds:7.1f} s"
        _console.print(
            f"[dim]{done:2d}/{num_steps}[/] [bold]{step:<14}[/] [dim]{time}[/]  {artifact.manifest.headline}"
        )

    return Listener(started=started, waiting=lambda message: _console.print(f"[yellow]{message}[/]"), finished=finished)


def print_plan(steps: Sequence[PlannedStep], store: Store) -> None:
    """The table of ``--dry-run``."""
    table = Table(box=None, pad_edge=False)
    for column in ("step", "stage", "fingerprint", "state"):
        table.add_column(column)
    for step in steps:
        state = "committed" if store.find(step.recipe) else "to compute"
        table.add_row(step.name, step.recipe.stage, step.recipe.fingerprint[:16], state)
    _console.print(table)


def say(message: str) -> None:
    """One line on standard output."""
    _console.print(message)


def complain(message: str) -> None:
    """One error line on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {message}", markup=True)

"""``python -m launch <stage|pipeline> [overrides] [--dry-run] [--multirun] [--step STEP]``, or behind ``torchrun -m``.

Torch-free until a stage body runs, or until several processes meet.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.markup import escape

from launch import console, preemption, processes
from launch.commands import run_one_step, run_target
from launch.config import pipeline_names
from launch.registry import STAGES
from launch.sweep import run_sweep

READING_COMMANDS = {
    "report": "launch.report_command",
    "plan": "launch.plan_table",
    "forecast": "launch.forecast",
    "dashboard": "launch.dashboard",
}
"""Commands that read what is there, or nothing, and compute no artifact -> a module with ``run(arguments) -> int``, the
exit status. What only one of them needs is imported for that one alone."""

STATUS_VARIABLE = "FUSION_JOB_STATUS"
"""Environment variable: a file for the exit status of the process that knows why all of them end. Behind torchrun,
whose own status says nothing, a job script goes by it; a job that ended without a word leaves none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point, for every process of a torchrun. Returns the exit status: 0 done, 2 refused, 75 stopped with its
    state saved, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in READING_COMMANDS:
        # Their options are their own.
        options, overrides = _parser().parse_args(given[:1]), given[1:]
    else:
        options, overrides = _parser().parse_known_args(given)
    # What went wrong is said before the other processes hear of it: torchrun ends all when one has ended.
    command = functools.partial(_status_of, functools.partial(_command, options, overrides))
    if processes.count() > 1 and not options.dry_run and options.target not in READING_COMMANDS:
        status = _status_of(functools.partial(processes.run, command))
    else:
        status = command() if processes.is_first() else 0
    if status in (0, preemption.EXIT_STATUS) and processes.is_first():
        _tell_job(status)
    return status


def _status_of(command: Callable[[], int]) -> int:
    """Exit status of ``command``, whose errors become one line."""
    try:
        return command()
    except processes.AlreadyToldError:
        return 2
    except preemption.Preempted as error:
        if processes.is_first():
            console.say(f"{escape(str(error))}; the same command goes on from there")
        return preemption.EXIT_STATUS
    except (ValueError, OSError) as error:
        if _is_refusal(error):
            _tell_job(2)
        if os.environ.get("FUSION_TRACEBACK"):
            raise
        console.complain_of(error)
        return 2
    except KeyboardInterrupt:
        if processes.is_first():
            console.complain("interrupted; the same command goes on from the last resume point")
        return 130


def _is_refusal(error: BaseException | None) -> bool:
    """Whether another attempt would end the same way: not where a disk, or another process, is behind it."""
    while error is not None:
        if isinstance(error, OSError | RuntimeError):
            return False
        error = error.__cause__
    return True


def _tell_job(status: int) -> None:
    file = os.environ.get(STATUS_VARIABLE)
    if file:
        Path(file).write_text(f"{status}\n")


def _command(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.target in READING_COMMANDS:
        return importlib.import_module(READING_COMMANDS[options.target]).run(overrides)
    unknown = [text for text in overrides if text.startswith("-")]
    if unknown:
        raise ValueError(
            f"unknown option {unknown[0]}; options are --dry-run, --multirun and --step, settings are <key>=<value>"
        )
    if options.step is not None:
        run_one_step(options, overrides)
    elif options.multirun:
        return run_sweep(_known_target(options.target), overrides, dry_run=options.dry_run)
    else:
        run_target(_known_target(options.target), overrides, dry_run=options.dry_run)
    return 0


def _parser() -> argparse.ArgumentParser:
    targets = f"pipelines: {', '.join(pipeline_names())}\nstages: {', '.join(STAGES)}"
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Puzzle search, attention pruning, FFN Fusion and distillation of a decoder.",
        epilog=(
            f"{targets}\n"
            "report: `report <run directory>` writes the report of a finished run again; of several runs, or a sweep, "
            "one page that compares them\n"
            "plan: `plan <pipeline> [overrides] [--json]` says what fits, how long it takes and what it costs\n"
            "forecast: `forecast <run directory>` says how many tokens a training still needs\n"
            "dashboard: `dashboard <run name>` makes a W&B workspace for a run"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="stage|pipeline", help="what to run; see below")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan; compute nothing")
    parser.add_argument("--step", metavar="STEP", help="run one step of a pipeline, from what is in the store")
    parser.add_argument("--multirun", action="store_true", help="sweep over comma-separated values")
    return parser


def _known_target(target: str) -> str:
    known = [*pipeline_names(), *STAGES, *READING_COMMANDS]
    if target not in known:
        raise ValueError(f"unknown stage or pipeline {target!r}; known are {', '.join(known)}")
    return target


if __name__ == "__main__":
    preemption.install()
    sys.exit(main())

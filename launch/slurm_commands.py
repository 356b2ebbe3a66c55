"""Slurm's commands: sbatch, squeue, scancel. Their complaints become one line. Torch-free."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.config import require


class InQueueError(ValueError):
    """What was to be submitted has been, and is not through yet."""


def require_slurm() -> None:
    """Raise ``ValueError`` where there is no sbatch."""
    require(
        shutil.which("sbatch") is not None,
        "cluster.kind=slurm submits with sbatch, which is not on PATH here; start this on a login node of the "
        "cluster, or set cluster=local to run here",
    )


def check(script: Path) -> None:
    """Have Slurm look at ``script`` without submitting it.

    Raises:
        ValueError: it would refuse, in its own words.
    """
    _run(["sbatch", "--test-only", str(script)])


def submit(script: Path, *, after: Sequence[str] = (), after_any: Sequence[str] = ()) -> str:
    """Submit ``script``, to start when the jobs ``after`` have ended well and the jobs ``after_any`` in whatever way.
    Returns its job id.

    Raises:
        ValueError: Slurm refuses, in its own words.
    """
    waits = [f"{how}:{':'.join(jobs)}" for how, jobs in (("afterok", after), ("afterany", after_any)) if jobs]
    # Without the second option a job whose turn can no longer come would stay in the queue for ever.
    dependency = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    return _run(["sbatch", "--parsable", *dependency, str(script)]).strip().partition(";")[0]


def queued(jobs: Mapping[str, str], *, held: bool = True) -> set[str]:
    """Those of ``jobs`` (id -> name) that wait or run; without ``held``, those that nobody holds back.

    An id alone does not tell a job: a controller that was set up anew, or has counted to its last one, gives it again.
    """
    if not jobs:
        return set()
    try:
        told = _run(["squeue", "--noheader", "--all", "--format=%A|%r|%j", f"--jobs={','.join(jobs)}"])
    except ValueError as error:
        # Slurm forgets ended jobs; asked for none but such, it complains.
        if "Invalid job id" in str(error):
            return set()
        raise
    rows = [line.strip().split("|", 2) for line in told.splitlines() if line.strip()]
    own = [(number, reason) for number, reason, name in rows if jobs.get(number) == name]
    return {number for number, reason in own if held or "held" not in reason.lower()}


def cancel(jobs: Sequence[str]) -> None:
    """Take ``jobs`` out of the queue."""
    if jobs:
        _run(["scancel", *jobs])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode != 0:
        lines = [
            re.sub(r"^(sbatch|squeue|scancel|slurm_\w+|allocation failure|error)[: ]*", "", line)
            for line in re.sub(r"\w+: error: ", "", done.stderr).splitlines()
        ]
        told = "; ".join(dict.fromkeys(line.strip() for line in lines if line.strip()))
        raise ValueError(f"{command[0]} refused: {told or f'exit status {done.returncode}'}")
    return done.stdout


def _environment() -> dict[str, str]:
    """This process's, without what a job around it was given (the new jobs would take that for theirs) and without what
    a user has set for squeue and scancel, which would hide jobs."""
    given = re.compile(r"(SLURM|SBATCH|SQUEUE|SCANCEL)_(?!CONF$)")
    return {name: value for name, value in os.environ.items() if not given.match(name)}

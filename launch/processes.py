"""The processes of a torchrun around one command. Torch-free as long as there is one process.

The first process plans, locks, commits and talks. The others wait for it, and run with it the bodies of those stages
that are for all processes. A process that fails in such a body cannot call the others back, which may be waiting for
its data: it says why and ends, its connections close, and with that the others end too.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distill.failures import SharedError
from launch.preemption import EXIT_STATUS, Preempted
from launch.registry import STAGES
from launch.stage import Inputs, StageContext, StageResult

_FAILURE = "failure"
"""Claimed by the process that fails first."""


class AlreadyToldError(Exception):
    """Another process has failed, and has said why."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One stage for all processes, as the first process sends it to the others."""

    stage: str
    config: Any
    inputs: Inputs
    context: StageContext


def count() -> int:
    """Processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that plans and talks."""
    return os.environ.get("RANK", "0") == "0"


def run(command: Callable[[], int]) -> int:
    """Run ``command`` in the first process, with the others at its service. Returns its exit status in each of them.

    Raises:
        ValueError: a stage for all failed in this process, which is not the first, before it failed anywhere else.
        AlreadyToldError: it failed in another process first.
    """
    distributed = _distributed()
    distributed.join()
    if not is_first():
        return _follow()
    status = 2
    try:
        status = command()
    finally:
        if not have_failed():
            with suppress(RuntimeError):
                distributed.from_first(status)
    if status in (0, EXIT_STATUS):
        distributed.leave()
    return status


def have_failed() -> bool:
    """Whether a process has failed in a stage for all, so that they no longer work together."""
    return count() > 1 and _distributed().is_claimed(_FAILURE)


def check_devices(device: str) -> None:
    """Refuse, before anything is computed, processes that would share a GPU under ``engine.device=<device>``.

    Raises:
        ValueError: a host has more processes than GPUs.
    """
    if count() > 1 and device != "cpu":
        _distributed().check_own_gpu()


def run_body(stage: str, config: Any, inputs: Inputs, context: StageContext) -> StageResult:
    """The body of ``stage``, in all processes if it is for all, called in the first.

    Raises:
        ValueError: it failed in the first process, before it failed anywhere else, or in all for one reason.
        AlreadyToldError: it failed in another process first.
    """
    task = _Task(stage=stage, config=config, inputs=inputs, context=context)
    if count() == 1 or not STAGES[stage].distributed:
        return _body(task)
    _distributed().from_first(task)
    return _run_together(task)


def _follow() -> int:
    """Serve the first process until it has no more to do."""
    silence_progress_bars()
    while True:
        try:
            task = _distributed().from_first()
        except RuntimeError as error:
            # The first process ended without a word, or was killed; torchrun says so.
            raise AlreadyToldError from error
        if isinstance(task, int):
            if task in (0, EXIT_STATUS):
                _distributed().leave()
            return task
        # The first process hears of it too, and says how it ends.
        with suppress(Preempted, SharedError):
            _run_together(task)


def _run_together(task: _Task) -> StageResult:
    distributed = _distributed()
    try:
        with distributed.together():
            return _body(task)
    except (Preempted, SharedError):
        raise
    except BaseException as error:
        if not _first_to_fail() and isinstance(error, Exception):
            raise AlreadyToldError from error
        if isinstance(error, ValueError | OSError):
            raise ValueError(f"process {os.environ['RANK']} of {count()}: {error}") from error
        if "onnection closed" in str(error) or "onnection reset" in str(error):
            raise ValueError(
                f"process {os.environ['RANK']} of {count()} has lost another one, which ended without a word "
                "(killed, perhaps for its memory)"
            ) from error
        if "imed out waiting" in str(error):
            raise ValueError(
                f"process {os.environ['RANK']} of {count()} has waited too long for another one, which hangs "
                f"({str(error).splitlines()[0]}); the same command goes on from the last resume point"
            ) from error
        raise


def _first_to_fail() -> bool:
    try:
        return _distributed().claim(_FAILURE)
    except RuntimeError:
        # The process that keeps the claims has ended.
        return False


def _body(task: _Task) -> StageResult:
    # Imported here, not before: a skipped step costs no import of torch.
    return STAGES[task.stage].load_body()(task.config, task.inputs, task.context)


def silence_progress_bars() -> None:
    """Draw none in this process, whose output mixes with that of others."""
    from tqdm import tqdm

    draw = tqdm.__init__
    tqdm.__init__ = lambda self, *args, **settings: draw(self, *args, **{**settings, "disable": True})


def _distributed() -> Any:
    return importlib.import_module("distill.distributed")

"""Stopping where nothing is lost: a signal asks, the processes agree between two steps, the state is saved. Torch-free.

A cluster sends SIGUSR2 some minutes before a job's time is up, and SIGTERM when it takes the nodes back. Either sets
a flag; what trains asks :func:`should_stop` after every step, saves a resume point where it says so and raises
:class:`Preempted`, upon which the process ends with :data:`EXIT_STATUS`: queue this again.
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STATUS = 75
"""Of a process that stopped with its state saved: sysexits' EX_TEMPFAIL."""

_is_asked = False
_is_polled = False


class Preempted(Exception):
    """The work stopped at a step boundary, with its state saved; the same command goes on from there."""


def install() -> None:
    """Take SIGUSR2 and SIGTERM as the wish to stop. In the main thread, before the first step.

    SIGUSR2 only ever sets the flag. SIGTERM does so where somebody looks at it (:func:`polled`), and ends the process
    as usual elsewhere; the second one always does.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, _on_signal)


@contextmanager
def polled() -> Iterator[None]:
    """Around work that calls :func:`should_stop` between its steps."""
    global _is_polled
    _is_polled = True
    try:
        yield
    finally:
        _is_polled = False


def should_stop() -> bool:
    """Whether any of the processes that work together has been asked to stop; the same answer in all of them.

    Every process calls it at the same boundary. It costs one integer over the CPUs' network, and no wait for a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _is_asked
    torch = importlib.import_module("torch")
    distributed = importlib.import_module("distill.distributed")
    num_asked = distributed.all_reduce_sum(torch.tensor([int(_is_asked)]))
    return bool(num_asked.item() > 0)


def _on_signal(number: int, _: FrameType | None) -> None:
    global _is_asked
    if number == signal.SIGTERM and (_is_asked or not _is_polled):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    _is_asked = True

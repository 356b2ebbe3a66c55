"""A process of a test that ends itself as SIGKILL ends it, at a chosen place."""

from __future__ import annotations

import os
import signal


def kill_at_call(owner: object, function: str, number: int) -> None:
    """End this process when ``owner.function`` is called for the ``number``-th time, from 0, before it does a thing."""
    original, left = getattr(owner, function), [number]

    def call(*arguments: object, **named: object) -> object:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return original(*arguments, **named)

    setattr(owner, function, call)

"""Resume points written beside training, which waits only for a copy of the state.

One point at a time is on its way: the next one waits for it, and no more than one copy of the state exists. What goes
wrong in the thread is raised in the one that trains, at the next look (:meth:`PointWriter.check`) and at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from distill import distributed, resume


class Savable(Protocol):
    """The part of :class:`distill.engine.base.Engine` that is asked for here."""

    def save(self, directory: Path) -> None:
        """Write the state."""

    def snapshot(self) -> Callable[[Path], None]:
        """Copy the state, to be written by any thread."""


class PointWriter:
    """Commits resume points of all processes to ``directory``; a context that is left when all are on disk.

    Every process has one, and calls its methods in the same order.

    Args:
        directory: private directory of the run, which all processes share.
        keep: which points stay.
        background: write in a thread; otherwise :meth:`save` waits for the disk.
    """

    def __init__(self, directory: Path, *, keep: resume.Keep, background: bool) -> None:
        self._directory = directory
        self._keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="resume_point") if background else None
        self._pending: Future[Path] | None = None
        self._committed: Path | None = None

    def save(self, step: int, engine: Savable, state: dict[str, Any], *, waits: bool) -> None:
        """Commit the state of ``engine`` after ``step``, or begin to.

        Args:
            step: optimizer steps done.
            engine: its state is copied, or written from where it is.
            state: JSON values, which do not change any more.
            waits: return when it is on disk. Nothing is copied then.

        Raises:
            ValueError: this point, or the one before, could not be written.
        """
        self.finish()
        if waits or self._thread is None:
            self._committed = resume.save_together(
                self._directory, step, write=engine.save, state=state, keep=self._keep
            )
            return
        self._pending = self._thread.submit(
            resume.save_together,
            self._directory,
            step,
            write=engine.snapshot(),
            state=state,
            keep=self._keep,
            group=distributed.background_group(),
        )

    def check(self) -> None:
        """Raise what a write that has ended went wrong with. Waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the point that is on its way.

        Raises:
            ValueError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._committed = pending.result()

    def last_committed(self) -> Path | None:
        """The newest point that this writer, or :meth:`found` before it, knows; waits for the one on its way."""
        if self._pending is not None:
            wait([self._pending])
            if self._pending.exception() is None:
                return self._pending.result()
        return self._committed

    def found(self, point: Path) -> None:
        """Say which point the run goes on from."""
        self._committed = point

    def __enter__(self) -> PointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the point that is on its way; its failure is a warning where something else has failed already."""
        try:
            self.finish()
        except Exception as failure:
            if error is None or error is failure:
                raise
            warnings.warn(str(failure), RuntimeWarning, stacklevel=2)
        finally:
            if self._thread is not None:
                self._thread.shutdown()

"""``python -m launch`` in a process group of its own, killed at a chosen moment, and what its bars told before that."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.artifact import MANIFEST_NAME

REPOSITORY = Path(__file__).resolve().parents[1]
POLL_S = 0.002
TIMEOUT_S = 1800
"""Of one command: beyond it something hangs."""
_BAR = re.compile(r"(?P<desc>[^\r\n|]*?): +(?P<percent>\d+)%\|[^|]*\| (?P<count>[\d.]+[kMG]?)/[^ ]+ \[[^\]]*tok/s")

Kind = Literal["anywhere", "training step", "resume point", "commit"]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a step is killed."""

    kind: Kind
    """anywhere: by the clock; training step: when its bar has come so far; resume point: while the first one after that
    time is written; commit: between the last file of the artifact and the end of the process."""
    fraction: float
    """0..1 of the time that the step takes, from when its stage starts to write; of a bar; of the first 20 ms of a
    commit."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Directories of one step in the store."""

    unfinished: Path
    resume: Path
    artifact: Path


@dataclass(frozen=True, kw_only=True)
class BarLine:
    """What a progress bar over tokens said once."""

    at_s: float
    """Since the start of the process."""
    desc: str
    count: str
    """Tokens done, rounded as the bar rounds them."""


class Launch:
    """One command, started at once. Its output goes to ``log``; bars are read on the way.

    Args:
        arguments: behind ``python -m launch``.
        log: file that is appended to.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        self._started = time.monotonic()
        self._lines: list[tuple[float, str]] = []
        # Every step of a bar is printed, so that the first one and the last one are seen.
        environment = {**os.environ, "TQDM_MININTERVAL": "0", "COLUMNS": "200", "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch", *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with self._log.open("ab") as log:
            while chunk := os.read(descriptor, 1 << 16):
                log.write(chunk)
                self._lines.append((time.monotonic() - self._started, chunk.decode(errors="replace")))

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    @property
    def is_over(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def wait(self) -> int:
        """Exit status, once the process has ended."""
        try:
            status = self._process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill_group()
            raise
        self._reader.join()
        return status

    def kill(self) -> bool:
        """SIGKILL to the process and all that it has started. Returns whether it was still there."""
        self._kill_group()
        return self.wait() == -signal.SIGKILL

    def _kill_group(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def until(self, happens: Callable[[], bool], *, timeout_s: float = TIMEOUT_S) -> bool:
        """Wait; whether it happened before the process ended and before ``timeout_s``."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and not self.is_over:
            if happens():
                return True
            time.sleep(POLL_S)
        return False

    def progress(self) -> float:
        """What the newest bar over tokens shows, 0..1."""
        found = [match for _, text in self._lines[-4:] for match in _BAR.finditer(text)]
        return int(found[-1]["percent"]) / 100 if found else 0.0

    def bars(self) -> list[BarLine]:
        """Everything that bars over tokens have said, in order."""
        return [
            BarLine(at_s=at, desc=found["desc"].strip(), count=found["count"])
            for at, text in self._lines
            for found in _BAR.finditer(text)
        ]


def kill_at(launch: Launch, moment: Moment, places: Places, *, step_s: float) -> bool:
    """Kill ``launch`` at ``moment`` of the step that takes ``step_s``. False: it had ended before."""

    def is_committing() -> bool:
        names = (f"{MANIFEST_NAME}.tmp", MANIFEST_NAME)
        return any((places.unfinished / name).exists() for name in names) or places.artifact.exists()

    def is_saving() -> bool:
        return any(places.resume.rglob("step_*.tmp"))

    if not launch.until(lambda: places.unfinished.exists() or places.artifact.exists()):
        return launch.kill()
    if moment.kind == "commit":
        launch.until(is_committing)
        time.sleep(moment.fraction * 0.02)
        return launch.kill()
    if moment.kind == "training step":
        launch.until(lambda: 1 > launch.progress() >= moment.fraction > 0)
        return launch.kill()
    launch.until(lambda: False, timeout_s=moment.fraction * step_s)
    if moment.kind == "resume point" and launch.until(is_saving):
        time.sleep(random.Random(moment.fraction).random() * 0.03)
    return launch.kill()


def first_new_step(bars: Sequence[BarLine]) -> BarLine | None:
    """The first line that shows more than its bar began with; None: no training step was made."""
    start: BarLine | None = None
    for line in bars:
        if start is None or line.desc != start.desc:
            start = line
        elif line.count != start.count:
            return line
    return None


def lost_steps(before: Sequence[BarLine], after: Sequence[BarLine]) -> int | None:
    """Training steps that a killed process (``before``) had made and the next one makes again; None: it made none."""
    new = first_new_step(after)
    if not before or new is None:
        return None
    last = before[-1].desc
    own = [line.count for line in before if line.desc == last]
    again = [line.count for line in after if line.desc == last]
    if not again:
        return 0
    # Each step shows another count; the next process begins where its resume point is.
    made = list(dict.fromkeys(own))
    return len(made) - 1 - made.index(again[0]) if again[0] in made else 0

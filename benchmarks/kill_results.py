"""What kills came to, as records and as a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from killed_launch import Kind


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run that was killed."""

    number: int
    finished: bool
    """The same command ended with status 0."""
    damaged: list[str]
    """Artifacts that did not match their manifests, after a kill or at the end."""
    unequal: list[str]
    """Files that the uninterrupted run has otherwise."""
    leftovers: list[str]
    """What is not an artifact and still stood in the store at the end."""

    @property
    def is_survived(self) -> bool:
        return self.finished and not (self.damaged or self.unequal or self.leftovers)


@dataclass(frozen=True, kw_only=True)
class Kill(Outcome):
    """One step, killed once."""

    step: str
    kind: Kind
    dealt_fraction: float
    """Of the moment that this kill was dealt (``killed_launch.Moment``)."""
    fraction: float
    """Of the moment at which it struck: the one that was dealt, halved for every try before."""
    tries: int
    """Starts of the step, the one that was killed included; the others had ended before their moment."""
    killed_after_s: float
    """Since the start of the process."""
    left: list[str]
    """What stood there after the kill, of: artifact, unfinished, resume point, half a resume point."""
    restarts: int
    restart_s: float
    """From the restart to the end of the command."""
    resume_s: float | None = None
    """From the restart to its first training step: interpreter, imports, checksums, models, state, one step."""
    lost_steps: int | None = None
    """Training steps made again."""


@dataclass(frozen=True, kw_only=True)
class Chain(Outcome):
    """A whole run, killed again and again."""

    kills: int
    steps_killed: list[str]
    """Which step ran at each kill."""
    seconds: float


@dataclass(kw_only=True)
class Findings:
    """What is known so far."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Of every step, uninterrupted."""
    kills: list[Kill] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)


def read_findings(out: Path) -> Findings:
    """What an earlier call has found."""
    file = out / "kills.json"
    if not file.is_file():
        return Findings()
    content = json.loads(file.read_text())
    return Findings(
        seconds=content["seconds"],
        kills=[Kill(**row) for row in content["kills"]],
        chains=[Chain(**row) for row in content["chains"]],
    )


def _median(values: Iterable[float | None], digits: int = 1) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.{digits}f} ({max(known):.{digits}f})" if known else ""


def _range(values: Iterable[float]) -> str:
    known = sorted(values)
    return f"{known[0]:.2f} to {known[-1]:.2f}" if known else ""


def table(steps: Sequence[str], findings: Findings) -> str:
    rows = [
        "| step | s | kills | tries | moments | at a resume point | at the commit | survived "
        "| s to the first step again | steps lost |",
        f"|{'---|' * 10}",
    ]
    for name in [*steps, "all"]:
        own = [kill for kill in findings.kills if name in (kill.step, "all")]
        seconds = sum(findings.seconds.values()) if name == "all" else findings.seconds[name]
        columns = (
            name,
            f"{seconds:.1f}",
            len(own),
            sum(kill.tries for kill in own),
            _range(kill.fraction for kill in own),
            sum(kill.kind == "resume point" for kill in own),
            sum(kill.kind == "commit" for kill in own),
            sum(kill.is_survived for kill in own),
            _median(kill.resume_s for kill in own),
            _median((kill.lost_steps for kill in own), 0),
        )
        rows.append(f"| {' | '.join(map(str, columns))} |")
    lines = [f"| {c.number} | {c.kills} | {', '.join(c.steps_killed)} | {c.is_survived} |" for c in findings.chains]
    if lines:
        rows += ["", "| whole run | kills | in steps | survived |", "|---|---|---|---|", *lines]
    damaged = sum(len(run.damaged) for run in (*findings.kills, *findings.chains))
    unequal = sum(len(run.unequal) for run in (*findings.kills, *findings.chains))
    rows += ["", f"Damaged artifacts: {damaged}. Files other than those of the uninterrupted run: {unequal}."]
    rows.append("Survived: finished, nothing damaged or left over, all files equal. Medians, in brackets the largest.")
    rows.append("Tries: starts until all kills struck; a step that ended first was started again, to half the moment.")
    rows.append("Moments: those that struck, as fractions of the step, of its bar or of the first 20 ms of a commit.")
    return "\n".join(rows)

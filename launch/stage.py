"""What a stage is to the program that runs it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.config import TrackingConfig
from launch.artifact import Artifact

Inputs = Mapping[str, Artifact]
"""Committed artifacts by input name, for example ``{"student": ..., "teacher": ..., "data": ...}``."""


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """The places that a stage may write to, and who it runs for. A stage neither creates nor names directories.

    Where several processes run a stage together, the places are the same for all of them. Files of ``out`` that all of
    them would write are written by the first alone (:func:`distill.distributed.is_main`); any of them may write files
    under names that no other process uses. What one of them has written, all may read after a barrier.
    """

    out: Path
    """Empty directory; what stands in it when the stage returns is the artifact's payload."""
    resume: Path
    """Private directory that survives a kill and is removed after the commit. Never another stage's input."""
    pool: Path
    """Directory that all runs share, for parts of artifacts by content: what one library has trained another need not
    train again. Whatever lies there may be deleted at any time."""
    run_name: str
    """Name of the pipeline run (W&B group)."""
    step_name: str
    """Name of the step within it."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run_dir: Path | None = None
    """Directory of the pipeline run, where W&B keeps its files; None: W&B keeps them where it does by itself."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage says of its output, kept in the manifest."""

    headline: str
    """One line for the console, led by the number that matters."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """JSON values."""
    tokens: int = 0
    """Training tokens that this stage consumed."""


StageBody = Callable[[Any, Inputs, StageContext], StageResult]

"""Where metrics go: a JSONL file always, Weights & Biases when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from distill import wandb_run
from distill.config import TrackingConfig
from distill.metrics import Row
from distill.wandb_run import RunIdentity


class Tracker:
    """Writes rows of metrics, one JSON object a line, and to W&B under x = tokens.

    The file starts empty: a resumed run first gives back the rows of its resume point through :meth:`restore`, so the
    file never holds rows of steps that were lost. W&B goes on with the run that this process has started for the same
    step, or with that of an earlier attempt; see :class:`distill.wandb_run.WandbRun`.

    Args:
        path: the JSONL file.
        config: whether and where W&B is used.
        run_name: name of the pipeline run, the W&B group.
        step_name: name of the step within it; both together name the W&B run.
        stage: name of the stage, the W&B job type.
        settings: resolved configuration, shown beside the run.
        resume_dir: private directory that survives the attempt.
        further: gives metrics that follow from a row, which are written beside its own; it sees every row in order.

    Raises:
        ValueError: W&B is asked for and not installed, or does not start.
    """

    def __init__(
        self,
        path: Path,
        config: TrackingConfig,
        *,
        run_name: str,
        step_name: str,
        stage: str,
        settings: Mapping[str, Any],
        resume_dir: Path,
        further: Callable[[Row], Row] = lambda row: {},
    ) -> None:
        self._num_rows = 0
        self._further = further
        identity = RunIdentity(run_name=run_name, step_name=step_name, stage=stage, place=path.parent.name)
        self._wandb_run = wandb_run.current(identity)
        self._is_own = self._wandb_run is None
        if self._is_own:
            self._wandb_run = wandb_run.start(config, identity, settings=settings, state_dir=resume_dir)
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def log(self, row: Row) -> None:
        """Write one row. Rows reach the file at once."""
        row = {**row, **self._further(row)}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._wandb_run is not None:
            self._wandb_run.log(row, self._num_rows)
        self._num_rows += 1

    def restore(self, rows: Iterable[Row]) -> None:
        """Write rows that an earlier attempt has logged already. W&B gets those that it does not have."""
        for row in rows:
            self.log(row)

    def close(self, *, failed: bool = False) -> None:
        """Finish the file and, unless it goes on after this, the W&B run."""
        self._file.close()
        if self._is_own and self._wandb_run is not None:
            self._wandb_run.finish(failed=failed)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

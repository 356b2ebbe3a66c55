"""Where metrics go: a JSONL file always, Weights & Biases when asked for. The only importer of wandb."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.config import TrackingConfig
from distill.metrics import Row

SENT_FILE = "wandb_rows"
"""As many bytes long as there are rows before the first that W&B has not been given."""


class Tracker:
    """Writes rows of metrics, one JSON object a line, and to W&B under x = tokens.

    The file starts empty: a resumed run first gives back the rows of its resume point through :meth:`restore`, so the
    file never holds rows of steps that were lost. W&B continues the run of the same name. It cannot take back the rows
    between that resume point and the end of the earlier attempt: their number is their W&B step, and a row whose number
    W&B has already is not sent again.

    Args:
        path: the JSONL file.
        config: whether and where W&B is used.
        run_name: name of the pipeline run, the W&B group.
        step_name: name of the step within it; both together name the W&B run.
        stage: name of the stage, the W&B job type.
        settings: resolved configuration, shown beside the run.
        resume_dir: private directory that survives the attempt; there stands which rows W&B has been given, which an
            offline run does not know of its predecessor.

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
    ) -> None:
        self._wandb_run: Any = None
        self._num_rows = 0
        self._num_sent = 0
        if config.wandb != "off":
            self._wandb_run = _start_wandb(
                project=config.project,
                entity=config.entity,
                mode=config.wandb,
                group=run_name,
                job_type=stage,
                name=f"{run_name}/{step_name}",
                # The directory is named by the fingerprint: another recipe under the same names is another run.
                id=hashlib.sha256(f"{run_name}/{step_name}/{path.parent.name}".encode()).hexdigest()[:16],
                resume="allow",
                config=dict(settings),
            )
            sent = resume_dir / SENT_FILE
            self._num_sent = max(self._wandb_run.step, sent.stat().st_size if sent.is_file() else 0)
            self._sent = sent.open("ab")
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def log(self, row: Row) -> None:
        """Write one row. Rows reach the file at once."""
        number = self._num_rows
        self._write(row)
        if self._wandb_run is not None and number >= self._num_sent:
            self._wandb_run.log(row, step=number)
            self._sent.truncate(number + 1)

    def restore(self, rows: Iterable[Row]) -> None:
        """Write rows that an earlier attempt has logged already."""
        for row in rows:
            self._write(row)

    def close(self, *, failed: bool = False) -> None:
        """Finish the file and the W&B run."""
        self._file.close()
        if self._wandb_run is not None:
            self._sent.close()
            self._wandb_run.finish(exit_code=int(failed))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _write(self, row: Row) -> None:
        self._num_rows += 1
        self._file.write(json.dumps(row, allow_nan=False) + "\n")


def _start_wandb(**settings: Any) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "tracking.wandb needs the package wandb, which is not installed; "
            "install it with `pip install -e '.[wandb]'` or set tracking.wandb=off"
        ) from error
    try:
        run = wandb.init(**settings)
    except wandb.Error as error:
        raise ValueError(
            f"W&B does not start ({str(error).splitlines()[0]}); run `wandb login` or set tracking.wandb=offline"
        ) from error
    run.define_metric("*", step_metric="tokens")
    return run

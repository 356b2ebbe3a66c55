"""What W&B has written of its offline runs, read back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.wandb_log import read_records


@dataclass
class OfflineRun:
    """One attempt of a run."""

    directory: Path
    id: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    may_resume: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    """Glob of metric names -> their x axis."""
    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    """Artifact records by name, without those that hold tables."""
    exit_code: int | None = None

    def file(self, key: str) -> str:
        """Content of the table or page under ``key``."""
        path = next(row[f"{key}.path"] for row in self.history if f"{key}.path" in row)
        return (self.directory / "files" / path).read_text()

    def table(self, key: str) -> list[dict[str, Any]]:
        """Rows of the table under ``key``."""
        content = json.loads(self.file(key))
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def read_runs(directory: Path) -> list[OfflineRun]:
    """The attempts under ``<directory>/wandb``, in the order of their start."""
    import wandb

    # Its service closes the files of a finished run a little later, and all of them before it ends.
    wandb.teardown()
    return [read_run(path) for path in sorted(directory.glob("wandb/offline-run-*"))]


def read_run(directory: Path) -> OfflineRun:
    """The attempt whose files are in ``directory``."""
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun(directory)
    (file,) = directory.glob("run-*.wandb")
    for data in read_records(file):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found = record.run
            run.id, run.group, run.job_type = found.run_id, found.run_group, found.job_type
            run.name, run.may_resume = found.display_name, found.resume
            run.config |= _values(found.config.update)
        elif kind == "history":
            run.history.append(_values(record.history.item))
        elif kind == "summary":
            run.summary |= _values(record.summary.update)
        elif kind == "metric" and record.metric.glob_name:
            run.step_metrics[record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact" and record.artifact.type != "run_table":
            into = run.inputs if record.artifact.use_after_commit else run.outputs
            into[record.artifact.name] = record.artifact
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

"""Keep the evidence of a finished run: ``python benchmarks/collect.py runs/smollm2 benchmarks/results/<date>-<name>``.

Writes the report page, its numbers and the held-out points of every training step's recovery curve. Weights stay in the
store. What the numbers mean is for a person to write, into README.md beside them.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

from launch.recovery import TRAINING_STAGES
from launch.rundir import RunDirectory

COLUMNS = ("step", "tokens", "eval/lm_loss", "eval/kld", "eval/kld_top_k", "eval/top1_agreement_frac")


def collect(run_path: Path, destination: Path) -> None:
    run = RunDirectory(root=run_path.parent, name=run_path.name)
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("index.html", "report.json"):
        shutil.copy(run.path / "report" / name, destination / name)
    with (destination / "recovery.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(COLUMNS)
        for step, artifact in run.read_steps().items():
            if artifact.manifest.stage in TRAINING_STAGES:
                for line in (artifact.path / "metrics.jsonl").read_text().splitlines():
                    row = {"step": step, **json.loads(line)}
                    if "eval/lm_loss" in row:
                        table.writerow([row.get(column, "") for column in COLUMNS])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/collect.py <run directory> <destination>")
    collect(Path(sys.argv[1]).absolute(), Path(sys.argv[2]))

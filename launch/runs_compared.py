"""Finished runs side by side: one model of each, and only among runs that were measured alike. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.config import require
from launch.artifact import Artifact, canonical_json
from launch.config import from_yaml
from launch.finished_run import FinishedRun
from launch.quantities import serving
from launch.report import build_report
from launch.rundir import RunDirectory
from launch.runs_settings import columns_of, settings_that_differ

VALIDATION_PREFIX = "validation"
"""Of the names of the files that hold the held-out text."""
MAX_LABEL = 44
PARENT_VALUES = {"kld": 0.0, "lm_loss_gap_closed_frac": 1.0}
"""Metrics that are set against latency -> the parent's own value."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What measurements of a run are stated for. Those of two situations are never set against each other."""

    parent: str
    """Fingerprint of the parent: recovery, KL divergence and relative latency are counted from it."""
    serving: str | None
    """The workload in words."""
    workload: str
    """The whole of it, with the threads of a CPU."""
    hardware: str | None
    held_out: str
    """Which text losses were measured on, and how much of it."""

    @classmethod
    def of(cls, run: FinishedRun) -> Situation:
        """That of a finished run."""
        speed = run.document("benchmark", "benchmark.json")
        workload = speed["workload"] if speed else None
        return cls(
            parent=run.parent.manifest.fingerprint,
            serving=serving(workload) if workload else None,
            workload=canonical_json([workload, speed.get("cpu_threads") if speed else None]),
            hardware=speed["hardware"] if speed else None,
            held_out=_held_out(run),
        )

    def differences(self, other: Situation) -> list[str]:
        """In what the two differ, in words."""
        words = {"parent": "parent", "workload": "workload", "hardware": "hardware", "held_out": "held-out text"}
        return [word for name, word in words.items() if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run among others."""

    number: int
    """From 1, in the order given."""
    label: str
    """What tells it from the others, short enough for a legend."""
    directory: RunDirectory
    settings: Mapping[str, str]
    """Of the columns: key -> value."""
    run: FinishedRun

    @cached_property
    def report(self) -> dict[str, Any]:
        """Content of ``report.json``, as it would be written now."""
        return build_report(self.directory.name, self.run)

    @cached_property
    def situation(self) -> Situation:
        """What its measurements are stated for."""
        return Situation.of(self.run)

    @cached_property
    def model_name(self) -> str:
        """The model that stands for the run: the last one both timed and evaluated, or that has the most of it."""
        models = self.report["models"]
        wanted = (("decode_ms", "kld"), ("kld",), ("decode_ms",), ())
        candidates = (
            name for fields in wanted for name in reversed(models) if all(models[name][f] is not None for f in fields)
        )
        return next(candidates)

    @property
    def model(self) -> dict[str, Any]:
        """What ``report.json`` says of that model."""
        return self.report["models"][self.model_name]

    @property
    def parent(self) -> dict[str, Any]:
        """What it says of the parent."""
        return next(iter(self.report["models"].values()))

    @property
    def seconds(self) -> float:
        """Time of all steps, also of those that it shares with other runs."""
        return sum(artifact.manifest.seconds for artifact in self.run.steps.values())

    @property
    def gpu_hours(self) -> float | None:
        """GPUs held, one per process, by the time of all steps; None where no step saw one."""
        return gpu_hours(self.run.steps.values())


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that were measured alike."""

    situation: Situation
    runs: tuple[ComparedRun, ...]

    @cached_property
    def fronts(self) -> dict[str, frozenset[int]]:
        """Numbers of the runs on the Pareto front of decode latency and KL divergence, and of latency and recovery; the
        parent, which is one of the points, is 0."""
        return {metric: self._front(metric, parent) for metric, parent in PARENT_VALUES.items()}

    def _front(self, metric: str, parent: float) -> frozenset[int]:
        # Less KL divergence is better, but more recovery.
        sign = 1.0 if metric == "kld" else -1.0
        points = {
            run.number: (run.model["decode_latency_vs_parent"], sign * run.model[metric])
            for run in self.runs
            if run.model["decode_latency_vs_parent"] is not None and run.model[metric] is not None
        }
        return frozenset(pareto_front({**points, 0: (1.0, sign * parent)}))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that a page, a table or a file over several runs says."""

    title: str
    columns: tuple[str, ...]
    """Settings that tell the runs apart."""
    settings: Mapping[str, Sequence[str]]
    """All resolved settings that differ: key -> value per run."""
    groups: tuple[Group, ...]
    unfinished: Mapping[str, str]
    """Runs of the sweep that are not among them -> why."""

    @property
    def runs(self) -> list[ComparedRun]:
        """Of all groups, in the order given."""
        return sorted((run for group in self.groups for run in group.runs), key=lambda run: run.number)

    @property
    def artifacts(self) -> list[Artifact]:
        """What the runs are made of, each once, however many share it."""
        return list({a.manifest.fingerprint: a for run in self.runs for a in run.run.steps.values()}.values())

    @property
    def differences(self) -> list[str]:
        """In what the groups differ, in words; empty where there is one."""
        pairs = itertools.combinations((group.situation for group in self.groups), 2)
        return list(dict.fromkeys(word for one, other in pairs for word in one.differences(other)))

    def as_dict(self) -> dict[str, Any]:
        """Content of ``runs.json``."""
        return {
            "title": self.title,
            "columns": list(self.columns),
            "groups": [
                {
                    "parent": {"fingerprint": group.situation.parent, **group.runs[0].parent},
                    "workload": group.runs[0].report["workload"],
                    "hardware": group.situation.hardware,
                    "runs": [row for row in self.rows() if row["group"] == number],
                }
                for number, group in enumerate(self.groups, start=1)
            ],
            "differing_settings": {key: list(values) for key, values in self.settings.items()},
            "unfinished": dict(self.unfinished),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One flat row per run, as JSON and CSV have it: the columns' settings under their own keys, then numbers."""
        for number, group in enumerate(self.groups, start=1):
            for run in group.runs:
                yield {
                    "number": run.number,
                    "run": run.directory.name,
                    "group": number,
                    **run.settings,
                    "model": run.model_name,
                    **{key: value for key, value in run.model.items() if key not in ("step", "is_recovery_reference")},
                    "seconds": round(run.seconds, 3),
                    "gpu_hours": run.gpu_hours,
                    "on_front_of_kld": run.number in group.fronts["kld"],
                    "on_front_of_recovery": run.number in group.fronts["lm_loss_gap_closed_frac"],
                }


def compare(
    title: str,
    directories: Mapping[int, RunDirectory],
    *,
    columns: Mapping[str, Sequence[str]] | None = None,
    unfinished: Mapping[str, str] | None = None,
) -> Comparison:
    """Read finished runs.

    Args:
        title: of the page.
        directories: number of a run, from 1 -> its directory, in the order in which they are to stand.
        columns: settings that tell the runs apart -> their value in each run; None: found out.
        unfinished: runs that are missing among them -> why.

    Raises:
        ValueError: some have not finished, which are named all at once; or one has no model.
    """
    steps: list[Mapping[str, Artifact]] = []
    refused = []
    for directory in directories.values():
        try:
            steps.append(directory.read_steps())
        except ValueError as error:
            refused.append(str(error))
    count = f"{len(refused)} of {len(directories)} runs cannot be compared: " if len(refused) > 1 else ""
    require(not refused, count + "; ".join(refused))
    configs = [from_yaml(directory.config_file.read_text(encoding="utf-8")) for directory in directories.values()]
    if columns is None:
        columns = columns_of(configs)
    runs = []
    for index, ((number, directory), own) in enumerate(zip(directories.items(), steps, strict=True)):
        settings = {key: values[index] for key, values in columns.items()}
        label = f"{number}: {_label(settings) or directory.name}"
        label = label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"
        run = FinishedRun(own)
        runs.append(ComparedRun(number=number, label=label, directory=directory, settings=settings, run=run))
    situations = dict.fromkeys(run.situation for run in runs)
    groups = (Group(situation=s, runs=tuple(run for run in runs if run.situation == s)) for s in situations)
    return Comparison(
        title=title,
        columns=tuple(columns),
        settings=settings_that_differ(configs),
        groups=tuple(groups),
        unfinished=unfinished or {},
    )


def pareto_front(points: Mapping[int, tuple[float, float]]) -> set[int]:
    """Keys of the points that no other is at least as good as in both values, and better in one. Less is better."""
    return {
        key
        for key, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    }


def gpu_hours(artifacts: Iterable[Artifact]) -> float | None:
    """GPU hours of the artifacts' steps, one GPU per process; None where no step saw a GPU."""
    seen = [a.manifest for a in artifacts if a.manifest.provenance["hardware"]["gpus"]]
    hours = (manifest.seconds * manifest.provenance.get("num_processes", 1) / 3600 for manifest in seen)
    return round(sum(hours), 4) if seen else None


def common_directory(directories: Iterable[RunDirectory]) -> Path:
    """The deepest directory that all runs lie in."""
    parents = [directory.root for directory in directories]
    return next(place for place in (parents[0], *parents[0].parents) if all(p.is_relative_to(place) for p in parents))


def _label(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())


def _held_out(run: FinishedRun) -> str:
    evaluation = run.last("evaluate")
    document = run.document("evaluate", "evaluate.json")
    data = run.input_of(evaluation, "data") if evaluation else None
    if document is None or data is None:
        return ""
    files = [file.sha256 for file in data.manifest.files if Path(file.name).name.startswith(VALIDATION_PREFIX)]
    return canonical_json([files, document["seq_len"], document["num_tokens"]])

"""The steps of a pipeline as chained Slurm jobs: plan them, render a script for each, submit them in one go.

A login node does this without torch. Every job is ``python -m launch <pipeline> --step <step>``; what its script does
on signals and failures stands in ``slurm/step.sbatch.j2``. All that can be refused is refused before the first job.

Where a job of another run under the same root is going to compute the same artifact, the one of this run waits for its
end, so that no nodes are held for nothing but the lock on that artifact.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from distill.config import require
from launch import slurm_commands
from launch.artifact import Artifact
from launch.cluster_config import ClusterConfig
from launch.config import PipelineConfig
from launch.data_sizes import require_enough_data
from launch.pipeline import PlannedStep, known_models
from launch.preemption import EXIT_STATUS
from launch.rundir import RunDirectory
from launch.single_step import committed
from launch.slurm_site import DIRECTORY, SiteConfig
from launch.store import Store, make_directory

TEMPLATE = "step.sbatch.j2"
REPORT = "report"
"""The command, and the name of its job."""
REPORT_TIME_LIMIT = "00:30:00"
LEAST_GRACE_SECONDS = 5
"""Before the limit, after which a job that has not saved its state is queued again without."""


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """One step as a job."""

    step: str
    nodes: int
    processes_per_node: int
    """Started by torchrun where the job has more than one."""
    after: tuple[str, ...]
    """Steps whose jobs it waits for."""
    artifact: str
    """Name in the store of what it computes, as planned here: behind a measurement of another machine it may differ."""
    script: str


def plan_jobs(
    pipeline_name: str,
    pipeline: PipelineConfig,
    steps: Sequence[PlannedStep],
    *,
    overrides: Sequence[str],
    cluster: ClusterConfig,
    site: SiteConfig,
    store: Store,
    run: RunDirectory,
) -> list[StepJob]:
    """A job for every step that is not committed yet, in order.

    Args:
        pipeline_name: as on the command line.
        pipeline: says what nodes and how much time a step needs.
        steps: planned from ``pipeline``.
        overrides: of the command line; the jobs get them too.
        cluster: nodes, time limit, signal.
        site: account, partition, software.
        store: where the artifacts are.
        run: where links, scripts and logs go.

    Raises:
        ValueError: a step cannot be dealt over its nodes, or the data that is there is too short for it; names the
            step.
    """
    there = committed(steps, store=store, run=run)
    require_enough_data(steps, there)
    todo = [step for step in steps if step.name not in there]
    jobs = []
    for step in todo:
        try:
            own = cluster.for_step(pipeline.steps[step.name])
            inputs = {name: there[source] for name, source in step.inputs.items() if source in there}
            nodes, processes = _shape(step, pipeline.steps[step.name].nodes, own, inputs)
        except ValueError as error:
            raise ValueError(f"step {step.name}: {error}") from error
        after = tuple(dict.fromkeys(source for source in step.inputs.values() if source not in there))
        script = _render(
            run,
            step.name,
            title=f"Step {step.name} of pipeline {pipeline_name}{', after ' if after else ''}{', '.join(after)}",
            command=["-m", "launch", pipeline_name, "--step", step.name, *overrides],
            nodes=nodes,
            processes=processes,
            gpus=processes,
            cluster=own,
            site=site,
        )
        jobs.append(
            StepJob(
                step=step.name,
                nodes=nodes,
                processes_per_node=processes,
                after=after,
                artifact=store.path(step.recipe).name,
                script=script,
            )
        )
    return jobs


def twins(jobs: Sequence[StepJob], run: RunDirectory) -> dict[str, str]:
    """Steps of ``jobs`` -> the job in the queue, of another run under the same root, that computes the same.

    One that is held back is none: nobody knows for how long.
    """
    claims = {job.step: file.read_text().split(" ", 1) for job in jobs if (file := _claim(run, job)).is_file()}
    queued = slurm_commands.queued(dict(claims.values()), held=False)
    return {step: number for step, (number, _) in claims.items() if number in queued}


def submit(jobs: Sequence[StepJob], run: RunDirectory, beside: Mapping[str, str] | None = None) -> dict[str, str]:
    """Submit ``jobs``, each after those that it waits for. All of them, or none.

    Args:
        jobs: of one run, in order.
        run: theirs.
        beside: their :func:`twins`, which they also wait for, whatever becomes of those.

    Returns:
        Slurm's job ids by step.

    Raises:
        ValueError: there is no sbatch, jobs of this run are in the queue, or Slurm refuses a script.
    """
    check_submission(run)
    beside = beside or {}
    scripts = dict(_write(jobs, run))
    for job in jobs:
        try:
            slurm_commands.check(scripts[job.step])
        except ValueError as error:
            raise ValueError(f"step {job.step}: {error}; nothing was submitted") from error
    ids: dict[str, str] = {}
    for job in jobs:
        try:
            ids[job.step] = slurm_commands.submit(
                scripts[job.step],
                after=[ids[step] for step in job.after],
                after_any=[beside[job.step]] if job.step in beside else [],
            )
        except ValueError as error:
            slurm_commands.cancel(list(ids.values()))
            raise ValueError(
                f"step {job.step}: {error}; {len(ids)} jobs before it were taken back, nothing is queued"
            ) from error
        _record(run, ids)
        if job.step not in beside:
            # What this spares is not worth a chain that breaks off.
            with suppress(OSError):
                _claim_for(run, job, ids[job.step])
    return ids


def plan_report(sweep: RunDirectory, target: str, *, cluster: ClusterConfig, site: SiteConfig) -> str:
    """The script of the job that writes the page over the runs of a sweep.

    Args:
        sweep: its directory.
        target: the pipeline.
        cluster: of its runs. This job takes one process without a GPU, for :data:`REPORT_TIME_LIMIT` at most.
        site: account, partition, software.
    """
    return _render(
        sweep,
        REPORT,
        title=f"Report on a sweep of pipeline {target}",
        command=["-m", "launch", REPORT, str(sweep.path)],
        nodes=1,
        processes=1,
        gpus=0,
        cluster=replace(cluster, time_limit=REPORT_TIME_LIMIT, signal_seconds=60),
        site=site,
    )


def submit_report(script: str, sweep: RunDirectory, runs: Sequence[RunDirectory]) -> str | None:
    """Submit the job that writes the page of ``sweep`` when all jobs of ``runs`` have ended, in place of an earlier
    one. Returns its id; None where none of them is in the queue.

    Raises:
        ValueError: there is no sbatch, or Slurm refuses the script.
    """
    slurm_commands.require_slurm()
    waiting = {number for run in runs for number in slurm_commands.queued(_names(run, _recorded(run)))}
    earlier = slurm_commands.queued(_names(sweep, _recorded(sweep)))
    number = None
    if waiting:
        file = _write_script(sweep, REPORT, script)
        number = slurm_commands.submit(file, after_any=sorted(waiting, key=int))
        _record(sweep, {REPORT: number})
    slurm_commands.cancel(sorted(earlier))
    return number


def check_submission(run: RunDirectory) -> None:
    """Refuse jobs of ``run`` where none can be submitted.

    Raises:
        ValueError: there is no sbatch, or jobs of this run are in the queue.
    """
    slurm_commands.require_slurm()
    _require_idle(run)


def _shape(
    step: PlannedStep, nodes: int | None, cluster: ClusterConfig, inputs: Mapping[str, Artifact]
) -> tuple[int, int]:
    """Nodes, and processes on each, of ``step``, of whose inputs these are there."""
    if not step.stage.distributed:
        require(
            nodes in (None, 1),
            f"nodes={nodes}, but stage {step.recipe.stage} runs in one process; leave nodes out of the pipeline",
        )
        return 1, 1
    count = cluster.nodes
    if hasattr(step.config, "check_processes"):
        step.config.check_processes(count * cluster.gpus_per_node, known_models(inputs), step.inputs)
    elif hasattr(step.config, "engine"):
        slices, world = step.config.engine.slices, count * cluster.gpus_per_node
        require(
            world % slices == 0,
            f"engine.slices={slices} needs a multiple of {slices} processes, got {count} nodes x "
            f"{cluster.gpus_per_node}; set engine.slices to a divisor of {world}, or other nodes",
        )
    return count, cluster.gpus_per_node


def _render(
    run: RunDirectory,
    name: str,
    *,
    title: str,
    command: Sequence[str],
    nodes: int,
    processes: int,
    gpus: int,
    cluster: ClusterConfig,
    site: SiteConfig,
) -> str:
    """Script of the job ``name`` of ``run``, which runs ``command`` in Python."""
    return _template().render(
        title=title,
        job_name=_job_name(run, name),
        nodes=nodes,
        processes=processes,
        cluster=cluster,
        grace_seconds=max(LEAST_GRACE_SECONDS, cluster.signal_seconds - max(15, cluster.signal_seconds // 10)),
        options=site.sbatch_options(gpus),
        site=site,
        directory=shlex.quote(str(Path.cwd())),
        logs=_logs(run, name),
        quoted_logs=shlex.quote(str(_logs(run, name))),
        command=shlex.join(command),
        preempted=EXIT_STATUS,
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DIRECTORY),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template(TEMPLATE)


def _job_name(run: RunDirectory, step: str) -> str:
    return f"{run.name}.{step}"


def _names(run: RunDirectory, ids: Mapping[str, str]) -> dict[str, str]:
    """Job ids of ``run`` -> the names that Slurm knows them by."""
    return {number: _job_name(run, step) for step, number in ids.items()}


def _logs(run: RunDirectory, step: str) -> Path:
    return run.path / "logs" / step


def _scripts(run: RunDirectory) -> Path:
    return run.path / "slurm"


def _claim(run: RunDirectory, job: StepJob) -> Path:
    """Holds id and name of the job that was submitted for this artifact, by whichever run."""
    return run.store / ".jobs" / job.artifact


def _claim_for(run: RunDirectory, job: StepJob, number: str) -> None:
    file = _claim(run, job)
    make_directory(file.parent)
    temporary = file.with_name(f".{file.name}.{number}.tmp")
    temporary.write_text(f"{number} {_job_name(run, job.step)}")
    temporary.rename(file)


def _write(jobs: Sequence[StepJob], run: RunDirectory) -> Iterator[tuple[str, Path]]:
    for job in jobs:
        yield job.step, _write_script(run, job.step, job.script)


def _write_script(run: RunDirectory, name: str, script: str) -> Path:
    """Write the script, and make the directory that Slurm opens its log in."""
    make_directory(_scripts(run))
    make_directory(_logs(run, name))
    file = _scripts(run) / f"{name}.sbatch"
    file.write_text(script)
    return file


def _record(run: RunDirectory, ids: Mapping[str, str]) -> None:
    (_scripts(run) / "jobs.json").write_text(json.dumps(dict(ids), indent=1))


def _recorded(run: RunDirectory) -> dict[str, str]:
    """Jobs that were last submitted for ``run``."""
    file = _scripts(run) / "jobs.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _require_idle(run: RunDirectory) -> None:
    recorded = _recorded(run)
    queued = slurm_commands.queued(_names(run, recorded))
    left = {step: number for step, number in recorded.items() if number in queued}
    if left:
        raise slurm_commands.InQueueError(
            f"run {run.name} has jobs in the queue ({', '.join(f'{step} {number}' for step, number in left.items())}); "
            f"wait for them, or scancel {' '.join(left.values())} first"
        )

"""The steps of a pipeline as chained Slurm jobs: plan them, render a script for each, submit them in one go.

A login node does this without torch. Every job is ``python -m launch <pipeline> --step <step>``; what its script does
on signals and failures stands in ``slurm/step.sbatch.j2``. All that can be refused is refused before the first job.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from distill.config import require
from launch import slurm_commands
from launch.cluster_config import ClusterConfig
from launch.config import PipelineConfig
from launch.pipeline import PlannedStep
from launch.preemption import EXIT_STATUS
from launch.rundir import RunDirectory
from launch.single_step import committed
from launch.slurm_site import DIRECTORY, SiteConfig
from launch.store import Store, make_directory

TEMPLATE = "step.sbatch.j2"
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
        ValueError: a step cannot be dealt over its nodes; names the step.
    """
    there = committed(steps, store=store, run=run)
    todo = [step for step in steps if step.name not in there]
    jobs = []
    for step in todo:
        try:
            own = cluster.for_step(pipeline.steps[step.name])
            nodes, processes = _shape(step, pipeline.steps[step.name].nodes, own)
        except ValueError as error:
            raise ValueError(f"step {step.name}: {error}") from error
        after = tuple(dict.fromkeys(source for source in step.inputs.values() if source not in there))
        command = shlex.join(["-m", "launch", pipeline_name, "--step", step.name, *overrides])
        script = _template().render(
            pipeline=pipeline_name,
            step=step.name,
            job_name=_job_name(run, step.name),
            after=after,
            nodes=nodes,
            processes=processes,
            cluster=own,
            grace_seconds=max(LEAST_GRACE_SECONDS, own.signal_seconds - max(15, own.signal_seconds // 10)),
            options=site.sbatch_options(processes),
            site=site,
            directory=shlex.quote(str(Path.cwd())),
            logs=_logs(run, step.name),
            quoted_logs=shlex.quote(str(_logs(run, step.name))),
            command=command,
            preempted=EXIT_STATUS,
        )
        jobs.append(StepJob(step=step.name, nodes=nodes, processes_per_node=processes, after=after, script=script))
    return jobs


def submit(jobs: Sequence[StepJob], run: RunDirectory) -> dict[str, str]:
    """Submit ``jobs``, each after those that it waits for. All of them, or none.

    Returns:
        Slurm's job ids by step.

    Raises:
        ValueError: there is no sbatch, jobs of this run are in the queue, or Slurm refuses a script.
    """
    check_submission(run)
    scripts = dict(_write(jobs, run))
    for job in jobs:
        try:
            slurm_commands.check(scripts[job.step])
        except ValueError as error:
            raise ValueError(f"step {job.step}: {error}; nothing was submitted") from error
    ids: dict[str, str] = {}
    for job in jobs:
        try:
            ids[job.step] = slurm_commands.submit(scripts[job.step], after=[ids[step] for step in job.after])
        except ValueError as error:
            slurm_commands.cancel(list(ids.values()))
            raise ValueError(
                f"step {job.step}: {error}; {len(ids)} jobs before it were taken back, nothing is queued"
            ) from error
        _record(run, ids)
    return ids


def check_submission(run: RunDirectory) -> None:
    """Refuse jobs of ``run`` where none can be submitted.

    Raises:
        ValueError: there is no sbatch, or jobs of this run are in the queue.
    """
    slurm_commands.require_slurm()
    _require_idle(run)


def _shape(step: PlannedStep, nodes: int | None, cluster: ClusterConfig) -> tuple[int, int]:
    """Nodes, and processes on each, of ``step``."""
    if not step.stage.distributed:
        require(
            nodes in (None, 1),
            f"nodes={nodes}, but stage {step.recipe.stage} runs in one process; leave nodes out of the pipeline",
        )
        return 1, 1
    count = cluster.nodes
    if hasattr(step.config, "check_processes"):
        step.config.check_processes(count * cluster.gpus_per_node)
    elif hasattr(step.config, "engine"):
        slices, world = step.config.engine.slices, count * cluster.gpus_per_node
        require(
            world % slices == 0,
            f"engine.slices={slices} needs a multiple of {slices} processes, got {count} nodes x "
            f"{cluster.gpus_per_node}; set engine.slices to a divisor of {world}, or other nodes",
        )
    return count, cluster.gpus_per_node


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


def _logs(run: RunDirectory, step: str) -> Path:
    return run.path / "logs" / step


def _scripts(run: RunDirectory) -> Path:
    return run.path / "slurm"


def _write(jobs: Sequence[StepJob], run: RunDirectory) -> Iterator[tuple[str, Path]]:
    """Write the scripts, and make the directories that Slurm opens their logs in."""
    make_directory(_scripts(run))
    for job in jobs:
        make_directory(_logs(run, job.step))
        script = _scripts(run) / f"{job.step}.sbatch"
        script.write_text(job.script)
        yield job.step, script


def _record(run: RunDirectory, ids: Mapping[str, str]) -> None:
    (_scripts(run) / "jobs.json").write_text(json.dumps(dict(ids), indent=1))


def _require_idle(run: RunDirectory) -> None:
    file = _scripts(run) / "jobs.json"
    recorded: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    queued = slurm_commands.queued(list(recorded.values()))
    left = {step: number for step, number in recorded.items() if number in queued}
    require(
        not left,
        f"run {run.name} has jobs in the queue ({', '.join(f'{step} {number}' for step, number in left.items())}); "
        f"wait for them, or scancel {' '.join(left.values())} first",
    )

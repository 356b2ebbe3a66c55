"""``python -m launch plan <pipeline> [overrides] [--json]``: what fits, how long it takes, what it leaves on disk.

Torch-free, offline, in seconds on a login node. Shapes come from :mod:`launch.plan_models`, what a stage needs from
:mod:`launch.plan_demands`. Settings of the plan itself are overrides too: ``plan.parent`` and ``plan.child`` (a model
directory, a config.json or a known name), ``plan.utilization`` and ``plan.gpu_memory_gib``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from distill.config import require
from launch import plan_models
from launch.cluster_config import ClusterConfig
from launch.config import (
    PipelineConfig,
    check_step_prefixes,
    compose_pipeline,
    compose_stage,
    run_settings,
    step_overrides,
)
from launch.pipeline import check_inputs
from launch.plan_advice import Limits, fits, nearest_fit, needed_bytes, step_memory
from launch.plan_demands import Demand, Training, stage_demand
from launch.plan_memory import Memory
from launch.plan_models import PlannedModel
from launch.plan_state import POINT_BYTES
from launch.plan_time import UTILIZATION, Rates, step_time
from launch.registry import STAGES
from puzzle.config import CostConfig
from puzzle.model.stats import num_params, sequence_flops

GIB = 2**30
PREFIX = "plan."
GPU_GIB = {"h100_sxm": 79.1, "h200_sxm": 139.8, "b200": 178.3}
"""Memory of one GPU as torch sees it, by file of conf/hardware."""
_NODE_FACTORS = (1, 2, 4, 8)
DISK_BYTES_PER_S = 2e9
"""What one node writes to the shared file system. An assumption."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a plan takes for granted."""

    parent: str | None = None
    """Shape of the parent, in place of model.source."""
    child: str | None = None
    """Known shape of what stage assemble gives."""
    utilization: float = UTILIZATION
    """Of conf/hardware's sustained rate."""
    gpu_memory_gib: float | None = None
    """null: what the GPU of cluster.hardware has."""

    def __post_init__(self) -> None:
        require(0 < self.utilization <= 1, f"plan.utilization must be in 0..1, got {self.utilization}")
        memory = self.gpu_memory_gib
        require(memory is None or memory > 0, f"plan.gpu_memory_gib must be > 0, got {memory}")


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step of a pipeline, or one phase of it."""

    step: str
    stage: str
    nodes: int
    gpus: int
    """Processes, over all nodes."""
    memory_bytes: dict[str, float] = field(default_factory=dict)
    """On the fullest GPU at its fullest moment, by kind; of a CPU run, of one process."""
    moment: str = ""
    needed_gib: float | None = None
    """With the allocator's and the libraries' own."""
    limit_gib: float
    host_bytes: dict[str, float] = field(default_factory=dict)
    """For one process."""
    step_s: float | None = None
    hours: float | None = None
    """null: not modelled."""
    gpu_hours: float | None = None
    artifact_gib: float = 0.0
    resume_gib: float = 0.0
    notes: tuple[str, ...] = ()
    problem: str | None = None
    """Why it cannot run, and the nearest setting that can."""


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """All steps."""

    pipeline: str
    hardware: str
    utilization: float
    steps: tuple[StepPlan, ...]

    @property
    def problems(self) -> list[str]:
        """What cannot run, with the step's name."""
        return [f"step {step.step}: {step.problem}" for step in self.steps if step.problem]


def plan_pipeline(name: str, overrides: Sequence[str]) -> PipelinePlan:
    """What every step of pipeline ``name`` needs. Reads no weights and asks no hub.

    Raises:
        ValueError: a configuration is wrong, or the parent's shape is not known; names the step.
    """
    settings = _plan_config([text for text in overrides if text.startswith(PREFIX)])
    overrides = [text for text in overrides if not text.startswith(PREFIX)]
    pipeline = compose_pipeline(name, overrides)
    check_step_prefixes(pipeline, overrides)
    cluster = run_settings(pipeline, overrides).cluster
    planner = _Planner(pipeline, overrides, settings, cluster)
    return PipelinePlan(
        pipeline=name,
        hardware=cluster.hardware,
        utilization=settings.utilization,
        steps=tuple(step for key in pipeline.steps for step in planner.plan(key)),
    )


def _plan_config(texts: Sequence[str]) -> PlanConfig:
    given = dict(text.removeprefix(PREFIX).split("=", 1) for text in texts)
    known = PlanConfig.__dataclass_fields__
    for key in given:
        require(key in known, f"{PREFIX}{key} is no setting of the plan; there are {', '.join(known)}")
    values: dict[str, Any] = dict(given)
    for key in ("utilization", "gpu_memory_gib"):
        if key in values:
            try:
                values[key] = float(values[key])
            except ValueError:
                raise ValueError(f"{PREFIX}{key}={values[key]} is no number") from None
    return PlanConfig(**values)


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """The node of the tree that has the hardware."""

    costs: CostConfig


class _Planner:
    """Walks over the steps of one pipeline and remembers their models."""

    def __init__(
        self, pipeline: PipelineConfig, overrides: Sequence[str], settings: PlanConfig, cluster: ClusterConfig
    ) -> None:
        self._pipeline = pipeline
        self._overrides = overrides
        self._settings = settings
        self._cluster = cluster
        self._models: dict[str, PlannedModel] = {}
        self._configs: dict[str, Any] = {}
        hardware = compose_stage(_Costs, [f"hardware@costs.hardware={cluster.hardware}"]).costs.hardware
        self._rates = None
        if hardware.flops_per_s is not None:
            self._rates = Rates.of(hardware, utilization=settings.utilization, gpus_per_node=cluster.gpus_per_node)

    def plan(self, name: str) -> list[StepPlan]:
        """The rows of one step."""
        try:
            return self._plan(name)
        except ValueError as error:
            raise ValueError(f"step {name}: {error}") from error

    def _plan(self, name: str) -> list[StepPlan]:
        step = self._pipeline.steps[name]
        require(step.stage in STAGES, f"unknown stage {step.stage!r}; stages are {', '.join(STAGES)}")
        stage = STAGES[step.stage]
        config = compose_stage(stage.config, step_overrides(self._pipeline, name, self._overrides))
        earlier = self._configs
        for source in step.inputs.values():
            require(source in earlier, f"input {source!r} is not an earlier step; there are {', '.join(earlier)}")
        kinds = {key: STAGES[self._pipeline.steps[source].stage].output for key, source in step.inputs.items()}
        check_inputs(stage, config, kinds)
        self._configs[name] = config
        given = self._given(name, config) if stage.output == "model" else None
        if given is not None:
            self._models[name] = given
        cluster = self._cluster_of(name)
        nodes = cluster.nodes if stage.distributed and cluster.kind == "slurm" else 1
        ranks = nodes * cluster.gpus_per_node if stage.distributed else 1
        models = {key: self._models[source] for key, source in step.inputs.items() if source in self._models}
        demand = stage_demand(step.stage, config, models, ranks, given)
        row = StepPlan(
            step=name,
            stage=step.stage,
            nodes=nodes,
            gpus=ranks,
            limit_gib=self._limits(config).gpu_bytes / GIB,
            artifact_gib=demand.artifact_bytes / GIB,
            resume_gib=demand.resume_bytes / GIB,
            notes=(*demand.notes, *_notes(given, models)),
        )
        if demand.trainings:
            return [self._trained(row, config, demand, run) for run in demand.trainings]
        return [self._forward(row, config, demand, models, given)]

    def _given(self, name: str, config: Any) -> PlannedModel:
        """The model that a step will give."""
        step = self._pipeline.steps[name]
        sources = {key: self._models[source] for key, source in step.inputs.items() if source in self._models}
        if step.stage == "import_parent":
            if self._settings.parent is not None:
                return PlannedModel(architecture=plan_models.given_architecture(self._settings.parent))
            return plan_models.parent_model(config)
        if step.stage == "pretrain":
            return plan_models.pretrained_model(config, self._configs[step.inputs["data"]].data.vocab_size)
        if step.stage == "assemble":
            if self._settings.child is not None:
                return PlannedModel(architecture=plan_models.given_architecture(self._settings.child))
            search = self._configs[step.inputs["solution"]]
            costs = self._pipeline.steps[step.inputs["solution"]].inputs.get("costs")
            workload = None if costs is None else self._configs[costs].workload
            return plan_models.searched_child(sources["parent"], search, workload)
        if step.stage == "prune_attention":
            return plan_models.pruned_model(sources["model"], config)
        if step.stage == "fuse":
            return plan_models.fused_model(sources["model"], config)
        own = next(key for key in ("student", "fused", "model") if key in sources)
        return sources[own]

    def _limits(self, config: Any) -> Limits:
        cluster, engine = self._cluster, getattr(config, "engine", None)
        host = cluster.cpu_memory_gib * GIB
        if engine is not None and engine.device == "cpu":
            return Limits(gpu_bytes=host / cluster.gpus_per_node, host_bytes=host, gpus_per_node=cluster.gpus_per_node)
        gib = self._settings.gpu_memory_gib or GPU_GIB.get(cluster.hardware)
        require(
            gib is not None,
            f"memory of cluster.hardware={cluster.hardware} is not known; give plan.gpu_memory_gib=<GiB>, or one of "
            f"{', '.join(GPU_GIB)}",
        )
        assert gib is not None
        return Limits(gpu_bytes=gib * GIB, host_bytes=host, gpus_per_node=cluster.gpus_per_node)

    def _trained(self, row: StepPlan, config: Any, demand: Demand, run: Training) -> StepPlan:
        limits, step, cluster = self._limits(config), run.step, self._cluster_of(row.step)
        if len(demand.trainings) > 1:
            row = replace(row, step=f"{row.step} phase {run.name.rpartition('.')[2]}")
        try:
            config.check_processes(step.num_ranks, step.models)
            memory = step_memory(step)
        except ValueError as error:
            return replace(row, problem=str(error))
        row = _with_memory(row, memory)
        if not fits(step, memory, limits):
            nearest = nearest_fit(step, limits, node=run.name)
            row = replace(row, problem=_misfit(row, memory, limits, nearest))
        if self._rates is None or config.engine.device == "cpu":
            return row
        seconds = step_time(step, self._rates).total_s
        flops = sum(sequence_flops(model, step.seq_len) for model in step.models.values())
        held_out = run.evaluated_tokens / step.seq_len * flops
        hours = (run.num_steps * seconds + held_out / (self._rates.flops_per_s * step.num_ranks)) / 3600
        row = replace(row, step_s=seconds, hours=hours, gpu_hours=hours * row.gpus)
        return self._with_interruptions(
            row, cluster, step_s=seconds, state_bytes=POINT_BYTES * num_params(step.student)
        )

    def _cluster_of(self, step: str) -> ClusterConfig:
        return self._cluster.for_step(self._pipeline.steps[step])

    def _with_interruptions(
        self, row: StepPlan, cluster: ClusterConfig, *, step_s: float, state_bytes: float
    ) -> StepPlan:
        """Whether a job that is told to stop can save in time, and how many jobs the step takes."""
        if cluster.kind != "slurm":
            return row
        needed = step_s + state_bytes / (DISK_BYTES_PER_S * row.nodes)
        notes = list(row.notes)
        jobs = (row.hours or 0) * 3600 / (cluster.job_seconds - cluster.signal_seconds)
        if jobs > 1:
            notes.append(f"about {jobs:.0f} jobs of {cluster.time_limit}")
        if needed > cluster.signal_seconds and row.problem is None:
            problem = (
                f"a step and a save take about {needed:.0f} s, more than the signal_seconds={cluster.signal_seconds} "
                f"that a job has before its time limit; set cluster.signal_seconds={2 * round(needed)}, or the "
                "signal_seconds of the step in its pipeline"
            )
            return replace(row, notes=tuple(notes), problem=problem)
        return replace(row, notes=tuple(notes))

    def _forward(
        self,
        row: StepPlan,
        config: Any,
        demand: Demand,
        models: Mapping[str, PlannedModel],
        given: PlannedModel | None,
    ) -> StepPlan:
        work = demand.forward
        if work is None:
            return replace(row, gpus=0)
        limits = self._limits(config)
        if work.memory is not None:
            row = _with_memory(row, work.memory)
            if needed_bytes(work.memory) > limits.gpu_bytes:
                nearest = self._forward_fit(row, config, models, given)
                row = replace(row, problem=_misfit(row, work.memory, limits, nearest))
        engine = getattr(config, "engine", None)
        if work.flops is None or self._rates is None or (engine is not None and engine.device == "cpu"):
            return row
        hours = work.flops / (self._rates.flops_per_s * work.ranks) / 3600
        return replace(row, hours=hours, gpu_hours=hours * row.gpus)

    def _forward_fit(
        self, row: StepPlan, config: Any, models: Mapping[str, PlannedModel], given: PlannedModel | None
    ) -> str | None:
        """The fewest changes of the engine, and nodes, with which a stage without training loop fits."""
        limit = self._limits(config).gpu_bytes
        for factor, settings in product(_NODE_FACTORS, _forward_settings(row.stage, config)):
            engine = replace(config.engine, **settings)
            ranks = factor * row.gpus
            if (not STAGES[row.stage].distributed and factor > 1) or ranks % engine.slices:
                continue
            demand = stage_demand(row.stage, replace(config, engine=engine), models, ranks, given)
            memory = None if demand.forward is None else demand.forward.memory
            if memory is not None and needed_bytes(memory) <= limit:
                texts = [f"engine.{name}={str(value).lower()}" for name, value in settings.items()]
                return " ".join([*texts, *([f"nodes x {factor}"] if factor > 1 else [])])
        on_cpu = sum(row.memory_bytes.values()) < self._cluster.cpu_memory_gib * GIB
        return "engine.device=cpu" if on_cpu else None


def _forward_settings(stage: str, config: Any) -> Iterator[dict[str, Any]]:
    """Engine settings that lower the memory of a stage without training loop."""
    engine = config.engine
    slices = [engine.slices]
    if stage in ("build_library", "score_library", "measure_dependency"):
        slices += [n for n in (2, 4, 8, 16, 32, 64, 128) if n > engine.slices]
    for number in slices:
        settings: dict[str, Any] = {} if number == engine.slices else {"slices": number}
        yield settings
        if stage == "build_library":
            yield {**settings, "micro_batch_tokens": config.library.bld.seq_len}
        if stage == "cache_teacher" and not engine.shard:
            yield {**settings, "shard": True}


def _notes(given: PlannedModel | None, models: Mapping[str, PlannedModel]) -> tuple[str, ...]:
    """What is assumed of a model that the step is the first to give."""
    is_new = given is not None and all(given is not model for model in models.values())
    return (f"its shape: {given.note}",) if given is not None and is_new and given.note else ()


def _with_memory(row: StepPlan, memory: Memory) -> StepPlan:
    return replace(
        row,
        memory_bytes=memory.parts,
        moment=memory.moment,
        needed_gib=needed_bytes(memory) / GIB,
        host_bytes=memory.host,
    )


def _misfit(row: StepPlan, memory: Memory, limits: Limits, nearest: str | None) -> str:
    way_out = f"the nearest that fits: {nearest}" if nearest else "nothing that was tried fits; take a smaller model"
    per_node = memory.host_total * min(max(row.gpus, 1), limits.gpus_per_node)
    if needed_bytes(memory) <= limits.gpu_bytes:
        shown = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in memory.host.items())
        return (
            f"{per_node / GIB:,.0f} GiB of CPU memory per node (of each process: {shown}), and cluster.cpu_memory_gib="
            f"{limits.host_bytes / GIB:,.0f}; {way_out}"
        )
    largest = sorted(memory.parts.items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in largest)
    return (
        f"{needed_bytes(memory) / GIB:,.1f} GiB needed per GPU ({shown}; {memory.moment}), and there are "
        f"{limits.gpu_bytes / GIB:,.1f}; {way_out}"
    )

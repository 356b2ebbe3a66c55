"""The configuration of every stage: the nodes of the configuration tree that it reads. Torch-free.

Those nodes (``conf/config.yaml``) make up a part of the fingerprint of the stage's artifact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from distill.config import (
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
    require,
)
from distill.context_phases import ExtendContextConfig, PhaseConfig
from distill.data.generation import GenerationConfig
from distill.engine.dealing import StepShape
from distill.engine.layout import check_layout, check_objective_memory, check_options, check_whole_model
from distill.teacher_cache import TeacherCacheConfig, check_objective
from fusion.config import (
    DependencyConfig,
    FuseConfig,
    GroupDistillationConfig,
    GroupScoreConfig,
    ParallelizeConfig,
)
from puzzle.config import (
    AdditivityConfig,
    AssembleConfig,
    BenchmarkConfig,
    CostConfig,
    LibraryConfig,
    PruneAttentionConfig,
    ScoreConfig,
    SearchConfig,
    SpaceConfig,
    WorkloadConfig,
)
from puzzle.model.architecture import Architecture
from puzzle.model.config import ExportConfig, ModelConfig, PretrainConfig
from puzzle.model.parallelism import refuses

NONE_KNOWN: Mapping[str, Architecture] = MappingProxyType({})
"""Before the models that a stage takes are there."""


@dataclass(frozen=True, kw_only=True)
class ImportParentStage:
    """Configuration of stage import_parent."""

    model: ModelConfig


@dataclass(frozen=True, kw_only=True)
class PrepareDataStage:
    """Configuration of stage prepare_data."""

    data: DataConfig
    seed: int

    def check_inputs(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` where the configuration asks for an input that is not among ``names``."""
        require(
            self.data.tokenizer != "parent" or "parent" in names,
            "data.tokenizer=parent needs the input `parent`; name one, or set data.tokenizer=train",
        )
        is_generated = any(source.kind == "generated" for source in self.data.sources)
        require(
            is_generated == ("generated" in names),
            f"data.sources has {'a' if is_generated else 'no'} source of kind=generated, and the input `generated` (of "
            f"stage generate_text) is {'not ' * is_generated}given; give both or neither",
        )


@dataclass(frozen=True, kw_only=True)
class GenerateTextStage:
    """Configuration of stage generate_text."""

    generation: GenerationConfig
    engine: EngineConfig
    """Its device and precision."""
    seed: int

    def __post_init__(self) -> None:
        check_whole_model(self.engine, "generate_text", may_shard=False)


@dataclass(frozen=True, kw_only=True)
class PretrainStage:
    """Configuration of stage pretrain."""

    pretrain: PretrainConfig
    engine: EngineConfig
    seed: int

    def __post_init__(self) -> None:
        check_options(self.engine)

    def check_processes(
        self, count: int, models: Mapping[str, Architecture] = NONE_KNOWN, inputs: Collection[str] = ()
    ) -> None:
        """Raise ``ValueError`` where ``count`` processes cannot run the engine, the batch or ``models`` by role."""
        shape = _shape(self.pretrain.train, "pretrain.train", max_seq_len=self.pretrain.max_positions)
        _check_layout(self.engine, count, models, [shape])


@dataclass(frozen=True, kw_only=True)
class BuildLibraryStage:
    """Configuration of stage build_library."""

    space: SpaceConfig
    library: LibraryConfig
    engine: EngineConfig
    seed: int

    def check_inputs(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` where an input is given that the configuration has no use for."""
        require(
            "library" not in names or self.library.mode == "coupled",
            "library.mode=decoupled starts from the parent's weights and has no use for the input `library`; leave it "
            "out, or set library.mode=coupled",
        )
        for name in ("max_attentions", "max_ffns"):
            require(
                getattr(self.library, name) is None or "solution" in names,
                f"library.{name} keeps what the solutions of a search use most; give the input `solution`, or set "
                f"library.{name}=null",
            )


@dataclass(frozen=True, kw_only=True)
class ScoreLibraryStage:
    """Configuration of stage score_library."""

    scores: ScoreConfig
    engine: EngineConfig


@dataclass(frozen=True, kw_only=True)
class CheckAdditivityStage:
    """Configuration of stage check_additivity."""

    additivity: AdditivityConfig
    scores: ScoreConfig
    """Its tokens and batch size."""
    engine: EngineConfig
    seed: int


@dataclass(frozen=True, kw_only=True)
class MeasureCostsStage:
    """Configuration of stage measure_costs."""

    space: SpaceConfig
    workload: WorkloadConfig
    costs: CostConfig
    engine: EngineConfig


@dataclass(frozen=True, kw_only=True)
class SearchStage:
    """Configuration of stage search."""

    search: SearchConfig
    fuse: FuseConfig
    """What the later fusion will leave out, for the fusion-aware cost."""

    def check_inputs(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` where scores or costs come from nowhere, or from two places."""
        for name in ("scores", "costs"):
            given = [f"inputs.{name}"] * (name in names) + [f"search.{name}"] * (getattr(self.search, name) is not None)
            require(
                len(given) == 1,
                f"{name}: give either inputs.{name}=<artifact> or search.{name}=<CSV or JSON file>, "
                f"got {' and '.join(given) or 'neither'}",
            )


@dataclass(frozen=True, kw_only=True)
class AssembleStage:
    """Configuration of stage assemble."""

    assemble: AssembleConfig


@dataclass(frozen=True, kw_only=True)
class PruneAttentionStage:
    """Configuration of stage prune_attention."""

    prune_attention: PruneAttentionConfig
    engine: EngineConfig


@dataclass(frozen=True, kw_only=True)
class MeasureDependencyStage:
    """Configuration of stage measure_dependency."""

    dependency: DependencyConfig
    engine: EngineConfig


@dataclass(frozen=True, kw_only=True)
class ScoreGroupsStage:
    """Configuration of stage score_groups."""

    group_scores: GroupScoreConfig
    workload: WorkloadConfig
    engine: EngineConfig


@dataclass(frozen=True, kw_only=True)
class FuseStage:
    """Configuration of stage fuse."""

    fuse: FuseConfig

    def check_inputs(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` where the configuration asks for an input that is not among ``names``."""
        require_fusion_inputs(self.fuse, names)


@dataclass(frozen=True, kw_only=True)
class DistillGroupsStage:
    """Configuration of stage distill_groups."""

    group_distillation: GroupDistillationConfig
    fuse: FuseConfig
    """Chooses the groups, where the input `fused` does not name them."""
    engine: EngineConfig
    seed: int

    def check_inputs(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` where the configuration asks for an input that is not among ``names``."""
        if "fused" not in names:
            require_fusion_inputs(self.fuse, names)


@dataclass(frozen=True, kw_only=True)
class ParallelizeBlocksStage:
    """Configuration of stage parallelize_blocks."""

    parallelize: ParallelizeConfig

    def check_inputs(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` where the configuration asks for an input that is not among ``names``."""
        require(
            self.parallelize.windows is not None or "dependency" in names,
            "the greedy choice of windows goes by the input `dependency` (stage measure_dependency); name one, or set "
            "parallelize.windows",
        )


def require_fusion_inputs(fuse: FuseConfig, names: Collection[str]) -> None:
    """Raise ``ValueError`` where the choice of groups needs a measurement that is not among the inputs ``names``."""
    require(
        fuse.max_dependency is None or "dependency" in names,
        f"fuse.max_dependency={fuse.max_dependency} needs the input `dependency` (stage measure_dependency); name one, "
        "or set it to null",
    )
    needs_scores = {
        "choose=most_gain": fuse.choose == "most_gain",
        "treatment=remove": fuse.treatment == "remove",
    }
    for setting, needed in needs_scores.items():
        require(
            not needed or "group_scores" in names,
            f"fuse.{setting} needs the input `group_scores` (stage score_groups); name one",
        )


@dataclass(frozen=True, kw_only=True)
class CacheTeacherStage:
    """Configuration of stage cache_teacher."""

    teacher_cache: TeacherCacheConfig
    engine: EngineConfig
    """Its device, precision and compile; with ``shard`` the blocks' weights are dealt over the processes."""

    def __post_init__(self) -> None:
        check_whole_model(self.engine, "cache_teacher", may_shard=True)


@dataclass(frozen=True, kw_only=True)
class DistillStage:
    """Configuration of stage distill."""

    distill: TrainConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    engine: EngineConfig
    seed: int

    def __post_init__(self) -> None:
        check_options(self.engine)
        check_objective_memory(self.engine, self.objective)

    def check_processes(
        self, count: int, models: Mapping[str, Architecture] = NONE_KNOWN, inputs: Collection[str] = ()
    ) -> None:
        """Raise ``ValueError`` where ``count`` processes cannot run the engine, the batch or ``models`` by role.

        ``inputs`` are the names of all that the stage is given. Cached signals are of one sequence length.
        """
        positions = [architecture.max_positions for architecture in models.values()]
        bounds = {"max_seq_len": min(positions)} if positions else {}
        if "signals" in inputs:
            bounds = {"min_seq_len": self.distill.seq_len, "max_seq_len": self.distill.seq_len}
        _check_layout(self.engine, count, models, [_shape(self.distill, "distill", **bounds)])

    def check_inputs(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` where there is no teacher, or two, or one that the objective cannot learn from."""
        given = [f"inputs.{name}" for name in ("teacher", "signals") if name in names]
        require(
            len(given) == 1,
            "give either inputs.teacher=<model>, which runs beside the student, or inputs.signals=<artifact of stage "
            f"cache_teacher>, got {' and '.join(given) or 'neither'}",
        )
        if "signals" in names:
            check_objective(self.objective)


@dataclass(frozen=True, kw_only=True)
class ExtendContextStage:
    """Configuration of stage extend_context."""

    extend_context: ExtendContextConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    engine: EngineConfig
    seed: int

    def __post_init__(self) -> None:
        check_options(self.engine)
        check_objective_memory(self.engine, self.objective)

    def check_processes(
        self, count: int, models: Mapping[str, Architecture] = NONE_KNOWN, inputs: Collection[str] = ()
    ) -> None:
        """Raise ``ValueError`` where ``count`` processes cannot run the engine, deal a phase's batch or ``models`` by
        role."""
        extend = self.extend_context
        # The student gets the positions of each phase; a teacher has to have them.
        bounds = {"max_seq_len": models["teacher"].max_positions} if "teacher" in models else {}
        shapes = [_shape(phase, extend.node(index), **bounds) for index, phase in enumerate(extend.phases)]
        shapes[-1] = replace(shapes[-1], min_seq_len=max((2, *extend.lengths)))
        _check_layout(self.engine, count, models, shapes)

    def check_inputs(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` where the configuration asks for an input that is not among ``names``."""
        require(
            not self.objective.needs_teacher or "teacher" in names,
            f"objective.kld={self.objective.kld} objective.hidden_cosine={self.objective.hidden_cosine} "
            f"objective.hidden_mse={self.objective.hidden_mse} need the input `teacher`; name one, or train on the "
            "data alone with objective=lm",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateStage:
    """Configuration of stage evaluate."""

    evaluate: EvaluateConfig
    engine: EngineConfig
    seed: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkStage:
    """Configuration of stage benchmark."""

    benchmark: BenchmarkConfig
    workload: WorkloadConfig
    engine: EngineConfig


@dataclass(frozen=True, kw_only=True)
class ExportStage:
    """Configuration of stage export."""

    export: ExportConfig


def _check_layout(
    engine: EngineConfig, count: int, models: Mapping[str, Architecture], steps: Sequence[StepShape]
) -> None:
    known = [refuses(architecture, role=role) for role, architecture in models.items()]
    check_layout(engine, world_size=count, steps=steps, models=known)


def _shape(step: TrainConfig | PhaseConfig, node: str, **bounds: int) -> StepShape:
    return StepShape(node=node, batch_size=step.batch_size, seq_len=step.seq_len, max_tokens=step.max_tokens, **bounds)

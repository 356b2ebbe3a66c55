"""Every stage: its configuration, its body, what it takes and what it gives. Torch-free; bodies import lazily.

A stage's configuration class names the nodes of the configuration tree (``conf/config.yaml``) that it reads. Those
nodes, the inputs' fingerprints, the stage's version and its externals make up the fingerprint of its artifact.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from distill.config import (
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    ExtendContextConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
    require,
)
from fusion.config import (
    DependencyConfig,
    FuseConfig,
    GroupDistillationConfig,
    GroupScoreConfig,
    ParallelizeConfig,
)
from launch.stage import StageBody
from puzzle.config import (
    AdditivityConfig,
    AssembleConfig,
    BenchmarkConfig,
    CostConfig,
    ExportConfig,
    LibraryConfig,
    ModelConfig,
    PretrainConfig,
    PruneAttentionConfig,
    ScoreConfig,
    SearchConfig,
    SpaceConfig,
    WorkloadConfig,
)


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


@dataclass(frozen=True, kw_only=True)
class PretrainStage:
    """Configuration of stage pretrain."""

    pretrain: PretrainConfig
    engine: EngineConfig
    seed: int


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
class DistillStage:
    """Configuration of stage distill."""

    distill: TrainConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    engine: EngineConfig
    seed: int


@dataclass(frozen=True, kw_only=True)
class ExtendContextStage:
    """Configuration of stage extend_context."""

    extend_context: ExtendContextConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    engine: EngineConfig
    seed: int

    def check_inputs(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` where the configuration asks for an input that is not among ``names``."""
        require(
            not self.objective.needs_teacher or "teacher" in names,
            f"objective.kld={self.objective.kld} and objective.hidden_cosine={self.objective.hidden_cosine} need the "
            "input `teacher`; name one, or train on the data alone with objective=lm",
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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the registry."""

    config: type
    body: str
    """``module:function`` of the body, imported when the stage runs."""
    inputs: Mapping[str, str]
    """Required inputs: name -> artifact kind."""
    optional_inputs: Mapping[str, str] = field(default_factory=dict)
    further_inputs: str | None = None
    """Kind of any further inputs, under names of the user's choice (the models that evaluate compares)."""
    output: str
    distributed: bool = False
    """Whether every process of a torchrun takes part; the others leave the stage to the first process."""
    version: int = 1
    """Raise it when the code's output changes for equal inputs; older artifacts then no longer match."""
    externals: str | None = None
    """``module:function`` that maps the configuration to facts outside of it that the output depends on: the content
    of a source directory, the name of the hardware."""

    def load_body(self) -> StageBody:
        """Import the body."""
        return _load(self.body)

    def load_externals(self) -> Callable[[Any], dict[str, Any]] | None:
        """Import the function behind ``externals``, if there is one."""
        return _load(self.externals) if self.externals else None


def _load(reference: str) -> Any:
    module, _, function = reference.partition(":")
    return getattr(importlib.import_module(module), function)


STAGES: dict[str, Stage] = {
    "import_parent": Stage(
        config=ImportParentStage,
        body="launch.stages.import_parent:run",
        inputs={},
        output="model",
        externals="launch.externals:model_source",
    ),
    "prepare_data": Stage(
        config=PrepareDataStage,
        body="launch.stages.prepare_data:run",
        inputs={},
        optional_inputs={"parent": "model"},
        output="data",
        externals="launch.externals:text_sources",
    ),
    "pretrain": Stage(config=PretrainStage, body="launch.stages.pretrain:run", inputs={"data": "data"}, output="model"),
    "build_library": Stage(
        config=BuildLibraryStage,
        body="launch.stages.build_library:run",
        inputs={"parent": "model", "data": "data"},
        optional_inputs={"library": "library", "solution": "solution"},
        output="library",
        version=2,
        distributed=True,
    ),
    "score_library": Stage(
        config=ScoreLibraryStage,
        body="launch.stages.score_library:run",
        inputs={"parent": "model", "library": "library", "data": "data"},
        optional_inputs={"solution": "solution"},
        output="scores",
        version=2,
        distributed=True,
        externals="launch.externals:task_sources",
    ),
    "check_additivity": Stage(
        config=CheckAdditivityStage,
        body="launch.stages.check_additivity:run",
        inputs={
            "parent": "model",
            "library": "library",
            "scores": "scores",
            "solution": "solution",
            "data": "data",
        },
        output="report",
    ),
    "measure_costs": Stage(
        config=MeasureCostsStage,
        body="launch.stages.measure_costs:run",
        inputs={"parent": "model"},
        output="costs",
        version=2,
        distributed=True,
        externals="launch.externals:cost_sources",
    ),
    "search": Stage(
        config=SearchStage,
        body="launch.stages.search:run",
        inputs={},
        optional_inputs={"scores": "scores", "costs": "costs"},
        output="solution",
        version=3,
        externals="launch.externals:own_tables",
    ),
    "assemble": Stage(
        config=AssembleStage,
        body="launch.stages.assemble:run",
        inputs={"parent": "model", "library": "library", "solution": "solution"},
        output="model",
    ),
    "prune_attention": Stage(
        config=PruneAttentionStage,
        body="launch.stages.prune_attention:run",
        inputs={"model": "model", "data": "data"},
        output="model",
        version=2,
    ),
    "measure_dependency": Stage(
        config=MeasureDependencyStage,
        body="launch.stages.measure_dependency:run",
        inputs={"model": "model", "data": "data"},
        output="dependency",
        version=2,
        distributed=True,
    ),
    "score_groups": Stage(
        config=ScoreGroupsStage,
        body="launch.stages.score_groups:run",
        inputs={"model": "model", "data": "data"},
        output="group_scores",
        version=2,
        externals="launch.externals:hardware",
    ),
    "fuse": Stage(
        config=FuseStage,
        body="launch.stages.fuse:run",
        inputs={"model": "model"},
        optional_inputs={"dependency": "dependency", "group_scores": "group_scores"},
        output="model",
        version=3,
    ),
    "distill_groups": Stage(
        config=DistillGroupsStage,
        body="launch.stages.distill_groups:run",
        inputs={"model": "model", "data": "data"},
        optional_inputs={"fused": "model", "dependency": "dependency", "group_scores": "group_scores"},
        output="model",
        version=2,
    ),
    "parallelize_blocks": Stage(
        config=ParallelizeBlocksStage,
        body="launch.stages.parallelize_blocks:run",
        inputs={"model": "model"},
        optional_inputs={"dependency": "dependency"},
        output="model",
    ),
    "distill": Stage(
        config=DistillStage,
        body="launch.stages.distill:run",
        inputs={"student": "model", "teacher": "model", "data": "data"},
        output="model",
    ),
    "extend_context": Stage(
        config=ExtendContextStage,
        body="launch.stages.extend_context:run",
        inputs={"student": "model", "data": "data"},
        optional_inputs={"teacher": "model"},
        output="model",
    ),
    "evaluate": Stage(
        config=EvaluateStage,
        body="launch.stages.evaluate:run",
        inputs={"parent": "model", "data": "data"},
        further_inputs="model",
        output="report",
    ),
    "benchmark": Stage(
        config=BenchmarkStage,
        body="launch.stages.benchmark:run",
        inputs={"parent": "model"},
        further_inputs="model",
        output="report",
        externals="launch.externals:hardware",
    ),
    "export": Stage(config=ExportStage, body="launch.stages.export:run", inputs={"model": "model"}, output="export"),
}

"""Every stage: its configuration, its body, what it takes and what it gives. Torch-free; bodies import lazily.

A stage's configuration class names the nodes of the configuration tree (``conf/config.yaml``) that it reads. Those
nodes, the inputs' fingerprints, the stage's version and its externals make up the fingerprint of its artifact.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.stage import StageBody
from launch.stage_configs import (
    AssembleStage,
    BenchmarkStage,
    BuildLibraryStage,
    CacheTeacherStage,
    CheckAdditivityStage,
    DistillGroupsStage,
    DistillStage,
    EvaluateStage,
    ExportStage,
    ExtendContextStage,
    FuseStage,
    GenerateTextStage,
    ImportParentStage,
    MeasureCostsStage,
    MeasureDependencyStage,
    ParallelizeBlocksStage,
    PrepareDataStage,
    PretrainStage,
    PruneAttentionStage,
    ScoreGroupsStage,
    ScoreLibraryStage,
    SearchStage,
)


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
    "generate_text": Stage(
        config=GenerateTextStage,
        body="launch.stages.generate_text:run",
        inputs={"teacher": "model"},
        output="text",
        distributed=True,
    ),
    "prepare_data": Stage(
        config=PrepareDataStage,
        body="launch.stages.prepare_data:run",
        inputs={},
        optional_inputs={"parent": "model", "generated": "text"},
        output="data",
        version=3,
        externals="launch.externals:text_sources",
    ),
    "pretrain": Stage(
        config=PretrainStage,
        body="launch.stages.pretrain:run",
        inputs={"data": "data"},
        output="model",
        version=2,
        distributed=True,
    ),
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
    "cache_teacher": Stage(
        config=CacheTeacherStage,
        body="launch.stages.cache_teacher:run",
        inputs={"teacher": "model", "data": "data"},
        output="teacher_signals",
        version=2,
        distributed=True,
    ),
    "distill": Stage(
        config=DistillStage,
        body="launch.stages.distill:run",
        inputs={"student": "model", "data": "data"},
        optional_inputs={"teacher": "model", "signals": "teacher_signals"},
        output="model",
        version=2,
        distributed=True,
    ),
    "extend_context": Stage(
        config=ExtendContextStage,
        body="launch.stages.extend_context:run",
        inputs={"student": "model", "data": "data"},
        optional_inputs={"teacher": "model"},
        output="model",
        version=3,
        distributed=True,
    ),
    "evaluate": Stage(
        config=EvaluateStage,
        body="launch.stages.evaluate:run",
        inputs={"parent": "model", "data": "data"},
        further_inputs="model",
        output="report",
        version=2,
        externals="launch.externals:task_sources",
    ),
    "benchmark": Stage(
        config=BenchmarkStage,
        body="launch.stages.benchmark:run",
        inputs={"parent": "model"},
        further_inputs="model",
        output="report",
        externals="launch.externals:hardware",
    ),
    "export": Stage(
        config=ExportStage, body="launch.stages.export:run", inputs={"model": "model"}, output="export", version=3
    ),
}

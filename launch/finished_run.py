"""A finished run as its report sees it: committed artifacts, and what they say of the models. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.config import require
from launch.artifact import Artifact
from puzzle.model.architecture import Architecture
from puzzle.model.hf_config import architecture_from_config

PARENT = "parent"
"""Name of the input that evaluate and benchmark compare with."""


@dataclass(frozen=True)
class FinishedRun:
    """The committed artifacts of a run, in pipeline order, with the questions that a report asks of them."""

    steps: Mapping[str, Artifact]

    def last(self, stage: str) -> Artifact | None:
        """Output of the last step of ``stage``."""
        return next((a for a in reversed(list(self.steps.values())) if a.manifest.stage == stage), None)

    def document(self, stage: str, file: str) -> dict[str, Any] | None:
        """JSON ``file`` of the last step of ``stage``; None without such a step."""
        artifact = self.last(stage)
        return read_json(artifact.path / file) if artifact else None

    def step_of(self, artifact: Artifact) -> str:
        """Name of the first step that gave ``artifact``."""
        return next(name for name, a in self.steps.items() if a.manifest.fingerprint == artifact.manifest.fingerprint)

    def input_of(self, artifact: Artifact, name: str) -> Artifact | None:
        """Input ``name`` of ``artifact``, where a step of this run made it."""
        record = artifact.manifest.inputs.get(name)
        return self._by_fingerprint.get(record.fingerprint) if record else None

    @cached_property
    def _by_fingerprint(self) -> dict[str, Artifact]:
        return {artifact.manifest.fingerprint: artifact for artifact in self.steps.values()}

    @cached_property
    def models(self) -> dict[str, Artifact]:
        """The models that evaluate and benchmark compare, under the names that they have there; without such steps
        every model of the run, under its step's name. The parent comes first, the others in pipeline order.

        Raises:
            ValueError: the run has no model.
        """
        compared: dict[str, Artifact] = {}
        for report in (self.last("evaluate"), self.last("benchmark")):
            for name, record in report.manifest.inputs.items() if report else ():
                if record.kind == "model":
                    compared.setdefault(name, self._by_fingerprint[record.fingerprint])
        if not compared:
            made = {name: artifact for name, artifact in self.steps.items() if artifact.manifest.kind == "model"}
            require(
                bool(made), f"a run of {', '.join(self.steps)} has no model to report on; add a step that makes one"
            )
            return made
        order = list(self._by_fingerprint)
        return dict(
            sorted(compared.items(), key=lambda item: (item[0] != PARENT, order.index(item[1].manifest.fingerprint)))
        )

    @cached_property
    def parent(self) -> Artifact:
        """What the other models are compared with."""
        return next(iter(self.models.values()))

    @cached_property
    def final_name(self) -> str:
        """The model that the run is about: the last one in pipeline order."""
        return list(self.models)[-1]

    @cached_property
    def timed_name(self) -> str | None:
        """The last model that benchmark timed."""
        timed = (self.document("benchmark", "benchmark.json") or {}).get("models", {})
        return next((name for name in reversed(list(self.models)) if name in timed), None)

    @cached_property
    def final(self) -> Artifact:
        """The artifact of :attr:`final_name`."""
        return self.models[self.final_name]

    @cached_property
    def unfused(self) -> Artifact:
        """Nearest ancestor of the final model (itself, if need be) without a fused block."""
        return self.unfused_of(self.final)

    def unfused_of(self, model: Artifact) -> Artifact:
        """Nearest ancestor of ``model`` without a fused block; it itself, where it has none or there is no such one."""
        return next((artifact for artifact in self.line_of(model) if not _is_fused(artifact)), model)

    def line_of(self, model: Artifact) -> tuple[Artifact, ...]:
        """``model`` and the models of the run that its weights came from, the nearest first."""
        line = []
        artifact: Artifact | None = model
        while artifact is not None:
            line.append(artifact)
            sources = (self.input_of(artifact, name) for name in ("fused", "student", "model"))
            artifact = next((source for source in sources if source is not None), None)
        return tuple(line)

    @cached_property
    def fusions(self) -> tuple[dict[str, Any], ...]:
        """``fusion.json`` of every fusion that led to the final model, the last first; no controls among them."""
        made = (artifact for artifact in self.line_of(self.final) if artifact.manifest.stage == "fuse")
        documents = (read_json(artifact.path / "fusion.json") for artifact in made)
        return tuple(fusion for fusion in documents if fusion.get("treatment", "fuse") == "fuse")


def _is_fused(artifact: Artifact) -> bool:
    return any(block.is_fused for block in read_architecture(artifact).blocks)


def num_attentions(architecture: Architecture) -> int:
    """Blocks that still attend."""
    return sum(not block.attention.is_no_op for block in architecture.blocks)


def read_architecture(artifact: Artifact) -> Architecture:
    """Architecture of an artifact of kind model."""
    return architecture_from_config(read_json(artifact.path / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    return json.loads(path.read_text(encoding="utf-8"))

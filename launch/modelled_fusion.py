"""Whether the fusion that a fusion-aware search prices is the one that the fuse steps behind it do. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from distill.config import require
from fusion.config import FuseConfig

if TYPE_CHECKING:
    from launch.pipeline import PlannedStep

FOLLOWED = ("leave_last_out", "min_length")
"""Settings of the fusion that its cost in the search follows."""
INDIFFERENT = ("norm", "latency", "tensor_parallel")
"""Those that change no group."""


def require_modelled(fuse: FuseConfig) -> None:
    """Raise ``ValueError`` where a setting would group otherwise than the fusion-aware cost does, which merges whole
    runs."""
    default = FuseConfig()
    for name in sorted({field.name for field in fields(FuseConfig)} - {*FOLLOWED, *INDIFFERENT}):
        require(
            getattr(fuse, name) == getattr(default, name),
            f"fuse.{name}={getattr(fuse, name)} is not in the search's fusion-aware cost; leave it at "
            f"{getattr(default, name)}, or set search.fusion_aware=false",
        )


def require_fused_as_modelled(steps: Sequence[PlannedStep], *, is_fused_elsewhere: bool = False) -> None:
    """Raise ``ValueError`` where a fusion-aware search is followed by no fusion, or by one that it does not price.

    The steps that follow a search are those that go on from its output. Of these, the controls of stage fuse (reversed
    order, removal) fuse nothing.

    Args:
        steps: of one pipeline, in order.
        is_fused_elsewhere: no fusion need follow here.
    """
    for search in steps:
        if search.recipe.stage != "search" or not search.config.search.fusion_aware:
            continue
        fusions = [
            step
            for step in _behind(search, steps)
            if step.recipe.stage == "fuse" and step.config.fuse.treatment == "fuse"
        ]
        require(
            is_fused_elsewhere or len(fusions) > 0,
            f"step {search.name}: search.fusion_aware=true counts on a fusion, but no fuse step goes on from its "
            "solution; add one, or set search.fusion_aware=false",
        )
        for fusion in fusions:
            _require_same(search, fusion)


def _require_same(search: PlannedStep, fusion: PlannedStep) -> None:
    for step in (search, fusion):
        try:
            require_modelled(step.config.fuse)
        except ValueError as error:
            raise ValueError(f"step {step.name}: {error}") from error
    for name in FOLLOWED:
        counted, done = (getattr(step.config.fuse, name) for step in (search, fusion))
        require(
            counted == done,
            f"fuse.{name} differs between steps ({search.name}: {counted}, {fusion.name}: {done}), so that the search "
            "counts on another fusion; set it for both, or set search.fusion_aware=false",
        )


def _behind(first: PlannedStep, steps: Sequence[PlannedStep]) -> list[PlannedStep]:
    """Steps that ``first`` leads to, in order."""
    names, found = {first.name}, []
    for step in steps:
        if names & set(step.inputs.values()):
            names.add(step.name)
            found.append(step)
    return found

"""What the stages that choose or train fusion groups read: measurements of the unfused model, and ``fusion.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fusion.dependency import JSON_NAME as DEPENDENCY_NAME
from fusion.group_table import JSON_NAME as TABLE_NAME
from fusion.group_table import GroupTable
from fusion.grouping import Matrix
from launch.artifact import require_made_from
from launch.stage import Inputs

FUSION_NAME = "fusion.json"
"""What stage fuse did, beside the model that came of it."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured on the unfused model before."""

    matrix: Matrix | None
    """Dependency matrix."""
    table: GroupTable | None
    """Scores of its groups."""


def measured(inputs: Inputs) -> Measured:
    """Dependency matrix and group scores, where given.

    Raises:
        ValueError: one of them is of another model.
    """
    matrix = table = None
    if "dependency" in inputs:
        require_made_from(inputs["dependency"], "model", inputs["model"], what="dependency matrix")
        matrix = json.loads((inputs["dependency"].path / DEPENDENCY_NAME).read_text())["matrix"]
    if "group_scores" in inputs:
        require_made_from(inputs["group_scores"], "model", inputs["model"], what="table of group scores")
        table = GroupTable.read(inputs["group_scores"].path / TABLE_NAME)
    return Measured(matrix=matrix, table=table)

"""The ``solution.json`` of a search, as the stages that go by it read it. Torch-free."""

from __future__ import annotations

import json
from typing import Any

from distill.config import require
from launch.artifact import Artifact

NAME = "solution.json"


def read_solution(solution: Artifact, parent: Artifact) -> dict[str, Any]:
    """Content of ``solution``.

    A search in tables of a user's own knows no model: ``parent`` is then null, and whoever uses the variants compares
    them with the model's.

    Raises:
        ValueError: the search was for another model than ``parent``.
    """
    found: dict[str, Any] = json.loads((solution.path / NAME).read_text())
    own = parent.manifest.fingerprint
    require(
        found["parent"] in (None, own),
        f"the solution is for model {str(found['parent'])[:12]}, parent is {own[:12]}; name the parent that was "
        "searched",
    )
    return found

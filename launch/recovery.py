"""Recovery: how much of the quality that surgery took comes back with training tokens. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TRAINING_STAGES = frozenset({"distill", "extend_context"})
"""Stages whose output counts as recovered; the models of every other stage count as surgery."""


@dataclass(frozen=True, kw_only=True)
class RecoveryCurve:
    """One held-out metric of one training step."""

    step: str
    """Name of the pipeline step."""
    metric: str
    """Name in ``metrics.jsonl``, for example ``eval/kld``."""
    tokens: tuple[int, ...]
    """Training tokens along the student's line, never falling."""
    values: tuple[float, ...]


def reference_model(lm_loss: Mapping[str, float], stages: Mapping[str, str], parent: str = "parent") -> str | None:
    """The model that recovery is counted from: the worst LM loss among those that surgery made.

    Args:
        lm_loss: model name -> LM loss in nats per token.
        stages: model name -> stage that made it. A model without an entry came from outside and is not considered.
        parent: name of the parent.
    """
    candidates = [name for name in lm_loss if name != parent and name in stages and stages[name] not in TRAINING_STAGES]
    return max(candidates, key=lm_loss.__getitem__, default=None)


def read_curves(path: Path, step: str, metrics: Iterable[str]) -> list[RecoveryCurve]:
    """Curves of ``metrics`` in a metrics file of JSON lines. Metrics without a point are left out.

    Points stay in the order of the file: where a phase of training ends and the next one begins, two of them share a
    token count.

    Raises:
        ValueError: a line is not a JSON object with ``tokens``.
    """
    rows = [
        _parse(line, f"{path}:{number}")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    ]
    curves = []
    for metric in metrics:
        points = [(int(row["tokens"]), float(row[metric])) for row in rows if metric in row]
        if points:
            tokens, values = zip(*points, strict=True)
            curves.append(RecoveryCurve(step=step, metric=metric, tokens=tokens, values=values))
    return curves


def _parse(line: str, where: str) -> dict[str, float]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict) or "tokens" not in row:
        raise ValueError(
            f"{where} is not a JSON object with `tokens`; damaged; remove its artifact and run the step again"
        )
    return row

"""Whether two scorers found the same, candidate by candidate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from prepare import Subject

from puzzle.tables import ScoreTable

TOLERANCES = {"kld": 1e-3, "lm_loss": 1e-3, "top1_disagreement": 2e-3, "hidden_cosine": 1e-5}
"""Of kld and lm_loss relative to Puzzletron's value, else absolute. Where two tokens are almost equally likely,
rounding decides which one is first."""
RELATIVE = ("kld", "lm_loss")

Values = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest difference over all candidates in one metric."""

    metric: str
    largest: float
    tolerance: float
    candidate: str

    @property
    def is_within(self) -> bool:
        return self.largest <= self.tolerance


def our_values(scores: Path, subject: Subject) -> list[Values]:
    """Absolute values of every candidate: our LM loss is stored as the difference to the parent's."""
    table = ScoreTable.read(scores)
    rows = {(row.block, row.variant): row.values for row in table.rows}
    return [
        {**rows[candidate], "lm_loss": rows[candidate]["lm_loss"] + table.parent["lm_loss"]}
        for candidate in subject.candidates
    ]


def peer_values(out: Path, subject: Subject) -> list[Values]:
    """The same from Puzzletron's files, one per solution. Its own cosine, over a whole sample, has no match in ours."""
    found = []
    for index in range(len(subject.candidates)):
        solution = json.loads((out / f"solution_{index}.json").read_text())
        values = {"kld": solution["kl_div"]["avg"], "lm_loss": solution["lm_loss"]["avg"]}
        if "hidden_cosine" in solution:
            values["hidden_cosine"] = solution["hidden_cosine"]["avg"]
            values["top1_disagreement"] = solution["top1_disagreement"]["avg"]
        else:
            values["top1_disagreement"] = 1 - solution["greedy_teacher_prediction_in_student_top_1"]["avg"]
        found.append(values)
    return found


def differences(ours: list[Values], peer: list[Values], subject: Subject) -> list[Difference]:
    """The largest difference in every metric that both have."""
    found = []
    for metric in (metric for metric in TOLERANCES if metric in peer[0]):
        pairs = zip(ours, peer, strict=True)
        distances = [
            abs(own[metric] - other[metric]) / (abs(other[metric]) if metric in RELATIVE else 1) for own, other in pairs
        ]
        worst = max(range(len(distances)), key=distances.__getitem__)
        block, variant = subject.candidates[worst]
        found.append(
            Difference(
                metric=metric,
                largest=distances[worst],
                tolerance=TOLERANCES[metric],
                candidate=f"block {block} {variant}",
            )
        )
    return found

"""Recovery, as rows of the curve: what a held-out loss says beside the teacher's. Torch-free.

Losses are in nats per token, on the same held-out sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def gap_closed_frac(*, parent: float, reference: float, model: float) -> float | None:
    """Share of the gap between ``reference`` and ``parent`` that ``model`` closes; losses in nats per token.

    1 means the parent's loss, 0 the reference's; more than 1 is better than the parent, less than 0 worse than the
    reference. None where the reference is not worse than the parent, so that there is nothing to recover.
    """
    gap = reference - parent
    return (reference - model) / gap if gap > 0 else None


def retained_frac(*, teacher: float, student: float) -> float:
    """Share of the teacher's quality that the student has: the teacher's perplexity over the student's.

    It is ``exp(teacher - student)``, the student's geometric mean probability of the right token over the teacher's. 1
    means as good as the teacher, more means better.
    """
    # A teacher that is beyond any measure bad must not stop a run.
    return math.exp(min(teacher - student, 700.0))


def retained_accuracy_frac(*, parent: float, model: float) -> float | None:
    """Share of the parent's accuracy in a task that ``model`` has; more than 1 is better than the parent.

    None where the parent has none, or less than none (a correlation), so that no share of it can be told.
    """
    return model / parent if parent > 0 else None


class Recovery:
    """What rows of held-out losses say of recovery, beyond what was measured.

    Args:
        starts_untrained: the first evaluation is of a student that has had no token of training since its weights were
            cut, and what is recovered is counted from there.
    """

    def __init__(self, *, starts_untrained: bool) -> None:
        self._counts = starts_untrained
        self._lm_loss_at_start: float | None = None

    def __call__(self, row: Mapping[str, float]) -> dict[str, float]:
        """Further metrics of ``row``, the next one of the curve; none where it has no loss of a teacher.

        ``eval/lm_loss_gap`` is the student's loss minus the teacher's, ``eval/retained_frac`` is :func:`retained_frac`.
        Where the first student was worse than the teacher, ``eval/gap_closed_frac`` is :func:`gap_closed_frac` from it.
        """
        if "eval/teacher_lm_loss" not in row:
            return {}
        student, teacher = row["eval/lm_loss"], row["eval/teacher_lm_loss"]
        metrics = {
            "eval/lm_loss_gap": student - teacher,
            "eval/retained_frac": retained_frac(teacher=teacher, student=student),
        }
        if self._counts:
            if self._lm_loss_at_start is None:
                self._lm_loss_at_start = student
            closed = gap_closed_frac(parent=teacher, reference=self._lm_loss_at_start, model=student)
            metrics |= {} if closed is None else {"eval/gap_closed_frac": closed}
        return metrics

"""Metrics that are not finite: found by all processes together, and said in a way that a user can act on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill import distributed
from distill.failures import SharedError
from distill.metrics import Row


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """The first metric of some rows that is not a finite number."""

    row: int
    """Index of its row."""
    name: str
    value: float

    def error(self, *, desc: str, step: int, tokens: float, read: str, point: Path | None) -> SharedError:
        """What ends the run.

        Args:
            desc: label of the run.
            step: optimizer steps done with this one.
            tokens: the row's position on the curve.
            read: the text that the metric is of.
            point: the last good resume point.
        """
        if point is None:
            way_back = "no resume point of this training yet: the same command starts it anew"
        else:
            way_back = f"last good resume point: {point}; the same command goes on from there"
        return SharedError(
            f"{desc}: {self.name} is {self.value} at step {step} ({tokens:,} tokens), on {read}; {way_back}; if that "
            "ends here again, look at this text and at the weights that the run started from, or lower optim.lr, with "
            "which it starts anew"
        )


def first_not_finite(rows: Sequence[Row]) -> NotFinite | None:
    """The first metric of ``rows`` that is not finite in any of the processes, the same in all of them.

    Every process calls it with as many rows: one that stopped alone would leave the others waiting for it.
    """
    own = next(
        (
            NotFinite(row=index, name=name, value=value)
            for index, row in enumerate(rows)
            for name, value in row.items()
            if not math.isfinite(value)
        ),
        None,
    )
    found = [one for one in distributed.gather_objects(own) if one is not None]
    return min(found, key=lambda one: one.row, default=None)

"""Disjoint groups that gain the most under a bound on what they cost in quality, exactly. Torch-free.

Weighted interval scheduling with a budget. The groups' gains add up, because each saves time of its own; so, by
assumption, do their KL divergences, as the scores of Puzzle's search do (arXiv 2411.19146, section 3).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusion.config import Span


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A group that may be fused."""

    group: Span
    gain_ms: float
    """Milliseconds that it saves."""
    kld: float
    """Nats per token that it costs."""


class _Label(NamedTuple):
    """Groups chosen among the blocks before some place."""

    gain_ms: float
    kld: float
    chosen: tuple[Candidate, ...]

    def plus(self, candidate: Candidate) -> _Label:
        return _Label(self.gain_ms + candidate.gain_ms, self.kld + candidate.kld, (*self.chosen, candidate))


def most_gain(candidates: Sequence[Candidate], max_kld: float | None = None) -> tuple[Candidate, ...]:
    """The disjoint candidates whose gains sum to the most, their KL divergences to ``max_kld`` at most.

    Exact: at every block, of all choices before it, those are kept that no other beats in both sums. A choice is
    dropped early where not even the relaxed rest of the blocks, its KL divergence priced by a Lagrange multiplier,
    lifts it to a solution that is already known.

    Args:
        candidates: those that gain nothing are never chosen.
        max_kld: in nats per token, >= 0; None: no bound.

    Returns:
        The chosen ones in rising order, none where none gains within the bound. Of equal gains the least divergence.
    """
    gainful = sorted((c for c in candidates if c.gain_ms > 0), key=lambda c: c.group)
    budget = math.inf if max_kld is None else max_kld
    if not gainful:
        return ()
    known, multipliers = _relaxed(gainful, budget)
    rests = {multiplier: _best_rest(gainful, multiplier) for multiplier in multipliers}
    least_rest = _best_rest(gainful, None)
    # Sums in another order differ by rounding; a margin well above it keeps the optimum from being pruned.
    floor = known.gain_ms - 1e-9 * (1 + known.gain_ms)

    def may_win(label: _Label, place: int) -> bool:
        if label.kld - least_rest[place] > budget + 1e-9 * (1 + abs(label.kld)):
            return False
        slack = 0.0 if math.isinf(budget) else budget - label.kld
        return all(label.gain_ms + rest[place] + price * slack >= floor for price, rest in rests.items())

    labels: dict[int, list[_Label]] = defaultdict(list)
    starts = _by_first(gainful)
    place, end = gainful[0].group[0], _end(gainful)
    labels[place] = [_Label(0.0, 0.0, ())]
    while place < end:
        for label in _nondominated([label for label in labels.pop(place, []) if may_win(label, place)]):
            labels[place + 1].append(label)
            for candidate in starts.get(place, ()):
                labels[candidate.group[1] + 1].append(label.plus(candidate))
        place += 1
    return _nondominated([label for label in labels[end] if label.kld <= budget])[0].chosen


def _end(candidates: Sequence[Candidate]) -> int:
    return max(candidate.group[1] for candidate in candidates) + 1


def _by_first(candidates: Sequence[Candidate]) -> dict[int, list[Candidate]]:
    starts: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        starts[candidate.group[0]].append(candidate)
    return starts


def _nondominated(labels: Sequence[_Label]) -> list[_Label]:
    """Most gain first, each of less divergence than all before it."""
    kept: list[_Label] = []
    for label in sorted(labels, key=lambda label: (-label.gain_ms, label.kld)):
        if not kept or label.kld < kept[-1].kld:
            kept.append(label)
    return kept


def _value(candidate: Candidate, multiplier: float | None) -> float:
    return -candidate.kld if multiplier is None else candidate.gain_ms - multiplier * candidate.kld


def _best_rest(candidates: Sequence[Candidate], multiplier: float | None) -> list[float]:
    """Largest sum of gain - multiplier x divergence (None: of the negative divergence) from every block to the end."""
    end = _end(candidates)
    starts = _by_first(candidates)
    best = [0.0] * (end + 1)
    for place in reversed(range(end)):
        taken = (_value(c, multiplier) + best[c.group[1] + 1] for c in starts.get(place, ()))
        best[place] = max([best[place + 1], *taken])
    return best


def _best_choice(candidates: Sequence[Candidate], multiplier: float) -> _Label:
    """A choice of the largest sum of gain - multiplier x divergence, without the bound."""
    best, starts = _best_rest(candidates, multiplier), _by_first(candidates)
    label, place = _Label(0.0, 0.0, ()), candidates[0].group[0]
    while place < _end(candidates):
        options = starts.get(place, ())
        taken = max(options, key=lambda c: _value(c, multiplier) + best[c.group[1] + 1], default=None)
        if taken is None or _value(taken, multiplier) + best[taken.group[1] + 1] <= best[place + 1]:
            place += 1
        else:
            label, place = label.plus(taken), taken.group[1] + 1
    return label


def _relaxed(candidates: Sequence[Candidate], budget: float) -> tuple[_Label, tuple[float, ...]]:
    """A good choice within ``budget``, and prices of divergence whose relaxation bounds all choices closely."""
    low, high = 0.0, 1.0 + max((c.gain_ms / c.kld for c in candidates if c.kld > 0), default=0.0)
    known = _best_choice(candidates, low)
    if known.kld <= budget:
        return known, (0.0,)
    known = _best_choice(candidates, high)
    for _ in range(50):
        middle = (low + high) / 2
        choice = _best_choice(candidates, middle)
        if choice.kld > budget:
            low = middle
        else:
            high = middle
            known = max(known, choice, key=lambda label: label.gain_ms)
    return known, (0.0, low, high)

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from fusion.gain import Candidate, most_gain


def random_candidates(rng, runs, *, coarse=False):
    """Every group of two or more within ``runs``; coarse values tie often, fine ones never."""

    def value(low, high):
        return rng.randint(int(8 * low), int(8 * high)) / 8 if coarse else rng.uniform(low, high)

    return [
        Candidate(group=(first, last), gain_ms=value(-0.5, 1.5), kld=value(0, 1))
        for start, end in runs
        for first in range(start, end + 1)
        for last in range(first + 1, end + 1)
    ]


def every_choice(candidates):
    """All sets of disjoint candidates in rising order, by enumeration."""
    candidates = sorted(candidates, key=lambda candidate: candidate.group)

    def extend(chosen, rest):
        yield chosen
        for index, candidate in enumerate(rest):
            if not chosen or candidate.group[0] > chosen[-1].group[1]:
                yield from extend((*chosen, candidate), rest[index + 1 :])

    return extend((), candidates)


def sums(chosen):
    return sum(candidate.gain_ms for candidate in chosen), sum(candidate.kld for candidate in chosen)


@pytest.mark.parametrize("runs", [[(1, 9)], [(2, 6), (8, 11)], [(0, 3), (5, 6), (8, 10)]], ids=str)
@pytest.mark.parametrize("max_kld", [0.0, 0.1, 0.4, 1.0, 3.0, None])
@pytest.mark.parametrize("coarse", [False, True])
def test_equals_brute_force(runs, max_kld, coarse):
    for seed in range(4):
        candidates = random_candidates(random.Random(seed), runs, coarse=coarse)
        allowed = [
            (gain, -kld)
            for gain, kld in map(sums, every_choice([c for c in candidates if c.gain_ms > 0]))
            if max_kld is None or kld <= max_kld
        ]
        gain, kld = sums(most_gain(candidates, max_kld))
        # Exact where the values are multiples of 1/8; otherwise sums of a dozen numbers in another order.
        assert (gain, -kld) == (max(allowed) if coarse else pytest.approx(max(allowed), abs=1e-12))
        assert max_kld is None or kld <= max_kld


def test_choice_is_disjoint_rising_and_gainful():
    candidates = random_candidates(random.Random(5), [(0, 20), (22, 30)])
    chosen = most_gain(candidates, 2.0)
    assert len(chosen) > 2
    assert all(before.group[1] < after.group[0] for before, after in pairwise(chosen))
    assert all(candidate.gain_ms > 0 for candidate in chosen)


def test_groups_without_gain_are_never_taken():
    candidates = [
        Candidate(group=(0, 1), gain_ms=0.0, kld=-0.1),
        Candidate(group=(3, 4), gain_ms=-1.0, kld=0.0),
    ]
    assert most_gain(candidates, 1.0) == most_gain([], None) == ()


def test_measured_divergences_below_zero_count_as_they_are():
    """A noisy divergence below 0 makes room for another group, before or after it."""
    good, noisy = Candidate(group=(0, 1), gain_ms=1.0, kld=0.3), Candidate(group=(3, 4), gain_ms=0.1, kld=-0.2)
    assert most_gain([good, noisy], 0.1) == (good, noisy)
    assert most_gain([good, noisy], 0.05) == (noisy,)


def test_a_bound_that_is_met_exactly_holds():
    candidates = [Candidate(group=(2 * i, 2 * i + 1), gain_ms=1.0, kld=0.25) for i in range(4)]
    assert len(most_gain(candidates, 0.75)) == 3


@pytest.mark.parametrize("max_kld", [0.003, 0.01, 0.05])
def test_the_longest_published_run_stays_small(monkeypatch, max_kld):
    """50 FFNs (Ultra-253B), gains that grow with the members and divergences that grow faster: few choices are kept."""
    rng = random.Random(0)
    candidates = [
        Candidate(
            group=(first, last),
            gain_ms=0.03 * (last - first) + 0.01 * rng.random(),
            kld=0.001 * (last - first) ** 1.5 * rng.uniform(0.5, 2),
        )
        for first in range(50)
        for last in range(first + 1, 50)
    ]
    kept = []
    nondominated = most_gain.__globals__["_nondominated"]
    monkeypatch.setitem(
        most_gain.__globals__, "_nondominated", lambda labels: kept.append(nondominated(labels)) or kept[-1]
    )
    gain, kld = sums(most_gain(candidates, max_kld))
    assert gain > 0
    assert kld <= max_kld
    assert max(map(len, kept)) < 1000

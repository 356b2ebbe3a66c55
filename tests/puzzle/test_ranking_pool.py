from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.config import OptimConfig, TrainConfig
from puzzle.config import LibraryConfig
from puzzle.importance import Rankings, channel_criterion
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model
from puzzle.ranking_pool import RankingPool
from puzzle.slices import ParentSlice

TRAIN = TrainConfig(max_tokens=96, seq_len=24, batch_size=4)
CONFIG = LibraryConfig(importance_sequences=6, kv_init="select", bld=TRAIN, optim=OptimConfig(lr=1e-3))
CHANNELS, HEADS = {0: 512, 1: 256, 2: 512}, {0: 2, 3: 1, 5: 2}


@pytest.fixture
def pool(tmp_path: Path) -> RankingPool:
    return RankingPool(directory=tmp_path / "pool", facts={"parent": "a", "precision": "fp32"})


@pytest.fixture
def rank(heterogeneous_architecture: Architecture) -> Callable[..., Rankings]:
    """The rankings that a pool gives of a parent; ``seed`` decides what a measurement finds, None: none may be made."""
    parent = ParentSlice.whole(build_model(heterogeneous_architecture, seed=0))

    def rankings(pool: RankingPool, seed: int | None, config: LibraryConfig = CONFIG) -> Rankings:
        def measure() -> Rankings:
            assert seed is not None, "measured again"
            generator = torch.Generator().manual_seed(seed)
            channels, heads = (
                {index: torch.randperm(size, generator=generator) for index, size in sizes.items()}
                for sizes in (CHANNELS, HEADS if config.kv_init == "select" else {})
            )
            return Rankings(channels=channels, kv_heads=heads, criterion=channel_criterion(config))

        return pool.rankings(parent, heterogeneous_architecture, config, measure)

    return rankings


def assert_equal(found: Rankings, expected: Rankings) -> None:
    assert found.criterion == expected.criterion
    for one, other in ((found.channels, expected.channels), (found.kv_heads, expected.kv_heads)):
        assert one.keys() == other.keys()
        assert all(torch.equal(ranking, other[index]) for index, ranking in one.items())


def test_what_was_measured_is_taken_as_it_is(pool: RankingPool, rank: Callable[..., Rankings]) -> None:
    first = rank(pool, 0)
    assert {index: len(ranking) for index, ranking in first.channels.items()} == CHANNELS
    assert {index: len(ranking) for index, ranking in first.kv_heads.items()} == HEADS
    assert len(list(pool.directory.iterdir())) == 6
    assert_equal(rank(pool, None), first)


@pytest.mark.parametrize(
    ("facts", "config"),
    [
        ({"parent": "b", "precision": "fp32"}, CONFIG),
        ({"parent": "a", "precision": "fp32"}, replace(CONFIG, ffn_importance="iterative", importance_rounds=2)),
    ],
)
def test_other_facts_are_ranked_anew(
    pool: RankingPool, rank: Callable[..., Rankings], facts: dict[str, str], config: LibraryConfig
) -> None:
    first = rank(pool, 0)
    other = rank(replace(pool, facts=facts), 1, config)
    assert not torch.equal(other.channels[0], first.channels[0])
    assert_equal(rank(pool, None), first)


def test_settings_that_rank_alike_share_a_ranking(pool: RankingPool, rank: Callable[..., Rankings]) -> None:
    first = rank(pool, 0)
    for config in (
        replace(CONFIG, importance_rounds=2, mode="coupled", train=False),
        replace(CONFIG, ffn_importance="iterative", importance_rounds=1),
    ):
        assert_equal(rank(pool, None, config), first)
    assert rank(pool, None, replace(CONFIG, kv_init="mean_pool")).kv_heads == {}
    # KV heads are ranked by all sequences whatever ranks the channels.
    iterative = rank(pool, 1, replace(CONFIG, ffn_importance="iterative", importance_rounds=2))
    assert torch.equal(iterative.kv_heads[0], first.kv_heads[0])


def test_the_first_that_is_written_stands(
    pool: RankingPool, rank: Callable[..., Rankings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes miss a ranking at the same time and measure it, each with a rounding of its own."""
    take, others = RankingPool._take, list[Rankings]()

    def taking_late(pool: RankingPool, *args: object) -> object:
        found = take(pool, *args)  # type: ignore[arg-type]
        if not others:
            monkeypatch.undo()
            others.append(rank(pool, 1))
        return found

    monkeypatch.setattr(RankingPool, "_take", taking_late)
    late = rank(pool, 2)
    assert_equal(late, others[0])
    assert_equal(rank(pool, None), late)
    assert not list(pool.directory.glob("*.partial"))


def test_file_systems_without_hard_links(
    pool: RankingPool, rank: Callable[..., Rankings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, destination: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    first = rank(pool, 0)
    assert_equal(rank(pool, None), first)
    assert {path.suffix for path in pool.directory.iterdir()} == {".json"}


def flip_a_digit(content: str) -> str:
    return content.replace("1", "2", 1)


def truncate(content: str) -> str:
    return content[:-20]


def swap_two(content: str) -> str:
    """Still a ranking of all channels."""
    head, _, rest = content.partition('"ranking": [')
    first, second, others = rest.split(", ", 2)
    return f'{head}"ranking": [{second}, {first}, {others}'


@pytest.mark.parametrize("damage", [flip_a_digit, truncate, swap_two, lambda _: "[]", lambda _: "\xff"])
def test_damaged_file_is_measured_again(
    pool: RankingPool, rank: Callable[..., Rankings], damage: Callable[[str], str]
) -> None:
    rank(pool, 0)
    (damaged,) = (path for path in pool.directory.iterdir() if '"channels"' in path.read_text() and is_of(path, 0))
    damaged.write_text(damage(damaged.read_text()), encoding="latin-1")
    with pytest.warns(RuntimeWarning, match="is damaged and not used; the ranking is measured again"):
        again = rank(pool, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(rank(pool, None), again)


def is_of(path: Path, block: int) -> bool:
    return f'"block": {block},' in path.read_text()

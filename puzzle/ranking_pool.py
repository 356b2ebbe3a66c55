"""Rankings by content, shared by all libraries: the first that is written stands.

A ranking is a sum over tokens in floating point. Measured again, in other micro-batches or on another device, channels
that are all but equal change places. So it is measured once and kept: a library that was killed goes on from the very
weights that it began with, its widths are nested, and so are those that a later library adds.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distill import distributed
from puzzle.config import LibraryConfig
from puzzle.importance import Rankings, channel_criterion
from puzzle.model.architecture import Architecture
from puzzle.slices import ParentSlice

RANKING_VERSION = 1
"""Raise it when equal settings rank otherwise than before."""


class Ranked(NamedTuple):
    """What is ranked: the channels or the KV heads of one block."""

    kind: Literal["channels", "kv_heads"]
    block: int
    size: int
    """How many there are."""


@dataclass(frozen=True, kw_only=True)
class RankingPool:
    """A directory of rankings. Any file may be deleted at any time; what is missing is measured again."""

    directory: Path
    facts: Mapping[str, Any]
    """JSON values that every ranking depends on: fingerprints of parent and data, precision, number and length of
    sequences."""

    def rankings(
        self, parent: ParentSlice, architecture: Architecture, config: LibraryConfig, measure: Callable[[], Rankings]
    ) -> Rankings:
        """Rankings of the slice's own blocks, as :func:`puzzle.importance.measure_rankings` gives them.

        Every process of the stage has to call this. Where one of them lacks a ranking, all call ``measure``; what
        processes rank alike they have alike afterwards, and so has everyone who comes later.
        """
        criterion = channel_criterion(config)
        wanted = {item: self._facts_of(item, criterion) for item in _ranked(parent, architecture, config)}
        found = {item: self._take(item, facts) for item, facts in wanted.items()}
        if any(distributed.gather_objects(any(ranking is None for ranking in found.values()))):
            measured = measure()
            assert measured.criterion == criterion
            for item, facts in wanted.items():
                own = getattr(measured, item.kind)[item.block]
                self._put(facts, own)
                stored = self._take(item, facts)
                found[item] = own if stored is None else stored
        by_kind: dict[str, dict[int, Tensor]] = {"channels": {}, "kv_heads": {}}
        for item, ranking in found.items():
            assert ranking is not None
            by_kind[item.kind][item.block] = ranking
        return Rankings(**by_kind, criterion=criterion)

    def _facts_of(self, item: Ranked, criterion: str) -> dict[str, Any]:
        facts = {"version": RANKING_VERSION, **self.facts, "kind": item.kind, "block": item.block}
        return {**facts, "criterion": criterion} if item.kind == "channels" else facts

    def _take(self, item: Ranked, facts: Mapping[str, Any]) -> Tensor | None:
        """None if it is not here, or not as it was written; a damaged file is removed, with a warning."""
        path = self._path(facts)
        try:
            content = json.loads(path.read_text())
            ranking = content["ranking"]
            whole = content["facts"] == facts and content["sha256"] == _digest(facts, ranking)
            whole = whole and sorted(ranking) == list(range(item.size))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            warnings.warn(
                f"{path} is damaged and not used; the ranking is measured again", RuntimeWarning, stacklevel=3
            )
            path.unlink(missing_ok=True)
            return None
        return torch.tensor(ranking)

    def _put(self, facts: Mapping[str, Any], ranking: Tensor) -> None:
        """Write a ranking, unless there is one already."""
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {"facts": facts, "ranking": ranking.tolist(), "sha256": _digest(facts, ranking.tolist())}
        path = self._path(facts)
        unfinished = self.directory / f"{path.stem}.{uuid.uuid4().hex}.partial"
        unfinished.write_text(json.dumps(content))
        try:
            os.link(unfinished, path)
            unfinished.unlink()
        except FileExistsError:
            unfinished.unlink()
        except OSError:  # A file system without hard links.
            unfinished.replace(path)

    def _path(self, facts: Mapping[str, Any]) -> Path:
        return self.directory / f"{_digest(facts, [])}.json"


def _ranked(parent: ParentSlice, architecture: Architecture, config: LibraryConfig) -> Iterator[Ranked]:
    """All that :func:`puzzle.importance.measure_rankings` ranks of this slice."""
    for index in parent.blocks:
        block = architecture.blocks[index]
        if block.ffn.ffn_dim is not None:
            yield Ranked("channels", index, block.ffn.ffn_dim)
        if block.attention.num_kv_heads is not None and config.kv_init == "select":
            yield Ranked("kv_heads", index, block.attention.num_kv_heads)


def _digest(facts: Mapping[str, Any], ranking: list[int]) -> str:
    return hashlib.sha256(json.dumps([facts, ranking], sort_keys=True).encode()).hexdigest()

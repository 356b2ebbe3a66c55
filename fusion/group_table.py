"""What fusing each group of neighbouring FFNs costs in quality and saves in time, as a plain table. Torch-free.

``groups.json`` holds one row per group, one per single removal and one per measured FFN width. It is checked when it is
read, so that no grouping starts on a table with holes.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import dacite

from distill.config import require
from fusion.config import Latency, Norm

JSON_NAME = "groups.json"


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """What the model becomes where one group of neighbouring attention-free FFNs, alone, is fused."""

    first: int
    """First block of the group."""
    last: int
    """Last block of the group, inclusive."""
    ffn_dim: int
    """Channels of the fused FFN: the sum of the members'."""
    kld: float
    """KL(unfused model || fused model) in nats per token."""
    kld_stderr: float
    """Standard error of ``kld`` over sequences. All rows see the same sequences, so differences between rows are much
    more certain than this."""
    lm_loss: float
    """Next-token loss of the fused model, nats per token."""


@dataclass(frozen=True, kw_only=True)
class RemovalScore:
    """What the model becomes where the FFN of one attention-free block, alone, is removed."""

    block: int
    kld: float
    """KL(whole model || model without the FFN) in nats per token."""
    kld_stderr: float
    """Standard error of ``kld`` over sequences."""
    lm_loss: float
    """Next-token loss of the model without the FFN, nats per token."""


@dataclass(frozen=True, kw_only=True)
class FFNLatency:
    """Time of one SwiGLU subblock, its norm and its residual included, at the table's workload.

    Under tensor parallelism it is that of one rank's share, without the all-reduce that each FFN ends in.
    """

    ffn_dim: int
    """Channels of the whole FFN, over all ranks."""
    prefill_ms: float
    """For the whole prompt of the whole batch."""
    decode_ms: float
    """For one token of every sequence of the batch."""


@dataclass(frozen=True, kw_only=True)
class GroupTable:
    """Scores of groups and removals of one model, and latencies of its FFNs."""

    num_tokens: int
    """Tokens that every score was measured on."""
    norm: Norm
    """What became of the members' norms, as in ``fuse.norm``."""
    lm_loss: float
    """Next-token loss of the unfused model, nats per token."""
    groups: tuple[GroupScore, ...]
    removals: tuple[RemovalScore, ...]
    latencies: tuple[FFNLatency, ...]
    """By rising width."""
    hardware: str
    """Device that the latencies are of."""
    workload: dict[str, Any]
    """Fields of the :class:`puzzle.config.WorkloadConfig` that the latencies are for."""
    clamped: tuple[str, ...] = ()
    """Latencies that came out below 0 time and again and stand as 0, for example ``ffn w256 decode_ms``."""
    all_reduce_prefill_ms: float = 0.0
    """The all-reduce that every FFN ends in under tensor parallelism, for the whole prompt of the whole batch. It is
    modelled, not measured; 0 on a single rank."""
    all_reduce_decode_ms: float = 0.0
    """The same for one token of every sequence of the batch."""
    all_reduce_hardware: str | None = None
    """Device whose rates the all-reduces are modelled by; null on a single rank."""

    def __post_init__(self) -> None:
        _require_unique(((row.first, row.last) for row in self.groups), "group")
        _require_unique((row.block for row in self.removals), "removal of block")
        _require_finite(self, "table")
        for row in (*self.groups, *self.removals, *self.latencies):
            _require_finite(row, repr(row))
        require(len(self.latencies) > 0, "group scores: the table has no FFN latency; score the groups anew")
        require(
            min(self.all_reduce_prefill_ms, self.all_reduce_decode_ms) >= 0,
            f"group scores: all-reduces of {self.all_reduce_prefill_ms} and {self.all_reduce_decode_ms} ms must be "
            ">= 0; score the groups anew",
        )
        for narrow, wide in pairwise(self.latencies):
            require(
                narrow.ffn_dim < wide.ffn_dim,
                f"group scores: latencies must stand by rising width, {narrow.ffn_dim} stands before {wide.ffn_dim}",
            )
        for latency in self.latencies:
            require(
                min(latency.prefill_ms, latency.decode_ms) >= 0,
                f"group scores: {latency} has a time below 0; measure it again",
            )

    @cached_property
    def _groups(self) -> dict[tuple[int, int], GroupScore]:
        return {(row.first, row.last): row for row in self.groups}

    @cached_property
    def _removals(self) -> dict[int, RemovalScore]:
        return {row.block: row for row in self.removals}

    def group(self, first: int, last: int) -> GroupScore:
        """Score of the group of blocks ``first`` to ``last``, inclusive.

        Raises:
            ValueError: it was not scored.
        """
        score = self._groups.get((first, last))
        if score is None:
            longest = max((row.last - row.first + 1 for row in self.groups), default=0)
            raise ValueError(
                f"group scores: [{first}, {last}] was not scored; the scores cover groups of up to {longest} FFNs "
                "within one attention-free run. Score the model that is fused, with a group_scores.max_members that "
                "reaches, or null"
            )
        return score

    def removal(self, block: int) -> RemovalScore:
        """Score of the removal of the FFN of ``block``.

        Raises:
            ValueError: it was not scored.
        """
        score = self._removals.get(block)
        if score is None:
            raise ValueError(
                f"group scores: the removal of block {block} was not scored, only those of "
                f"{', '.join(map(str, self._removals)) or 'no block'}; score the model that is fused"
            )
        return score

    def ffn_ms(self, ffn_dim: int, latency: Latency) -> float:
        """Milliseconds of one FFN of ``ffn_dim`` channels, linear between the two nearest measured widths, and of the
        all-reduce behind it.

        Raises:
            ValueError: ``ffn_dim`` is not between the narrowest and the widest measured width.
        """
        if latency == "request":
            # The prompt gives the first token.
            further_tokens = self.workload["generated_tokens"] - 1
            return self.ffn_ms(ffn_dim, "prefill") + further_tokens * self.ffn_ms(ffn_dim, "decode")
        widths = [row.ffn_dim for row in self.latencies]
        require(
            widths[0] <= ffn_dim <= widths[-1],
            f"group scores: no latency of an FFN of {ffn_dim} channels, measured are {widths[0]} to {widths[-1]}; "
            "score the model that is fused, with a group_scores.max_members that reaches, or null",
        )
        times = [row.decode_ms if latency == "decode" else row.prefill_ms for row in self.latencies]
        all_reduce_ms = self.all_reduce_decode_ms if latency == "decode" else self.all_reduce_prefill_ms
        index = bisect_left(widths, ffn_dim)
        if widths[index] == ffn_dim:
            return times[index] + all_reduce_ms
        share = (ffn_dim - widths[index - 1]) / (widths[index] - widths[index - 1])
        return times[index - 1] + share * (times[index] - times[index - 1]) + all_reduce_ms

    def saved_ms(self, ffn_dims: Sequence[int], latency: Latency) -> float:
        """Milliseconds that one FFN of the summed width takes less than FFNs of ``ffn_dims`` one after another, each
        with its all-reduce: k FFNs have k of them, the fused one has one.

        Below 0 where fusing does not pay.

        Raises:
            ValueError: a width, or their sum, is beyond those measured.
        """
        return sum(self.ffn_ms(width, latency) for width in ffn_dims) - self.ffn_ms(sum(ffn_dims), latency)

    def write(self, path: Path) -> None:
        """Write the file ``path`` (``groups.json``)."""
        path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> GroupTable:
        """Read the file ``path`` (``groups.json``).

        Raises:
            ValueError: no such file; a field is missing or unknown, a value is not finite, a row stands twice.
        """
        require(path.is_file(), f"{path} does not exist")
        try:
            content = json.loads(path.read_text())
            require(isinstance(content, dict), f"holds a {type(content).__name__}, expected a JSON object")
            return dacite.from_dict(cls, content, dacite.Config(cast=[tuple, float], strict=True))
        except (dacite.DaciteError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def _require_unique(keys: Iterable[object], what: str) -> None:
    seen: set[object] = set()
    for key in keys:
        require(key not in seen, f"group scores: {what} {key} stands twice; keep one row")
        seen.add(key)


def _require_finite(record: Any, where: str) -> None:
    for name in (f.name for f in fields(record)):
        value = getattr(record, name)
        require(
            not isinstance(value, float) or math.isfinite(value),
            f"group scores: {where}: {name} is {value}, not a finite number; measure it again",
        )

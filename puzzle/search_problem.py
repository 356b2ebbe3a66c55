"""What the search chooses from: scores, costs and budgets as plain numbers, whoever measured them. Torch-free.

One variant stands at every block. Scores and costs are sums over blocks, to which costs add what lies outside of the
blocks. Where the search is aware of fusion, a latency is less what the merges save that the later fuse stage will make;
:class:`FusionRule` counts them as :mod:`fusion.grouping` groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np

from distill.config import require
from puzzle.config import ConstraintConfig, SearchConfig
from puzzle.model.architecture import BlockConfig
from puzzle.tables import CostTable, TotalCost, parse_variant

GIB = 2**30
TOLERANCE = 1e-6
"""Relative excess over a budget that counts as rounding."""

Cost = Literal["prefill_ms", "decode_ms", "request_ms", "memory_bytes", "params", "kv_bytes_per_token"]
COSTS: tuple[str, ...] = tuple(f.name for f in fields(TotalCost))
INGREDIENTS = {
    "request_ms": "request_ms, or prefill_ms, decode_ms and generated_tokens",
    "memory_bytes": "memory_bytes, or weight_bytes, kv_bytes_per_token, prefill_tokens and generated_tokens",
}
"""Columns that a cost is made of, where it is not a column alone."""


class InfeasibleError(ValueError):
    """No choice of variants meets the budgets.

    Which budget is to blame takes further searches, so the reason may be a function, called when the message is read.
    """

    def __init__(self, reason: str | Callable[[], str]) -> None:
        super().__init__(reason)
        self._reason = reason

    def __str__(self) -> str:
        if not isinstance(self._reason, str):
            self._reason = self._reason()
        return self._reason


@dataclass(frozen=True, kw_only=True)
class FusionRule:
    """How the later fusion groups the attention-free blocks of a model; fields as in ``FuseConfig``."""

    leave_last_out: bool = True
    min_length: int = 2

    def num_merges(self, attention_free: Iterable[bool]) -> int:
        """Merges of two neighbouring FFNs that the rule makes, given which blocks are attention-free, in order."""
        lengths = [sum(run) - self.leave_last_out for is_free, run in groupby(attention_free) if is_free]
        return sum(length - 1 for length in lengths if length >= self.min_length)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the variants of every block cost at one batch size.

    A cost is there for all variants or counts as unknown: a search that does not need it does not miss it.
    """

    batch_size: int
    generated_tokens: int | None
    """Per sequence; None: unknown."""
    blocks: tuple[Mapping[str, Mapping[str, float]], ...]
    """Costs by variant, block by block; the parent's own variant is among them."""
    outside: Mapping[str, float]
    """Embedding, final norm and LM head."""
    merge_saving_ms: Mapping[str, float]
    """What one merge of two FFNs saves of each latency; empty: unknown, nothing is fused."""

    def total(self, variants: Sequence[str]) -> dict[str, float]:
        """What a whole model costs, nothing fused, by name of cost; unknown ones are left out."""
        parts = [self.outside, *(self.blocks[block][variant] for block, variant in enumerate(variants))]
        known = [name for name in COSTS if all(name in part for part in parts)]
        return {name: sum(part[name] for part in parts) for name in known}

    def require_known(self, cost: str, *, reason: str) -> None:
        """Raise ``ValueError`` naming the first variant whose ``cost`` is unknown; ``reason`` says who asks for it."""
        for block, variants in enumerate(self.blocks):
            for variant, costs in variants.items():
                require(
                    cost in costs,
                    f"{reason} needs {INGREDIENTS.get(cost, cost)} of every variant; costs of block {block}, variant "
                    f"{variant} lack it",
                )
        require(cost in self.outside, f"{reason} needs {INGREDIENTS.get(cost, cost)}; the row `outside` lacks it")

    def throughput(self, request_ms: float) -> float:
        """Generated tokens per second of requests that take ``request_ms``, the whole batch at once."""
        assert self.generated_tokens is not None
        return self.batch_size * self.generated_tokens * 1e3 / request_ms


def costs_of(table: CostTable, scores: Sequence[Mapping[str, float]], parent: Sequence[str]) -> Costs:
    """The costs in ``table`` of all variants that have a score, and of the parent's own.

    Raises:
        ValueError: the table lacks a subblock of one.
    """
    names = dict.fromkeys([*parent, *(variant for row in scores for variant in row)])
    of_variant = {name: asdict(table.block(name)) for name in names}
    return Costs(
        batch_size=table.workload.batch_size,
        generated_tokens=table.workload.generated_tokens,
        blocks=tuple(
            {name: of_variant[name] for name in dict.fromkeys([own, *row])}
            for own, row in zip(parent, scores, strict=False)
        ),
        outside=asdict(table.outside_blocks()),
        merge_saving_ms={f"{phase}_ms": table.merge_saving_ms(phase) for phase in ("prefill", "decode", "request")},
    )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bound on one cost of the whole model."""

    key: str
    """Field of :class:`ConstraintConfig`."""
    cost: Cost
    unit: float
    """What one unit of the field is worth: the parent's cost where it is a fraction."""
    value: float
    """In units of the field."""
    is_rate: bool = False
    """The field is the least rate, and the cost at most ``unit / value``."""

    @property
    def limit(self) -> float:
        """In the unit of the cost."""
        return self.unit / self.value if self.is_rate else self.value * self.unit

    @property
    def extreme(self) -> str:
        """Which end of the field is hard to reach."""
        return "most" if self.is_rate else "least"

    def __str__(self) -> str:
        return f"{self.key}={self.value:g}"

    def setting(self, cost: float) -> str:
        """The tightest setting of the field that admits ``cost``, rounded to the safe side at 4 digits:
        ``latency_frac=0.6132``."""
        if self.key in ("params", "kv_bytes_per_token"):
            return f"{self.key}={math.ceil(cost)}"
        value = self.unit / max(cost, 1e-300) if self.is_rate else cost / self.unit
        step = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
        rounded = math.floor(value / step) if self.is_rate else math.ceil(value / step)
        return f"{self.key}={rounded * step:.4g}"


@dataclass(frozen=True, kw_only=True)
class Solution:
    """One variant per block."""

    blocks: tuple[str, ...]
    score: float
    """Sum of the replace-1-block scores."""
    costs: Mapping[str, float]
    """Before fusion; costs that the table does not know are left out."""
    predicted_fused_latency_ms: float | None
    """Latency of the phase that the search is about, after the attention-free runs are fused; None: unknown."""
    num_merges: int
    status: Literal["optimal", "time_limit", "heuristic"]
    """optimal: proven; time_limit: within the budgets, but mip_gap away from the proof; heuristic: a baseline that
    proves nothing."""
    mip_gap: float | None
    """Distance of the objective to the proven bound, relative to it; None where nothing is proven."""
    batch_size: int
    """Batch size that the costs are of."""
    method: str
    """``search.method`` that found it."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Candidates of every block at one batch size."""

    variants: tuple[tuple[int, str], ...]
    """Block and name of every variant that may stand there."""
    scores: np.ndarray
    """[num_variants]."""
    parent: tuple[str, ...]
    """The parent's own variant of every block."""
    costs: Costs
    config: SearchConfig
    fusion: FusionRule
    base: tuple[str, ...]
    """Variants of the model that the scores are changes to: the parent, or what conditional scores were measured on."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the parent."""
        return len(self.parent)

    @cached_property
    def block_of(self) -> np.ndarray:
        """Block of every variant, [num_variants]."""
        return np.array([block for block, _ in self.variants])

    @cached_property
    def is_free(self) -> np.ndarray:
        """Whether a variant is material of FFN Fusion, [num_variants]; False throughout where nothing is fused."""
        if not self.costs.merge_saving_ms:
            return np.zeros(len(self.variants), dtype=bool)
        return np.array([is_attention_free(variant) for _, variant in self.variants])

    @property
    def latency(self) -> Cost:
        """Cost that the search means by latency."""
        names: dict[str, Cost] = {"decode": "decode_ms", "prefill": "prefill_ms", "request": "request_ms"}
        return names[self.config.latency]

    def cost(self, cost: str) -> np.ndarray:
        """One cost of every variant, [num_variants]."""
        return np.array([self.costs.blocks[block][variant][cost] for block, variant in self.variants], dtype=float)

    def saving_ms(self, cost: str) -> float:
        """What a merge takes off ``cost`` in the eyes of the search; 0 where it is not aware of fusion."""
        return self.costs.merge_saving_ms.get(cost, 0.0) if self.config.fusion_aware else 0.0

    def is_saving_known(self, cost: str) -> bool:
        """Whether the search knows what a merge takes off ``cost``, or need not: no time, nothing fused, not aware."""
        savings = self.costs.merge_saving_ms
        return not (cost.endswith("_ms") and self.config.fusion_aware and savings) or cost in savings

    def num_merges(self, blocks: Sequence[str]) -> int:
        """Merges that the later fusion makes of a model given by its variants."""
        return self.fusion.num_merges(map(is_attention_free, blocks)) if self.costs.merge_saving_ms else 0

    def spent(self, blocks: Sequence[str], cost: str) -> float:
        """What a model takes of a budget on ``cost``: after fusion where the search is aware of it."""
        return self.costs.total(blocks)[cost] - self.num_merges(blocks) * self.saving_ms(cost)


def build_problem(
    scores: Sequence[Mapping[str, float]],
    costs: Costs,
    parent: Sequence[str],
    config: SearchConfig,
    *,
    fusion: FusionRule | None = None,
    base: Sequence[str] | None = None,
) -> Problem:
    """Lay out the candidates.

    Args:
        scores: per block, the score of every variant that may stand there; lower is better.
        costs: of all of them and of the parent's own, from :func:`costs_of` for one.
        parent: the parent's own variant of every block.
        config: what is minimised under which limits.
        fusion: how the later fusion groups.
        base: the model that conditional scores are changes to, whose variants take the place of the parent's, which
            may be absent then; None: the parent.

    Raises:
        ValueError: scores, costs and parent do not cover the same blocks and variants.
    """
    require(
        len(scores) == len(parent) == len(costs.blocks),
        f"scores cover {len(scores)} blocks, the parent of the costs has {len(parent)}; take both from one parent",
    )
    what = "parent's own variant" if base is None else "base's variant"
    base = tuple(parent if base is None else base)
    for block, (row, own) in enumerate(zip(scores, base, strict=True)):
        require(own in row, f"scores: block {block} lacks the {what} {own}; it has {', '.join(row)}")
    variants = tuple((block, variant) for block, row in enumerate(scores) for variant in row)
    problem = Problem(
        variants=variants,
        scores=np.array([scores[block][name] for block, name in variants], dtype=float),
        parent=tuple(parent),
        costs=costs,
        config=config,
        fusion=fusion or FusionRule(),
        base=base,
    )
    assert all(variant in costs.blocks[block] for block, variant in variants)
    problem.is_free  # noqa: B018  names that fusion must read are refused here, before the solver starts
    return problem


def budgets_of(
    problem: Problem, constraint: ConstraintConfig, *, parent_throughput: float | None = None
) -> tuple[Budget, ...]:
    """The budgets that are set; fractions are of the parent's cost in the same table, nothing fused.

    Args:
        problem: whose costs.
        constraint: the fields.
        parent_throughput: tokens per second that ``throughput_ratio`` is relative to; None: those of the parent here.

    Raises:
        ValueError: a cost that a field needs is unknown, or the parent's is 0 where the field is relative to it.
    """
    costs, latency = problem.costs, problem.latency
    fields_: dict[str, tuple[Cost, float | None]] = {
        "latency_frac": (latency, None),
        "latency_ms": (latency, 1.0),
        "memory_frac": ("memory_bytes", None),
        "memory_gib": ("memory_bytes", float(GIB)),
        "params_frac": ("params", None),
        "params": ("params", 1.0),
        "kv_frac": ("kv_bytes_per_token", None),
        "kv_bytes_per_token": ("kv_bytes_per_token", 1.0),
        "throughput_ratio": ("request_ms", None),
        "throughput_tokens_per_s": ("request_ms", 1.0),
    }
    budgets = []
    for key, (cost, unit) in fields_.items():
        value = getattr(constraint, key)
        if value is None:
            continue
        where = f"search.constraint.{key}"
        costs.require_known(cost, reason=where)
        require(
            problem.is_saving_known(cost),
            f"{where} is a budget on {cost}, of which the row `merge` does not say what a merge saves (only of "
            f"{', '.join(costs.merge_saving_ms)}); add {INGREDIENTS.get(cost, cost)} there, or set "
            "search.fusion_aware=false",
        )
        is_rate = key.startswith("throughput")
        if is_rate:
            require(costs.generated_tokens is not None, f"{where} needs the column generated_tokens of the costs")
            reference = unit or parent_throughput or costs.throughput(costs.total(problem.parent)[cost])
            worth = costs.throughput(1.0) / reference
        else:
            worth = costs.total(problem.parent)[cost] if unit is None else unit
            require(worth > 0, f"{where} is relative to the parent, whose {cost} is {worth:g}; set it to null")
        budgets.append(Budget(key=key, cost=cost, unit=worth, value=value, is_rate=is_rate))
    return tuple(budgets)


def best_parent_throughput(costs: Iterable[Costs], parent: Sequence[str], memory_gib: float | None) -> float:
    """Most tokens per second that the parent reaches at any batch size at which it is within ``memory_gib``.

    Raises:
        ValueError: it is within at none, or its request time is unknown.
    """
    key = "search.constraint.throughput_ratio"
    rates, sizes_gib = [], {}
    for table in costs:
        table.require_known("request_ms", reason=key)
        require(table.generated_tokens is not None, f"{key} needs the column generated_tokens of the costs")
        total = table.total(parent)
        if memory_gib is not None:
            table.require_known("memory_bytes", reason="search.constraint.memory_gib")
            sizes_gib[table.batch_size] = total["memory_bytes"] / GIB
        if memory_gib is None or sizes_gib[table.batch_size] <= memory_gib:
            rates.append(table.throughput(total["request_ms"]))
    needs = ", ".join(f"{gib:.4g} GiB at batch size {size}" for size, gib in sizes_gib.items())
    require(
        len(rates) > 0,
        f"{key} is relative to the parent within memory_gib={memory_gib}, but it needs {needs}; "
        "give throughput_tokens_per_s",
    )
    return max(rates)


def solution_of(
    problem: Problem,
    blocks: Sequence[str],
    *,
    status: Literal["optimal", "time_limit", "heuristic"] = "heuristic",
    mip_gap: float | None = None,
) -> Solution:
    """The record of a choice: one variant per block."""
    score_of = dict(zip(problem.variants, problem.scores, strict=True))
    costs, merges = problem.costs.total(blocks), problem.num_merges(blocks)
    latency_ms, saving_ms = costs.get(problem.latency), problem.costs.merge_saving_ms.get(problem.latency)
    is_known = latency_ms is not None and (merges == 0 or saving_ms is not None)
    return Solution(
        blocks=tuple(blocks),
        score=math.fsum(score_of[key] for key in enumerate(blocks)),
        costs=costs,
        predicted_fused_latency_ms=(latency_ms or 0.0) - merges * (saving_ms or 0.0) if is_known else None,
        num_merges=merges,
        status=status,
        mip_gap=mip_gap,
        batch_size=problem.costs.batch_size,
        method=problem.config.method,
    )


def is_attention_free(variant: str) -> bool:
    """Whether a variant is material of FFN Fusion."""
    attention, ffn = parse_variant(variant)
    return BlockConfig(attention=attention, ffn=ffn, parent_block_indices=()).is_attention_free

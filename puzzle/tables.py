"""Scores and costs as plain tables: what the search reads, whoever measured it. Torch-free.

``scores.json`` holds one row per block and block variant, ``costs.json`` one row per subblock variant (a subblock costs
the same at every block) for one workload on one device. Both are checked when they are read, so that a search never
starts on a table with holes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import dacite

from distill.config import require
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, AttentionConfig, FFNConfig

Phase = Literal["decode", "prefill", "request"]
"""decode: one token; prefill: the prompt; request: the prompt and all generated tokens."""
Record = TypeVar("Record")


def parse_attention(name: str) -> AttentionConfig:
    """Inverse of ``AttentionConfig.name``.

    Raises:
        ValueError: not the name of an attention variant.
    """
    if name == NO_ATTENTION.name:
        return NO_ATTENTION
    if name == "linear":
        return AttentionConfig(kind="linear")
    heads = re.fullmatch(r"kv([1-9]\d*)(_nope)?", name)
    if heads is None:
        raise ValueError(f"attention variant {name!r} is none of kv<heads>[_nope], linear, {NO_ATTENTION.name}")
    return AttentionConfig(num_kv_heads=int(heads[1]), rope=heads[2] is None)


def parse_ffn(name: str) -> FFNConfig:
    """Inverse of ``FFNConfig.name``.

    Raises:
        ValueError: not the name of an FFN variant.
    """
    if name == NO_FFN.name:
        return NO_FFN
    if name == "linear":
        return FFNConfig(kind="linear")
    width = re.fullmatch(r"w([1-9]\d*)", name)
    if width is None:
        raise ValueError(f"FFN variant {name!r} is none of w<channels>, linear, {NO_FFN.name}")
    return FFNConfig(ffn_dim=int(width[1]))


def parse_variant(name: str) -> tuple[AttentionConfig, FFNConfig]:
    """Inverse of ``BlockConfig.name``: ``kv2+w512``, ``no_op+w256``, ``linear+no_op``.

    Raises:
        ValueError: not ``<attention>+<ffn>``.
    """
    attention, separator, ffn = name.partition("+")
    require(bool(separator), f"block variant {name!r} is not <attention>+<ffn>, for example kv8+w14336")
    return parse_attention(attention), parse_ffn(ffn)


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """What one variant at one block, alone, does to the model that was scored.

    Every value is a difference to that model, lower is better, and 0 means no change: sums over blocks carry no
    baseline, whether a replacement stands for one block or for many.
    """

    block: int
    variant: str
    values: dict[str, float]
    """By metric. kld: KL(parent || child) in nats per token; lm_loss: next-token loss in nats; top1_disagreement: share
    of tokens where the likeliest next token is another; hidden_cosine: mean of 1 - cos between the final hidden states;
    a task of lm-eval: drop in its accuracy."""
    stderr: dict[str, float]
    """Standard error over sequences of some of the values. All rows see the same sequences, so differences between rows
    are much more certain than this."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Replace-1-block scores of a library (Puzzle, section 4.2)."""

    parent: dict[str, float]
    """The parent's own values, ``lm_loss`` among them."""
    num_tokens: int
    """Tokens that every row was measured on."""
    rows: tuple[ScoreRow, ...]
    base: tuple[str, ...] | None = None
    """Variants of the model that was scored, where it is not the parent: scores are then conditional on its depth."""
    base_values: dict[str, float] | None = None
    """What that model is away from the parent, by metric."""

    def __post_init__(self) -> None:
        require(len(self.rows) > 0, "scores: the table has no rows; score the library first")
        _require_unique(((f"block {row.block}", row.variant) for row in self.rows), "scores")
        for row in self.rows:
            parse_variant(row.variant)
            where = f"scores: block {row.block}, variant {row.variant}"
            require(len(row.values) > 0, f"{where} has no value")
            for name, value in (*row.values.items(), *row.stderr.items()):
                require(math.isfinite(value), f"{where}: {name} is {value}, not a finite number; measure it again")
        blocks = {row.block for row in self.rows}
        require(
            blocks == set(range(len(blocks))),
            f"scores: blocks must count from 0 without gaps, the rows have {sorted(blocks)}; score the missing blocks",
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of the parent."""
        return len({row.block for row in self.rows})

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that every row has."""
        return tuple(name for name in self.rows[0].values if all(name in row.values for row in self.rows))

    def by_block(self, metric: str) -> tuple[dict[str, float], ...]:
        """``metric`` of every variant, block by block, in the order of the rows.

        Raises:
            ValueError: a row lacks the metric.
        """
        blocks: tuple[dict[str, float], ...] = tuple({} for _ in range(self.num_blocks))
        for row in self.rows:
            require(
                metric in row.values,
                f"scores: block {row.block}, variant {row.variant} has no {metric}; all rows have "
                f"{', '.join(self.metrics) or 'no metric in common'}",
            )
            blocks[row.block][row.variant] = row.values[metric]
        return blocks

    def write(self, path: Path) -> None:
        """Write ``scores.json``."""
        _write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> ScoreTable:
        """Read ``scores.json``.

        Raises:
            ValueError: a field or a block is missing, a value is not finite, or a row stands twice.
        """
        return _from_json(cls, _read_json(path), path)


@dataclass(frozen=True, kw_only=True)
class SubblockCost:
    """What one subblock, its norm and its residual included, costs at the table's workload.

    Under tensor parallelism times, weights and KV cache are those of one rank, all-reduce included; parameters are
    those of the whole subblock.
    """

    subblock: Literal["attention", "ffn"]
    variant: str
    prefill_ms: float
    """For the whole prompt of the whole batch."""
    decode_ms: float
    """For one token of every sequence of the batch, with half of the generated tokens in the cache."""
    params: int
    weight_bytes: int
    kv_bytes_per_token: int
    """Per sequence."""


@dataclass(frozen=True, kw_only=True)
class OverheadCost:
    """Embedding, final norm and LM head (tied embeddings count once)."""

    prefill_ms: float
    decode_ms: float
    params: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class MergeSaving:
    """Time saved where two neighbouring FFNs without attention become one FFN of their summed width. Never negative: a
    merge that does not pay need not be made."""

    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, kw_only=True)
class TotalCost:
    """What a block or a whole model costs at the table's workload."""

    prefill_ms: float
    decode_ms: float
    request_ms: float
    """The prompt, then every further token: prefill gives the first one."""
    memory_bytes: int
    """Weights, and the KV cache of the whole batch at full context."""
    params: int
    kv_bytes_per_token: int
    """Per sequence."""


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Costs of every subblock variant for one workload on one device."""

    source: str
    """measured, analytic, vllm, or the name that a user gives."""
    hardware: str
    """Device that the times are of."""
    workload: WorkloadConfig
    """With this table's own batch size."""
    kv_tokens: int
    """Positions per sequence that a KV cache holds at full context: the context, or the sliding window if shorter."""
    overhead: OverheadCost
    subblocks: tuple[SubblockCost, ...]
    ffn_merge_saving: MergeSaving
    clamped: tuple[str, ...] = ()
    """Measurements that came out below 0 time and again and stand as 0, for example ``ffn w256 decode_ms``."""
    all_reduce: Literal["measured", "modelled"] | None = None
    """Where the all-reduces in the times come from; None: there are none, or the source times them with the rest."""

    def __post_init__(self) -> None:
        _require_unique(((row.subblock, row.variant) for row in self.subblocks), "costs")
        for row in self.subblocks:
            parse = parse_attention if row.subblock == "attention" else parse_ffn
            parse(row.variant)
            _require_numbers(row, f"costs: {row.subblock} {row.variant}", minimum=0)
        _require_numbers(self.overhead, "costs: overhead", minimum=0)
        _require_numbers(self.ffn_merge_saving, "costs: ffn_merge_saving", minimum=0)
        require(self.kv_tokens > 0, f"costs: kv_tokens must be > 0, got {self.kv_tokens}")

    @cached_property
    def _rows(self) -> dict[tuple[str, str], SubblockCost]:
        return {(row.subblock, row.variant): row for row in self.subblocks}

    def subblock(self, subblock: Literal["attention", "ffn"], variant: str) -> SubblockCost:
        """One row.

        Raises:
            ValueError: the table lacks the variant.
        """
        row = self._rows.get((subblock, variant))
        if row is None:
            known = ", ".join(name for kind, name in self._rows if kind == subblock)
            raise ValueError(
                f"costs: {subblock} variant {variant} is not in the table, which has {known}; "
                "measure costs over the search space that was scored"
            )
        return row

    def block(self, variant: str) -> TotalCost:
        """Cost of one block, for example of ``kv2+w512``."""
        attention, ffn = parse_variant(variant)
        rows = (self.subblock("attention", attention.name), self.subblock("ffn", ffn.name))
        names = ("prefill_ms", "decode_ms", "params", "weight_bytes", "kv_bytes_per_token")
        return self._total(**{name: sum(getattr(row, name) for row in rows) for name in names})

    def outside_blocks(self) -> TotalCost:
        """Cost of embedding, final norm and LM head."""
        return self._total(**asdict(self.overhead), kv_bytes_per_token=0)

    def model(self, variants: Iterable[str]) -> TotalCost:
        """Cost of a whole model, one variant per block, nothing fused."""
        parts = [self.outside_blocks(), *(self.block(variant) for variant in variants)]
        return TotalCost(**{f.name: sum(getattr(part, f.name) for part in parts) for f in fields(TotalCost)})

    def merge_saving_ms(self, phase: Phase) -> float:
        """Time that one merge of two FFNs saves in ``phase``."""
        saving = self.ffn_merge_saving
        if phase == "request":
            return self._request_ms(saving.prefill_ms, saving.decode_ms)
        return saving.decode_ms if phase == "decode" else saving.prefill_ms

    def _request_ms(self, prefill_ms: float, decode_ms: float) -> float:
        return prefill_ms + (self.workload.generated_tokens - 1) * decode_ms

    def _total(
        self, *, prefill_ms: float, decode_ms: float, params: int, weight_bytes: int, kv_bytes_per_token: int
    ) -> TotalCost:
        return TotalCost(
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
            request_ms=self._request_ms(prefill_ms, decode_ms),
            memory_bytes=weight_bytes + self.workload.batch_size * self.kv_tokens * kv_bytes_per_token,
            params=params,
            kv_bytes_per_token=kv_bytes_per_token,
        )


@dataclass(frozen=True, kw_only=True)
class CostFile:
    """``costs.json``: costs of one parent from several sources and at several batch sizes."""

    architecture: dict[str, Any]
    """The parent as a Hugging Face config."""
    workload: WorkloadConfig
    """With the batch size that figures are stated for unless they name another."""
    tables: tuple[CostTable, ...]
    """One for every source and batch size."""

    def __post_init__(self) -> None:
        keys = [(table.source, table.workload.batch_size) for table in self.tables]
        for source, size in keys:
            require(
                keys.count((source, size)) == 1,
                f"costs: there are two tables from {source} at batch size {size}; keep one",
            )
        require(len(self.tables) > 0, "costs: there is no table; measure costs first")

    @property
    def sources(self) -> tuple[str, ...]:
        """Distinct sources, in order."""
        return tuple(dict.fromkeys(table.source for table in self.tables))

    def of_source(self, source: str) -> dict[int, CostTable]:
        """The tables of one source by batch size, the workload's own batch size first.

        Raises:
            ValueError: there is none.
        """
        require(source in self.sources, f"costs have no table from {source!r}, only from {', '.join(self.sources)}")
        found = {table.workload.batch_size: table for table in self.tables if table.source == source}
        own = self.workload.batch_size
        return {size: found[size] for size in sorted(found, key=lambda size: (size != own, size))}

    def write(self, path: Path) -> None:
        """Write ``costs.json``."""
        _write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> CostFile:
        """Read ``costs.json``.

        Raises:
            ValueError: a field is missing, a cost is negative or not finite, or a row stands twice.
        """
        return _from_json(cls, _read_json(path), path)


def _require_unique(keys: Iterable[tuple[str, str]], table: str) -> None:
    seen: set[tuple[str, str]] = set()
    for key in keys:
        require(key not in seen, f"{table}: {key[0]} has variant {key[1]} twice; keep one row")
        seen.add(key)


def _require_numbers(record: Any, where: str, *, minimum: float) -> None:
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, str):
            continue
        require(math.isfinite(value), f"{where}: {f.name} is {value}, not a finite number; measure it again")
        require(value >= minimum, f"{where}: {f.name} is {value}, below {minimum}; measure it again")


def _read_json(path: Path) -> dict[str, Any]:
    require(path.is_file(), f"{path} does not exist")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _from_json(kind: type[Record], content: dict[str, Any], path: Path) -> Record:
    try:
        return dacite.from_dict(kind, content, dacite.Config(cast=[tuple, float], strict=True))
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

"""Scores and costs that a user brings: CSV or JSON files, whatever measured them. Torch-free.

The columns are documented in ``docs/tables.md``. A JSON file holds a list of rows as objects with the same names, or it
is a ``scores.json`` or ``costs.json`` of ours. Every complaint names the file and the line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import require
from puzzle.search_problem import COSTS, Costs
from puzzle.tables import CostFile, ScoreTable

COST_COLUMNS = (*COSTS, "weight_bytes")
WORKLOAD_COLUMNS = ("batch_size", "prefill_tokens", "generated_tokens")
EVERY_BLOCK = ("", "*")
"""What the column block says where a row is of every block."""
OUTSIDE, MERGE = "outside", "merge"
"""What it says where a row is of what lies outside of the blocks, or of what one merge of two FFNs saves."""
MARKS = ("1", "true", "yes", "x")
"""What the column parent says where a variant is the parent's own."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a search reads of a score file."""

    by_block: tuple[Mapping[str, float], ...]
    """One metric of every variant, block by block."""
    parent: tuple[str, ...] | None
    """The parent's own variant of every block; None where the file cannot say."""
    base: tuple[str, ...] | None = None
    """The model that the scores are changes to, where it is not the parent."""

    @property
    def is_conditional(self) -> bool:
        """Whether scores are of changes to another model than the parent."""
        return self.base is not None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a file, with the place to name in complaints."""

    where: str
    cells: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The cell as text without spaces around it; empty where there is none."""
        value = self.cells.get(column)
        return "" if value is None else str(value).strip()

    def number(self, column: str, *, minimum: float = -math.inf) -> float | None:
        """The cell as a finite number, whole ones as ``int``; None where it is empty.

        Raises:
            ValueError: it is none, or below ``minimum``.
        """
        text = self.text(column)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{self.where}: {column} is {text!r}, not a number") from None
        require(math.isfinite(value), f"{self.where}: {column} is {text}, not a finite number; measure it again")
        require(value >= minimum, f"{self.where}: {column} is {text}, below {minimum:g}; measure it again")
        return int(value) if value.is_integer() else value

    def count(self, column: str) -> int | None:
        """The cell as a whole number above 0; None where it is empty."""
        value = self.number(column)
        require(
            value is None or (isinstance(value, int) and value > 0),
            f"{self.where}: {column} is {self.text(column)}, not a whole number above 0",
        )
        return None if value is None else int(value)

    def block(self) -> int:
        """The column block as an index.

        Raises:
            ValueError: it is none.
        """
        text = self.text("block")
        require(text.isdecimal(), f"{self.where}: block is {text!r}, not a number from 0")
        return int(text)

    def variant(self) -> str:
        """The name of the variant.

        Raises:
            ValueError: there is none.
        """
        require(bool(self.text("variant")), f"{self.where}: variant is empty; give every variant a name")
        return self.text("variant")


def read_scores(path: Path, metric: str) -> Scores:
    """``metric`` of every variant: from ``scores.json`` or from rows of block, variant and metrics.

    The parent's own variant is the row that the column parent marks, or the first row of its block.

    Raises:
        ValueError: the file is none of these; names the line that is wrong.
    """
    content = _read(path)
    if isinstance(content, Mapping):
        require("rows" in content, f"{path} is a JSON object without rows; give a scores.json or a list of rows")
        return scores_of(ScoreTable.read(path), metric)
    rows = list(_rows(path, content, needed=("block", "variant", metric), any_other=True))
    blocks: dict[int, dict[str, float]] = {}
    marked: dict[int, str] = {}
    for row in rows:
        block, variant, value = row.block(), row.variant(), row.number(metric)
        require(value is not None, f"{row.where}: {metric} is empty; score every variant")
        table = blocks.setdefault(block, {})
        require(variant not in table, f"{row.where}: block {block} has variant {variant} twice; keep one row")
        table[variant] = float(value or 0.0)
        if row.text("parent").lower() in MARKS:
            require(block not in marked, f"{row.where}: block {block} has a second parent, {variant}; mark one")
            marked[block] = variant
    require(
        set(blocks) == set(range(len(blocks))),
        f"{path}: blocks must count from 0 without gaps, the rows have {sorted(blocks)}; add the missing blocks",
    )
    by_block = tuple(blocks[index] for index in range(len(blocks)))
    parent = tuple(marked.get(index, next(iter(table))) for index, table in enumerate(by_block))
    return Scores(by_block=by_block, parent=parent)


def scores_of(table: ScoreTable, metric: str) -> Scores:
    """What a search reads of a table of ours.

    Raises:
        ValueError: a row lacks ``metric``.
    """
    by_block = table.by_block(metric)
    first = tuple(next(iter(row)) for row in by_block)
    return Scores(by_block=by_block, parent=first if table.base is None else None, base=table.base)


def read_costs(path: Path, scores: Scores) -> CostFile | tuple[Costs, ...]:
    """A ``costs.json`` as it is, or one table for every batch size in rows of block, variant and costs.

    Raises:
        ValueError: the file is neither, or lacks a variant that has a score; names the line that is wrong.
    """
    content = _read(path)
    if isinstance(content, Mapping):
        require("tables" in content, f"{path} is a JSON object without tables; give a costs.json or a list of rows")
        return CostFile.read(path)
    require(
        scores.parent is not None,
        f"{path} cannot say which variant is the parent's, and neither can scores of changes to another model; "
        "give the costs.json that was measured",
    )
    known = {"block", "variant", *COST_COLUMNS, *WORKLOAD_COLUMNS}
    rows = list(_rows(path, content, needed=("block", "variant"), known=known))
    sizes = list(dict.fromkeys(row.count("batch_size") or 1 for row in rows))
    return tuple(
        _table(path, [row for row in rows if (row.count("batch_size") or 1) == size], size, scores) for size in sizes
    )


def _table(path: Path, rows: Sequence[Row], batch_size: int, scores: Scores) -> Costs:
    """The rows of one batch size as the costs of every variant that has a score."""
    prefill_tokens, generated_tokens = (_one_count(rows, column) for column in WORKLOAD_COLUMNS[1:])
    costs: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        block = "*" if row.text("block") in EVERY_BLOCK else row.text("block")
        if block not in ("*", OUTSIDE, MERGE):
            block = str(row.block())
            require(
                int(block) < len(scores.by_block),
                f"{row.where}: block {block}, but scores cover blocks 0..{len(scores.by_block) - 1}; "
                "take both from one parent",
            )
        key = (block, "") if block in (OUTSIDE, MERGE) else (block, row.variant())
        what = f"block {block} has variant {key[1]}" if key[1] else f"the row {block} stands"
        require(key not in costs, f"{row.where}: {what} twice; keep one row")
        costs[key] = _costs_of_row(row, batch_size, prefill_tokens, generated_tokens)
    blocks = []
    for index, variants in enumerate(scores.by_block):
        table = {name: costs.get((str(index), name), costs.get(("*", name))) for name in variants}
        missing = [name for name, found in table.items() if found is None]
        require(
            not missing,
            f"{path}: block {index}, variant {', '.join(missing[:3])} has a score, but no costs at batch size "
            f"{batch_size}; add a row, for every block with block=*",
        )
        blocks.append({name: found for name, found in table.items() if found is not None})
    saved = costs.get((MERGE, ""), {})
    return Costs(
        batch_size=batch_size,
        generated_tokens=generated_tokens,
        blocks=tuple(blocks),
        # Without the row they count as nothing, so every cost is known.
        outside=costs.get((OUTSIDE, ""), dict.fromkeys(COSTS, 0)),
        merge_saving_ms={name: value for name, value in saved.items() if name.endswith("_ms")},
    )


def _costs_of_row(
    row: Row, batch_size: int, prefill_tokens: int | None, generated_tokens: int | None
) -> dict[str, float]:
    """The costs that a row states, and those that follow from them."""
    stated = {name: row.number(name, minimum=0) for name in COST_COLUMNS}
    costs = {name: value for name, value in stated.items() if value is not None}
    if row.text("block") == OUTSIDE:
        costs.setdefault("kv_bytes_per_token", 0)
    if generated_tokens is not None and {"prefill_ms", "decode_ms"} <= costs.keys():
        costs.setdefault("request_ms", costs["prefill_ms"] + (generated_tokens - 1) * costs["decode_ms"])
    weights, kv = costs.pop("weight_bytes", None), costs.get("kv_bytes_per_token")
    if weights is not None and kv is not None:
        if kv == 0:
            costs.setdefault("memory_bytes", weights)
        elif prefill_tokens is not None and generated_tokens is not None:
            costs.setdefault("memory_bytes", weights + batch_size * (prefill_tokens + generated_tokens) * kv)
    return costs


def _one_count(rows: Sequence[Row], column: str) -> int | None:
    """The number that all rows that have one agree on."""
    found: int | None = None
    for row in rows:
        value = row.count(column)
        require(
            None in (found, value) or found == value,
            f"{row.where}: {column} is {value}, but {found} in rows before; one batch size has one workload",
        )
        found = found or value
    return found


def _read(path: Path) -> Any:
    """The JSON value, or the lines of a CSV file."""
    require(path.is_file(), f"{path} does not exist; give a CSV or JSON file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    return text.splitlines()


def _rows(
    path: Path,
    content: Any,
    *,
    needed: Collection[str],
    known: Collection[str] = (),
    any_other: bool = False,
) -> Iterator[Row]:
    """Rows of a file whose columns are checked; empty lines are passed over."""
    require(isinstance(content, list) and len(content) > 0, f"{path} holds no rows; see docs/tables.md for the columns")
    if path.suffix.lower() == ".json":
        require(all(isinstance(row, Mapping) for row in content), f"{path}: every item of the list must be an object")
        columns: list[str] = list(dict.fromkeys(str(key) for row in content for key in row))
        pairs: Iterable[tuple[str, Mapping[str, Any]]] = ((f"item {i + 1}", row) for i, row in enumerate(content))
    else:
        reader = csv.reader(content)
        columns = [name.strip() for name in next(reader)]
        require(len(set(columns)) == len(columns), f"{path}: a column stands twice in {', '.join(columns)}")
        pairs = [(f"line {reader.line_num}", _cells(path, reader.line_num, columns, row)) for row in reader if any(row)]
    for name in needed:
        require(name in columns, f"{path} has no column {name}, only {', '.join(columns)}")
    for name in columns:
        require(
            any_other or name in known,
            f"{path}: unknown column {name}; columns are {', '.join(sorted(known))}",
        )
    rows = [Row(where=f"{path}, {where}", cells=cells) for where, cells in pairs]
    require(len(rows) > 0, f"{path} holds a header and no rows")
    yield from rows


def _cells(path: Path, line: int, columns: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    require(
        len(row) == len(columns),
        f"{path}, line {line} has {len(row)} cells, the header {len(columns)} columns",
    )
    return dict(zip(columns, row, strict=True))

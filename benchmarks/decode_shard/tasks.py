"""What is measured in which order, as flat records: the most telling first, for a run that is cut short. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Task = dict[str, Any]
SELF_CHECK: Task = {"kind": "self_check"}

TENSOR_PARALLEL = 8
FFN_SHAPES = {
    "llama-405b": (16_384, 53_248 // TENSOR_PARALLEL),
    "llama-70b": (8_192, 28_672 // TENSOR_PARALLEL),
    "smollm2-135m": (576, 1_536),
}
"""Hidden size and channels of one rank's full-width FFN: of 8 ranks, for SmolLM2 of one."""


def default_num_ranks(layout: str) -> int:
    """Ranks whose shapes a layout is measured with."""
    return 1 if layout.startswith("smollm2") else TENSOR_PARALLEL


def layout_tasks(
    names: Sequence[str], *, dtypes: Sequence[str], batches: Sequence[int], kv_tokens: int, reduce: str, replays: int
) -> list[Task]:
    """All layouts of one type and batch behind each other, so that ratios are there early; the first type of all
    further batches before the other types."""
    first = [(batches[0], dtype) for dtype in dtypes]
    further = [(batch, dtype) for dtype in dtypes for batch in batches[1:]]
    return [
        {
            "kind": "layout",
            "layout": name,
            "dtype": dtype,
            "batch": batch,
            "kv_tokens": kv_tokens,
            "num_ranks": default_num_ranks(name),
            "reduce": reduce,
            "replays": replays,
            "breakdown": True,
        }
        for batch, dtype in (*first, *further)
        for name in names
    ]


def ffn_tasks(
    shapes: Sequence[str],
    *,
    dtypes: Sequence[str],
    num_members: Sequence[int],
    batches: Sequence[int],
    reduce: str,
    replays: int,
) -> list[Task]:
    """FFN runs, batch by batch."""
    return [
        {
            "kind": "ffn_run",
            "shape": shape,
            "hidden_dim": FFN_SHAPES[shape][0],
            "width": FFN_SHAPES[shape][1],
            "dtype": dtype,
            "num_members": members,
            "batch": batch,
            "reduce": reduce,
            "replays": replays,
        }
        for dtype in dtypes
        for batch in batches
        for shape in shapes
        for members in num_members
    ]


def all_reduce_tasks(methods: Sequence[str], *, batches: Sequence[int]) -> list[Task]:
    """One all-reduce of a hidden state of 405B, by batch; always of 1 and 32 sequences, for the line through both."""
    return [
        {"kind": "all_reduce", "reduce": method, "hidden_dim": 16_384, "batch": batch}
        for method in methods
        for batch in sorted({1, 32, *batches})
    ]

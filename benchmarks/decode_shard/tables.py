"""Tables of the records that the workers left. Torch-free.

What was measured is named measured. For eight ranks there is a model alone: the measured time of one rank's share
without communication, plus its number of all-reduces times that of one over eight ranks, which follows from the
measured one over two (see modelled_us).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

PAPER_MS = {"llama-405b": 24.13, "ultra-253b-unfused": 15.78, "ultra-253b": 14.10, "llama-70b": 10.63}
"""FFN Fusion, Table 2, from its tokens per second: 8 H100, TP8, batch 1, FP8."""
PAPER_RATIOS = {"search": 1.53, "fusion": 1.119, "both": 1.71}
FUSIONS = (
    ("ultra-253b-unfused", "ultra-253b"),
    *(("super-49b", f"super-49b-step{step}") for step in (1, 2, 3, 4)),
    ("smollm2-child", "smollm2-child-fused"),
)
NUM_RANKS = 8
OP_CLASSES = ("gate_up", "down", "qkv", "output", "attention", "rotary", "norm", "head", "all_reduce")

Latencies = dict[str, float]
"""Layout -> milliseconds per token."""


def report(records: Sequence[Record]) -> str:
    """Markdown of all that is there; ``records`` of all workers, failed ones included."""
    parts = [
        _failures(records),
        _layouts(records),
        _ratios(records),
        _fusions(records),
        _left_for_communication(records),
        _breakdown(records),
        _all_reduces(records),
        _ffn_runs(records),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def all_reduce_times(records: Sequence[Record], method: str) -> dict[int, float]:
    """Measured microseconds by bytes."""
    return {r["bytes"]: r["us"] for r in _good(records, "all_reduce") if r["reduce"] == method}


def modelled_us(measured_us: dict[int, float], num_bytes: int, *, num_ranks: int = NUM_RANKS) -> float:
    """Microseconds of a one-shot all-reduce of ``num_bytes`` over ``num_ranks``, from times over two ranks by bytes.

    Two ranks read one addend each: a line through the measured times is what starting and meeting takes plus the bytes
    of one peer. More ranks read ``num_ranks - 1`` addends over the same links; meeting is taken to cost the same.
    """
    sizes = sorted(measured_us)
    slope = 0.0
    if len(sizes) > 1:
        slope = max(0.0, (measured_us[sizes[-1]] - measured_us[sizes[0]]) / (sizes[-1] - sizes[0]))
    constant = measured_us[sizes[0]] - slope * sizes[0]
    return constant + slope * num_bytes * (num_ranks - 1)


def scenarios(
    records: Sequence[Record],
) -> dict[tuple[str, int, str], Latencies]:
    """(type, batch, communication) -> latencies; communication is none, measured, or modelled for eight ranks."""
    found: dict[tuple[str, int, str], Latencies] = {}
    times = all_reduce_times(records, "one_shot")
    for r in _good(records, "layout"):
        label = "no all-reduce" if r["reduce"] == "none" else f"{r['reduce']} over {r['gpus']} GPUs, measured"
        if not r.get("triton", True):
            label += ", library kernels alone"
        found.setdefault((r["dtype"], r["batch"], label), {})[r["layout"]] = r["ms"]
        if r["reduce"] == "none" and times and r["num_ranks"] == NUM_RANKS:
            one_us = modelled_us(times, 2 * _hidden_dim(r["layout"]) * r["batch"])
            label = label.replace("no all-reduce", f"one shot over {NUM_RANKS} GPUs, modelled")
            milliseconds = r["ms"] + r["num_all_reduces"] * one_us / 1e3
            found.setdefault((r["dtype"], r["batch"], label), {})[r["layout"]] = milliseconds
    return found


def ratios(latencies: Latencies) -> dict[str, float]:
    """Search, fusion and both, as far as their layouts are there."""
    pairs = {
        "search": ("llama-405b", "ultra-253b-unfused"),
        "fusion": ("ultra-253b-unfused", "ultra-253b"),
        "both": ("llama-405b", "ultra-253b"),
    }
    return {
        name: latencies[slow] / latencies[fast]
        for name, (slow, fast) in pairs.items()
        if slow in latencies and fast in latencies
    }


def _layouts(records: Sequence[Record]) -> str:
    rows = [
        [
            r["layout"], r["dtype"], r["batch"], r["kv_tokens"], f"1/{r['num_ranks']}", f"{r['reduce']} ({r['gpus']})",
            f"{r['ms']:.3f}", f"{r['p10_ms']:.3f}-{r['p90_ms']:.3f}", f"{r['tokens_per_s']:.1f}",
            f"{r['read_gb']:.2f}", f"{r['tb_per_s']:.2f}", r["num_all_reduces"], f"{r['distinct_weights']:.0%}",
        ]
        for r in _good(records, "layout")
    ]  # fmt: skip
    head = (
        "layout, type, batch, KV tokens, share, all-reduce (GPUs), ms/token, p10-p90, tok/s, read GB, TB/s, "
        "all-reduces, distinct weights"
    )
    return _titled("Decode latency of one rank's share, measured", head, rows)


def _ratios(records: Sequence[Record]) -> str:
    rows = [["paper, 8 H100", "fp8", 1, *(f"{ms:.2f}" for ms in PAPER_MS.values()), *_shown(PAPER_RATIOS)]]
    for (dtype, batch, label), latencies in scenarios(records).items():
        if not latencies.keys() & PAPER_MS.keys():
            continue
        milliseconds = [f"{latencies[name]:.2f}" if name in latencies else "" for name in PAPER_MS]
        rows.append([label, dtype, batch, *milliseconds, *_shown(ratios(latencies))])
    head = "communication, type, batch, 405B ms, 253B unfused ms, 253B fused ms, 70B ms, search, fusion, both"
    return _titled("Beside the paper's Table 2", head, rows) if len(rows) > 1 else ""


def _left_for_communication(records: Sequence[Record]) -> str:
    rows = []
    for r in _good(records, "layout"):
        if (r["dtype"], r["batch"], r["reduce"]) == ("fp8", 1, "none") and r["layout"] in PAPER_MS:
            left_ms = PAPER_MS[r["layout"]] - r["ms"]
            each_us = left_ms * 1e3 / r["num_all_reduces"]
            rows.append([r["layout"], PAPER_MS[r["layout"]], f"{r['ms']:.2f}", r["num_all_reduces"], f"{each_us:.1f}"])
    head = "layout, paper ms, measured without all-reduces ms, all-reduces, left for each us"
    return _titled("What the paper's times leave for communication and all else", head, rows)


def _fusions(records: Sequence[Record]) -> str:
    rows = []
    for (dtype, batch, label), latencies in scenarios(records).items():
        for unfused, fused in FUSIONS:
            if unfused in latencies and fused in latencies:
                before, after = latencies[unfused], latencies[fused]
                times = [f"{before:.3f}", f"{after:.3f}", f"{before / after:.3f}x"]
                rows.append([unfused, fused, dtype, batch, label, *times])
    return _titled("Fusion alone", "unfused, fused, type, batch, communication, ms, ms fused, speed-up", rows)


def _shown(values: dict[str, float]) -> list[str]:
    return [f"{values[name]:.3f}x" if name in values else "" for name in PAPER_RATIOS]


def _breakdown(records: Sequence[Record]) -> str:
    rows = []
    for r in _good(records, "layout"):
        parts = r.get("breakdown_ms")
        if parts:
            each = [f"{parts[name]:.3f}" if name in parts else "" for name in OP_CLASSES]
            rows.append(
                [
                    r["layout"],
                    r["dtype"],
                    r["batch"],
                    r["reduce"],
                    *each,
                    f"{sum(parts.values()):.3f}",
                    f"{r['ms']:.3f}",
                ]
            )
    head = f"layout, type, batch, all-reduce, {', '.join(OP_CLASSES)}, sum, whole step"
    return _titled("Milliseconds per token by class of operator, each class in a graph of its own", head, rows)


def _all_reduces(records: Sequence[Record]) -> str:
    rows = []
    for r in _good(records, "all_reduce"):
        times = all_reduce_times(records, r["reduce"])
        modelled = f"{modelled_us(times, r['bytes']):.2f}" if r["reduce"] == "one_shot" else ""
        rows.append([r["reduce"], r["gpus"], r["bytes"], f"{r['us']:.2f}", modelled])
    return _titled("One all-reduce", f"method, GPUs, bytes, measured us, modelled us over {NUM_RANKS}", rows)


def _ffn_runs(records: Sequence[Record]) -> str:
    rows = [
        [
            r["shape"], r["dtype"], r["batch"], r["num_members"], f"{r['reduce']} ({r['gpus']})",
            f"{r['sequential_ms'] * 1e3:.1f}", f"{r['fused_ms'] * 1e3:.1f}", f"{r['speedup']:.3f}x",
            f"{r['saved_us_per_ffn']:.2f}",
        ]
        for r in _good(records, "ffn_run")
    ]  # fmt: skip
    head = (
        "shape, type, batch, FFNs, all-reduce (GPUs), one after another us, fused us, speed-up, saved us per FFN less"
    )
    return _titled("Runs of FFNs against one fused FFN, one rank's share, measured", head, rows)


def _failures(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        if "error" in r:
            subject = r.get("layout") or r.get("shape") or r.get("reduce", "")
            rows.append(
                [r["kind"], subject, r.get("dtype", ""), r.get("batch", ""), r["error"].replace("|", "/")[:200]]
            )
        for finding in r.get("failed", []):
            rows.append(
                ["self_check", finding["name"], "", "", (finding["message"] or f"error {finding['error']}")[:200]]
            )
    return _titled("What failed", "kind, subject, type, batch, why", rows)


def _good(records: Sequence[Record], kind: str) -> list[Record]:
    return [r for r in records if r["kind"] == kind and "error" not in r]


def _hidden_dim(layout: str) -> int:
    return 8_192 if "70b" in layout or "49b" in layout else 16_384


def _titled(title: str, head: str, rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    columns = head.split(", ")
    lines = [f"## {title}", "", _line(columns), _line(["---"] * len(columns)), *(_line(row) for row in rows)]
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"

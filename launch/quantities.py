"""Numbers as a reader wants them, the same in the console and on the page. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MISSING = "\N{EN DASH}"
"""What stands where a number does not exist."""


def scaled(value: float | None, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: ``134M``, ``8.39k``."""
    if value is None:
        return MISSING
    prefixes = ("", "k", "M", "B", "T")
    return _with_prefix(float(value), 1000.0, prefixes) + (f" {unit}" if unit else "")


def num_bytes(value: float | None) -> str:
    """Three significant digits with a binary prefix: ``23.0 KiB``."""
    if value is None:
        return MISSING
    return _with_prefix(float(value), 1024.0, (" B", " KiB", " MiB", " GiB", " TiB"))


def _with_prefix(value: float, base: float, prefixes: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value /= base
        power += 1
    digits = 0 if power == 0 and value == int(value) else max(0, 2 - len(str(int(abs(value)))) + 1)
    return f"{value:.{digits}f}{prefixes[power]}"


def decimals(value: float | None, digits: int) -> str:
    """Fixed decimals, so that a column lines up."""
    return MISSING if value is None else f"{value:.{digits}f}"


def ratio(value: float | None) -> str:
    """``0.71×``."""
    return MISSING if value is None else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def percent(frac: float | None) -> str:
    """``87.5%``."""
    return MISSING if frac is None else f"{100 * frac:.1f}%"


def signed_percent(frac: float | None) -> str:
    """``+4%``, ``−12%``: a relative difference."""
    return MISSING if frac is None else f"{100 * frac:+.0f}%".replace("-", "\N{MINUS SIGN}")


def significant(value: float | None) -> str:
    """Three significant digits, and all that stand before the point: ``0.0421``, ``3.14``, ``1817``."""
    if value is None:
        return MISSING
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def serving(workload: Mapping[str, Any]) -> str:
    """The serving situation that a latency or a memory size is stated for: ``batch 1, prompt of 128 tokens, ...``."""
    words = (
        f"batch {workload['batch_size']}, prompt of {workload['prefill_tokens']} tokens, "
        f"{workload['generated_tokens']} generated, {workload['dtype']}"
    )
    ranks = workload.get("tensor_parallel", 1)
    return words if ranks == 1 else f"{words}, {ranks} tensor-parallel ranks"

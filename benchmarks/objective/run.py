"""Time, memory and exactness of a distillation loss through two LM heads, beside Liger's, TRL's and the plain formula.

    python benchmarks/objective/run.py OUT [--time-limit 500] [--contenders ours liger_fused ...]

README.md beside this file says what is measured. Every contender and divergence is measured in a process of its own,
one after the other, what is compared first; one that fails, hangs or has no memory is noted. A process takes 5 to 21 s
on an H100, all that is compared about 150 s. OUT gets result.json and table.md, written anew after each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from contenders import COMPUTES_NO_LOSS, CONTENDERS
from measure import Settings

from launch.provenance import provenance

HERE = Path(__file__).resolve().parent
NOTE_CHARACTERS = 300
"""Of what a failed process said last."""
LEAST_S = 10.0
"""Less time than that starts no process."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.time_limit
    rows: list[dict[str, Any]] = []
    for divergence, name in _cases(options):
        settings = _settings(options, divergence)
        left = deadline - time.monotonic()
        if left < LEAST_S:
            rows.append({"contender": name, **asdict(settings), "note": "no time was left"})
        else:
            rows.append(_measured(name, settings, min(left, options.each)))
        print(_line(rows[-1]), flush=True)
        _write(options.out, rows)
    print(f"written: {options.out / 'result.json'}, {options.out / 'table.md'}")
    return 0 if any("median_ms" in row for row in rows) else 1


def _cases(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Divergence and contender: all that are compared, under every divergence, then what explains their numbers, which
    hangs little on the divergence and is measured under the first alone."""
    chosen = [name for name in CONTENDERS if name in options.contenders]
    explaining = [name for name in chosen if name in COMPUTES_NO_LOSS or name.startswith("ours_")]
    compared = [(divergence, name) for divergence in options.divergences for name in chosen if name not in explaining]
    return compared + [(options.divergences[0], name) for name in explaining]


def _settings(options: argparse.Namespace, divergence: str) -> Settings:
    names = ("tokens", "hidden", "vocab", "dtype", "device", "warmup", "repeats", "exact_tokens")
    return Settings(divergence=divergence, **{name: getattr(options, name) for name in names})


def _measured(name: str, settings: Settings, timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path, log = Path(directory) / "result.json", Path(directory) / "log"
        command = [sys.executable, str(HERE / "measure.py"), name, json.dumps(asdict(settings)), str(path)]
        started = time.monotonic()
        note = _run(command, log, timeout)
        row = json.loads(path.read_text()) if path.exists() else {"contender": name, **asdict(settings)}
    if note:
        row["note"] = note
    return row | {"process_s": time.monotonic() - started}


def _run(command: list[str], log: Path, timeout: float) -> str:
    """Run to the end or the timeout; what went wrong, if something did."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        if process.wait(timeout) == 0:
            return ""
    except subprocess.TimeoutExpired:
        # With the processes that a compiler started, which would hold the GPU's memory and the log.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"ended after {timeout:.0f} s"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:NOTE_CHARACTERS] if lines else f"status {process.returncode}"


def _line(row: dict[str, Any]) -> str:
    if "median_ms" not in row:
        return f"{row['divergence']:8} {row['contender']:14} {row.get('note', '')}"
    errors = [row.get(f"{part}_gradient_error") for part in ("hidden", "head")]
    exact = "" if None in errors else f"  gradient errors {errors[0]:.2e} {errors[1]:.2e}"
    return (
        f"{row['divergence']:8} {row['contender']:14} {row['median_ms']:9.2f} ms  {row['peak_gib']:6.2f} GiB{exact}"
        f"  {row.get('note', '')}"
    )


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {"command": " ".join(sys.argv), "torch": torch.__version__, "gpu": gpu, **provenance(seed=0), "rows": rows}
    (out / "result.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    (out / "table.md").write_text(table(rows) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row per contender and divergence."""
    lines = [
        "| divergence | contender | forward + backward, ms | range | peak, GiB | loss | error of hidden gradient "
        "| of head gradient | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        span = f"{row['min_ms']:.1f} to {row['max_ms']:.1f}" if "min_ms" in row else ""
        numbers = [
            _number(row.get("median_ms"), ".1f"),
            span,
            _number(row.get("peak_gib"), ".2f"),
            _number(row.get("loss"), ".5f"),
            _number(row.get("hidden_gradient_error"), ".1e"),
            _number(row.get("head_gradient_error"), ".1e"),
        ]
        notes = "; ".join(str(row[key]) for key in ("version", "note") if key in row)
        lines.append(
            f"| {row['divergence']} | {row['contender']} | {' | '.join(numbers)} | {notes.replace('|', ' ')} |"
        )
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--divergences", nargs="+", default=["forward", "jsd"], choices=["forward", "jsd"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--exact-tokens", type=int, default=512, help="0: gradients are not compared with fp64")
    parser.add_argument("--time-limit", type=float, default=500.0, metavar="S", help="seconds for all")
    parser.add_argument("--each", type=float, default=120.0, metavar="S", help="seconds for one of them")
    return parser


if __name__ == "__main__":
    sys.exit(main())

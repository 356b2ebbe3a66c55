"""One rank of a measurement: takes tasks from a file, appends one record per task to another. Started by run.py.

A record is on disk before the next task starts. A task that raises leaves a record with ``error``; if the device does
not answer afterwards the process ends, and run.py starts another for the tasks that are left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

sys.path[1:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from layouts import layouts  # noqa: E402 - found by the line above
from measuring import Bench, make_bench, num_processes  # noqa: E402

DEVICE_LOST = 3
"""Exit status after which the tasks that are left need a new process."""


def main() -> int:
    options = _parser().parse_args()
    tasks: list[dict[str, Any]] = json.loads(options.tasks.read_text())
    device = _device()
    is_first = int(os.environ.get("RANK", 0)) == 0
    witnesses = _join_others(device)
    bench = make_bench(
        device,
        weight_bytes=int(options.weight_gb * 1e9),
        cache_bytes=int(options.cache_gb * 1e9),
        picks_path=options.picks,
        keeps_picks=is_first,
        triton=not options.no_triton,
    )
    lost_methods: set[str] = set()
    for task in tasks:
        start = time.perf_counter()
        record = {**task, "gpus": num_processes(), "device": _device_name(device)}
        try:
            if task.get("reduce") in lost_methods:
                raise RuntimeError(f"left out: all-reduce {task['reduce']} failed before")
            record |= run_task(bench, task)
        except Exception as failure:
            # One measurement that fails must not stop the others.
            record["error"] = f"{type(failure).__name__}: {failure}"[:1000]
        record["wall_s"] = round(time.perf_counter() - start, 2)
        if is_first:
            append(options.results, record)
        if not _device_answers(device):
            return DEVICE_LOST
        if _any_failed("error" in record, witnesses) and task["kind"] == "all_reduce":
            lost_methods.add(task["reduce"])
    sys.stdout.flush()
    # Destroying a communicator that graphs have captured may wait for ever, and nothing is left to save.
    os._exit(0)


def run_task(bench: Bench, task: dict[str, Any]) -> dict[str, Any]:
    """What the task's kind measures."""
    kinds: dict[str, Callable[[Bench, dict[str, Any]], dict[str, Any]]] = {
        "self_check": _self_check,
        "layout": _layout,
        "ffn_run": _ffn_run,
        "all_reduce": _all_reduce,
    }
    return kinds[task["kind"]](bench, task)


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line and wait until it is on the disk."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _self_check(bench: Bench, task: dict[str, Any]) -> dict[str, Any]:
    findings = bench.check_kernels()
    failed = [asdict(finding) for finding in findings if not finding.passed]
    return {"num_checked": len(findings), "num_failed": len(failed), "failed": failed}


def _layout(bench: Bench, task: dict[str, Any]) -> dict[str, Any]:
    record = bench.layout(
        layouts()[task["layout"]],
        fp8=task["dtype"] == "fp8",
        batch=task["batch"],
        kv_tokens=task["kv_tokens"],
        num_ranks=task["num_ranks"],
        reduce=task["reduce"],
        replays=task["replays"],
        breakdown=task["breakdown"],
    )
    return {**record, "failed_ways": dict(bench.picker.failures), "triton": bench.triton}


def _ffn_run(bench: Bench, task: dict[str, Any]) -> dict[str, Any]:
    return bench.ffn_run(
        hidden_dim=task["hidden_dim"],
        width=task["width"],
        num_members=task["num_members"],
        fp8=task["dtype"] == "fp8",
        batch=task["batch"],
        reduce=task["reduce"],
        replays=task["replays"],
    )


def _all_reduce(bench: Bench, task: dict[str, Any]) -> dict[str, Any]:
    microseconds = bench.all_reduce_us(task["reduce"], hidden_dim=task["hidden_dim"], batch=task["batch"])
    return {"us": microseconds, "bytes": 2 * task["hidden_dim"] * task["batch"]}


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _device_answers(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _join_others(device: torch.device) -> distributed.ProcessGroup | None:
    """Start communication; the group that is returned works on the host, apart from what is measured."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    patience = timedelta(seconds=30)
    if device.type == "cuda":
        distributed.init_process_group("nccl", device_id=device, timeout=patience)
    else:
        distributed.init_process_group("gloo", timeout=patience)
    return distributed.new_group(backend="gloo", timeout=patience)


def _any_failed(failed: bool, witnesses: distributed.ProcessGroup | None) -> bool:
    """Whether this task failed on any rank. Ranks that are not at the same task time out here and end."""
    if witnesses is None:
        return failed
    flags = torch.tensor([int(failed)])
    distributed.all_reduce(flags, group=witnesses)
    return bool(flags.item())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", type=Path, help="JSON list")
    parser.add_argument("results", type=Path, help="JSON lines, appended to")
    parser.add_argument("--picks", type=Path, required=True, help="which way runs which product fastest")
    parser.add_argument("--weight-gb", type=float, required=True)
    parser.add_argument("--cache-gb", type=float, required=True)
    parser.add_argument("--no-triton", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())

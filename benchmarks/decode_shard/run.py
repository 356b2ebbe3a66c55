"""The paper's Table 2 in kind: decode latency of 405B, of 253B before and after fusion, as one rank of eight sees it.

    python benchmarks/decode_shard/run.py OUT [--time-limit 200]

Random weights in the shapes of one tensor-parallel rank, one CUDA graph per token, kernels as a serving engine would
use them. On one GPU without communication; where there are two, also with real all-reduces between them, while
shapes stay those of eight ranks. README.md beside this file says what is measured and what is modelled.

Measures in processes of its own, on one GPU each and then over all. Each measurement is on disk before the next starts;
one that fails or hangs is noted and left out. OUT gets results.jsonl, result.json and table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tables import report
from tasks import FFN_SHAPES, SELF_CHECK, Task, all_reduce_tasks, default_num_ranks, ffn_tasks, layout_tasks

HERE = Path(__file__).resolve().parent
POLL_S = 0.2
PARTING_S = 5.0
"""For processes to end by themselves once all is measured."""
DEVICE_LOST = 3
"""Exit status of a worker that has recorded why it cannot go on."""
MAX_STARTS = 5
"""Of processes for one list of tasks."""
WITHOUT_TRITON_FROM = 3
"""Start from which on this project's kernels stay out: twice the device was lost with them."""
FIRST_TASK_S = 45.0
"""Beyond the time of any task: starting Python, CUDA and the ring of weights."""


@dataclass(kw_only=True)
class Crew:
    """The processes that work at one list of tasks, one per GPU, and what becomes of them."""

    name: str
    gpus: tuple[int, ...]
    tasks: list[Task]
    out: Path
    options: argparse.Namespace
    picks: Path
    starts: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    last_news: float = 0.0
    first_news: bool = False
    lost_self_check: bool = False

    @property
    def results(self) -> Path:
        return self.out / f"results-{self.name}.jsonl"

    @property
    def num_done(self) -> int:
        return len(read_records(self.results))

    def start(self) -> None:
        """Processes for the tasks that have no record yet."""
        self.starts += 1
        left = self.tasks[self.num_done :]
        if self.starts > 1 and left[0] != SELF_CHECK:
            # A new process has to find out again which kernels it may use.
            left = [SELF_CHECK, *left]
            self.tasks[self.num_done : self.num_done] = [SELF_CHECK]
        task_file = self.out / f"tasks-{self.name}.json"
        task_file.write_text(json.dumps(left))
        command = [
            *(sys.executable, str(HERE / "worker.py"), str(task_file), str(self.results), "--picks", str(self.picks)),
            *("--weight-gb", str(self.options.weight_gb), "--cache-gb", str(self.options.cache_gb)),
        ]
        if self.starts >= WITHOUT_TRITON_FROM or self.lost_self_check or self.options.no_triton:
            command.append("--no-triton")
        port = _free_port()
        self.processes = []
        for rank in range(len(self.gpus) or 1):
            log = (self.out / f"log-{self.name}-{rank}.txt").open("ab")
            environment = _environment(self.gpus, rank, port)
            self.processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            )
            log.close()
        self.last_news, self.first_news = time.monotonic(), False

    def is_busy(self, known: int) -> bool:
        """Look after the processes once; False when there is nothing left to do.

        Args:
            known: records when it was looked at last.
        """
        done, now = self.num_done, time.monotonic()
        if done > known:
            self.last_news, self.first_news = now, True
        codes = [process.poll() for process in self.processes]
        finished = all(code == 0 for code in codes)
        ended = finished or any(code not in (None, 0) for code in codes)
        patience = self.options.task_limit + (0.0 if self.first_news else FIRST_TASK_S)
        if done >= len(self.tasks) and (ended or now - self.last_news > PARTING_S):
            self.stop()
            return False
        if not ended and now - self.last_news < patience:
            return True
        self.stop()
        if not finished:
            self._note_loss(codes, f"no answer within {patience:.0f} s" if not ended else "the process ended")
        if self.starts >= MAX_STARTS or self.num_done >= len(self.tasks):
            return False
        self.start()
        return True

    def _note_loss(self, codes: list[int | None], why: str) -> None:
        """Record the task at which the processes stopped, unless the first one did; put a layout in line once more."""
        has_record = codes[0] == DEVICE_LOST
        place = self.num_done - has_record
        if place >= len(self.tasks):
            return
        task = self.tasks[place]
        if not has_record:
            error = f"{why} (status {', '.join(map(str, codes))}); see log-{self.name}-*.txt"
            self._note({**task, "error": error})
        self.lost_self_check |= task == SELF_CHECK
        if task["kind"] == "layout" and self.tasks.count(task) == 1:
            self.tasks.append(task)

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _note(self, record: dict[str, Any]) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps({"gpus": len(self.gpus), **record}) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.self_check:
        return subprocess.run([sys.executable, str(HERE / "check.py")], check=False).returncode
    # So that a run that is cut short takes its processes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    num_gpus = options.gpus if options.gpus is not None else _count_gpus()
    deadline = start + options.time_limit
    communicates = num_gpus > 1 and options.reduce
    for crews, share in _phases(options, num_gpus):
        end = deadline if not communicates else min(deadline, start + share * options.time_limit)
        _work(crews, end, options)
    _write(options)
    print((options.out / "table.md").read_text())
    print(f"{time.monotonic() - start:.0f} s")
    records = _all_records(options.out)
    return 0 if any(record["kind"] == "layout" and "error" not in record for record in records) else 1


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a line that a killed process left half is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _phases(options: argparse.Namespace, num_gpus: int) -> list[tuple[list[Crew], float]]:
    """Crews that work side by side, then the one that needs all GPUs; with the share of the time that ends each."""
    alone = [
        SELF_CHECK,
        *layout_tasks(
            options.layouts, dtypes=options.dtypes, batches=options.batches, kv_tokens=options.kv_tokens,
            reduce="none", replays=options.replays,
        ),
    ]  # fmt: skip
    ffns = ffn_tasks(
        options.ffn_shapes, dtypes=options.ffn_dtypes, num_members=options.ffn_members, batches=options.ffn_batches,
        reduce="none", replays=options.replays,
    )  # fmt: skip

    def crew(name: str, gpus: tuple[int, ...], tasks: list[Task], picks: str) -> Crew:
        return Crew(name=name, gpus=gpus, tasks=tasks, out=options.out, options=options, picks=options.out / picks)

    if num_gpus < 2:
        return [([crew("alone", (0,) * num_gpus, [*alone, *ffns], "picks.json")], 1.0)]
    phases = [
        ([crew("alone", (0,), alone, "picks.json"), crew("ffns", (1,), [SELF_CHECK, *ffns], "picks-ffns.json")], 0.6)
    ]
    if options.reduce:
        phases.append(([crew("together", (0, 1), _together_tasks(options), "picks.json")], 1.0))
    return phases


def _together_tasks(options: argparse.Namespace) -> list[Task]:
    batches = options.batches[:1]
    tasks = [SELF_CHECK, *all_reduce_tasks(options.reduce, batches=options.batches)]
    for method in options.reduce:
        tasks += layout_tasks(
            options.layouts, dtypes=options.dtypes[:1], batches=batches, kv_tokens=options.kv_tokens, reduce=method,
            replays=options.replays,
        )  # fmt: skip
    for method in options.reduce:
        tasks += ffn_tasks(
            [shape for shape in options.ffn_shapes if default_num_ranks(shape) > 1], dtypes=options.ffn_dtypes[:1],
            num_members=options.ffn_members, batches=[1], reduce=method, replays=options.replays,
        )  # fmt: skip
    return tasks


def _work(crews: list[Crew], end: float, options: argparse.Namespace) -> None:
    """Until all crews are done or ``end`` has come; tables are written again with every record."""
    busy = [crew for crew in crews if crew.tasks != [SELF_CHECK]]
    known = {crew.name: 0 for crew in busy}
    for crew in busy:
        for left_over in (crew.results, *crew.out.glob(f"log-{crew.name}-*.txt")):
            left_over.unlink(missing_ok=True)
        crew.start()
    try:
        while busy and time.monotonic() < end:
            time.sleep(POLL_S)
            before = dict(known)
            known = {crew.name: crew.num_done for crew in busy}
            busy = [crew for crew in busy if crew.is_busy(before[crew.name])]
            if before != known:
                _write(options)
    finally:
        for crew in crews:
            crew.stop()


def _write(options: argparse.Namespace) -> None:
    records = _all_records(options.out)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    result = {"settings": settings, "records": records}
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    (options.out / "table.md").write_text(report(records))


def _all_records(out: Path) -> list[dict[str, Any]]:
    return [record for name in ("alone", "ffns", "together") for record in read_records(out / f"results-{name}.jsonl")]


def _environment(gpus: tuple[int, ...], rank: int, port: int) -> dict[str, str]:
    environment = dict(os.environ)
    # Multicast objects are a resource of the whole host; nothing here needs them.
    environment |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(max(1, len(gpus))), "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if len(gpus) == 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpus[0])
    elif gpus:
        environment["LOCAL_RANK"] = str(gpus[rank])
    return environment


def _count_gpus() -> int:
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return 0
    return sum(line.startswith("GPU ") for line in found.stdout.splitlines())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _names(text)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--self-check", action="store_true", help="only check the kernels (check.py)")
    layouts = "llama-405b,ultra-253b-unfused,ultra-253b,llama-70b"
    parser.add_argument("--layouts", type=_names, default=_names(layouts), help="names of benchmarks/layouts.py")
    parser.add_argument("--dtypes", type=_names, default=["fp8", "bf16"])
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32])
    parser.add_argument("--kv-tokens", type=int, default=2048)
    parser.add_argument("--reduce", type=_names, default=["one_shot", "nccl"], help="all-reduces; empty: none")
    parser.add_argument("--ffn-shapes", type=_names, default=list(FFN_SHAPES), help="empty: no FFN runs")
    parser.add_argument("--ffn-dtypes", type=_names, default=["fp8"])
    parser.add_argument("--ffn-members", type=_numbers, default=[2, 4, 8, 12, 15])
    parser.add_argument("--ffn-batches", type=_numbers, default=[1, 8, 32, 128])
    parser.add_argument("--gpus", type=int, help="default: all that are there, at most 2 are used")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--weight-gb", type=float, default=56.0, help="ring of weights")
    parser.add_argument("--cache-gb", type=float, default=6.0, help="ring of KV caches")
    parser.add_argument("--time-limit", type=float, default=200.0, help="seconds for everything")
    parser.add_argument("--task-limit", type=float, default=40.0, help="seconds for one measurement")
    parser.add_argument("--no-triton", action="store_true", help="plain torch and the vendor's library alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Our scorer beside Puzzletron's: the same parent, candidates, samples, metrics and device, one process each.

    python benchmarks/score_beside_modelopt/run.py <work directory> --peer-python <its environment>/bin/python

README.md beside this file says how its environment is made and what is compared. Both sides run alternately, as new
processes: ``python -m launch score_library`` and Puzzletron's scoring stage. Times are from start to exit. Prints a
table, writes ``result.json`` into the work directory, and ends with status 1 if the two find different values in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compare import Difference, Values, differences, our_values, peer_values
from prepare import Subject, prepare

from launch.provenance import cpu_name, gpu_names, provenance

PEER = Path(__file__).with_name("peer.py")
BLOCKS = (2, 7, 12, 17, 22, 27)
"""Of 30. A variant costs our scorer the blocks behind it: these have the mean depth of all."""
GIB = 1 << 30

WHAT_PEER_RUNS_ON = """
import json
from importlib.metadata import version
print(json.dumps({name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")}))
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process, from start to exit."""

    wall_s: float
    cpu_s: float
    peak_gib: float
    """Resident memory of the host."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    work = options.work.absolute()
    num_labels = options.num_sequences * options.tokens
    subject = prepare(
        work,
        model=options.model,
        blocks=options.blocks,
        num_sequences=options.num_sequences,
        seq_len=options.tokens + 1,
    )
    candidates = len(subject.candidates)
    print(f"{candidates} candidates, {num_labels} tokens each, {options.device} {options.precision}", flush=True)
    ours, peer = [], []
    values: dict[str, list[Values]] = {}
    for number in range(options.repeats):
        directory = work / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{number}"
        ours.append(_run("ours", _our_command(options, subject, directory), options, directory))
        peer.append(_run("peer", _peer_command(options, subject, directory), options, directory))
        (scores,) = directory.glob("ours/store/score_library-*/scores.json")
        values = {"ours": our_values(scores, subject), "peer": peer_values(directory / "peer", subject)}
    found = differences(values["ours"], values["peer"], subject)
    result = _result(options, {"ours": ours, "peer": peer}, found) | {
        "candidates": subject.candidates,
        "values": values,
    }
    (work / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    _print(result)
    print(f"written: {work / 'result.json'}")
    return 0 if options.precision == "bf16" or all(difference.is_within for difference in found) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory for artifacts, runs and result.json")
    parser.add_argument("--peer-python", default=sys.executable, help="Python of the environment with nvidia-modelopt")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of either side")
    parser.add_argument("--repeats", type=int, default=3, help="runs of either side; the median counts")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS), help="blocks with five candidates each")
    parser.add_argument("--num-sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="scored tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per forward, of either side")
    parser.add_argument(
        "--peer-metrics",
        choices=["shared", "all"],
        default="shared",
        help="shared: the four that our scorer computes; all: the 18 that Puzzletron computes",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=["model=smollm2_135m_package"],
        help="settings of import_parent, for a Llama: model=hub model.source=<hub id, directory or GGUF file>",
    )
    parser.add_argument("--ours", nargs="*", default=[], help="further settings of score_library: engine.compile=true")
    return parser


def _our_command(options: argparse.Namespace, subject: Subject, directory: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "launch", "score_library"),
        *(f"inputs.{name}={getattr(subject, name)}" for name in ("parent", "library", "data")),
        f"scores.num_sequences={options.num_sequences}",
        f"scores.seq_len={options.tokens + 1}",
        f"scores.batch_size={options.batch_size}",
        *("engine=torch", f"engine.device={options.device}", f"engine.precision={options.precision}"),
        *options.ours,
        f"run.root={directory / 'ours'}",
    ]


def _peer_command(options: argparse.Namespace, subject: Subject, directory: Path) -> list[str]:
    settings = {
        "puzzle_dir": str(subject.puzzle_dir),
        "out": str(directory / "peer"),
        "device": options.device,
        "precision": options.precision,
        "metrics": options.peer_metrics,
        "num_sequences": options.num_sequences,
        "batch_size": options.batch_size,
    }
    path = directory / "peer_settings.json"
    path.write_text(json.dumps(settings))
    return [options.peer_python, str(PEER), str(path)]


def _run(name: str, command: list[str], options: argparse.Namespace, directory: Path) -> Run:
    directory.mkdir(parents=True, exist_ok=True)
    threads = {variable: str(options.threads) for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    log = directory / f"{name}.log"
    start = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(command, env={**os.environ, **threads}, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # As communicate(), but tells what the process used.
        process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - start
    if process.returncode != 0:
        sys.exit(f"{name} failed; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-20:]))
    run = Run(wall_s=wall_s, cpu_s=usage.ru_utime + usage.ru_stime, peak_gib=usage.ru_maxrss * 1024 / GIB)
    print(f"{name} {wall_s:7.1f} s", flush=True)
    return run


def _result(options: argparse.Namespace, sides: dict[str, list[Run]], found: list[Difference]) -> dict[str, Any]:
    medians = {side: statistics.median(run.wall_s for run in runs) for side, runs in sides.items()}
    own = provenance(seed=None)
    versions = subprocess.run(
        [options.peer_python, "-c", WHAT_PEER_RUNS_ON], capture_output=True, text=True, check=True
    )
    return {
        "hardware": {
            "cpu": cpu_name(),
            "gpus": gpu_names() if options.device == "cuda" else (),
            "threads": options.threads,
        },
        "commit": own["git_commit"],
        "packages": {"ours": own["packages"], "peer": json.loads(versions.stdout)},
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "num_tokens": options.num_sequences * options.tokens,
        "runs": {side: [asdict(run) for run in runs] for side, runs in sides.items()},
        "median_wall_s": medians,
        "ours_over_peer": medians["ours"] / medians["peer"],
        "differences": [{**asdict(difference), "is_within": difference.is_within} for difference in found],
    }


def _print(result: dict[str, Any]) -> None:
    for side, runs in result["runs"].items():
        walls = ", ".join(f"{run['wall_s']:.1f}" for run in runs)
        peak = max(run["peak_gib"] for run in runs)
        print(f"{side}: median {result['median_wall_s'][side]:.1f} s of {walls}; peak {peak:.2f} GiB")
    print(f"ours / peer: {result['ours_over_peer']:.3f}")
    for row in result["differences"]:
        verdict = "within" if row["is_within"] else "BEYOND"
        print(f"{row['metric']}: {row['largest']:.2e} at most ({row['candidate']}), {verdict} {row['tolerance']:.0e}")


if __name__ == "__main__":
    sys.exit(main())

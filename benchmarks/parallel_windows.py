"""What it costs to run windows of whole blocks in parallel: quality by number of windows, nothing trained.

    python benchmarks/parallel_windows.py model=smollm2_135m data=fineweb_edu [--windows 4] [--size 4] [--random 3]
        [--root runs/parallel_windows] [--out DIR]

FFN Fusion, Appendix B and Table 7: windows of neighbouring blocks that attend are chosen greedily by the dependency
matrix, least dependent first, and every model with 0, 1, 2, ... of them is evaluated on held-out text against the model
itself. --random adds as many draws of windows at random places, as a measure of what the matrix is worth. Whatever else
stands on the command line is set for every step. Steps that are in the store are not computed again.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from ablation import new_parser, run, write_results

from distill.config import require
from launch.artifact import Artifact
from launch.config import StepConfig
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import read_architecture

Spans = list[tuple[int, int]]
NUM_TRIES = 1000
"""Draws until windows are found that do not overlap."""


def measuring_steps() -> dict[str, StepConfig]:
    """Steps up to the dependency matrix."""
    return {
        "parent": StepConfig(stage="import_parent"),
        "data": StepConfig(stage="prepare_data", inputs={"parent": "parent"}),
        "dependency": StepConfig(stage="measure_dependency", inputs={"model": "parent", "data": "data"}),
    }


def parallel_steps(
    architecture: Architecture, *, num_windows: int, window_size: int, num_random: int
) -> dict[str, StepConfig]:
    """A model for every number of windows, greedily chosen (``greedy_<number>``) and drawn
    (``random_<number>_<draw>``), and the evaluation of all of them."""
    found = {}
    inputs = {"model": "parent", "dependency": "dependency"}
    for number in range(1, num_windows + 1):
        overrides = (f"parallelize.num_windows={number}", f"parallelize.window_size={window_size}")
        found[f"greedy_{number}"] = StepConfig(stage="parallelize_blocks", inputs=inputs, overrides=overrides)
        for draw in range(num_random):
            spans = drawn_windows(architecture, number=number, size=window_size, seed=draw)
            by_hand = ",".join(f"[{first},{last}]" for first, last in spans)
            found[f"random_{number}_{draw}"] = StepConfig(
                stage="parallelize_blocks", inputs=inputs, overrides=(f"parallelize.windows=[{by_hand}]",)
            )
    judged = {"parent": "parent", "data": "data"} | {name: name for name in found}
    return found | {"evaluation": StepConfig(stage="evaluate", inputs=judged)}


def drawn_windows(architecture: Architecture, *, number: int, size: int, seed: int) -> Spans:
    """``number`` windows at random places, out of all that can be had together; those of fewer windows are others."""
    attends = [not block.attention.is_no_op for block in architecture.blocks]
    starts = [first for first in range(len(attends) - size + 1) if all(attends[first : first + size])]
    generator = random.Random(seed)
    for _ in range(NUM_TRIES if number <= len(starts) else 0):
        drawn = sorted(generator.sample(starts, number))
        if all(after - before >= size for before, after in pairwise(drawn)):
            return [(first, first + size - 1) for first in drawn]
    raise ValueError(
        f"--random: {NUM_TRIES} draws gave no {number} windows of {size} blocks that do not overlap; ask for fewer "
        "with --windows, or leave --random out"
    )


def rows(artifacts: Mapping[str, Artifact]) -> Iterator[dict[str, Any]]:
    """One row per evaluated model, the parent first."""
    judged = json.loads((artifacts["evaluation"].path / "evaluate.json").read_text())["models"]
    for name, quality in judged.items():
        parallel: dict[str, Any] = {"windows": [], "max": None, "sum": None}
        if name != "parent":
            parallel = json.loads((artifacts[name].path / "parallel.json").read_text())
        yield {
            "name": name,
            "choice": name.partition("_")[0] if name != "parent" else "greedy",
            "num_windows": len(parallel["windows"]),
            "depth": read_architecture(artifacts[name].path).depth,
            **{key: quality[key] for key in ("kld", "lm_loss", "top1_agreement_frac")},
            "largest_dependency": parallel["max"],
            "windows": [[window["first"], window["last"]] for window in parallel["windows"]],
        }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: the greedy choice, and the median and range of the draws beside it."""
    lines = [
        "| windows | depth | added | largest dependency | KLD | LM loss | top-1 agreement | KLD of random windows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    before: list[Any] = []
    for row in (row for row in results if row["choice"] == "greedy"):
        drawn = [r["kld"] for r in results if r["choice"] == "random" and r["num_windows"] == row["num_windows"]]
        added = ", ".join(f"{first}-{last}" for first, last in row["windows"] if [first, last] not in before)
        largest = "" if row["largest_dependency"] is None else f"{row['largest_dependency']:.3g}"
        lines.append(
            f"| {row['num_windows']} | {row['depth']} | {added} | {largest} | {row['kld']:.3f} | {row['lm_loss']:.3f} "
            f"| {row['top1_agreement_frac']:.3f} | {_spread(drawn)} |"
        )
        before = row["windows"]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""


def main() -> None:
    parser = new_parser(__doc__, root="runs/parallel_windows")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="as --set")
    parser.add_argument("--windows", type=int, default=4, help="most windows")
    parser.add_argument("--size", type=int, default=4, help="blocks per window")
    parser.add_argument("--random", type=int, default=0, help="draws of random windows beside every greedy choice")
    options = parser.parse_args()
    require(options.windows > 0, f"--windows must be > 0, got {options.windows}")
    overrides = [*options.set, *options.overrides]
    measuring = measuring_steps()
    artifacts = run(options.root, "parallel_windows", measuring, overrides)
    steps = measuring | parallel_steps(
        read_architecture(artifacts["parent"].path),
        num_windows=options.windows,
        window_size=options.size,
        num_random=options.random,
    )
    artifacts = run(options.root, "parallel_windows", steps, overrides)
    results = list(rows(artifacts))
    text = table(results)
    print(text)
    seconds = {name: artifact.manifest.seconds for name, artifact in artifacts.items()}
    write_results(options.out, "parallel_windows", {"rows": results, "seconds": seconds}, text)


if __name__ == "__main__":
    main()

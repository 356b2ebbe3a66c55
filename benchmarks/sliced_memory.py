"""Peak memory of every process that builds and scores a library, with the parent in one, two and three slices.

    python benchmarks/sliced_memory.py [--gib 1.5] [--root DIR]

A randomly initialised parent of the given size (fp32, on the CPU) goes through the real stages behind torchrun. The
table has what the blocks of every process weigh, its peak resident memory, and what of that is beyond the interpreter
and its libraries. Library and scores must come out the same, whatever the slices. Then once more under a cap on memory
that one process runs into and three do not. Memory is what is measured: the parent is random, and replacements train
for two steps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from distill.config import RopeConfig
from launch.__main__ import main as launch_main
from launch.artifact import Recipe
from launch.registry import STAGES
from launch.stage import StageContext, StageResult
from launch.store import Job, Store
from puzzle.model.architecture import Architecture, dense_blocks
from puzzle.model.stats import block_params, num_params
from puzzle.model.tensor_layout import tensor_shapes
from puzzle.slices import slice_blocks
from puzzle.tables import ScoreTable

MIB = 2**20
VOCAB_SIZE = 2048
SHARD_BYTES = 64 * MIB
"""Of the parent's files: a file that is mapped counts whole under the cap."""
REPORT, CAP = "SLICED_MEMORY_REPORT", "SLICED_MEMORY_CAP_BYTES"
"""Environment of a worker: where it reports, and the memory that it may have."""
SETTINGS = {
    "build_library": (
        "space.attention_no_op=false space.ffn_fracs=[0.25] library.importance_sequences=2 library.bld.max_tokens=128 "
        "library.bld.seq_len=64 library.bld.batch_size=1 library.bld.eval_sequences=2"
    ),
    "score_library": "scores.num_sequences=2 scores.seq_len=64 scores.batch_size=2",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One stage in some processes."""

    status: int
    complaint: str
    processes: tuple[dict[str, float], ...]
    """Resident MiB by process: ``idle`` and ``peak``."""


def architecture_of(num_bytes: float) -> Architecture:
    def with_blocks(num_blocks: int) -> Architecture:
        return Architecture(
            vocab_size=VOCAB_SIZE,
            hidden_dim=1024,
            num_heads=16,
            head_dim=64,
            blocks=dense_blocks(num_blocks, num_kv_heads=8, ffn_dim=4096),
            max_positions=128,
            rope=RopeConfig(theta=10_000.0),
        )

    one = with_blocks(1)
    return with_blocks(max(4, round(num_bytes / 4 / block_params(one, one.blocks[0]))))


def make_inputs(root: Path, architecture: Architecture) -> dict[str, Path]:
    """Paths of the artifacts ``data`` and ``parent``."""
    options = [f"data.tokenizer=train data.vocab_size={VOCAB_SIZE} data.train_tokens=20000"]
    options += ["data.validation_tokens=2000 data.calibration_tokens=2000", f"run.root={root}"]
    assert launch_main(["prepare_data", *" ".join(options).split()]) == 0
    data = next((root / "store").glob("prepare_data-*"))

    def write_parent(context: StageContext) -> StageResult:
        import torch

        from puzzle.model.checkpoint import CheckpointWriter, copy_tokenizer

        generator = torch.Generator().manual_seed(0)
        with CheckpointWriter(context.out, architecture, dtype=torch.float32, max_shard_bytes=SHARD_BYTES) as writer:
            for name, shape in tensor_shapes(architecture).items():
                norm = len(shape) == 1
                writer.add(name, torch.ones(shape) if norm else torch.randn(shape, generator=generator) * 0.01)
        copy_tokenizer(data, context.out)
        return StageResult(headline="random parent")

    recipe = Recipe(stage="import_parent", stage_version=1, config={"num_blocks": architecture.num_blocks})
    job = Job(recipe=recipe, kind="model", inputs={}, body=write_parent, context=_context)
    parent, _ = Store(root / "store").get_or_compute(job, on_wait=print)
    return {"parent": parent.path, "data": data}


def _context(out: Path, resume: Path) -> StageContext:
    return StageContext(out=out, resume=resume, pool=out.parent / ".pool", run_name="benchmark", step_name="parent")


def run_stage(
    root: Path, stage: str, inputs: dict[str, Path], overrides: Sequence[str], *, slices: int, cap: int | None = None
) -> Run:
    """One stage behind torchrun, in ``slices`` processes."""
    with tempfile.TemporaryDirectory() as report:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", REPORT: report, CAP: str(cap or "")}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={slices}"]
        command += [__file__, stage, f"run.root={root}", f"engine.slices={slices}", "engine.device=cpu", *overrides]
        command += [f"inputs.{name}={path}" for name, path in inputs.items()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        processes = tuple(json.loads(path.read_text()) for path in sorted(Path(report).iterdir()))
    errors = [line for line in done.stderr.splitlines() if "rror" in line]
    return Run(status=done.returncode, complaint=errors[0] if errors else "", processes=processes)


def worker(arguments: list[str]) -> int:
    """``python -m launch`` with the memory of this process noted, or bounded."""
    for stage in SETTINGS:
        STAGES[stage].load_body()
    idle = resident_mib("VmRSS")
    if cap := os.environ[CAP]:
        resource.setrlimit(resource.RLIMIT_DATA, (resident_bytes("VmData") + int(cap),) * 2)
    status = launch_main(arguments)
    report = Path(os.environ[REPORT]) / f"{os.environ['RANK']}.json"
    report.write_text(json.dumps({"idle": idle, "peak": resident_mib("VmHWM")}))
    return status


def resident_bytes(key: str) -> int:
    """A line of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def resident_mib(key: str) -> float:
    return resident_bytes(key) / MIB


def stages(root: Path, inputs: dict[str, Path], keep: str, *, slices: int) -> Iterator[tuple[str, Run, Path]]:
    """Both stages in a store of their own: stage, what it took, and its artifact."""
    own = dict(inputs)
    for stage, settings in SETTINGS.items():
        overrides = [*settings.split(), *([keep] if stage == "build_library" else [])]
        run = run_stage(root, stage, own, overrides, slices=slices)
        if run.status != 0:
            raise SystemExit(f"{stage} in {slices} slices failed: {run.complaint}")
        artifact = next((root / "store").glob(f"{stage}-*"))
        own["library"] = artifact
        yield stage, run, artifact


def slice_mib(architecture: Architecture, slices: int) -> list[float]:
    """Weights of every slice, without embedding and head."""
    return [
        sum(4 * block_params(architecture, architecture.blocks[index]) for index in blocks) / MIB
        for blocks in slice_blocks(architecture, slices)
    ]


def largest_difference(one: Path, other: Path) -> float:
    """Between the replacements of two libraries."""
    names = sorted(path.name for path in (one / "replacements").iterdir())
    assert names == sorted(path.name for path in (other / "replacements").iterdir())
    pairs = [(load_file(one / "replacements" / name), load_file(other / "replacements" / name)) for name in names]
    return max((a[key] - b[key]).abs().max().item() for a, b in pairs for key in a)


def largest_score_difference(one: Path, other: Path) -> float:
    rows = zip(ScoreTable.read(one / "scores.json").rows, ScoreTable.read(other / "scores.json").rows, strict=True)
    return max(abs(a.values[metric] - b.values[metric]) for a, b in rows for metric in a.values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.5, help="size of the parent in fp32")
    parser.add_argument("--root", type=Path, help="where everything is written; default: a temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure((options.root or Path(temporary)).absolute(), architecture_of(options.gib * 2**30))


def measure(root: Path, architecture: Architecture) -> None:
    inputs = make_inputs(root / "inputs", architecture)
    last = architecture.num_blocks - 1
    # One replacement in every third of the parent.
    kept = [str(n) for n in range(last + 1) if n not in (1, architecture.num_blocks // 2, last - 1)]
    keep = f"space.keep_ffn=[{','.join(kept)}]"
    print(f"parent: {architecture.num_blocks} blocks, {4 * num_params(architecture) / MIB:,.0f} MiB in fp32")
    print("| slices | stage | process | blocks MiB | peak MiB | beyond idle MiB |\n|---|---|---|---|---|---|")
    artifacts: dict[tuple[int, str], Path] = {}
    for slices in (1, 2, 3):
        for stage, run, artifact in stages(root / f"slices-{slices}", inputs, keep, slices=slices):
            artifacts[slices, stage] = artifact
            for rank, (took, weights) in enumerate(zip(run.processes, slice_mib(architecture, slices), strict=True)):
                beyond = took["peak"] - took["idle"]
                print(f"| {slices} | {stage} | {rank} | {weights:,.0f} | {took['peak']:,.0f} | {beyond:,.0f} |")
    for slices in (2, 3):
        weights = largest_difference(artifacts[1, "build_library"], artifacts[slices, "build_library"])
        scores = largest_score_difference(artifacts[1, "score_library"], artifacts[slices, "score_library"])
        print(f"{slices} slices against one: replacements differ by {weights:.3g} at most, scores by {scores:.3g}")
    # Half of the parent, and 300 MiB for training, activations and stacks: a third fits, the whole does not.
    cap = 2 * num_params(architecture) + 300 * MIB
    for slices in (1, 3):
        overrides = [*SETTINGS["build_library"].split(), keep]
        run = run_stage(root / f"capped-{slices}", "build_library", inputs, overrides, slices=slices, cap=cap)
        outcome = "passes" if run.status == 0 else f"fails: {run.complaint.strip()}"
        print(f"at most {cap / MIB:,.0f} MiB per process, {slices} processes: {outcome}")


if __name__ == "__main__":
    if REPORT in os.environ:
        sys.exit(worker(sys.argv[1:]))
    main()

"""How fast a checkpoint is fused, and in how much memory, beside ``cp -r`` of the same files.

    python benchmarks/fuse_speed.py [--gib 8] [--norm folded] [--cache cold] [--rounds 3] [--root DIR] [--json FILE]

A synthetic sharded bf16 checkpoint (Llama shapes; the middle blocks have no attention) is copied and fused in turn.
Both start from the same page cache: cold (source evicted) or warm (source read just before; it and the output should
fit in memory then). Every time ends when the output is on disk: ``fsync`` of its files counts for both. The fusion
runs in a process of its own, and its peak is the resident memory of the whole process. Speeds are bytes of the source
per second; medians count. The promise: ``fuse_checkpoint`` runs at 60% of the copy's speed at least, in at most three
times the largest fused tensor and 1 GB.

That promise is of the streaming alone. Stage fuse does more, and every part of it is timed, one after another: the
input's checksums before (not with ``run.verify=size``), the verification of every fused FFN and the output's checksums
after. A checksum is SHA-256 at the speed of one core, and the verification computes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from distill.config import RopeConfig
from fusion.config import FuseConfig
from fusion.fuse import fuse_checkpoint
from fusion.grouping import fusion_groups, group_width
from fusion.verify import verify_fusion
from launch.artifact import record_files
from puzzle.model.architecture import NO_ATTENTION, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import CheckpointWriter, read_architecture
from puzzle.model.stats import block_params, num_params
from puzzle.model.tensor_layout import tensor_shapes

MB = 10**6
SPEED_FRAC, TENSORS, REST_BYTES = 0.6, 3, 10**9
"""The promise: of the copy's speed; largest fused tensors, and bytes besides."""
WORKER = "--worker"
STAGE_PARTS = {
    "input_checksum_seconds": "checksums of the input (run.verify=full)",
    "seconds": "fuse_checkpoint",
    "verify_seconds": "verify_fusion",
    "output_checksum_seconds": "checksums of the output",
}
"""What stage fuse spends its time on; the tokenizer and the imports are not worth a row."""


def architecture_of(options: argparse.Namespace) -> Architecture:
    """As many blocks as ``options.gib`` holds: a quarter with attention, half without, a quarter with."""

    def with_blocks(num_blocks: int) -> Architecture:
        edge = num_blocks // 4
        return Architecture(
            vocab_size=options.vocab,
            hidden_dim=options.hidden,
            num_heads=options.hidden // 128,
            head_dim=128,
            blocks=tuple(
                BlockConfig(
                    attention=NO_ATTENTION if edge <= index < num_blocks - edge else AttentionConfig(num_kv_heads=8),
                    ffn=FFNConfig(ffn_dim=options.ffn),
                    parent_block_indices=(index,),
                )
                for index in range(num_blocks)
            ),
            max_positions=8192,
            rope=RopeConfig(theta=5e5),
        )

    one = with_blocks(4)
    of_blocks = sum(block_params(one, block) for block in one.blocks)
    others = num_params(one) - of_blocks
    return with_blocks(max(8, round((options.gib * 2**30 / 2 - others) / (of_blocks / 4))))


def make_source(directory: Path, architecture: Architecture, shard_bytes: int) -> None:
    """Weights are windows of one random row, at places that differ: enough to be no zeros, and fast to make."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2**24, generator=generator).mul_(0.02).bfloat16()

    def rows(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        num_rows = shape[0] if len(shape) == 2 else 1
        columns = shape[-1]
        for start in range(0, num_rows, step := max(1, 2**22 // columns)):
            count = min(step, num_rows - start)
            offset = int(torch.randint(0, len(random) - count * columns, (), generator=generator))
            yield random[offset : offset + count * columns].reshape(count, columns)

    with CheckpointWriter(directory, architecture, dtype=torch.bfloat16, max_shard_bytes=shard_bytes) as writer:
        for name, shape in tqdm(tensor_shapes(architecture).items(), desc="source", unit="tensor", leave=False):
            writer.add_rows(name, rows(shape))


def settle(directory: Path) -> None:
    """Wait until every file of ``directory`` is on disk."""
    for path in directory.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def prepare_cache(directory: Path, cache: str) -> None:
    """Evict the files of ``directory`` from the page cache, or read them into it."""
    os.sync()
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as stream:
            if cache == "cold":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(2**24):
                    pass


def copy_seconds(source: Path, out: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    settle(out)
    return time.perf_counter() - started


def fuse_in_a_process(source: Path, out: Path, norm: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, WORKER, str(source), str(out), norm], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def worker(source: Path, out: Path, norm: Any) -> None:
    """Do what stage fuse does; prints seconds of its parts and resident bytes as JSON.

    The input's checksums come last, unlike in the stage: they would leave the source in the page cache.
    """
    torch.set_num_threads(1)
    groups = fusion_groups(read_architecture(source), FuseConfig(), None)
    result: dict[str, float] = {"idle_bytes": resident_bytes("VmRSS")}
    started = time.perf_counter()
    fuse_checkpoint(source, out, groups, norm)
    result["unsynced_seconds"] = time.perf_counter() - started
    settle(out)
    result |= {"seconds": time.perf_counter() - started, "peak_bytes": resident_bytes("VmHWM")}
    result["verify_seconds"] = seconds_of(lambda: verify_fusion(source, out, groups, norm))
    result["verify_peak_bytes"] = resident_bytes("VmHWM")
    result["output_checksum_seconds"] = seconds_of(lambda: record_files(out))
    result["input_checksum_seconds"] = seconds_of(lambda: record_files(source))
    result["stage_seconds"] = sum(result[part] for part in STAGE_PARTS)
    print(json.dumps(result))


def seconds_of(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def resident_bytes(key: str) -> int:
    """A line of ``/proc/self/status``; ``ru_maxrss`` would include what the parent process had before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    source, copied, fused = root / "source", root / "copied", root / "fused"
    architecture = architecture_of(options)
    make_source(source, architecture, int(options.shard_gib * 2**30))
    groups = fusion_groups(architecture, FuseConfig(), None)
    source_bytes = sum(path.stat().st_size for path in source.iterdir())
    largest = 2 * architecture.hidden_dim * max(group_width(architecture, group) for group in groups)
    rounds = []
    for _ in range(options.rounds):
        prepare_cache(source, options.cache)
        copy = copy_seconds(source, copied)
        shutil.rmtree(copied)
        prepare_cache(source, options.cache)
        fuse = fuse_in_a_process(source, fused, options.norm)
        shutil.rmtree(fused)
        rounds.append({"copy_seconds": copy, **fuse})
    medians = {key: median(one[key] for one in rounds) for key in rounds[0]}
    return {
        "source_bytes": source_bytes,
        "num_blocks": architecture.num_blocks,
        "hidden_dim": architecture.hidden_dim,
        "ffn_dim": options.ffn,
        "groups": groups,
        "norm": options.norm,
        "cache": options.cache,
        "largest_fused_tensor_bytes": largest,
        "bound_bytes": TENSORS * largest + REST_BYTES,
        "machine": {"system": platform.platform(), "num_cpus": os.cpu_count()},
        "rounds": rounds,
        "medians": medians,
        "speed_frac": medians["copy_seconds"] / medians["seconds"],
        "stage_speed_frac": medians["copy_seconds"] / medians["stage_seconds"],
    }


def report(result: dict[str, Any]) -> str:
    medians, source_mb = result["medians"], result["source_bytes"] / MB
    peaks = {"seconds": medians["peak_bytes"], "verify_seconds": medians["verify_peak_bytes"]}
    parts = [
        f"| {name} | {medians[part]:.1f} | {source_mb / medians[part]:,.0f} | "
        f"{format(peaks[part] / MB, ',.0f') if part in peaks else ''} |"
        for part, name in STAGE_PARTS.items()
    ]
    lines = [
        f"source: {source_mb:,.0f} MB, {result['num_blocks']} blocks, groups {result['groups']}, "
        f"norm {result['norm']}, {result['cache']} cache, fsync included, medians of {len(result['rounds'])} rounds",
        "",
        "| | s | MB/s | peak MB |",
        "|---|---|---|---|",
        f"| cp -r | {medians['copy_seconds']:.1f} | {source_mb / medians['copy_seconds']:,.0f} | |",
        *parts,
        f"| stage fuse, all of these | {medians['stage_seconds']:.1f} | "
        f"{source_mb / medians['stage_seconds']:,.0f} | |",
        "",
        f"fuse_checkpoint: {result['speed_frac']:.0%} of the copy's speed, promised {SPEED_FRAC:.0%}; "
        f"peak: {medians['peak_bytes'] / MB:,.0f} MB ({medians['idle_bytes'] / MB:,.0f} MB before the first tensor), "
        f"promised {result['bound_bytes'] / MB:,.0f} MB",
        f"whole stage: {result['stage_speed_frac']:.0%} of the copy's speed, nothing is promised of it",
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the source; twice that is free on the disk")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--shard-gib", type=float, default=4.0)
    parser.add_argument("--norm", choices=("folded", "last"), default="folded")
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, help="where everything is written, and deleted; default: as tempfile says")
    parser.add_argument("--json", type=Path, help="file of the result")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(dir=options.root) as temporary:
        result = measure(Path(temporary), options)
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        worker(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        main(sys.argv[1:])

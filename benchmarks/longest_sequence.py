"""Longest sequence that one GPU, or several with Ulysses, trains of a Llama-8B-shaped heterogeneous child.

    python benchmarks/longest_sequence.py OUT [--gpus 1] [--shape 8b] [--variants plain tiled offloaded]
        [--time-limit 540]

The child has fewer attentions and wider FFNs than its parent, so that its lengths are not those of Llama-3.1-8B itself:
``--shape 8b`` is the dense model, which published lengths of other systems are of. The results name the shape.
Without teacher, on random weights and tokens: one optimizer step, the optimizer in CPU memory, blocks recomputed, one
sequence per step. Every length is tried in fresh processes. Peak memory grows linearly with the length, so the next
length is where the line through the shortest and the longest reaches the limit; once a length has failed, the search
bisects, to 3% or to ``--granularity`` tokens. The table says what the shortest failure ran out of: GPU memory, host
memory or time.
``OUT/longest_sequence.json`` and ``.md`` are written after every trial; a second call goes on from what stands there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from training_trials import (
    TIME,
    Outcome,
    Trial,
    available_host_bytes,
    meminfo_bytes,
    run_trial,
    shape_text,
    write_random_model,
)

from distill.config import EngineConfig, ObjectiveConfig, RopeConfig
from launch.plan_advice import step_memory
from launch.plan_step import Step
from puzzle.model.architecture import NO_ATTENTION, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import read_architecture

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tiled": {"ffn_tile_tokens": 4096},
    "offloaded": {"ffn_tile_tokens": 4096, "offload_activations": True},
}
"""Fields of EngineConfig beyond recomputation and an optimizer on the CPU."""

CHILD = (
    *[(8, 14_336, 1)] * 6,
    *[(8, 10_752, 1)] * 6,
    *[(4, 7_168, 1)] * 4,
    *[(None, 28_672, 4)] * 2,
    *[(2, 7_168, 1)] * 4,
    (None, 10_752, 3),
    (8, 14_336, 1),
)
"""KV heads (None: no attention), FFN width and blocks of the parent it stands for, of every block: Llama-3.1-8B's 32
blocks after a search that kept 21 attentions, and the fusion of its runs without attention to FFNs of 28,672, 28,672
and 10,752 channels."""
SHAPES = {
    "8b_child": CHILD,
    "8b_child_part": ((None, 28_672, 4), CHILD[0], CHILD[-3]),
    "8b": ((8, 14_336, 1),) * 32,
    "pico": ((2, 512, 1), (None, 1024, 2), (1, 256, 1)),
}
"""By name: the child, three of its blocks, Llama-3.1-8B itself, and a tiny child to try the program with.

With optimizer and block inputs in CPU memory the GPU holds one block at a time and the input of the one before it. The
part, whose widest attention is not its first block, so takes nearly as much of it as the child, in a fraction of the
time."""
PUBLISHED = {
    "8b": "one H100 of 80 GB: no more than 32K tokens with transformers as it is, 500K tuned (ALST, arXiv 2506.13996)"
}
"""Lengths that others report, by the shape that they are of."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """One length."""

    variant: str
    gpus: int
    tokens: int
    failure: str | None
    step_s: float | None
    gpu_peak_gb: float
    gpu_reserved_gb: float
    host_taken_gb: float
    """Least available memory of the host during the trial, below what it was before."""
    host_resident_gb: float
    """Resident memory of the processes; without pinned memory where the driver keeps it out."""
    device: str
    gpu_planned_gb: float | None = None
    """What ``python -m launch plan`` counts for the peak. None: measured before it was recorded."""


def architecture(shape: str) -> Architecture:
    """The model of one of ``SHAPES``."""
    is_pico = shape == "pico"
    blocks: list[BlockConfig] = []
    first = 0
    for kv_heads, width, num_parents in SHAPES[shape]:
        attention = NO_ATTENTION if kv_heads is None else AttentionConfig(num_kv_heads=kv_heads)
        parents = tuple(range(first, first + num_parents))
        blocks.append(BlockConfig(attention=attention, ffn=FFNConfig(ffn_dim=width), parent_block_indices=parents))
        first += num_parents
    return Architecture(
        vocab_size=320 if is_pico else 128_256,
        hidden_dim=64 if is_pico else 4096,
        num_heads=4 if is_pico else 32,
        head_dim=16 if is_pico else 128,
        blocks=tuple(blocks),
        max_positions=8_388_608,
        rope=RopeConfig(theta=500_000.0),
    )


def engine_fields(options: argparse.Namespace, variant: str, gpus: int) -> dict[str, Any]:
    """Fields of EngineConfig."""
    fields = {"device": options.device, "precision": options.precision, "recompute": True, "compile": options.compile}
    fields |= {"offload_optimizer": not options.keep_optimizer, "sequence_parallel": gpus, **VARIANTS[variant]}
    if options.engine == "torch":
        return {**fields, "shard": True}
    return {**fields, "name": "deepspeed", "zero_stage": 3}


def planned_gb(options: argparse.Namespace, variant: str, gpus: int, tokens: int) -> float:
    """The planner's peak of one GPU for one sequence of ``tokens``."""
    step = Step(
        student=read_architecture(options.model),
        objective=objective(options),
        engine=EngineConfig(**engine_fields(options, variant, gpus)),
        num_ranks=gpus,
        batch_size=1,
        seq_len=tokens,
    )
    return step_memory(step).total / 1e9


def objective(options: argparse.Namespace) -> ObjectiveConfig:
    """Next-token loss alone."""
    return ObjectiveConfig(lm=1.0, chunk_tokens=options.chunk_tokens)


def attempt(options: argparse.Namespace, variant: str, gpus: int, tokens: int, *, timeout_s: float) -> Try:
    """One optimizer step on one sequence of ``tokens``."""
    trial = Trial(
        student=str(options.model),
        engine=engine_fields(options, variant, gpus),
        objective=asdict(objective(options)),
        batch_size=1,
        seq_len=tokens,
    )
    outcome: Outcome = run_trial(trial, num_processes=gpus, timeout_s=timeout_s)
    return Try(
        variant=variant,
        gpus=gpus,
        tokens=tokens,
        failure=outcome.failure,
        step_s=outcome.step_s[0] if outcome.step_s else None,
        gpu_peak_gb=outcome.gpu_peak_bytes / 1e9,
        gpu_planned_gb=planned_gb(options, variant, gpus, tokens),
        gpu_reserved_gb=outcome.gpu_reserved_bytes / 1e9,
        host_taken_gb=outcome.host_taken_bytes / 1e9,
        host_resident_gb=outcome.host_resident_bytes / 1e9,
        device=outcome.device,
    )


def next_length(tries: list[Try], *, start: int, granularity: int, gpu_gb: float, host_gb: float) -> int | None:
    """The length to try after ``tries`` of one variant, in tokens; None: the answer is known.

    Args:
        tries: in any order.
        start: first length.
        granularity: lengths are multiples of it. The answer is known to so many tokens, or to a 32nd.
        gpu_gb: memory of one GPU; infinite: unknown.
        host_gb: memory of the host that is free to be taken.
    """
    passed = sorted((entry for entry in tries if entry.failure is None), key=lambda entry: entry.tokens)
    failed = min((entry.tokens for entry in tries if entry.failure is not None), default=None)
    longest = passed[-1].tokens if passed else 0
    step = max(granularity, longest // 32 // granularity * granularity)
    if failed is not None and failed - longest <= step:
        return None
    if not tries:
        return start
    guess = 2 * longest
    if len(passed) >= 2:
        # 3% are left to the allocator. Four times the last length at most: a line through two points may be off.
        reach = min(_reach(passed, "gpu_reserved_gb", 0.97 * gpu_gb), _reach(passed, "host_taken_gb", 0.97 * host_gb))
        guess = int(min(reach, 4 * longest))
    if failed is not None and not longest < guess < failed:
        guess = (longest + failed) // 2
    guess = max(longest + step, guess // granularity * granularity)
    return guess if failed is None else min(guess, failed - granularity)


def _reach(passed: list[Try], name: str, limit: float) -> float:
    """Length at which the line through the shortest and the longest reaches ``limit``.

    Not through the two longest: near the limit the allocator gives back what it holds, and their line may fall.
    """
    shorter, longer = passed[0], passed[-1]
    slope = (getattr(longer, name) - getattr(shorter, name)) / (longer.tokens - shorter.tokens)
    if slope <= 0:
        return float("inf")
    return longer.tokens + (limit - getattr(longer, name)) / slope


def memory_limits(device: str) -> tuple[float, float]:
    """GB of one GPU and of the host, of the latter what this container may have."""
    gpu = torch.cuda.get_device_properties(0).total_memory / 1e9 if device == "cuda" else float("inf")
    host = meminfo_bytes("MemTotal")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).exists() else "max"
        host = host if text == "max" else min(host, int(text))
    return gpu, host / 1e9


def search(options: argparse.Namespace, variant: str, gpus: int, known: list[Try], deadline: float) -> Iterator[Try]:
    """Try lengths until the answer is known, the time is over or ``--max-tokens`` pass."""
    gpu_gb, host_gb = memory_limits(options.device)
    host_gb = min(host_gb, available_host_bytes() / 1e9)
    # What ran out of time says nothing of memory, and may be tried again in another call.
    tries = [entry for entry in known if (entry.variant, entry.gpus) == (variant, gpus) and entry.failure != TIME]
    while time.monotonic() < deadline - 5:
        granularity = options.granularity * gpus
        tokens = next_length(tries, start=options.start, granularity=granularity, gpu_gb=gpu_gb, host_gb=host_gb)
        longest = max((entry.tokens for entry in tries if entry.failure is None), default=0)
        if tokens is None or longest >= options.max_tokens:
            return
        tokens = min(tokens, options.max_tokens)
        entry = attempt(options, variant, gpus, tokens, timeout_s=deadline - time.monotonic())
        tries.append(entry)
        yield entry
        if entry.failure == TIME:
            return


def markdown(tries: list[Try], facts: dict[str, Any]) -> str:
    """One line per variant and number of GPUs, then all tries."""
    lines = [f"- {name}: {value}" for name, value in facts.items()] + [""]
    lines += ["| variant | GPUs | longest | shortest failure | it ran out of | step s | GPU GB | host GB |"]
    lines += ["|" + "---|" * 8]
    for variant, gpus in dict.fromkeys((entry.variant, entry.gpus) for entry in tries):
        own = [entry for entry in tries if (entry.variant, entry.gpus) == (variant, gpus)]
        longest = max((t for t in own if t.failure is None), key=lambda entry: entry.tokens, default=None)
        failed = min((t for t in own if t.failure is not None), key=lambda entry: entry.tokens, default=None)
        reached = "none" if longest is None else f"{longest.tokens:,}"
        limit = "not met | " if failed is None else f"{failed.tokens:,} | {failed.failure}"
        took = " | | "
        if longest is not None:
            took = f" {longest.step_s:.1f} | {longest.gpu_peak_gb:.1f} | {longest.host_taken_gb:.1f} "
        lines.append(f"| {variant} | {gpus} | {reached} | {limit} |{took}|")
    lines += ["", "planned: the planner's count of GPU GB; resident: memory of the processes."]
    lines += ["host GB: available memory of the host that the trial took.", ""]
    lines += ["| variant | GPUs | tokens | outcome | step s | GPU GB | planned | reserved | host GB | resident |"]
    lines += ["|" + "---|" * 10]
    for entry in tries:
        step, planned = ("" if value is None else f"{value:.1f}" for value in (entry.step_s, entry.gpu_planned_gb))
        lines.append(
            f"| {entry.variant} | {entry.gpus} | {entry.tokens:,} | {entry.failure or 'trained'} | {step} "
            f"| {entry.gpu_peak_gb:.1f} | {planned} | {entry.gpu_reserved_gb:.1f} "
            f"| {entry.host_taken_gb:.1f} | {entry.host_resident_gb:.1f} |"
        )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--engine", choices=("torch", "deepspeed"), default="torch")
    parser.add_argument("--keep-optimizer", action="store_true", help="leave the optimizer on the GPUs")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="8b_child")
    parser.add_argument("--start", type=int, default=32_768, help="first length, in tokens")
    parser.add_argument("--max-tokens", type=int, default=8_388_608)
    parser.add_argument("--granularity", type=int, default=8192, help="of the answer, in tokens per GPU")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="whose logits exist at once; 0: chosen by bytes")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds for all trials")
    parser.add_argument("--models", type=Path, help="where the random model is kept; default: OUT/models")
    options = parser.parse_args()
    options.model = (options.models or options.out / "models") / options.shape
    return options


def main() -> None:
    options = parse()
    deadline = time.monotonic() + options.time_limit
    options.out.mkdir(parents=True, exist_ok=True)
    write_random_model(options.model, architecture(options.shape))
    gpu_gb, host_gb = memory_limits(options.device)
    facts = {"shape": f"{options.shape}: {shape_text(options.model)}"}
    if options.shape in PUBLISHED:
        facts |= {"published of this shape": PUBLISHED[options.shape]}
    facts |= {"chunk tokens": options.chunk_tokens, "engine": options.engine, "precision": options.precision}
    facts |= {"optimizer": "GPU" if options.keep_optimizer else "CPU", "compile": options.compile}
    facts |= {"GPU GB": round(gpu_gb, 1) if options.device == "cuda" else None, "host GB": round(host_gb, 1)}
    facts |= {"torch": torch.__version__}
    path = options.out / "longest_sequence.json"
    known = json.loads(path.read_text()) if path.exists() else {"facts": facts, "tries": []}
    if known["facts"] != facts:
        raise SystemExit(f"{path} was measured elsewhere or with other options: {known['facts']}; choose another OUT")
    tries = [Try(**entry) for entry in known["tries"]]
    for gpus in options.gpus:
        for variant in options.variants:
            for entry in search(options, variant, gpus, list(tries), deadline):
                tries.append(entry)
                print(entry, flush=True)
                content = {"facts": facts, "tries": [asdict(entry) for entry in tries]}
                path.write_text(json.dumps(content, indent=2) + "\n")
                path.with_suffix(".md").write_text(markdown(tries, facts))
    print(markdown(tries, facts))


if __name__ == "__main__":
    main()

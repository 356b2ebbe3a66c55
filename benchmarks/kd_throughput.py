"""Speed of distillation: a 1B Llama-shaped student of a 3B teacher at 8,192 tokens, per engine and number of GPUs.

    python benchmarks/kd_throughput.py OUT [--gpus 1 2] [--settings torch torch_fsdp ...] [--time-limit 540]

Weights and tokens are random, the objective is the KL over the whole vocabulary. Every setting runs in fresh processes
and sees the same sequences, as many per GPU whatever their number. OUT receives ``kd_throughput.json`` and ``.md``
after every setting; what stands there already is not measured again, so that a second call goes on where the time
limit ended the first. Model FLOPs are those of the matrix products and of causal attention, once for the teacher and
three times for the student: what is computed again counts for nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from training_trials import TIME, Outcome, Trial, run_trial, shape_text, write_random_model

from distill.config import EngineConfig, RopeConfig
from distill.engine.dealing import num_model_ranks
from distill.utilization import peak_flops_per_s, training_flops
from puzzle.model.architecture import Architecture, dense_blocks
from puzzle.model.checkpoint import read_architecture
from puzzle.model.stats import sequence_flops

SETTINGS: dict[str, dict[str, Any]] = {
    "torch": {"compile": True},
    "torch_fsdp": {"compile": True, "shard": True},
    "torch_ulysses2": {"compile": True, "sequence_parallel": 2},
    "deepspeed_zero1": {"name": "deepspeed", "zero_stage": 1, "compile": True},
    "deepspeed_zero2": {"name": "deepspeed", "zero_stage": 2, "compile": True},
    "deepspeed_zero3": {"name": "deepspeed", "zero_stage": 3, "compile": True},
    "megatron": {"name": "megatron"},
    "megatron_tp2": {"name": "megatron", "tensor_parallel": 2},
    "megatron_pp2": {"name": "megatron", "pipeline_parallel": 2},
}
"""Fields of EngineConfig by the name of a setting. Several GPUs are data ranks unless the setting says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting on some GPUs."""

    setting: str
    gpus: int
    device: str
    failure: str | None
    step_s: float | None
    """Median."""
    tokens_per_s: float | None
    """Over all GPUs."""
    mfu_frac: float | None
    """Of the dense bf16 peak; None: that of the device is not known, or the step did not run in bf16."""
    gpu_peak_gb: float
    first_loss: float | None
    """Equal in all settings with equally many GPUs, up to the precision: they see the same sequences."""
    steps_s: tuple[float, ...]

    @property
    def key(self) -> tuple[str, int]:
        """What is measured once."""
        return self.setting, self.gpus


def shapes(name: str) -> tuple[Architecture, Architecture]:
    """Student and teacher: the shapes of Llama-3.2-1B and 3B, or tiny ones to try the program with."""
    if name == "pico":
        return _llama(64, 4, 2, 2, 256, vocab_size=320), _llama(64, 4, 2, 4, 512, vocab_size=320)
    return _llama(2048, 32, 8, 16, 8192), _llama(3072, 24, 8, 28, 8192)


def _llama(
    hidden_dim: int, num_heads: int, num_kv_heads: int, num_blocks: int, ffn_dim: int, *, vocab_size: int = 128_256
) -> Architecture:
    return Architecture(
        vocab_size=vocab_size,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        head_dim=hidden_dim // num_heads,
        blocks=dense_blocks(num_blocks, num_kv_heads, ffn_dim),
        max_positions=131_072,
        rope=RopeConfig(theta=500_000.0),
        tie_embeddings=True,
    )


def flops_per_step(student: Architecture, teacher: Architecture, *, seq_len: int, sequences: int) -> float:
    """Model FLOPs of one step: teacher forward, student forward and backward, both through their heads."""
    return training_flops(sequence_flops(student, seq_len), sequence_flops(teacher, seq_len)) * sequences


def engine_fields(options: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Fields of EngineConfig for one setting."""
    fields = {
        "device": options.device,
        "precision": options.precision,
        "micro_batch_tokens": options.micro_batch_tokens,
        "recompute": options.recompute,
        **SETTINGS[setting],
    }
    return {**fields, "compile": fields.get("compile", False) and options.compile}


def measure(options: argparse.Namespace, setting: str, gpus: int, *, timeout_s: float) -> Row:
    """Run one setting."""
    student, teacher = options.models
    sequences = options.sequences * gpus
    trial = Trial(
        student=str(student),
        teacher=str(teacher),
        engine=engine_fields(options, setting),
        objective={"kld": 1.0, "chunk_tokens": options.chunk_tokens},
        batch_size=sequences,
        seq_len=options.seq_len,
        warmup_steps=options.warmup,
        steps=options.steps,
    )
    outcome = run_trial(trial, num_processes=gpus, timeout_s=timeout_s)
    flops = flops_per_step(*map(read_architecture, options.models), seq_len=options.seq_len, sequences=sequences)
    tokens = sequences * options.seq_len
    engine = EngineConfig(**trial.engine)
    return make_row(setting, gpus, outcome, flops=flops, tokens=tokens, engine=engine)


def make_row(setting: str, gpus: int, outcome: Outcome, *, flops: float, tokens: int, engine: EngineConfig) -> Row:
    """What an outcome says of speed."""
    step_s = median(outcome.step_s) if outcome.failure is None else None
    peak = peak_flops_per_s(outcome.device, engine)
    return Row(
        setting=setting,
        gpus=gpus,
        device=outcome.device,
        failure=outcome.failure,
        step_s=step_s,
        tokens_per_s=None if step_s is None else tokens / step_s,
        mfu_frac=None if step_s is None or peak is None else flops / step_s / (peak * gpus),
        gpu_peak_gb=outcome.gpu_peak_bytes / 1e9,
        first_loss=outcome.losses[0] if outcome.losses else None,
        steps_s=outcome.step_s,
    )


def markdown(rows: list[Row], facts: dict[str, Any]) -> str:
    """The table, with the scaling of every setting from one GPU."""
    alone = {row.setting: row.tokens_per_s for row in rows if row.gpus == 1 and row.tokens_per_s}
    lines = [f"- {name}: {value}" for name, value in facts.items()] + [""]
    lines += ["| setting | GPUs | tokens/s | per GPU | MFU | of one GPU | step s | peak GB | first loss |"]
    lines += ["|" + "---|" * 9]
    for row in sorted(rows, key=lambda row: (row.gpus, -(row.tokens_per_s or 0))):
        if row.failure is not None:
            lines.append(f"| {row.setting} | {row.gpus} | failed: {row.failure} |" + " |" * 6)
            continue
        assert row.tokens_per_s is not None
        per_gpu = row.tokens_per_s / row.gpus
        mfu = "" if row.mfu_frac is None else f"{row.mfu_frac:.1%}"
        scaling = f"{per_gpu / alone[row.setting]:.1%}" if row.setting in alone else ""
        lines.append(
            f"| {row.setting} | {row.gpus} | {row.tokens_per_s:,.0f} | {per_gpu:,.0f} | {mfu} | {scaling} "
            f"| {row.step_s:.3f} | {row.gpu_peak_gb:.1f} | {row.first_loss:.4f} |"
        )
    unknown = {row.device for row in rows if row.failure is None and row.mfu_frac is None}
    if unknown:
        lines += ["", f"No MFU: no dense peak in {facts['precision']} is known of {', '.join(sorted(unknown))}."]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Options, and the two models' directories as ``models``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--shape", choices=("1b_3b", "pico"), default="1b_3b")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=4, help="of a step, per GPU")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--chunk-tokens", type=int, default=0, help="whose logits exist at once; 0: chosen by bytes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds for all settings")
    parser.add_argument("--models", type=Path, help="where the random models are kept; default: OUT/models")
    options = parser.parse_args()
    root = (options.models or options.out / "models") / options.shape
    options.models = (root / "student", root / "teacher")
    return options


def main() -> None:
    options = parse()
    deadline = time.monotonic() + options.time_limit
    options.out.mkdir(parents=True, exist_ok=True)
    for directory, architecture in zip(options.models, shapes(options.shape), strict=True):
        write_random_model(directory, architecture)
    facts = {name: getattr(options, name) for name in ("seq_len", "sequences", "micro_batch_tokens", "chunk_tokens")}
    facts |= {name: getattr(options, name) for name in ("steps", "recompute", "compile", "precision")}
    facts |= {"torch": torch.__version__}
    facts |= dict(zip(("student", "teacher"), map(shape_text, options.models), strict=True))
    path = options.out / "kd_throughput.json"
    known = json.loads(path.read_text()) if path.exists() else {"facts": facts, "rows": []}
    if known["facts"] != facts:
        raise SystemExit(f"{path} was measured with other options: {known['facts']}; choose another OUT")
    rows = [Row(**{**row, "steps_s": tuple(row["steps_s"])}) for row in known["rows"]]
    rows = [row for row in rows if row.failure != TIME]
    for gpus in options.gpus:
        for setting in options.settings:
            model_ranks = num_model_ranks(EngineConfig(**engine_fields(options, setting)))
            left = deadline - time.monotonic()
            if gpus % model_ranks or (setting, gpus) in {row.key for row in rows}:
                continue
            if left < 5:
                print(f"no time left for {setting} on {gpus} GPUs", flush=True)
                continue
            rows.append(measure(options, setting, gpus, timeout_s=left))
            print(rows[-1], flush=True)
            path.write_text(json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
            path.with_suffix(".md").write_text(markdown(rows, facts))
    print(markdown(rows, facts))


if __name__ == "__main__":
    main()

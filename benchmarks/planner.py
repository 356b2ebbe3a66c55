"""The planner's memory beside what torch's allocator hands out: dense and heterogeneous, engines, lengths, teachers.

    python benchmarks/planner.py OUT [--gpus 1 2] [--settings torch torch_kd ...] [--time-limit 230]

Two optimizer steps of random models in fresh processes, every setting of SETTINGS that the GPUs allow, in that order.
Measured is ``torch.cuda.max_memory_allocated`` of the fullest process, predicted what ``python -m launch plan`` counts
as allocated. ``OUT/planner.json`` and ``.md`` are written after every setting; what stands there is not measured again.
``--shape pico --device cpu`` tries the program, without a measurement.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from training_trials import TIME, Outcome, Trial, num_params_text, run_trial, write_random_model

from distill.config import EngineConfig, ObjectiveConfig, RopeConfig
from launch.plan_advice import step_memory
from launch.plan_memory import Memory
from launch.plan_step import Step
from puzzle.model.architecture import NO_ATTENTION, Architecture, AttentionConfig, BlockConfig, FFNConfig, dense_blocks
from puzzle.model.checkpoint import read_architecture

GOAL = 0.10
"""Largest relative error that the planner is meant to have."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One configuration."""

    student: str = "dense"
    """A key of :func:`shapes`."""
    teacher: str | None = None
    """Another one; None: no teacher."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Fields of EngineConfig beyond precision and device."""
    objective: dict[str, float] = field(default_factory=lambda: {"lm": 1.0})
    gpus: int = 1
    seq_len: int = 4096
    sequences: int = 2
    """Of a step, per data rank."""


KD, KD_COSINE = {"kld": 1.0}, {"kld": 1.0, "hidden_cosine": 1.0}
ZERO2 = {"name": "deepspeed", "zero_stage": 2}
ZERO3 = {"name": "deepspeed", "zero_stage": 3}

SETTINGS: dict[str, Setting] = {
    "torch": Setting(engine={"micro_batch_tokens": 4096}),
    "torch_kd": Setting(student="fused", teacher="teacher", objective=KD, seq_len=8192, sequences=1),
    "torch_kd_recompute": Setting(
        teacher="teacher", objective=KD, engine={"recompute": True, "micro_batch_tokens": 8192}, seq_len=8192
    ),
    "fsdp": Setting(student="fused", engine={"shard": True}, seq_len=8192, sequences=1),
    "offload_tiles": Setting(
        student="fused",
        engine={
            "offload_optimizer": True,
            "recompute": True,
            "offload_activations": True,
            "ffn_tile_tokens": 2048,
        },
        seq_len=32_768,
        sequences=1,
    ),
    "zero2_kd": Setting(
        teacher="teacher", objective=KD, engine={**ZERO2, "recompute": True, "micro_batch_tokens": 4096}
    ),
    "zero3": Setting(student="fused", engine={**ZERO3, "recompute": True}, seq_len=8192, sequences=1),
    "torch_kd_cosine": Setting(
        student="fused", teacher="dense", objective=KD_COSINE, engine={"micro_batch_tokens": 4096}
    ),
    "torch_compile": Setting(engine={"compile": True}, seq_len=8192, sequences=1),
    "ddp_2": Setting(gpus=2, engine={"micro_batch_tokens": 4096}),
    "fsdp_kd_2": Setting(
        student="fused",
        teacher="teacher",
        objective=KD,
        gpus=2,
        engine={"shard": True, "recompute": True},
        seq_len=8192,
    ),
    "zero2_2": Setting(gpus=2, engine={**ZERO2, "micro_batch_tokens": 4096}),
    "zero3_kd_2": Setting(
        student="fused", teacher="teacher", objective=KD, gpus=2, engine={**ZERO3, "recompute": True}, sequences=1
    ),
    "ulysses_2": Setting(gpus=2, engine={"sequence_parallel": 2, "recompute": True}, seq_len=32_768, sequences=1),
    "zero1_2": Setting(gpus=2, engine={"name": "deepspeed", "zero_stage": 1, "micro_batch_tokens": 4096}),
    "megatron_tp2": Setting(
        gpus=2,
        teacher="teacher",
        objective=KD,
        engine={"name": "megatron", "tensor_parallel": 2, "micro_batch_tokens": 4096},
    ),
    "megatron_pp2": Setting(
        gpus=2, engine={"name": "megatron", "pipeline_parallel": 2, "micro_batch_tokens": 4096}, sequences=4
    ),
}
"""By name; those for one GPU first, the most telling ones before others."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting."""

    setting: str
    gpus: int
    device: str
    failure: str | None
    predicted_gb: float
    measured_gb: float | None
    error_frac: float | None
    """(predicted - measured) / measured."""
    moment: str
    parts_gb: dict[str, float]


def shapes(name: str) -> dict[str, Architecture]:
    """Students and the teacher: 0.75B and 1B Llama-shaped models, or tiny ones to try the program with."""
    if name == "pico":
        return _family(64, 4, 2, 512, 320, blocks=(3, 4))
    return _family(2048, 32, 8, 8192, 128_256, blocks=(8, 12))


def _family(
    hidden: int, heads: int, kv_heads: int, width: int, vocab: int, *, blocks: tuple[int, int]
) -> dict[str, Architecture]:
    def model(layers: tuple[BlockConfig, ...]) -> Architecture:
        return Architecture(
            vocab_size=vocab,
            hidden_dim=hidden,
            num_heads=heads,
            head_dim=hidden // heads,
            blocks=layers,
            max_positions=131_072,
            rope=RopeConfig(theta=500_000.0),
            tie_embeddings=True,
        )

    fused = (
        BlockConfig(
            attention=AttentionConfig(num_kv_heads=kv_heads), ffn=FFNConfig(ffn_dim=width), parent_block_indices=(0,)
        ),
        BlockConfig(
            attention=AttentionConfig(num_kv_heads=1), ffn=FFNConfig(ffn_dim=width // 2), parent_block_indices=(1,)
        ),
        BlockConfig(attention=NO_ATTENTION, ffn=FFNConfig(ffn_dim=4 * width), parent_block_indices=(2, 3, 4, 5)),
        BlockConfig(attention=NO_ATTENTION, ffn=FFNConfig(ffn_dim=width // 2), parent_block_indices=(6,)),
        BlockConfig(
            attention=AttentionConfig(num_kv_heads=kv_heads), ffn=FFNConfig(ffn_dim=width), parent_block_indices=(7,)
        ),
    )
    return {
        "dense": model(dense_blocks(blocks[0], kv_heads, width)),
        "fused": model(fused),
        "teacher": model(dense_blocks(blocks[1], kv_heads, width)),
    }


def engine_fields(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Fields of EngineConfig."""
    return {"device": options.device, "precision": options.precision, **setting.engine}


def step_of(options: argparse.Namespace, setting: Setting) -> Step:
    """The setting as the planner knows it."""
    models = {name: read_architecture(options.models / name) for name in (setting.student, setting.teacher) if name}
    engine = EngineConfig(**engine_fields(options, setting))
    step = Step(
        student=models[setting.student],
        teacher=models[setting.teacher] if setting.teacher else None,
        objective=ObjectiveConfig(**setting.objective),
        engine=engine,
        num_ranks=setting.gpus,
        batch_size=1,
        seq_len=setting.seq_len // options.shorter,
    )
    return Step(**{**vars(step), "batch_size": setting.sequences * step.data_ranks})


def measure(options: argparse.Namespace, name: str, *, timeout_s: float) -> Row:
    """Predict, then run."""
    setting = SETTINGS[name]
    step = step_of(options, setting)
    memory = step_memory(step)
    trial = Trial(
        student=str(options.models / setting.student),
        teacher=str(options.models / setting.teacher) if setting.teacher else None,
        engine=engine_fields(options, setting),
        objective=setting.objective,
        batch_size=step.batch_size,
        seq_len=step.seq_len,
        steps=2,
    )
    return make_row(name, setting, memory, run_trial(trial, num_processes=setting.gpus, timeout_s=timeout_s))


def make_row(name: str, setting: Setting, memory: Memory, outcome: Outcome) -> Row:
    """Prediction and measurement side by side; without a GPU there is none."""
    measured = outcome.gpu_peak_bytes if outcome.failure is None and outcome.gpu_peak_bytes > 0 else None
    return Row(
        setting=name,
        gpus=setting.gpus,
        device=outcome.device,
        failure=outcome.failure,
        predicted_gb=memory.total / 1e9,
        measured_gb=None if measured is None else measured / 1e9,
        error_frac=None if measured is None else memory.total / measured - 1,
        moment=memory.moment,
        parts_gb={part: round(size / 1e9, 3) for part, size in memory.parts.items()},
    )


def markdown(rows: list[Row], facts: dict[str, Any]) -> str:
    """The table, and how many settings are within the goal."""
    errors = [abs(row.error_frac) for row in rows if row.error_frac is not None]
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    if errors:
        within = sum(error <= GOAL for error in errors)
        lines.append(f"- within {GOAL:.0%}: {within} of {len(errors)}; largest error {max(errors):.1%}")
    lines += ["", "| setting | GPUs | predicted GB | measured GB | error | fullest moment, as predicted |"]
    lines += ["|" + "---|" * 6]
    for row in rows:
        measured = "" if row.measured_gb is None else f"{row.measured_gb:.2f}"
        error = "" if row.error_frac is None else f"{row.error_frac:+.1%}"
        if row.failure is not None:
            measured = f"failed: {row.failure}"
        lines.append(f"| {row.setting} | {row.gpus} | {row.predicted_gb:.2f} | {measured} | {error} | {row.moment} |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--shape", choices=("1b", "pico"), default="1b")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--time-limit", type=float, default=230, help="seconds for all settings")
    parser.add_argument("--models", type=Path, help="where the random models are kept; default: OUT/models")
    options = parser.parse_args()
    options.models = (options.models or options.out / "models") / options.shape
    options.shorter = 64 if options.shape == "pico" else 1
    return options


def main() -> None:
    options = parse()
    deadline = time.monotonic() + options.time_limit
    options.out.mkdir(parents=True, exist_ok=True)
    for name, architecture in shapes(options.shape).items():
        write_random_model(options.models / name, architecture)
    facts = {name: num_params_text(options.models / name) for name in ("dense", "fused", "teacher")}
    facts |= {"precision": options.precision, "torch": torch.__version__}
    path = options.out / "planner.json"
    known = json.loads(path.read_text()) if path.exists() else {"facts": facts, "rows": []}
    if known["facts"] != facts:
        raise SystemExit(f"{path} was measured with other options: {known['facts']}; choose another OUT")
    rows = [Row(**row) for row in known["rows"] if row["failure"] != TIME]
    for name in options.settings:
        left = deadline - time.monotonic()
        if SETTINGS[name].gpus not in options.gpus or name in {row.setting for row in rows}:
            continue
        if left < 10:
            print(f"no time left for {name}", flush=True)
            continue
        rows.append(measure(options, name, timeout_s=left))
        print(rows[-1], flush=True)
        path.write_text(json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
        path.with_suffix(".md").write_text(markdown(rows, facts))
    print(markdown(rows, facts))


if __name__ == "__main__":
    main()

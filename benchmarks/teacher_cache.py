"""What is lost when a student learns from a teacher's cached top tokens: divergence, gradient, bytes, and quality.

    python benchmarks/teacher_cache.py model=smollm2_135m data=fineweb_edu [--top-k 8 32 128] [--sequences 64]
        [--train-tokens 0] [--precision fp32] [--root runs/teacher_cache] [--out DIR]

The student is the parent without some of its attentions (stage prune_attention). For every k, stage cache_teacher
writes the parent's signals on the first train sequences; the same sequences then go through the KD objective with the
parent beside the student and with the cache in its place. A row has the divergence from the cache over that from the
parent (at most 1: all other tokens are one) and the distance between both gradients over the length of the parent's.
--train-tokens distils the student from each of them as well, and has all of them evaluated against the parent. Whatever
else stands on the command line is set for every step. Steps that are in the store are not computed again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ablation import new_parser, run, write_results
from torch import Tensor, nn

from distill.config import EngineConfig, ObjectiveConfig, require
from distill.data.batch import Batch
from distill.data.dataset import TokenDataset
from distill.engine.base import resolve_device, resolve_dtype
from distill.objective import Objective, Totals
from distill.teacher import CachedTeacher, Teacher
from distill.teacher_store import SignalStore
from launch.artifact import Artifact
from launch.config import PipelineConfig, StepConfig, compose_stage, step_overrides
from launch.stage_configs import DistillStage
from puzzle.model.checkpoint import load_model

BATCH = 4
"""Sequences per forward and backward."""
_PIECE = 2**22
"""Values that are summed up at once."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The objective on all sequences."""

    kld: float
    gradient: Tensor
    """Of all parameters, flat, fp32 on the device."""
    teacher_seconds: float
    """Time that the signals took, of which nothing is hidden behind the student here."""


def steps_of(top_ks: Sequence[int], *, seq_len: int, num_tokens: int, train_tokens: int) -> dict[str, StepConfig]:
    """Parent, data, student and a cache per k; with ``train_tokens`` a distilled student of each, and one online."""
    cached = (f"teacher_cache.seq_len={seq_len}", f"teacher_cache.max_tokens={max(num_tokens, train_tokens)}")
    found = {
        "parent": StepConfig(stage="import_parent"),
        "data": StepConfig(stage="prepare_data", inputs={"parent": "parent"}),
        "student": StepConfig(stage="prune_attention", inputs={"model": "parent", "data": "data"}),
    }
    signals_inputs = {"teacher": "parent", "data": "data"}
    for k in top_ks:
        overrides = (*cached, f"teacher_cache.top_k={k}")
        found[f"signals_{k}"] = StepConfig(stage="cache_teacher", inputs=signals_inputs, overrides=overrides)
    if train_tokens == 0:
        return found
    training = ("objective=kld", f"distill.seq_len={seq_len}", f"distill.max_tokens={train_tokens}")
    models = {}
    for name in ("online", *map(str, top_ks)):
        source = {"teacher": "parent"} if name == "online" else {"signals": f"signals_{name}"}
        inputs = {"student": "student", "data": "data", **source}
        models[f"distilled_{name}"] = StepConfig(stage="distill", inputs=inputs, overrides=training)
    judged = {"parent": "parent", "data": "data", "student": "student"} | {name: name for name in models}
    return {**found, **models, "evaluation": StepConfig(stage="evaluate", inputs=judged)}


def whole_steps(train_tokens: int, seq_len: int, overrides: Sequence[str]) -> int:
    """Tokens of the optimizer steps that spend ``train_tokens``: what a cache has to hold for them."""
    if train_tokens == 0:
        return 0
    pipeline = PipelineConfig(about="", steps={"distilled": StepConfig(stage="distill")})
    budget = (f"distill.seq_len={seq_len}", f"distill.max_tokens={train_tokens}")
    return compose_stage(
        DistillStage, [*step_overrides(pipeline, "distilled", overrides), *budget]
    ).distill.spent_tokens


def measure(student: nn.Module, teacher: Teacher | CachedTeacher, sequences: Tensor) -> Measured:
    """KL(teacher || student) over all positions of ``sequences`` [n, seq], on the likeliest tokens and the rest where
    the teacher is cached, and its gradient."""
    device = next(student.parameters()).device
    student.zero_grad(set_to_none=True)
    _timed_signals(teacher, Batch.of(sequences[:BATCH]), device)  # files, kernels and memory are not there yet
    totals = Totals.of(Batch.of(sequences).to(device))
    objective = Objective(config=ObjectiveConfig(kld=1.0), teacher=teacher)
    kld, seconds = torch.zeros((), dtype=torch.float64, device=device), 0.0
    for batch in Batch.of(sequences).split(BATCH):
        seconds += _timed_signals(teacher, batch, device)
        loss, metrics = objective(student, batch.to(device), totals)
        loss.backward()
        kld += metrics["loss"]
    gradients = [p.grad.flatten().float() for p in student.parameters() if p.grad is not None]
    return Measured(kld=float(kld), gradient=torch.cat(gradients), teacher_seconds=seconds)


def _timed_signals(teacher: Teacher | CachedTeacher, batch: Batch, device: torch.device) -> float:
    batch = batch.to(device)
    started = time.perf_counter()
    teacher.signal(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def rows(
    artifacts: Mapping[str, Artifact], top_ks: Sequence[int], *, engine: EngineConfig, num_sequences: int, seq_len: int
) -> list[dict[str, Any]]:
    """One row with the parent beside the student, then one per k."""
    device, dtype = resolve_device(engine), resolve_dtype(engine)
    sequences = TokenDataset.open(artifacts["data"].path).split("train").first(num_sequences, seq_len)
    student = load_model(artifacts["student"].path, device=device, dtype=torch.float32)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        teacher = Teacher(load_model(artifacts["parent"].path, device=device, dtype=dtype))
        online = measure(student, teacher, sequences)
        found = [_row("online", online, online, sequences) | _quality(artifacts, "online")]
        del teacher
        for k in top_ks:
            store = SignalStore.open(artifacts[f"signals_{k}"].path)
            cached = measure(student, CachedTeacher(store.train), sequences)
            found.append(
                _row(str(k), cached, online, sequences)
                | _quality(artifacts, str(k))
                | {
                    "kept_frac": 1 - store.index.tail_mass("train"),
                    "bytes_per_token": store.index.bytes_per_token,
                    "write_seconds": artifacts[f"signals_{k}"].manifest.seconds,
                    "num_cached_tokens": store.train.num_sequences * seq_len,
                }
            )
    return found


def _row(name: str, found: Measured, online: Measured, sequences: Tensor) -> dict[str, Any]:
    error, cosine = distance(found.gradient, online.gradient)
    return {
        "signals": name,
        "kld": found.kld,
        "kld_vs_online": found.kld / online.kld,
        "gradient_error": error,
        "gradient_cosine": cosine,
        "signal_tokens_per_s": sequences.numel() / found.teacher_seconds,
    }


def distance(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Length of the difference of two vectors over the length of ``expected``, and the cosine between them.

    Sums in fp64: over 1e8 values of a gradient those in fp32 were off by more than 1%.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for parts in zip(found.split(_PIECE), expected.split(_PIECE), strict=True):
        a, b = (part.double() for part in parts)
        sums += torch.stack([(a - b) @ (a - b), a @ b, a @ a, b @ b]).cpu()
    difference, product, own, other = sums.tolist()
    return (difference / other) ** 0.5, product / (own * other) ** 0.5


def _quality(artifacts: Mapping[str, Artifact], name: str) -> dict[str, Any]:
    """Held-out quality of the student that was distilled from these signals, against the parent as it runs."""
    if "evaluation" not in artifacts:
        return {}
    judged = json.loads((artifacts["evaluation"].path / "evaluate.json").read_text())["models"]
    return {"distilled": {key: judged[f"distilled_{name}"][key] for key in ("kld", "lm_loss", "top1_agreement_frac")}}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| signals | bytes per token | mass kept | KLD | of online | gradient error | signals, tokens/s "
        "| KLD after training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        kept = f"{row['bytes_per_token']} | {row['kept_frac']:.4f}" if "kept_frac" in row else " | "
        after = f"{row['distilled']['kld']:.4f}" if "distilled" in row else ""
        lines.append(
            f"| {row['signals']} | {kept} | {row['kld']:.4f} | {row['kld_vs_online']:.4f} "
            f"| {row['gradient_error']:.4f} | {row['signal_tokens_per_s']:,.0f} | {after} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = new_parser(__doc__, root="runs/teacher_cache")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="as --set")
    parser.add_argument("--top-k", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256], help="tokens kept")
    parser.add_argument("--sequences", type=int, default=64, help="train sequences that losses are compared on")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per sequence")
    parser.add_argument(
        "--train-tokens",
        type=int,
        default=0,
        help="distil a student from each for so many tokens, rounded up to whole optimizer steps",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of teacher and student")
    options = parser.parse_args()
    require(options.sequences > 0, f"--sequences must be > 0, got {options.sequences}")
    overrides = [*options.set, *options.overrides, f"engine.precision={options.precision}"]
    steps = steps_of(
        options.top_k,
        seq_len=options.seq_len,
        num_tokens=options.sequences * options.seq_len,
        train_tokens=whole_steps(options.train_tokens, options.seq_len, overrides),
    )
    artifacts = run(options.root, "teacher_cache", steps, overrides)
    results = rows(
        artifacts,
        options.top_k,
        engine=EngineConfig(precision=options.precision),
        num_sequences=options.sequences,
        seq_len=options.seq_len,
    )
    text = table(results)
    print(text)
    seconds = {name: artifact.manifest.seconds for name, artifact in artifacts.items()}
    write_results(options.out, "teacher_cache", {"rows": results, "seconds": seconds}, text)


if __name__ == "__main__":
    main()

"""Synthetic finished runs, whose files have the formats that the stages write."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distill.config import RopeConfig
from fusion.grouping import fused_architecture
from launch.artifact import Artifact, InputRecord, Manifest, commit, record_files
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import NO_ATTENTION, Architecture, BlockConfig, FFNConfig, dense_blocks
from puzzle.model.hf_config import hf_config
from puzzle.tables import CostFile, CostTable, MergeSaving, OverheadCost, ScoreRow, ScoreTable, SubblockCost

NUM_BLOCKS = 12
WIDTHS = {5: 768, 6: 512, 7: 768, 8: 512, 9: 768}
"""FFN widths of the blocks whose attention is removed."""
GROUP = (5, 8)
LM_LOSS = {"parent": 3.5, "child": 3.9, "fused": 4.1, "distilled": 3.65, "extended": 3.62}
DECODE_MS = {"parent": 4.0, "child": 3.0, "fused": 2.8, "distilled": 2.8}
RNG = random.Random(0)


@dataclass
class SyntheticRun:
    """Commits artifacts one after another."""

    root: Path
    steps: dict[str, Artifact] = field(default_factory=dict)

    def step(
        self,
        name: str,
        stage: str,
        kind: str,
        files: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        tokens: dict[str, int] | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        path = self.root / "store" / name
        path.mkdir(parents=True)
        for file, content in files.items():
            if isinstance(content, ScoreTable | CostFile):
                content.write(path / file)
            else:
                (path / file).write_text(content if isinstance(content, str) else json.dumps(content, allow_nan=False))
        sources = {key: self.steps[source] for key, source in inputs.items()}
        self.steps[name] = commit(
            path,
            Manifest(
                kind=kind,
                stage=stage,
                stage_version=1,
                fingerprint=hashlib.sha256(name.encode()).hexdigest(),
                config={},
                externals={},
                inputs={
                    key: InputRecord(kind=a.manifest.kind, fingerprint=a.manifest.fingerprint, path=a.path.name)
                    for key, a in sources.items()
                },
                files=record_files(path),
                headline=f"{name} <done> & dusted",
                metrics=metrics or {},
                tokens=tokens or {},
                seconds=3.5 * (1 + len(self.steps)) ** 2,
                provenance={
                    "git_commit": "0123456789abcdef",
                    "dirty_diff_sha256": None,
                    "argv": ["/src/launch/__main__.py", "demo", "run.name=a b"],
                    "python": "3.11.7",
                    "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
                    "hardware": {"cpu": "Synthetic CPU", "num_cores": 2, "gpus": ()},
                    "seed": 0,
                },
                created_at="2026-11-24T08:00:00+00:00",
            ),
        )


def parent_architecture() -> Architecture:
    return Architecture(
        vocab_size=2048,
        hidden_dim=256,
        num_heads=8,
        head_dim=32,
        blocks=dense_blocks(NUM_BLOCKS, 4, 768),
        max_positions=512,
        rope=RopeConfig(theta=10_000.0),
        tie_embeddings=True,
    )


def child_architecture() -> Architecture:
    child = parent_architecture()
    for index, width in WIDTHS.items():
        ffn = FFNConfig(ffn_dim=width)
        child = child.with_block(index, BlockConfig(attention=NO_ATTENTION, ffn=ffn, parent_block_indices=(index,)))
    return child


def fused_model() -> Architecture:
    return fused_architecture(child_architecture(), [GROUP])


def model_files(architecture: Architecture, **further: Any) -> dict[str, Any]:
    return {"config.json": hf_config(architecture, "float32"), **further}


def metrics_file(start: float, end: float, tokens_before: int, num_tokens: int) -> str:
    rows = []
    for point in range(9):
        lm_loss = end + (start - end) * math.exp(-point / 2)
        tokens = tokens_before + num_tokens * point // 8
        rows += [{"tokens": tokens, "train/kld": 1.0, "optim/lr": 1e-3}]
        held_out = {"lm_loss": lm_loss, "kld": lm_loss - 3.4, "top1_agreement_frac": 1 - (lm_loss - 3.4) / 2}
        rows += [{"tokens": tokens, **{f"eval/{name}": value for name, value in held_out.items()}}]
    return "".join(json.dumps(row) + "\n" for row in rows)


def score_table() -> ScoreTable:
    attentions = {"kv4": 0.0, "kv2": 0.01, "no_op": 0.03}
    ffns = {"w768": 0.0, "w512": 0.01, "w256": 0.05}
    rows = []
    for block in range(NUM_BLOCKS):
        for attention, a in attentions.items():
            for ffn, f in ffns.items():
                if block > 0 or attention != "no_op":
                    kld = (a + f) * RNG.uniform(0.5, 3)
                    values = {"kld": kld, "lm_loss": 0.8 * kld - 0.002, "top1_disagreement": kld / 3}
                    row = {"values": values, "stderr": {"kld": kld / 10}}
                    rows.append(ScoreRow(block=block, variant=f"{attention}+{ffn}", **row))
    return ScoreTable(parent={"lm_loss": 3.5}, num_tokens=4096, rows=tuple(rows))


def cost_table(source: str, scale: float, batch_size: int = 1) -> CostTable:
    decode_ms = {
        "attention": {"kv4": 0.14, "kv2": 0.12, "no_op": 0.0},
        "ffn": {"w768": 0.11, "w512": 0.08, "w256": 0.05},
    }
    sizes = {"params": 1000, "weight_bytes": 4000}
    return CostTable(
        source=source,
        hardware="Synthetic CPU",
        workload=WorkloadConfig(batch_size=batch_size),
        kv_tokens=256,
        overhead=OverheadCost(prefill_ms=4.0 * scale, decode_ms=0.4 * scale, **sizes),
        subblocks=tuple(
            SubblockCost(
                subblock=subblock,  # type: ignore[arg-type]
                variant=variant,
                prefill_ms=9 * ms * scale,
                decode_ms=ms * scale,
                kv_bytes_per_token=0,
                **sizes,
            )
            for subblock, variants in decode_ms.items()
            for variant, ms in variants.items()
        ),
        ffn_merge_saving=MergeSaving(prefill_ms=0.05, decode_ms=0.03 * scale),
    )


def cost_file() -> CostFile:
    return CostFile(
        architecture=hf_config(parent_architecture(), "float32"),
        workload=WorkloadConfig(),
        tables=(
            cost_table("measured", 1.0),
            cost_table("measured", 3.0, batch_size=8),
            cost_table("analytic", 0.8),
            cost_table("analytic", 2.0, batch_size=8),
        ),
    )


def solution_file(*, method: str = "mip", batch_sizes: tuple[int, ...] = (1,)) -> dict[str, Any]:
    def solved(latency_frac: float, score: float, batch_size: int) -> dict[str, Any]:
        return {
            "blocks": [block.name for block in child_architecture().blocks],
            "score": score,
            "costs": {"latency_ms": 4.0 * latency_frac + 0.1},
            "parent_costs": {"latency_ms": 4.0},
            "predicted_fused_latency_ms": 4.0 * latency_frac,
            "num_merges": 3,
            "status": "optimal" if method == "mip" else "heuristic",
            "mip_gap": 0.0 if method == "mip" else None,
            "batch_size": batch_size,
            "method": method,
        }

    fracs = (0.55, 0.6, 0.7, 0.85, 1.0)
    front = [
        {"latency_frac": frac, **solved(frac, 0.04 / (frac - 0.4) - 0.05, batch_sizes[index % len(batch_sizes)])}
        for index, frac in enumerate(fracs)
    ]
    return {
        "metric": "kld",
        "latency": "decode",
        "cost_table": "measured",
        "parent": "0" * 64,
        "hardware": "Synthetic CPU",
        "workload": asdict(WorkloadConfig()),
        "method": method,
        "conditional": False,
        "batch_sizes": [
            {"batch_size": size, "score": 0.1, "infeasible": None, "time_limit": None} for size in batch_sizes
        ],
        "solutions": [solved(0.7, 0.083, batch_sizes[0]), solved(0.69, 0.1, batch_sizes[-1])],
        "pareto": front if method == "mip" else [],
        "pareto_out_of_reach": [],
        "pareto_out_of_time": [],
    }


def additivity_file() -> dict[str, Any]:
    child = [block.name for block in child_architecture().blocks]
    sums = {"solution 0": 0.08, "pareto 0.6": 0.15, "random 0": 0.02, "random 1": 0.4, "the parent": 0.0}
    rows = [
        {
            "name": name,
            "blocks": child,
            "num_replaced": 5,
            "sum_of_scores": total,
            "realised_kld": 1.5 * total,
            "realised_lm_loss_difference": 1.2 * total,
        }
        for name, total in sums.items()
    ]
    return {"rank_correlation": 0.9, "median_ratio": 0.67, "num_children": len(rows), "num_tokens": 4096, "rows": rows}


def tasks_done(lm_loss_gap: float) -> dict[str, Any]:
    """Two lm-eval tasks that suffer with the loss; the parent can do only the first."""
    kept = 1 - lm_loss_gap / 4
    mmlu = {
        "metric": "acc",
        "value": 0.5 * kept,
        "stderr": 0.004,
        "n": 14042,
        "num_truncated": 0,
        "recovery_frac": kept,
    }
    solved = {**mmlu, "metric": "exact_match,strict-match", "value": 0.0, "stderr": None, "n": 1319}
    solved |= {"num_truncated": 7, "recovery_frac": None}
    return {"tasks": {"mmlu": mmlu, "gsm8k": solved}, "tasks_recovery_frac": kept}


def evaluate_file(lm_loss: Mapping[str, float]) -> dict[str, Any]:
    def measured(name: str, loss: float, order: int, length: int) -> dict[str, float | None]:
        if length > 512 and name != "extended":
            return {"lm_loss": None, "retrieval_accuracy_frac": None}
        return {"lm_loss": loss - 0.05 * order, "retrieval_accuracy_frac": 0.9 - 0.1 * order - (loss - 3.5)}

    models = {
        name: {
            "lm_loss": loss,
            "lm_loss_gap": loss - 3.5,
            "kld": 0.9 * (loss - 3.5),
            "top1_agreement_frac": 1 - (loss - 3.5) / 2,
            **tasks_done(loss - 3.5),
            "by_length": {str(length): measured(name, loss, n, length) for n, length in enumerate((256, 512, 1024))},
        }
        for name, loss in lm_loss.items()
    }
    return {"models": models, "num_tokens": 8192, "seq_len": 256, "retrieval_chance_frac": 1 / 16}


def extension_metrics() -> dict[str, Any]:
    """Of stage extend_context: two phases, each of which reaches further back."""

    def by_length(reach: int) -> dict[str, dict[str, float | None]]:
        return {
            str(length): {"lm_loss": 3.7, "retrieval_accuracy_frac": 0.75 if length <= reach else 0.125}
            for length in (256, 512, 1024)
        }

    return {
        "before": {"by_length": by_length(256)},
        "phases": [{"seq_len": length, "by_length": by_length(length)} for length in (512, 1024)],
        "retrieval_chance_frac": 1 / 16,
    }


def benchmark_file() -> dict[str, Any]:
    models = {
        name: {
            "prefill_ms": 8 * ms,
            "decode_ms": ms,
            "decode_vs_parent": ms / DECODE_MS["parent"],
            "memory_bytes": int(1e7 * ms),
        }
        for name, ms in DECODE_MS.items()
    }
    workload = {"batch_size": 1, "prefill_tokens": 128, "generated_tokens": 128, "dtype": "float32"}
    return {"models": models, "workload": workload, "hardware": "Synthetic CPU"}


def dependency_file() -> dict[str, Any]:
    free = [block.is_attention_free for block in child_architecture().blocks]
    matrix = [
        [
            2 ** -RNG.uniform(*((6.5, 10) if free[i] and free[j] else (0.5, 6))) if j > i else None
            for j in range(len(free))
        ]
        for i in range(len(free))
    ]
    blocks = [
        {"direction_change": (0.04 if f else 0.15) * RNG.uniform(0.7, 1.5), "contribution_ratio": 0.1 if f else 0.6}
        for f in free
    ]
    return {"matrix": matrix, "blocks": blocks, "num_tokens": 4096}


def fusion_file() -> dict[str, Any]:
    return {
        "groups": [],
        "norm": "folded",
        "verify": {"max_relative_error_fp32": 3e-7, "max_relative_error_fp64": 2e-8},
    }


def full_run(root: Path) -> SyntheticRun:
    """Every stage that the report shows."""
    run = SyntheticRun(root)
    library, distilled = {"build_library": 50_000}, {"build_library": 50_000, "distill": 400_000}
    parent_and_data = {"parent": "parent", "data": "data"}
    run.step("data", "prepare_data", "data", {"data.json": {"unigram_entropy_nats": 5.9}}, {})
    run.step("parent", "pretrain", "model", model_files(parent_architecture()), {"data": "data"})
    run.step("library", "build_library", "library", {"library.json": {}}, parent_and_data, tokens=library)
    run.step(
        "scores", "score_library", "scores", {"scores.json": score_table()}, {**parent_and_data, "library": "library"}
    )
    run.step("costs", "measure_costs", "costs", {"costs.json": cost_file()}, {"parent": "parent"})
    run.step(
        "solution", "search", "solution", {"solution.json": solution_file()}, {"scores": "scores", "costs": "costs"}
    )
    run.step(
        "baseline",
        "search",
        "solution",
        {"solution.json": solution_file(method="greedy")},
        {"scores": "scores", "costs": "costs"},
    )
    run.step(
        "additivity",
        "check_additivity",
        "report",
        {"additivity.json": additivity_file()},
        {**parent_and_data, "library": "library", "scores": "scores", "solution": "solution"},
    )
    run.step(
        "child",
        "assemble",
        "model",
        model_files(child_architecture()),
        {"parent": "parent", "library": "library", "solution": "solution"},
        tokens=library,
    )
    run.step(
        "dependency",
        "measure_dependency",
        "dependency",
        {"dependency.json": dependency_file()},
        {"model": "child", "data": "data"},
    )
    run.step(
        "fused",
        "fuse",
        "model",
        model_files(fused_model(), **{"fusion.json": fusion_file()}),
        {"model": "child", "dependency": "dependency"},
        tokens=library,
    )
    run.step(
        "distilled",
        "distill",
        "model",
        model_files(fused_model(), **{"metrics.jsonl": metrics_file(4.1, 3.65, 0, 400_000)}),
        {"student": "fused", "teacher": "parent", "data": "data"},
        tokens=distilled,
        metrics={"teacher": {"lm_loss": 3.5}},
    )
    run.step(
        "extended",
        "extend_context",
        "model",
        model_files(fused_model(), **{"metrics.jsonl": metrics_file(3.7, 3.62, 400_000, 100_000)}),
        {"student": "distilled", "data": "data"},
        tokens={**distilled, "extend_context": 100_000},
        metrics=extension_metrics(),
    )
    models = {name: name for name in LM_LOSS}
    run.step("evaluation", "evaluate", "report", {"evaluate.json": evaluate_file(LM_LOSS)}, {**models, "data": "data"})
    timed = {name: name for name in DECODE_MS}
    run.step("benchmark", "benchmark", "report", {"benchmark.json": benchmark_file()}, timed)
    return run


def short_run(root: Path) -> SyntheticRun:
    """The short road to fusion, looked at by nobody."""
    run = SyntheticRun(root)
    run.step("data", "prepare_data", "data", {"data.json": {"unigram_entropy_nats": 5.9}}, {})
    run.step("parent", "import_parent", "model", model_files(parent_architecture()), {})
    run.step(
        "pruned",
        "prune_attention",
        "model",
        model_files(child_architecture(), **{"scores.json": pruning_scores()}),
        {"model": "parent", "data": "data"},
    )
    run.step(
        "fused", "fuse", "model", model_files(fused_model(), **{"fusion.json": fusion_file()}), {"model": "pruned"}
    )
    return run


def pruning_scores() -> ScoreTable:
    rows = [ScoreRow(block=block, variant="kv4+w768", values={"kld": 0.0}, stderr={}) for block in range(NUM_BLOCKS)]
    rows += [
        ScoreRow(block=block, variant=f"no_op+w{WIDTHS.get(block, 768)}", values={"kld": 0.1 / block}, stderr={})
        for block in range(1, NUM_BLOCKS)
    ]
    return ScoreTable(parent={"lm_loss": 3.5}, num_tokens=4096, rows=tuple(rows))


@pytest.fixture(scope="session")
def full_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return full_run(tmp_path_factory.mktemp("full")).steps


@pytest.fixture
def short(tmp_path: Path) -> SyntheticRun:
    return short_run(tmp_path)


@pytest.fixture
def new_solution() -> Callable[..., dict[str, Any]]:
    """``solution_file``."""
    return solution_file


@pytest.fixture
def new_scores() -> Callable[[], ScoreTable]:
    """``score_table``."""
    return score_table

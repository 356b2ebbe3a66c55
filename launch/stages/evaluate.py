"""Stage evaluate: held-out losses, agreement with the parent, retrieval by length and lm-eval tasks, model by model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from distill.config import require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import load_tokenizer, require_same_tokenizer
from distill.engine.base import resolve_device, resolve_dtype
from distill.evaluate import evaluate_model
from distill.recovered import retained_accuracy_frac
from distill.retrieval import NUM_CANDIDATES, make_probe, measure_lengths
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import EvaluateStage
from puzzle.lm_eval_tasks import WHOLE_MODEL, Harness, TaskChoice, Tasks
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.model.modeling_decilm import DeciLMForCausalLM

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once."""


def run(config: EvaluateStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``evaluate.json``: LM loss and its gap to the parent, KLD, top-1 agreement, columns by length, tasks."""
    evaluate = config.evaluate
    dataset = TokenDataset.open(inputs["data"].path)
    names = ["parent", *(name for name in inputs if name not in ("parent", "data"))]
    max_positions = {name: read_architecture(inputs[name].path).max_positions for name in names}
    for name in names:
        require_same_tokenizer(dataset, inputs[name].path, name)
        require(
            evaluate.seq_len <= max_positions[name],
            f"evaluate.seq_len={evaluate.seq_len} is beyond the {max_positions[name]} positions of {name}; lower it",
        )
    tasks = _read_tasks(config, max_positions)
    sequences = dataset.split("validation").first(evaluate.num_sequences, evaluate.seq_len)
    probes = {length: make_probe(dataset, evaluate, length=length, seed=config.seed) for length in evaluate.lengths}

    device, dtype = resolve_device(config.engine), resolve_dtype(config.engine)
    parent = load_model(inputs["parent"].path, device=device, dtype=dtype)
    models: dict[str, dict[str, Any]] = {}
    for name in tqdm(names, desc="evaluate", unit="model", leave=False):
        is_parent = name == "parent"
        model = parent if is_parent else load_model(inputs[name].path, device=device, dtype=dtype)
        quality = evaluate_model(
            model,
            sequences,
            teacher=None if is_parent else parent,
            batch_size=evaluate.batch_size,
            chunk_tokens=CHUNK_TOKENS,
        )
        models[name] = {
            "lm_loss": quality["lm_loss"],
            "lm_loss_gap": 0.0 if is_parent else quality["lm_loss"] - models["parent"]["lm_loss"],
            "kld": 0.0 if is_parent else quality["kld"],
            "top1_agreement_frac": 1.0 if is_parent else quality["top1_agreement_frac"],
            "by_length": measure_lengths(model, probes, max_positions=max_positions[name], chunk_tokens=CHUNK_TOKENS),
        }
        if tasks is not None:
            done = _do_tasks(model, inputs[name].path, tasks, config, max_positions[name])
            models[name] |= _beside_parent(done, models["parent"].get("tasks", done))
        del model  # before the next one is loaded: two large models fit where three do not
    report = {
        "models": models,
        "num_tokens": sequences.numel(),
        "seq_len": evaluate.seq_len,
        "retrieval_chance_frac": 1 / NUM_CANDIDATES if probes else None,
    }
    (context.out / "evaluate.json").write_text(json.dumps(report, indent=2) + "\n")
    return StageResult(headline=_headline(models), metrics=report)


def _read_tasks(config: EvaluateStage, max_positions: Mapping[str, int]) -> Tasks | None:
    """None where there are none. All that can be wrong with them is said here, before a model is loaded."""
    evaluate = config.evaluate
    if not evaluate.tasks:
        return None
    choice = TaskChoice(
        node="evaluate",
        tasks=evaluate.tasks,
        directory=evaluate.task_dir,
        limit=evaluate.task_limit,
        num_fewshot=evaluate.num_fewshot,
    )
    tasks = Tasks.read(choice, output_types=WHOLE_MODEL)
    tasks.main_metrics()
    for name, positions in max_positions.items():
        tasks.require_room(positions, name)
    return tasks


def _do_tasks(
    model: DeciLMForCausalLM, directory: Path, tasks: Tasks, config: EvaluateStage, max_positions: int
) -> dict[str, dict[str, Any]]:
    # For tasks that sample their answers.
    torch.manual_seed(config.seed)
    harness = Harness.around(
        model,
        load_tokenizer(directory),
        tasks,
        batch_size=config.evaluate.batch_size,
        max_positions=max_positions,
        progress=True,
    )
    return {task: asdict(result) for task, result in harness.results().items()}


def _beside_parent(done: Mapping[str, Mapping[str, Any]], parent: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``tasks``, each with its ``recovery_frac``, and the mean of those that have one as ``tasks_recovery_frac``."""
    tasks = {
        name: {**result, "recovery_frac": retained_accuracy_frac(parent=parent[name]["value"], model=result["value"])}
        for name, result in done.items()
    }
    fracs = [task["recovery_frac"] for task in tasks.values() if task["recovery_frac"] is not None]
    return {"tasks": tasks, "tasks_recovery_frac": statistics.fmean(fracs) if fracs else None}


def _headline(models: dict[str, dict[str, Any]]) -> str:
    """``LM loss: parent 2.310, child 2.451 (KLD 0.140), ...``, in nats per token, and what tasks keep of theirs."""
    others = {name: row for name, row in models.items() if name != "parent"}
    losses = [f"{name} {row['lm_loss']:.3f} (KLD {row['kld']:.3f})" for name, row in others.items()]
    headline = "LM loss: " + ", ".join([f"parent {models['parent']['lm_loss']:.3f}", *losses])
    kept = [
        f"{name} {row['tasks_recovery_frac']:.1%}"
        for name, row in others.items()
        if row.get("tasks_recovery_frac") is not None
    ]
    num_tasks = len(models["parent"].get("tasks", ()))
    of_tasks = f"; {num_tasks} {'task' if num_tasks == 1 else 'tasks'} recovered: {', '.join(kept)}" if kept else ""
    return headline + of_tasks

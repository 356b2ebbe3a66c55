"""Stage evaluate: held-out losses, agreement with the parent, retrieval by length and lm-eval tasks, model by model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from distill.config import EvaluateConfig, require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import load_tokenizer, require_same_tokenizer
from distill.engine.base import resolve_device, resolve_dtype
from distill.evaluate import evaluate_model
from distill.files import write_whole
from distill.recovered import retained_accuracy_frac
from distill.retrieval import NUM_CANDIDATES, make_probe, measure_lengths
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import EvaluateStage
from puzzle.lm_eval_index import TaskChoice
from puzzle.lm_eval_tasks import Harness, Tasks
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
    questions = _Questions.read(evaluate, inputs["parent"].path, min(max_positions.values()))
    sequences = dataset.split("validation").first(evaluate.num_sequences, evaluate.seq_len)
    probes = {length: make_probe(dataset, evaluate, length=length, seed=config.seed) for length in evaluate.lengths}

    device, dtype = resolve_device(config.engine), resolve_dtype(config.engine)
    parent = load_model(inputs["parent"].path, device=device, dtype=dtype)
    models: dict[str, dict[str, Any]] = {}
    for name in tqdm(names, desc="evaluate", unit="model", leave=False):
        # Models that a killed attempt finished: large ones take hours each.
        kept = context.resume / f"model-{name}.json"
        if kept.is_file():
            models[name] = json.loads(kept.read_text())
            continue
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
        if questions is not None:
            done = questions.put_to(model, inputs[name].path)
            models[name] |= _beside_parent(done, models["parent"].get("tasks", done))
        write_whole(kept, json.dumps(models[name]))
        del model  # before the next one is loaded: two large models fit where three do not
    report = {
        "models": models,
        "num_tokens": sequences.numel(),
        "seq_len": evaluate.seq_len,
        "retrieval_chance_frac": 1 / NUM_CANDIDATES if probes else None,
    }
    (context.out / "evaluate.json").write_text(json.dumps(report, indent=2) + "\n")
    return StageResult(headline=_headline(models), metrics=report)


@dataclass(frozen=True, kw_only=True)
class _Questions:
    """Tasks, put alike to every model."""

    tasks: Tasks
    max_positions: int
    """Those that all models have: longer questions lose the same beginning in all of them."""
    num_truncated: Mapping[str, int]
    batch_size: int

    @classmethod
    def read(cls, evaluate: EvaluateConfig, parent: Path, max_positions: int) -> _Questions | None:
        """None where there are none. All that can be wrong with them is said here, before a model is loaded."""
        if not evaluate.tasks:
            return None
        choice = TaskChoice(
            node="evaluate",
            tasks=evaluate.tasks,
            directory=evaluate.task_dir,
            limit=evaluate.task_limit,
            num_fewshot=evaluate.num_fewshot,
            metrics=evaluate.task_metrics or {},
        )
        tasks = Tasks.read(choice)
        num_truncated = tasks.num_truncated(load_tokenizer(parent), max_positions)
        return cls(
            tasks=tasks, max_positions=max_positions, num_truncated=num_truncated, batch_size=evaluate.batch_size
        )

    def put_to(self, model: DeciLMForCausalLM, directory: Path) -> dict[str, dict[str, Any]]:
        harness = Harness.around(
            model,
            load_tokenizer(directory),
            self.tasks,
            batch_size=self.batch_size,
            max_positions=self.max_positions,
            progress=True,
        )
        return {
            task: {**asdict(result), "num_truncated": self.num_truncated[task]}
            for task, result in harness.results().items()
        }


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
    return headline + (f"; {_counted(models['parent']['tasks'])} recovered: {', '.join(kept)}" if kept else "")


def _counted(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """``3 tasks``, ``1 of 2 tasks`` where the parent fails in one, so that no share of it can be told."""
    num_told = sum(task["recovery_frac"] is not None for task in tasks.values())
    of_all = f"{num_told} of " if num_told < len(tasks) else ""
    return f"{of_all}{len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}"

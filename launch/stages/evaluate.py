"""Stage evaluate: held-out losses, agreement with the parent and retrieval by length, model by model."""

from __future__ import annotations

import json
from typing import Any

from tqdm.auto import tqdm

from distill.config import require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.engine.base import resolve_device, resolve_dtype
from distill.evaluate import evaluate_model
from distill.retrieval import NUM_CANDIDATES, make_probe, measure_lengths
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import EvaluateStage
from puzzle.model.checkpoint import load_model, read_architecture

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once."""


def run(config: EvaluateStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``evaluate.json``: LM loss and its gap to the parent, KLD, top-1 agreement, and columns by length."""
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
        del model  # before the next one is loaded: two large models fit where three do not
    report = {
        "models": models,
        "num_tokens": sequences.numel(),
        "seq_len": evaluate.seq_len,
        "retrieval_chance_frac": 1 / NUM_CANDIDATES if probes else None,
    }
    (context.out / "evaluate.json").write_text(json.dumps(report, indent=2) + "\n")
    return StageResult(headline=_headline(models), metrics=report)


def _headline(models: dict[str, dict[str, Any]]) -> str:
    """``LM loss: parent 2.310, child 2.451 (KLD 0.140), ...``, in nats per token."""
    others = [f"{name} {row['lm_loss']:.3f} (KLD {row['kld']:.3f})" for name, row in models.items() if name != "parent"]
    return "LM loss: " + ", ".join([f"parent {models['parent']['lm_loss']:.3f}", *others])

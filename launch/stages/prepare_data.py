"""Stage prepare_data: text sources to token streams, with the tokenizer beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distill.config import DataConfig
from distill.data.generation import TEXT_NAME
from distill.data.packing import pack, training_texts
from distill.data.tokenizer import train_tokenizer
from launch.quantities import scaled
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import PrepareDataStage
from puzzle.model.checkpoint import copy_tokenizer


def run(config: PrepareDataStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Train or copy the tokenizer, then fill the splits."""
    config.check_inputs(inputs)
    data = _with_generated(config.data, inputs)
    if data.tokenizer == "train":
        train_tokenizer(training_texts(data, seed=config.seed), data.vocab_size, context.out)
    else:
        copy_tokenizer(inputs["parent"].path, context.out)
    summary = pack(data, context.out, seed=config.seed)
    num_tokens = {name: split["num_tokens"] for name, split in summary["splits"].items()}
    return StageResult(
        headline=(
            f"{scaled(num_tokens['train'])} train tokens{_shortfall(data, summary)}, "
            f"vocabulary {summary['vocab_size']}, unigram entropy {summary['unigram_entropy_nats']:.2f} nats"
        ),
        metrics={
            **{f"{name}_tokens": count for name, count in num_tokens.items()},
            "vocab_size": summary["vocab_size"],
            "unigram_entropy_nats": summary["unigram_entropy_nats"],
            "bytes_per_token": summary["bytes_per_token"],
            "sources": summary["sources"],
            "ended_by": summary["ended_by"],
        },
    )


def _with_generated(data: DataConfig, inputs: Inputs) -> DataConfig:
    """``data`` with the place of the input `generated` in the source of that kind."""
    if "generated" not in inputs:
        return data
    path = str(inputs["generated"].path / TEXT_NAME)
    return replace(data, sources=tuple(replace(s, path=path) if s.kind == "generated" else s for s in data.sources))


def _shortfall(data: DataConfig, summary: dict[str, Any]) -> str:
    """That the text ended before ``train_tokens``, where it did."""
    if summary["ended_by"] is None:
        return ""
    return f" of {scaled(data.train_tokens)} asked, where the text ended"

"""Stage prepare_data: text sources to token streams, with the tokenizer beside them."""

from __future__ import annotations

from distill.data.packing import pack, training_texts
from distill.data.tokenizer import train_tokenizer
from launch.quantities import scaled
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import PrepareDataStage
from puzzle.model.checkpoint import copy_tokenizer


def run(config: PrepareDataStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Train or copy the tokenizer, then fill the splits."""
    data = config.data
    config.check_inputs(inputs)
    if data.tokenizer == "train":
        train_tokenizer(training_texts(data, seed=config.seed), data.vocab_size, context.out)
    else:
        copy_tokenizer(inputs["parent"].path, context.out)
    summary = pack(data, context.out, seed=config.seed)
    num_tokens = {name: split["num_tokens"] for name, split in summary["splits"].items()}
    return StageResult(
        headline=(
            f"{scaled(num_tokens['train'])} train tokens, vocabulary {summary['vocab_size']}, "
            f"unigram entropy {summary['unigram_entropy_nats']:.2f} nats"
        ),
        metrics={
            **{f"{name}_tokens": count for name, count in num_tokens.items()},
            "vocab_size": summary["vocab_size"],
            "unigram_entropy_nats": summary["unigram_entropy_nats"],
            "bytes_per_token": summary["bytes_per_token"],
            "sources": summary["sources"],
        },
    )

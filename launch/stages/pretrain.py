"""Stage pretrain: data -> a Llama-shaped parent that is trained from nothing."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from distill.config import ObjectiveConfig, require
from distill.data.dataset import Batches, TokenDataset
from distill.data.tokenizer import load_tokenizer
from distill.engine.base import micro_batch_size
from distill.evaluate import evaluate_model
from distill.objective import Objective
from distill.tracking import Tracker
from distill.trainer import train
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import PretrainStage
from puzzle.config import PretrainConfig
from puzzle.model.architecture import FFN_DIM_MULTIPLE, Architecture, dense_blocks
from puzzle.model.checkpoint import build_model, save_model

OBJECTIVE = ObjectiveConfig(lm=1.0)


def run(config: PretrainStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Train next-token prediction on the data. Writes the model in fp32 with its tokenizer, and ``metrics.jsonl``."""
    pretrain, budget = config.pretrain, config.pretrain.train
    dataset = TokenDataset.open(inputs["data"].path)
    architecture = llama_architecture(pretrain, dataset)
    batches = Batches(dataset.split("train"), seq_len=budget.seq_len, batch_size=budget.batch_size, seed=config.seed)
    sequences = dataset.split("validation").first(budget.eval_sequences, budget.seq_len)
    with Tracker(
        context.out / "metrics.jsonl",
        context.tracking,
        run_name=context.run_name,
        step_name=context.step_name,
        stage="pretrain",
        settings=asdict(config),
    ) as tracker:
        model = build_model(architecture, seed=config.seed)
        result = train(
            model=model,
            objective=Objective(config=OBJECTIVE),
            batches=batches,
            train=budget,
            optim=pretrain.optim,
            engine=config.engine,
            seed=config.seed,
            resume_dir=context.resume,
            tracker=tracker,
            evaluate=partial(
                evaluate_model,
                model,
                sequences,
                batch_size=micro_batch_size(config.engine, batch_size=budget.batch_size, seq_len=budget.seq_len),
                chunk_tokens=OBJECTIVE.chunk_tokens,
            ),
            desc=context.step_name,
        )
    save_model(model, context.out, architecture=architecture, tokenizer_from=dataset.directory)
    start, end = result.evaluations[0], result.evaluations[-1]
    return StageResult(
        headline=f"LM loss {start['lm_loss']:.2f} -> {end['lm_loss']:.2f} (token frequencies alone "
        f"{dataset.unigram_entropy:.2f}) after {result.tokens:,} tokens",
        metrics={"start": start, "end": end, "unigram_entropy": dataset.unigram_entropy},
        tokens=result.tokens,
    )


def llama_architecture(pretrain: PretrainConfig, dataset: TokenDataset) -> Architecture:
    """The configured shape, with the vocabulary and special tokens of ``dataset``.

    Raises:
        ValueError: the checkpoint format cannot express the shape.
    """
    require(
        pretrain.ffn_dim % FFN_DIM_MULTIPLE == 0,
        f"pretrain.ffn_dim={pretrain.ffn_dim} is not a multiple of {FFN_DIM_MULTIPLE}, as the model format demands",
    )
    head_dim = pretrain.hidden_dim // pretrain.num_heads
    require(
        head_dim % 2 == 0,
        f"pretrain.hidden_dim={pretrain.hidden_dim} over pretrain.num_heads={pretrain.num_heads} gives heads of "
        f"{head_dim} channels; rotary positions need an even number",
    )
    tokenizer = load_tokenizer(dataset.directory)
    return Architecture(
        vocab_size=dataset.vocab_size,
        hidden_dim=pretrain.hidden_dim,
        num_heads=pretrain.num_heads,
        head_dim=head_dim,
        blocks=dense_blocks(pretrain.num_blocks, pretrain.num_kv_heads, pretrain.ffn_dim),
        max_positions=pretrain.max_positions,
        rope=pretrain.rope,
        tie_embeddings=pretrain.tie_embeddings,
        token_ids={name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )

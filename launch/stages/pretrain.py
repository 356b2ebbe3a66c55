"""Stage pretrain: data -> a Llama-shaped parent that is trained from nothing. All processes train."""

from __future__ import annotations

from pathlib import Path

from distill import distributed
from distill.config import ObjectiveConfig, require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import load_tokenizer
from distill.engine.setup import TrainingSetup
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import PretrainStage
from launch.training import check_positions, curve_ends, only_whole, run_engine, tracking, training_data
from puzzle.model.architecture import FFN_DIM_MULTIPLE, Architecture, dense_blocks
from puzzle.model.checkpoint import build_model, save_model
from puzzle.model.config import PretrainConfig
from puzzle.model.provider import DirectoryProvider

OBJECTIVE = ObjectiveConfig(lm=1.0)


def run(config: PretrainStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Train next-token prediction on the data. Writes the model in fp32 with its tokenizer, and ``metrics.jsonl``."""
    pretrain, budget = config.pretrain, config.pretrain.train
    dataset = TokenDataset.open(inputs["data"].path)
    architecture = llama_architecture(pretrain, dataset)
    way_out = "raise pretrain.max_positions, or lower it"
    check_positions(architecture, budget, role="model", node="pretrain.train", way_out=way_out)
    config.check_processes(distributed.world_size(), {"model": architecture})
    data = training_data(dataset, budget, seed=config.seed, node="pretrain.train")
    with tracking(context, stage="pretrain", config=config) as tracker:
        initial = _initial_model(architecture, dataset, context.resume / "initial", seed=config.seed)
        result = run_engine(
            TrainingSetup(student=initial, objective=OBJECTIVE),
            data,
            optim=pretrain.optim,
            engine=config.engine,
            seed=config.seed,
            resume_dir=context.resume,
            tracker=tracker,
            desc=context.step_name,
            out=context.out,
        )
    ends = curve_ends(result)
    return StageResult(
        headline=f"LM loss {ends['start']['lm_loss']:.2f} -> {ends['end']['lm_loss']:.2f} (token frequencies alone "
        f"{dataset.unigram_entropy:.2f}) after {result.tokens:,} tokens",
        metrics={**ends, "unigram_entropy": dataset.unigram_entropy},
        tokens=result.tokens,
    )


def _initial_model(
    architecture: Architecture, dataset: TokenDataset, directory: Path, *, seed: int
) -> DirectoryProvider:
    """A random model in ``directory``, with the tokenizer of ``dataset``; engines start from directories."""
    with only_whole(directory) as partial:
        if partial is not None and distributed.is_main():
            model = build_model(architecture, seed=seed)
            save_model(model, partial, architecture=architecture, tokenizer_from=dataset.directory)
    return DirectoryProvider(directory)


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

"""Models, engines and steps that the tests of the Megatron engine share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import distributed
from distill.config import EngineConfig, ObjectiveConfig, OptimConfig
from distill.data.batch import Batch
from distill.engine.base import Engine, create_engine
from distill.engine.setup import TrainingSetup
from puzzle.model.architecture import (
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionConfig,
    BlockConfig,
    FFNConfig,
    dense_blocks,
)
from puzzle.model.checkpoint import build_model, save_model
from puzzle.model.provider import DirectoryProvider
from tests.distributed import megatron_cpu

SEQ_LEN = 32
BATCH_SIZE = 4
NUM_STEPS = 20
LAYER_MAP = (0, 1, 3, 4, 5)
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, grad_clip=1.0)
KD = ObjectiveConfig(kld=1.0, hidden_cosine=0.5, hidden_mse=0.25, lm=0.5, temperature=2.0, chunk_tokens=48)
SPLIT = {"tensor": (2, 1), "pipeline": (1, 2), "data": (1, 1)}


@dataclass(frozen=True, kw_only=True)
class Models:
    """Directories of a teacher and a student."""

    teacher: Path
    student: Path

    def setup(self, objective: ObjectiveConfig = KD) -> TrainingSetup:
        teacher = DirectoryProvider(self.teacher) if objective.needs_teacher else None
        layer_map = LAYER_MAP if objective.compares_hidden else ()
        return TrainingSetup(
            student=DirectoryProvider(self.student), objective=objective, teacher=teacher, layer_map=layer_map
        )


def student_blocks() -> tuple[BlockConfig, ...]:
    """Of the teacher's six: one kept, one without attention, two fused, two replaced by linear layers."""
    return (
        BlockConfig(attention=AttentionConfig(num_kv_heads=2), ffn=FFNConfig(ffn_dim=512), parent_block_indices=(0,)),
        BlockConfig(attention=NO_ATTENTION, ffn=NO_FFN, parent_block_indices=(1,)),
        BlockConfig(attention=NO_ATTENTION, ffn=FFNConfig(ffn_dim=1024), parent_block_indices=(2, 3)),
        BlockConfig(attention=AttentionConfig(kind="linear"), ffn=FFNConfig(ffn_dim=256), parent_block_indices=(4,)),
        BlockConfig(attention=AttentionConfig(num_kv_heads=1), ffn=FFNConfig(kind="linear"), parent_block_indices=(5,)),
    )


def save_seeded(architecture: Architecture, directory: Path, *, seed: int) -> Path:
    model = build_model(architecture, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms that are not one, so that a wrong one shows
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(3)  # logits of a trained model's size
    save_model(model, directory, architecture=architecture, tokenizer_from=None)
    return directory


def save_models(pico_architecture: Architecture, root: Path) -> dict[str, Models]:
    """Teacher and student with and without tied embeddings."""
    found = {}
    for name in ("untied", "tied"):
        like = replace(pico_architecture, tie_embeddings=name == "tied")
        directory = root / name
        found[name] = Models(
            teacher=save_seeded(like.with_blocks(dense_blocks(6, 2, 512)), directory / "teacher", seed=0),
            student=save_seeded(like.with_blocks(student_blocks()), directory / "student", seed=1),
        )
    return found


def tokens(num: int, *, seed: int) -> Tensor:
    return torch.randint(0, 320, (num, SEQ_LEN), generator=torch.Generator().manual_seed(seed))


def make_engine(setup: TrainingSetup, split: str | None, **options: Any) -> Engine:
    """The reference engine on the CPU, or megatron's; one sequence to a micro-batch."""
    options = {"micro_batch_tokens": SEQ_LEN, **options}
    if split is None:
        config = EngineConfig(device="cpu", **options)
    else:
        tensor, pipeline = SPLIT[split]
        config = EngineConfig(name="megatron", tensor_parallel=tensor, pipeline_parallel=pipeline, **options)
    return create_engine(setup, optim=OPTIM, engine=config, batch_size=BATCH_SIZE, seq_len=SEQ_LEN)


def train_steps(engine: Engine, first: int, end: int, *, lr: float | None = None) -> list[dict[str, float]]:
    share = BATCH_SIZE // engine.num_data_ranks
    rows = range(engine.data_rank * share, (engine.data_rank + 1) * share)
    found = []
    for step in range(first, end):
        batch = Batch.of(tokens(BATCH_SIZE, seed=step)).rows(rows.start, rows.stop)
        metrics = engine.step(batch, lr=lr or 1e-3 * (step + 1) / NUM_STEPS)
        found.append({name: float(value) for name, value in metrics.items()})
    return found


def in_process(function: Callable, *arguments: Any, **options: Any) -> Any:
    megatron_cpu.install()
    distributed.join()
    with distributed.together():
        return function(*arguments, **options)

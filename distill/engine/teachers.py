"""Who teaches: a model that runs, beside the student or elsewhere, or signals that were computed before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distill.config import EngineConfig
from distill.distributed import DataRanks
from distill.engine import torch_sharding
from distill.engine.base import compile_blocks, resolve_dtype
from distill.engine.setup import ModelProvider, TrainingSetup
from distill.engine.student_step import share_sequences
from distill.teacher import CachedTeacher, Teacher, resolve_teacher_device


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """Whom the student is compared with."""

    training: Teacher | CachedTeacher | None
    """In the objective."""
    held_out: Teacher | CachedTeacher | None
    """On the held-out sequences, by their number."""
    held_out_store: Any = None
    """What ``held_out`` reads, if it does not run."""

    def known_metrics(self, num_sequences: int) -> dict[str, float]:
        """Held-out metrics of the first ``num_sequences`` sequences that do not depend on the student and are not
        computed beside it: ``teacher_lm_loss`` of a teacher that does not run."""
        if self.held_out_store is None:
            return {}
        return {"teacher_lm_loss": self.held_out_store.teacher_lm_loss(num_sequences)}


def build_teachers(
    setup: TrainingSetup, engine: EngineConfig, *, device: torch.device, ranks: DataRanks, sharded: bool = False
) -> Teachers:
    """The teachers of ``setup``, if it has any. One that runs is also what held-out sequences are compared with.

    Args:
        setup: names a teacher or a store of its signals.
        engine: precision and device of a teacher that runs, and whether its blocks are compiled.
        device: the student's.
        ranks: ranks that share sequences read the same parts of them as the student.
        sharded: deal the teacher's weights over all ranks (FSDP2) if it runs on the student's device.
    """
    if setup.store is not None:
        part, num_parts = ranks.part, ranks.num_parts
        store = setup.held_out_store
        return Teachers(
            training=CachedTeacher(setup.store, part=part, num_parts=num_parts),
            held_out=None if store is None else CachedTeacher(store, part=part, num_parts=num_parts),
            held_out_store=store,
        )
    if setup.teacher is None:
        return Teachers(training=None, held_out=None)
    place = resolve_teacher_device(engine, device)
    teacher = _running(setup.teacher, engine, device=place, ranks=ranks, sharded=sharded and place == device)
    return Teachers(training=teacher, held_out=teacher)


def _running(
    provider: ModelProvider, engine: EngineConfig, *, device: torch.device, ranks: DataRanks, sharded: bool
) -> Teacher:
    dtype = resolve_dtype(engine)
    model = provider.empty().to(dtype) if sharded else provider.load(device=device, dtype=dtype)
    share_sequences(model, ranks.group)
    if engine.compile:
        compile_blocks(model)
    if sharded:
        torch_sharding.shard_teacher(model, device)
        torch_sharding.fill(model, provider, device)
    return Teacher(model)

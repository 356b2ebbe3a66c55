"""Stage cache_teacher: teacher, data -> the teacher's most probable tokens at every position, for runs without it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from distill.config import EngineConfig, ObjectiveConfig, require
from distill.data.batch import Batch
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.distributed import barrier, data_ranks, gather_objects, is_main, rank, world_size
from distill.engine.base import resolve_device
from distill.engine.setup import TrainingSetup
from distill.engine.teachers import build_teachers
from distill.teacher import Teacher
from distill.teacher_cache import SPLITS, CacheIndex, ShardRecord, TeacherCacheConfig
from distill.teacher_store import Shard, SignalStore, is_whole, num_batches, plan_shards, read_record, write_shard
from launch.quantities import scaled
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import CacheTeacherStage
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import read_architecture
from puzzle.model.provider import DirectoryProvider


def run(config: CacheTeacherStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write the shards and ``teacher_signals.json``. A run that was killed goes on with the shards that it lacks.

    Processes share the shards. Each has the teacher whole or, with ``engine.shard``, a part of its blocks' weights.
    """
    teacher_dir, cache = inputs["teacher"].path, config.teacher_cache
    architecture = read_architecture(teacher_dir)
    dataset = TokenDataset.open(inputs["data"].path)
    require_same_tokenizer(dataset, teacher_dir, "teacher")
    check_cache(cache, architecture, dataset)
    shards = plan_shards(cache)
    _write_missing(shards, config, teacher_dir, dataset, context)
    barrier()
    index = CacheIndex(
        teacher=inputs["teacher"].manifest.fingerprint,
        vocab_size=architecture.vocab_size,
        tokenizer_sha256=dataset.tokenizer_sha256,
        seq_len=cache.seq_len,
        top_k=cache.top_k,
        separate_documents=cache.separate_documents,
        shards=tuple(_record(context.resume, shard) for shard in shards),
    )
    if is_main():
        for shard in shards:
            _link(context.resume / shard.name, context.out / shard.name)
        index.write(context.out)
    barrier()
    return _result(SignalStore.open(context.out))


def check_cache(cache: TeacherCacheConfig, teacher: Architecture, dataset: TokenDataset) -> None:
    """Raise ``ValueError`` where the teacher or the data is too small for what is to be cached."""
    require(
        cache.seq_len <= teacher.max_positions,
        f"teacher_cache.seq_len={cache.seq_len} is beyond the {teacher.max_positions} positions of the teacher; lower "
        "it",
    )
    require(
        cache.top_k < teacher.vocab_size,
        f"teacher_cache.top_k={cache.top_k} leaves no other of the {teacher.vocab_size} tokens of the teacher's "
        "vocabulary; lower it",
    )
    cache.check_data({split: dataset.split(split).num_tokens for split in SPLITS})


def _write_missing(
    shards: Sequence[Shard], config: CacheTeacherStage, teacher_dir: Path, dataset: TokenDataset, context: StageContext
) -> None:
    """The shards that do not stand in the private directory yet, one per process at a time."""
    cache = config.teacher_cache
    lacking = [shard for shard in shards[rank() :: world_size()] if not is_whole(context.resume, shard)]
    lacking = [shard for share in gather_objects(lacking) for shard in share]
    missing = [shard for shard in shards if shard in lacking]
    if not missing:
        return
    teacher = _load_teacher(teacher_dir, config.engine)
    total = sum(shard.end - shard.first for shard in missing) * cache.seq_len
    with tqdm(total=total, desc=context.step_name, unit="tok", unit_scale=True, leave=False) as bar:
        for first in range(0, len(missing), world_size()):
            at_once = missing[first : first + world_size()]
            own = at_once[rank() : rank() + 1]
            for shard in own:
                write_shard(context.resume, shard, teacher, dataset, cache)
            if config.engine.shard:
                _keep_pace(teacher, at_once, own, dataset, cache)
            bar.update(sum(shard.end - shard.first for shard in at_once) * cache.seq_len)


def _load_teacher(directory: Path, engine: EngineConfig) -> Teacher:
    """The teacher in the engine's precision, whole on every process or dealt over them."""
    provider = DirectoryProvider(directory)
    setup = TrainingSetup(student=provider, teacher=provider, objective=ObjectiveConfig(kld=1.0))
    device, is_dealt = resolve_device(engine), engine.shard and world_size() > 1
    teacher = build_teachers(setup, engine, device=device, ranks=data_ranks(1), sharded=is_dealt).training
    assert isinstance(teacher, Teacher)
    return teacher


def _keep_pace(
    teacher: Teacher, at_once: Sequence[Shard], own: Sequence[Shard], dataset: TokenDataset, cache: TeacherCacheConfig
) -> None:
    """Run a dealt teacher as often as the process with most batches does: every forward needs all of them."""
    most, done = (max((num_batches(shard, cache) for shard in part), default=0) for part in (at_once, own))
    idle = Batch.of(dataset.split("train").sequences(cache.seq_len, [0])).to(teacher.device)
    for _ in range(most - done):
        teacher.signal(idle)


def _record(directory: Path, shard: Shard) -> ShardRecord:
    record = read_record(directory, shard)
    require(
        record is not None,
        f"{directory / shard.name}, which another process wrote, is not to be seen here; the processes need one file "
        "system",
    )
    assert record is not None
    return record


def _link(source: Path, destination: Path) -> None:
    """A second name, so that a kill loses nothing; a copy where the file system has no such names."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def _result(store: SignalStore) -> StageResult:
    index = store.index
    splits = {"train": store.train, "validation": store.validation}
    num_tokens = {split: splits[split].num_sequences * index.seq_len for split in SPLITS}
    kept = 1 - index.tail_mass("train")
    headline = (
        f"{scaled(num_tokens['train'])} train tokens, {index.bytes_per_token} bytes each; the top {index.top_k} of "
        f"{index.vocab_size:,} hold {kept:.2%} of the mass"
    )
    return StageResult(
        headline=headline,
        metrics={
            "num_tokens": num_tokens,
            "num_shards": len(index.shards),
            "bytes_per_token": index.bytes_per_token,
            "tail_mass_frac": {split: index.tail_mass(split) for split in SPLITS},
            "teacher_lm_loss": {split: splits[split].teacher_lm_loss(splits[split].num_sequences) for split in SPLITS},
        },
    )

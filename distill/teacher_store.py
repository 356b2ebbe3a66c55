"""Signals of a teacher on disk: computed once, shard by shard, and read by any number of processes.

A shard is one safetensors file of consecutive sequences of one split, ``n`` of them:

- ``token_ids`` [n, seq, k], unsigned 16 bits where the vocabulary allows it, else 32: the most probable tokens, in
  falling order;
- ``log_probs`` [n, seq, k], fp16: theirs, in nats;
- ``log_tails`` [n, seq], fp16: log of the mass of all other tokens. Implied by ``log_probs`` it would be their rounding
  error, up to 2e-4, rather than the mass of the tail of a confident teacher;
- ``lm_loss`` [n], fp32, and ``num_targets`` [n], int32: the teacher's own loss over the positions with a next token.

The index, :class:`distill.teacher_cache.CacheIndex`, has the size and checksum of every file.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.chunked_head import TopK, matmul_operand, project, row_chunks
from distill.config import require
from distill.data.batch import IGNORE_INDEX, Batch, moved_tensor
from distill.data.dataset import TokenDataset, TokenSplit, documents_apart
from distill.files import flush_to_disk, sha256_of, write_whole
from distill.teacher import Teacher
from distill.teacher_cache import CacheIndex, ShardRecord, TeacherCacheConfig, hash_of_tokens, id_bytes, shard_name

SMALLEST_LOG_PROB = -1e4
"""A token that a teacher rules out has probability 0 at this log-probability too, and 0 times it is not NaN."""
MAX_OPEN_SHARDS = 256
"""Files that a process keeps mapped, per split."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Consecutive sequences of one split, of which one file holds the signals."""

    split: str
    first: int
    end: int

    @property
    def name(self) -> str:
        """Name of the file."""
        return shard_name(self.split, self.first)


def plan_shards(config: TeacherCacheConfig) -> list[Shard]:
    """All shards of a cache, in the order of its index."""
    counts = {"train": config.num_sequences, "validation": config.eval_sequences}
    size = config.shard_sequences
    return [
        Shard(split=split, first=first, end=min(first + size, count))
        for split, count in counts.items()
        for first in range(0, count, size)
    ]


def num_batches(shard: Shard, config: TeacherCacheConfig) -> int:
    """Forwards of the teacher that a shard takes."""
    return -(-(shard.end - shard.first) // config.batch_size)


def read_record(directory: Path, shard: Shard) -> ShardRecord | None:
    """The record of a shard whose file stands in ``directory`` in full size; None: it is to be computed."""
    file, note = directory / shard.name, _note(directory, shard)
    if not (file.is_file() and note.is_file()):
        return None
    record = ShardRecord(**json.loads(note.read_text()))
    return record if file.stat().st_size == record.num_bytes else None


def is_whole(directory: Path, shard: Shard) -> bool:
    """Whether the file of ``shard`` is what was written, checksum included."""
    record = read_record(directory, shard)
    return record is not None and sha256_of(directory / shard.name) == record.sha256


def write_shard(
    directory: Path, shard: Shard, teacher: Teacher, dataset: TokenDataset, config: TeacherCacheConfig
) -> ShardRecord:
    """Run the teacher on the sequences of ``shard`` and write its file, which appears whole or not at all.

    What comes out depends on no other shard: neither on which process computes it nor on where an earlier run ended.

    Args:
        directory: of the files, and of a note beside each that says it is whole.
        shard: which sequences.
        teacher: on any device.
        dataset: the tokens.
        config: sequence length, tokens kept, sequences per forward.

    Raises:
        ValueError: a log-probability of the teacher is not a number.
    """
    split = dataset.split(shard.split)
    parts = [_signals(teacher, batch, config.top_k) for batch in _batches(shard, split, config, dataset.eos_token_id)]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tail_mass = float(tensors["log_tails"].double().exp().mean())
    tensors["token_ids"] = tensors["token_ids"].view(torch.uint16 if _is_16_bit(teacher) else torch.uint32)
    file = directory / shard.name
    partial = file.with_suffix(".tmp")
    save_file(tensors, partial)
    flush_to_disk(partial)
    partial.rename(file)
    tokens = split.tokens[shard.first * config.seq_len : shard.end * config.seq_len]
    record = ShardRecord(
        **asdict(shard),
        num_bytes=file.stat().st_size,
        sha256=sha256_of(file),
        tokens_sha256=hash_of_tokens(tokens),
        tail_mass=tail_mass,
    )
    write_whole(_note(directory, shard), json.dumps(asdict(record)))
    return record


def top_signals(hidden: Tensor, head: Tensor, labels: Tensor, top_k: int) -> dict[str, Tensor]:
    """What a cache keeps of one distribution per token, of the logits that a student is compared with beside a teacher
    that runs: fp32, of a chunk of tokens at a time.

    Args:
        hidden: [tokens, hidden], after the final norm.
        head: [vocab, hidden].
        labels: next tokens [tokens], IGNORE_INDEX where there is none.
        top_k: tokens kept.

    Returns:
        ``token_ids`` int64 and ``log_probs`` fp32, [tokens, k], most probable first; ``log_tails`` fp32 [tokens], of
        the mass of all others; ``nll`` fp32 [tokens], the loss at the label, 0 where there is none.
    """
    operand = matmul_operand(head, hidden)
    chunks = [
        _top_of_logits(project(hidden[rows], operand), labels[rows], top_k)
        for rows in row_chunks(len(labels), operand, 0)
    ]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _top_of_logits(logits: Tensor, labels: Tensor, top_k: int) -> dict[str, Tensor]:
    """:func:`top_signals` of ``logits`` [tokens, vocab], which it writes to."""
    log_z = logits.logsumexp(-1, keepdim=True)
    at_label = logits.gather(1, labels.clamp_min(0)[:, None])
    top = logits.topk(top_k)
    rest = logits.scatter_(1, top.indices, float("-inf")).logsumexp(-1, keepdim=True)
    log_probs = top.values - log_z
    kept = log_probs.exp().sum(-1)
    return {
        "token_ids": top.indices,
        "log_probs": log_probs,
        # Each where the other loses its digits: a small tail in 1 - kept, a large one in the difference of logarithms.
        "log_tails": torch.where(kept < 0.5, torch.log1p(-kept), (rest - log_z).squeeze(1)),
        "nll": (log_z - at_label).squeeze(1).masked_fill(labels == IGNORE_INDEX, 0),
    }


class SplitSignals:
    """Signals of one split, a :class:`distill.engine.setup.TeacherStore`. Files are mapped where they are touched."""

    def __init__(self, directory: Path, index: CacheIndex, split: str) -> None:
        self.num_sequences = index.num_sequences(split)
        self._directory = directory
        self._names = [shard.name for shard in index.shards if shard.split == split]
        self._firsts = [shard.first for shard in index.shards if shard.split == split]
        self._file = lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open)

    def signal(self, sequence_ids: Tensor, positions: slice, *, device: torch.device) -> TopK:
        """Signals [batch, positions, k] of sequences ``sequence_ids`` [batch], on ``device``, without waiting for it.

        Nothing else is read. Numbers reach the device as they are stored.
        """
        token_ids = self._read("token_ids", sequence_ids, device, positions)
        log_probs = self._read("log_probs", sequence_ids, device, positions).float()
        kept = -torch.expm1(self._read("log_tails", sequence_ids, device, positions).float())
        # To the mass that the tail leaves, which fp16 rounds less than it rounds the sum of the others.
        log_probs += (kept.log() - log_probs.logsumexp(-1))[..., None]
        return TopK(token_ids=_unsigned(token_ids), log_probs=log_probs)

    def teacher_lm_loss(self, num_sequences: int) -> float:
        """The teacher's LM loss on the first ``num_sequences`` sequences, nats per token with a next token."""
        ids = torch.arange(num_sequences)
        counts = self._read("num_targets", ids, torch.device("cpu")).double()
        losses = self._read("lm_loss", ids, torch.device("cpu")).double()
        return float((losses * counts).sum() / counts.sum())

    def _read(self, name: str, sequence_ids: Tensor, device: torch.device, *positions: slice) -> Tensor:
        rows = [_signed(row) for row in self._rows(name, sequence_ids.tolist(), *positions)]
        return moved_tensor(torch.stack(rows), device)

    def _rows(self, name: str, sequence_ids: list[int], *positions: slice) -> Iterator[Tensor]:
        for index in sequence_ids:
            assert 0 <= index < self.num_sequences, f"sequence {index} is not cached"
            shard = bisect_right(self._firsts, index) - 1
            row = index - self._firsts[shard]
            yield self._file(shard).get_slice(name)[(slice(row, row + 1), *positions)][0]

    def _open(self, shard: int) -> Any:
        return safe_open(self._directory / self._names[shard], framework="pt")


@dataclass(frozen=True, kw_only=True)
class SignalStore:
    """A cache: its index and its two splits."""

    directory: Path
    index: CacheIndex
    train: SplitSignals
    validation: SplitSignals

    @classmethod
    def open(cls, directory: Path) -> SignalStore:
        """Open what stage cache_teacher wrote.

        Raises:
            ValueError: no cache, one of another format, or files that are missing or cut short.
        """
        index = CacheIndex.read(directory)
        train, validation = (SplitSignals(directory, index, split) for split in ("train", "validation"))
        return cls(directory=directory, index=index, train=train, validation=validation)


def _batches(shard: Shard, split: TokenSplit, config: TeacherCacheConfig, eos_token_id: int) -> Iterator[Batch]:
    for first in range(shard.first, shard.end, config.batch_size):
        indices = range(first, min(first + config.batch_size, shard.end))
        batch = replace(Batch.of(split.sequences(config.seq_len, indices)), sequence_ids=torch.tensor(indices))
        yield documents_apart(batch, eos_token_id) if config.separate_documents else batch


@torch.no_grad()
def _signals(teacher: Teacher, batch: Batch, top_k: int) -> dict[str, Tensor]:
    """Tensors of a shard for ``batch``, on the CPU; token ids signed, of the size that is stored."""
    sequences = batch.sequence_ids.tolist()
    batch = batch.to(teacher.device)
    signal = teacher.signal(batch)
    assert signal.hidden is not None
    assert signal.head is not None
    top = top_signals(signal.hidden.flatten(0, 1), signal.head, batch.labels.flatten(), top_k)
    require(
        bool(torch.isfinite(top["nll"]).all()) and not bool(torch.isnan(top["log_tails"]).any()),
        f"the teacher's log-probabilities are not finite in sequences {sequences[0]} to {sequences[-1]}; look at its "
        "weights, or set engine.precision=fp32",
    )
    shape = batch.input_ids.shape
    num_targets = (batch.labels != IGNORE_INDEX).sum(1)
    tensors = {
        "token_ids": top["token_ids"].to(torch.int16 if _is_16_bit(teacher) else torch.int32).view(*shape, top_k),
        "log_probs": top["log_probs"].clamp_min(SMALLEST_LOG_PROB).half().view(*shape, top_k),
        "log_tails": top["log_tails"].half().view(shape),
        "lm_loss": top["nll"].view(shape).sum(1).div(num_targets.clamp_min(1)).float(),
        "num_targets": num_targets.to(torch.int32),
    }
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _is_16_bit(teacher: Teacher) -> bool:
    return id_bytes(len(teacher.model.get_output_embeddings().weight)) == 2


def _signed(tensor: Tensor) -> Tensor:
    """The same bits as signed integers, which every device computes with; other types stay."""
    return tensor.view({torch.uint16: torch.int16, torch.uint32: torch.int32}.get(tensor.dtype, tensor.dtype))


def _unsigned(token_ids: Tensor) -> Tensor:
    """int64 of :func:`_signed` token ids."""
    mask = 0xFFFF if token_ids.dtype == torch.int16 else 0xFFFFFFFF
    return token_ids.to(torch.int64) & mask


def _note(directory: Path, shard: Shard) -> Path:
    return (directory / shard.name).with_suffix(".json")

"""Configuration and index of a teacher's cached signals, and which training runs they fit. Torch-free.

A cache holds, for every position, the ``top_k`` most probable next tokens of the teacher and the mass of all others.
Hidden states are not cached: at hidden 4,096 one block's would take 8 KB per token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dacite
import numpy as np
from numpy.typing import NDArray

from distill.config import PLACEMENT, ObjectiveConfig, TrainConfig, require

INDEX_NAME = "teacher_signals.json"
FORMAT_VERSION = 2
SPLITS = ("train", "validation")
LARGEST_16_BIT_VOCAB = 2**16


@dataclass(frozen=True, kw_only=True)
class TeacherCacheConfig:
    """What stage cache_teacher computes."""

    seq_len: int
    """Tokens per sequence: that of the runs that will read the cache."""
    max_tokens: int
    """Train tokens: the first sequences of the split, whole ones, up to this many tokens. Runs with a larger budget
    repeat them."""
    top_k: int = 64
    """Tokens kept per position, the most probable ones."""
    separate_documents: bool = False
    """As in TrainConfig."""
    eval_sequences: int = 32
    """Sequences of the validation split, for the recovery curve."""
    batch_size: int = field(default=8, metadata=PLACEMENT)
    """Sequences per forward of the teacher."""
    shard_tokens: int = 2**20
    """Tokens per file: what one process computes at a time, and what is lost when it is killed."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "max_tokens", "top_k", "eval_sequences", "batch_size", "shard_tokens"):
            require(getattr(self, name) > 0, f"teacher_cache.{name} must be > 0, got {getattr(self, name)}")
        require(self.seq_len >= 2, f"teacher_cache.seq_len must be >= 2 to have a next token, got {self.seq_len}")
        require(
            self.max_tokens >= self.seq_len,
            f"teacher_cache.max_tokens={self.max_tokens} is less than one sequence of seq_len={self.seq_len}; raise it",
        )

    @property
    def num_sequences(self) -> int:
        """Sequences of the train split."""
        return self.max_tokens // self.seq_len

    @property
    def shard_sequences(self) -> int:
        """Sequences of every file but a split's last."""
        return max(1, self.shard_tokens // self.seq_len)

    def check_data(self, num_tokens: Mapping[str, int]) -> None:
        """Raise ``ValueError`` where a split is too short for what is to be cached; ``num_tokens`` by split."""
        counts = {"max_tokens": ("train", self.num_sequences), "eval_sequences": ("validation", self.eval_sequences)}
        for name, (split, num_sequences) in counts.items():
            available = num_tokens[split] // self.seq_len
            most = available * self.seq_len if name == "max_tokens" else available
            require(
                num_sequences <= available,
                f"teacher_cache.{name}={getattr(self, name)} asks for {num_sequences} sequences of {self.seq_len} "
                f"tokens of the {split} split, which has {available}; set it to {most}, or raise data.{split}_tokens",
            )


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One file: consecutive sequences of one split."""

    split: str
    first: int
    """Index of the first sequence in its split."""
    end: int
    """One more than the index of the last."""
    num_bytes: int
    sha256: str
    """Of the file."""
    tokens_sha256: str
    """Of the tokens that the teacher read (:func:`hash_of_tokens`)."""
    tail_mass: float
    """Mean mass of the tokens that are not kept, over the positions of the file."""

    @property
    def name(self) -> str:
        """Name of the file."""
        return shard_name(self.split, self.first)


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """Content of ``teacher_signals.json``."""

    format_version: int = FORMAT_VERSION
    teacher: str
    """Fingerprint of the model."""
    vocab_size: int
    """Rows of its head."""
    tokenizer_sha256: str
    """Of the data (:func:`distill.data.tokenizer.tokenizer_sha256`)."""
    seq_len: int
    top_k: int
    separate_documents: bool
    shards: tuple[ShardRecord, ...]
    """By split, in the order of :data:`SPLITS`, each from its first sequence on without gaps."""

    @property
    def bytes_per_token(self) -> int:
        """Size of a position: per kept token its id (2 bytes up to 65,536 rows of the head, else 4) and a 2-byte
        log-probability; once the 2-byte log-mass of the rest. A sequence has 8 bytes more, for its LM loss."""
        return self.top_k * (id_bytes(self.vocab_size) + 2) + 2

    def num_sequences(self, split: str) -> int:
        """Sequences 0 to this minus one of ``split`` are there."""
        return max((shard.end for shard in self.shards if shard.split == split), default=0)

    def tail_mass(self, split: str) -> float:
        """Mean mass per position of the tokens that are not kept."""
        shards = [shard for shard in self.shards if shard.split == split]
        total = sum(shard.tail_mass * (shard.end - shard.first) for shard in shards)
        return total / self.num_sequences(split)

    def write(self, directory: Path) -> None:
        """Write ``teacher_signals.json``; the files must be there."""
        (directory / INDEX_NAME).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, directory: Path) -> CacheIndex:
        """Read the index and compare the files' sizes with it.

        Raises:
            ValueError: no cache, one of another format, or files that are missing or cut short.
        """
        path = directory / INDEX_NAME
        require(
            path.is_file(), f"{directory} holds no teacher signals: it has no {INDEX_NAME}; run stage cache_teacher"
        )
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            version = content.get("format_version")
            require(
                version == FORMAT_VERSION,
                f"{path} has format version {version}, this program reads {FORMAT_VERSION}; run stage cache_teacher "
                "again",
            )
            index = dacite.from_dict(cls, content, dacite.Config(cast=[tuple], strict=True))
        except (json.JSONDecodeError, UnicodeDecodeError, dacite.DaciteError) as error:
            raise ValueError(f"{path} cannot be read ({error}); run stage cache_teacher again") from error
        for shard in index.shards:
            file = directory / shard.name
            num_bytes = file.stat().st_size if file.is_file() else 0
            require(
                num_bytes == shard.num_bytes,
                f"{file} has {num_bytes} bytes, its index says {shard.num_bytes}; run stage cache_teacher again",
            )
        return index


def shard_name(split: str, first: int) -> str:
    """File of the shard of ``split`` that begins with sequence ``first``."""
    return f"{split}-{first:09d}.safetensors"


def id_bytes(vocab_size: int) -> int:
    """Bytes of a stored token id."""
    return 2 if vocab_size <= LARGEST_16_BIT_VOCAB else 4


def hash_of_tokens(tokens: NDArray[Any]) -> str:
    """SHA-256 of token ids in order, whatever integer type they come in."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u4").tobytes()).hexdigest()


def check_objective(objective: ObjectiveConfig) -> None:
    """Raise ``ValueError`` where ``objective`` has a term that cached signals cannot serve."""
    for name in ("hidden_cosine", "hidden_mse"):
        weight = getattr(objective, name)
        require(
            weight == 0,
            f"objective.{name}={weight} compares hidden states, which the input `signals` does not hold; set it to 0, "
            "or give the input `teacher` in its place",
        )
    require(
        objective.temperature == 1,
        f"objective.temperature={objective.temperature}: the mass of the tokens that are not in the input `signals` is "
        "known at temperature 1 only; set it to 1, or give the input `teacher` in its place",
    )


def check_run(index: CacheIndex, train: TrainConfig, *, vocab_size: int, tokenizer_sha256: str) -> None:
    """Raise ``ValueError`` unless a student can train from the cache as ``train`` says.

    Args:
        index: of the cache.
        train: sequence length, documents and held-out sequences of the run.
        vocab_size: rows of the student's head.
        tokenizer_sha256: of the run's data.
    """
    require(
        index.tokenizer_sha256 == tokenizer_sha256,
        f"the teacher signals are of data with tokenizer sha256 {index.tokenizer_sha256[:12]}, the data given has "
        f"{tokenizer_sha256[:12]}; give the data that stage cache_teacher read, or run it on this data",
    )
    require(
        index.vocab_size == vocab_size,
        f"the teacher of the signals has a vocabulary of {index.vocab_size} rows, the student one of {vocab_size}; "
        "cache the signals of the model that the student was made of",
    )
    check_shape(
        train,
        seq_len=index.seq_len,
        separate_documents=index.separate_documents,
        eval_sequences=index.num_sequences("validation"),
    )


def check_shape(train: TrainConfig, *, seq_len: int, separate_documents: bool, eval_sequences: int) -> None:
    """Raise ``ValueError`` unless ``train`` reads sequences as they were cached, and not more for evaluation."""
    require(
        seq_len == train.seq_len,
        f"the teacher signals are of sequences of {seq_len} tokens, this run has seq_len={train.seq_len}; set "
        f"it to {seq_len}, or run stage cache_teacher with teacher_cache.seq_len={train.seq_len}",
    )
    require(
        separate_documents == train.separate_documents,
        f"the teacher signals have separate_documents={separate_documents}, this run has "
        f"{train.separate_documents}: the teacher has seen other contexts; set both to the same",
    )
    require(
        train.eval_sequences <= eval_sequences,
        f"eval_sequences={train.eval_sequences}, but the teacher signals have {eval_sequences} validation sequences; "
        f"lower it, or run stage cache_teacher with teacher_cache.eval_sequences={train.eval_sequences}",
    )


def check_tokens(index: CacheIndex, split: str, tokens: NDArray[Any]) -> None:
    """Raise ``ValueError`` unless the cache is of ``tokens``, a whole split.

    All tokens of the cache are compared, some 300 million a second: a source that changed anywhere would have a student
    learn from another text than it reads. A longer split that begins with the same tokens fits.
    """
    num_tokens = index.num_sequences(split) * index.seq_len
    way_out = "give the data that stage cache_teacher read, or run it on this data"
    require(
        num_tokens <= len(tokens),
        f"the teacher signals are of {num_tokens} {split} tokens, the data has {len(tokens)}; {way_out}",
    )
    for shard in (shard for shard in index.shards if shard.split == split):
        found = hash_of_tokens(tokens[shard.first * index.seq_len : shard.end * index.seq_len])
        require(
            found == shard.tokens_sha256,
            f"the teacher signals are of other data: sequences {shard.first} to {shard.end - 1} of the {split} split "
            f"differ; {way_out}",
        )

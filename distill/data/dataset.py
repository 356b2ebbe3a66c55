"""Fixed-length sequences out of a data artifact, and batches of them as a function of the step alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config import require


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """One split: a flat run of tokens, read from disk where it is touched."""

    name: str
    tokens: NDArray[np.unsignedinteger]
    """[num_tokens]"""

    @property
    def num_tokens(self) -> int:
        """Tokens in all, the end-of-text tokens between documents included."""
        return len(self.tokens)

    def num_sequences(self, seq_len: int) -> int:
        """Whole sequences of ``seq_len`` tokens, side by side."""
        return self.num_tokens // seq_len

    def sequences(self, seq_len: int, indices: Sequence[int]) -> Tensor:
        """Sequences by index: int64 ``[len(indices), seq_len]``."""
        assert all(0 <= index < self.num_sequences(seq_len) for index in indices)
        rows = [self.tokens[index * seq_len : (index + 1) * seq_len] for index in indices]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def first(self, n: int, seq_len: int) -> Tensor:
        """The first ``n`` sequences, int64 ``[n, seq_len]``. Raises ``ValueError`` where the split has fewer."""
        require(
            n <= self.num_sequences(seq_len),
            f"{n} sequences of {seq_len} tokens asked of the {self.name} split, "
            f"which has {self.num_sequences(seq_len)} ({self.num_tokens} tokens); "
            f"raise data.{self.name}_tokens to {n * seq_len} or ask for fewer",
        )
        return self.sequences(seq_len, range(n))


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """A data artifact: splits of tokens in one vocabulary."""

    directory: Path
    """Holds the tokenizer too."""
    vocab_size: int
    eos_token_id: int
    tokenizer_sha256: str
    unigram_entropy: float
    """Nats per token of the validation split under the train split's token frequencies."""

    @classmethod
    def open(cls, directory: Path) -> TokenDataset:
        """Open what :func:`distill.data.packing.pack` wrote."""
        summary = directory / "data.json"
        require(
            summary.is_file(),
            f"{directory} is no data directory: it has no data.json; make one with stage prepare_data",
        )
        content = json.loads(summary.read_text())
        return cls(
            directory=directory,
            vocab_size=content["vocab_size"],
            eos_token_id=content["eos_token_id"],
            tokenizer_sha256=content["tokenizer_sha256"],
            unigram_entropy=content["unigram_entropy_nats"],
        )

    def split(self, name: str) -> TokenSplit:
        """One of train, validation, calibration."""
        return TokenSplit(name=name, tokens=np.load(self.directory / f"{name}.npy", mmap_mode="r", allow_pickle=False))


class Batches:
    """Batches of a split in epochs, each a new seeded order of all sequences.

    ``batch(step)`` depends on nothing but the step, so a resumed run needs no state to see the same data; the
    permutation of the current epoch is kept only because it is slow to make.
    """

    def __init__(self, split: TokenSplit, *, seq_len: int, batch_size: int, seed: int) -> None:
        self._split = split
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._num_sequences = split.num_sequences(seq_len)
        require(
            self._num_sequences > 0,
            f"seq_len={seq_len} is longer than the {split.name} split of {split.num_tokens} tokens; "
            f"raise data.{split.name}_tokens or lower seq_len",
        )
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> Tensor:
        """Batch number ``step``, from 0: int64 ``[batch, seq_len]``. May span the end of an epoch."""
        first = step * self._batch_size
        indices = [self._sequence_index(position) for position in range(first, first + self._batch_size)]
        return self._split.sequences(self._seq_len, indices)

    def _sequence_index(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_sequences)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._num_sequences)
            self._epoch = epoch
        return int(self._order[offset])

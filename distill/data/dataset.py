"""Fixed-length sequences out of a data artifact, and batches of them as a function of the step alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config import require
from distill.data.batch import IGNORE_INDEX, Batch
from distill.data.budget import require_sequences

NAMED_SEQUENCES = 8
"""Most sequences that a message names."""


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """One split: a flat run of tokens, read from disk where it is touched."""

    name: str
    tokens: NDArray[np.unsignedinteger]
    """[num_tokens]"""
    file: Path | None = None
    """Array file that the tokens are read from; None: there is none."""
    first_token: int = 0
    """Position in ``file`` of what is ``tokens[0]`` here."""

    @property
    def num_tokens(self) -> int:
        """Tokens in all, the end-of-text tokens between documents included."""
        return len(self.tokens)

    def beyond(self, num_tokens: int) -> TokenSplit:
        """The split without its first ``num_tokens`` tokens."""
        return replace(self, tokens=self.tokens[num_tokens:], first_token=self.first_token + num_tokens)

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
        require_sequences(n, seq_len, split=self.name, num_tokens=self.num_tokens)
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
        file = self.directory / f"{name}.npy"
        return TokenSplit(name=name, tokens=np.load(file, mmap_mode="r", allow_pickle=False), file=file)


class Batches:
    """Batches of a split in epochs, each a new seeded order of all sequences.

    ``batch`` depends on nothing but its arguments, so a resumed run needs no state to see the same data, at any number
    of ranks; the permutation of the current epoch is kept only because it is slow to make.

    Args:
        split: what the sequences are cut from.
        seq_len: tokens per sequence.
        batch_size: sequences per optimizer step, over all ranks.
        seed: of the order.
        separate_documents: keep the documents of a sequence apart (:func:`documents_apart`).
        eos_token_id: token that ends a document; needed where documents are kept apart.
        num_sequences: draw from the first so many sequences of the split alone; None: from all.

    Raises:
        ValueError: the split has no sequence of that length, or fewer than ``num_sequences``.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        separate_documents: bool = False,
        eos_token_id: int | None = None,
        num_sequences: int | None = None,
    ) -> None:
        assert eos_token_id is not None or not separate_documents, "documents are told apart by their last token"
        available = split.num_sequences(seq_len)
        require(
            available > 0,
            f"seq_len={seq_len} is longer than the {split.name} split of {split.num_tokens} tokens; "
            f"raise data.{split.name}_tokens or lower seq_len",
        )
        self.num_sequences = available if num_sequences is None else num_sequences
        """Sequences of one epoch."""
        require(
            0 < self.num_sequences <= available,
            f"{num_sequences} sequences of {seq_len} tokens asked of the {split.name} split, which has {available}",
        )
        self._split = split
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._eos_token_id = eos_token_id if separate_documents else None
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        """Rank ``rank``'s equal share, in order, of the ``batch_size`` sequences of step ``step``, from 0.

        A step may span the end of an epoch.
        """
        assert 0 <= rank < num_ranks
        assert self._batch_size % num_ranks == 0, f"{self._batch_size} sequences for {num_ranks} ranks"
        share = self._batch_size // num_ranks
        indices = self._indices(step * self._batch_size + rank * share, share)
        batch = replace(
            Batch.of(self._split.sequences(self._seq_len, indices)),
            sequence_ids=torch.tensor(indices, dtype=torch.int64),
        )
        return batch if self._eos_token_id is None else documents_apart(batch, self._eos_token_id)

    def describe_step(self, step: int) -> str:
        """The sequences of step ``step`` of all ranks, and where their tokens stand, in words.

        Of more than :data:`NAMED_SEQUENCES` the first are named.
        """
        indices = self._indices(step * self._batch_size, self._batch_size)
        named = indices[:NAMED_SEQUENCES]
        firsts = [self._split.first_token + index * self._seq_len for index in named]
        begin, further = self._split.first_token, len(indices) - len(named)
        more = f" and {further} more" if further > 0 else ""
        counted = f", counted from token {begin} on," if begin > 0 else ""
        return (
            f"sequences {', '.join(map(str, named))}{more} of {self._seq_len} tokens{counted} of "
            f"{self._split.file or self._split.name}: "
            f"tokens {', '.join(f'{first}-{first + self._seq_len - 1}' for first in firsts)}"
        )

    def _indices(self, first: int, num: int) -> list[int]:
        """Sequences at ``num`` positions in the order of all epochs."""
        return [self._sequence_index(position) for position in range(first, first + num)]

    def _sequence_index(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.num_sequences)
            self._epoch = epoch
        return int(self._order[offset])


def documents_apart(batch: Batch, eos_token_id: int) -> Batch:
    """``batch`` of whole sequences with its documents kept apart: they begin after every end-of-text token.

    Positions start anew in every document, and its last token predicts nothing. What a sequence begins with is a
    document of its own, even where it is the rest of a cut one.
    """
    ends = batch.input_ids == eos_token_id
    begins = torch.cat((torch.ones_like(ends[:, :1]), ends[:, :-1]), dim=1)
    begin = torch.where(begins, batch.position_ids, 0).cummax(dim=1).values
    return replace(
        batch,
        labels=batch.labels.masked_fill(ends, IGNORE_INDEX),
        position_ids=batch.position_ids - begin,
        separate_documents=True,
    )

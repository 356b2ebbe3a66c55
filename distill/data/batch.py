"""What one forward pass reads: sequences of tokens, and where documents begin in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that has no next token, as in torch's cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences, or for one rank of a sequence-parallel group the same part of each of them.

    Labels stand beside the token that predicts them: a part of a sequence needs no look at the next part.
    """

    input_ids: Tensor
    """int64 [batch, seq]"""
    labels: Tensor
    """int64 [batch, seq]: the next token, IGNORE_INDEX where there is none (the end of the sequence and, where
    documents are kept apart, the end of a document)."""
    position_ids: Tensor
    """int64 [batch, seq]: position of each token in its sequence; where documents are kept apart, in its document."""
    sequence_ids: Tensor
    """int64 [batch]: index of each sequence in its split, at this sequence length."""
    separate_documents: bool = False
    """Whether a token attends to its own document alone; documents then begin where ``position_ids`` is 0."""
    on_host: Batch | None = field(default=None, repr=False)
    """The same sequences on the CPU, where they were moved from there by :meth:`to`: what is needed on the host is at
    hand without waiting for the device."""

    @classmethod
    def of(cls, input_ids: Tensor) -> Batch:
        """Whole sequences ``input_ids`` [batch, seq], numbered from 0, of which nothing else is known."""
        batch, seq = input_ids.shape
        ignored = torch.full((batch, 1), IGNORE_INDEX, dtype=input_ids.dtype, device=input_ids.device)
        return cls(
            input_ids=input_ids,
            labels=torch.cat((input_ids[:, 1:], ignored), dim=1),
            position_ids=torch.arange(seq, device=input_ids.device).expand(batch, seq),
            sequence_ids=torch.arange(batch, device=input_ids.device),
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_positions(self) -> int:
        """Tokens."""
        return self.input_ids.numel()

    def num_targets(self) -> Tensor:
        """Positions that have a next token, as a scalar on the batch's device: reading it may wait."""
        return (self.labels != IGNORE_INDEX).sum()

    def rows(self, first: int, end: int) -> Batch:
        """Sequences ``first`` to ``end - 1``."""
        return self._map(lambda tensor: tensor[first:end])

    def select(self, indices: Tensor) -> Batch:
        """Copies of sequences ``indices`` [n], in that order."""
        return self._map(lambda tensor: tensor[indices])

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of at most ``size`` sequences, in order."""
        for first in range(0, len(self), size):
            yield self.rows(first, first + size)

    def sequence_part(self, index: int, num_parts: int) -> Batch:
        """Part ``index`` of ``num_parts`` equal parts of every sequence."""
        seq = self.input_ids.shape[1]
        assert seq % num_parts == 0, f"{seq} tokens in {num_parts} parts"
        size = seq // num_parts
        return self._map(lambda tensor: tensor[:, index * size : (index + 1) * size] if tensor.ndim == 2 else tensor)

    def to(self, device: torch.device) -> Batch:
        """On ``device``, through pinned memory and without waiting for it where it is a GPU; on the CPU what is in
        ``on_host``, if this came from there.

        ``sequence_ids`` stay where they are: they are read on the host.
        """
        if self.input_ids.device == device:
            return self
        if device.type == "cpu" and self.on_host is not None:
            return self.on_host
        moved = self._map(lambda tensor: moved_tensor(tensor, device))
        on_host = self if self.input_ids.device.type == "cpu" else self.on_host
        return replace(moved, sequence_ids=self.sequence_ids, on_host=on_host)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            position_ids=change(self.position_ids),
            sequence_ids=change(self.sequence_ids),
            separate_documents=self.separate_documents,
            on_host=None if self.on_host is None else self.on_host._map(change),
        )


def moved_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. The host waits only where the copy goes to the CPU, where nothing else would.

    From GPU to GPU torch has the copy wait for both current streams and both for the copy; pinned memory is not used
    again before the copy out of it is done.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":
        # What is expanded cannot be pinned.
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")

"""Block-wise dependency: how far a block's contribution turns when an earlier block is removed (FFN Fusion, sec. 3).

The model may be dealt over processes (:mod:`puzzle.slices`). A slice measures the columns of its own blocks: runs that
lack a block of an earlier slice arrive from there, in rising order of the removed block, and it starts those that lack
one of its own. Replicas share the sequences.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill.config import require
from distill.distributed import gather_objects, is_main
from distill.engine.base import compile_blocks
from fusion.config import Average
from puzzle.blockwise import precision
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.slices import ParentSlice

JSON_NAME = "dependency.json"
MATRIX_NAME = "dependency.npy"


@dataclass(frozen=True, kw_only=True)
class Dependency:
    """Dependency between the blocks of one model. h(X) = f(X) - X is what block f adds to its input X."""

    matrix: Tensor
    """[num_blocks, num_blocks], fp64: cosine distance of block j's contribution in the full model to the one it makes
    when block i is removed, row i, column j. NaN where nothing is measured: j <= i, or either block is an identity."""
    direction_change: Tensor
    """[num_blocks], fp64: cosine distance of X to f(X) (section 5.5)."""
    contribution_ratio: Tensor
    """[num_blocks], fp64: ||h(X)|| / ||X|| (section 5.5)."""
    num_tokens: int
    average: Average = "token"
    """What all figures are means over, as in DependencyConfig."""

    def rows(self) -> list[list[float | None]]:
        """The matrix as JSON holds it, with null for NaN."""
        return [[None if math.isnan(value) else value for value in row] for row in self.matrix.tolist()]

    def save(self, directory: Path) -> None:
        """Write ``dependency.json`` (matrix, per-block figures, what they are means of) and ``dependency.npy`` (the
        matrix)."""
        per_block = zip(self.direction_change.tolist(), self.contribution_ratio.tolist(), strict=True)
        content: dict[str, Any] = {
            "matrix": self.rows(),
            "blocks": [{"direction_change": change, "contribution_ratio": ratio} for change, ratio in per_block],
            "num_tokens": self.num_tokens,
            "average": self.average,
        }
        (directory / JSON_NAME).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        np.save(directory / MATRIX_NAME, self.matrix.numpy(), allow_pickle=False)


def measure_dependency(
    parent: ParentSlice, sequences: Tensor, *, batch_size: int, average: Average = "token", compile: bool = False
) -> Dependency:
    """Measure the dependency matrix of a model, on the device that it is on.

    Every process of :func:`distill.distributed.together` has to call it, and all get the same result. A process keeps
    the hidden states before and after each of its own blocks for one batch ([batch, seq, hidden] fp32), nothing more.
    A run without block i starts from the kept input of block i at block i + 1, so that n blocks cost n (n - 1) / 2
    block forwards per batch. On a GPU the host waits once, at the end.

    Args:
        parent: the model, or this process's slice of it, in fp32: distances below 1e-3 are what is looked for.
        sequences: token ids [num_sequences, seq], the same on every process.
        batch_size: sequences per forward.
        average: see DependencyConfig.
        compile: run the blocks through torch.compile. Compiles those of ``parent`` in place.

    Raises:
        ValueError: a figure is not finite.
    """
    if compile:
        compile_blocks(parent.model)
    share = sequences[parent.replica :: parent.num_replicas].to(parent.device)
    batches = [batch for batch in share.split(batch_size) if len(batch) > 0]
    sums = DependencySums(parent, average=average)
    num_removals = len(batches) * len(sums.removals)
    with tqdm(total=num_removals, desc="dependency", unit="removal", leave=False, disable=not is_main()) as progress:
        for batch in batches:
            sums.add(batch, on_removal=progress.update)
    return sums.result(num_sequences=sequences.shape[0], seq_len=sequences.shape[1])


def active_blocks(model: DeciLMForCausalLM) -> list[int]:
    """Blocks of the whole model that are not identities, also where ``model`` holds a slice of it."""
    entries = enumerate(model.config.block_configs)
    return [index for index, entry in entries if not (entry.attention.no_op and entry.ffn.no_op)]


class DependencySums:
    """Sums over the batches that were seen of what a :class:`Dependency` holds means of, on the slice's device."""

    def __init__(self, parent: ParentSlice, *, average: Average) -> None:
        self._parent = parent
        self._average = average
        self._active = active_blocks(parent.model)
        self.removals = [index for index in self._active if index < parent.blocks.stop]
        """Blocks whose removal changes what this slice computes or hands on."""
        sums = torch.zeros(parent.num_blocks + 2, parent.num_blocks, dtype=torch.float64, device=parent.device)
        self._distances, self._direction_changes, self._ratios = sums[:-2], sums[-2], sums[-1]
        self._sums = sums

    @torch.no_grad()
    def add(self, input_ids: Tensor, *, on_removal: Callable[[], object] = lambda: None) -> None:
        """Measure ``input_ids`` [batch, seq], which all processes of a replica must give in the same order.

        The host never waits for a GPU.

        Args:
            on_removal: called after every removed block.
        """
        with precision(self._parent.model):
            states, attention_inputs = self._full_run(input_ids)
            self._add_block_figures(states)
            for removed in self.removals:
                self._add_row(removed, states, attention_inputs)
                on_removal()

    def result(self, *, num_sequences: int, seq_len: int) -> Dependency:
        """The means over the sequences of all replicas, the same on every process."""
        distances, changes, ratios = self._gathered()
        _require_finite(distances, changes, ratios)
        measured = torch.zeros_like(distances, dtype=torch.bool)
        for place, index in enumerate(self._active):
            measured[index, self._active[place + 1 :]] = True
        num_vectors = num_sequences * (seq_len if self._average == "token" else 1)
        return Dependency(
            matrix=(distances / num_vectors).clamp_min(0).where(measured, math.nan),
            direction_change=(changes / num_vectors).clamp_min(0),
            contribution_ratio=ratios / num_vectors,
            num_tokens=num_sequences * seq_len,
            average=self._average,
        )

    def _full_run(self, input_ids: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        """Input of every own block and the output of the last, each [batch, seq, hidden], and what attention reads."""
        hidden, attention_inputs = self._parent.enter(input_ids)
        states = [hidden]
        for _, block in self._parent.own_blocks():
            states.append(block(states[-1], **attention_inputs))
        self._parent.leave(states[-1])
        return states, attention_inputs

    def _add_block_figures(self, states: list[Tensor]) -> None:
        for index, (before, after) in zip(self._parent.blocks, itertools.pairwise(states), strict=True):
            self._direction_changes[index].add_(self._distance(after, before))
            self._ratios[index].add_((self._norms(after - before) / self._norms(before)).sum())

    def _add_row(self, removed: int, states: list[Tensor], attention_inputs: Mapping[str, Any]) -> None:
        """The run without block ``removed``, through the own blocks behind it, and on to the next slice."""
        own = self._parent.blocks
        start = max(removed + 1, own.start)
        hidden = states[removed - own.start] if removed in own else self._parent.receive(states[0].shape)
        for index in range(start, own.stop):
            if index not in self._active:
                continue
            output = self._parent.block(index)(hidden, **attention_inputs)
            before, after = states[index - own.start], states[index - own.start + 1]
            self._distances[removed, index].add_(self._distance(output - hidden, after - before))
            hidden = output
        self._parent.leave(hidden)

    def _distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Sum of 1 - cos over tokens or sequences of hidden [batch, seq, hidden], in fp64: in fp32 it has a noise of
        1e-7, and weakly dependent blocks are not far above. Two vectors of zeros do not differ: their distance is 0."""
        first, second = self._vectors(first).double(), self._vectors(second).double()
        norms = torch.linalg.vector_norm(first, dim=-1), torch.linalg.vector_norm(second, dim=-1)
        cosines = (first * second).sum(-1) / (norms[0] * norms[1]).clamp_min(torch.finfo(torch.float64).tiny)
        return (1 - cosines).where(norms[0] + norms[1] != 0, 0).sum()

    def _norms(self, hidden: Tensor) -> Tensor:
        """Of every token or sequence of hidden [batch, seq, hidden], fp64."""
        return torch.linalg.vector_norm(self._vectors(hidden), dim=-1, dtype=torch.float64)

    def _vectors(self, hidden: Tensor) -> Tensor:
        """What has one direction: a token of hidden [batch, seq, hidden], or all tokens of a sequence together."""
        return hidden if self._average == "token" else hidden.flatten(1)

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """All sums over all slices and replicas, on the CPU; columns of other slices are zero here."""
        own = self._sums.cpu()
        is_alone = self._parent.num_slices * self._parent.num_replicas == 1
        total = torch.stack([own] if is_alone else gather_objects(own)).sum(0)
        return total[:-2], total[-2], total[-1]


def _require_finite(distances: Tensor, direction_changes: Tensor, ratios: Tensor) -> None:
    """Figures that are not finite would be taken for figures that are not measured."""
    bad = ~(distances.isfinite().all(0) & direction_changes.isfinite() & ratios.isfinite())
    first = next(iter(bad.nonzero().flatten().tolist()), None)
    require(
        first is None,
        f"dependency: what block {first} reads or adds is not finite, or a token that it reads is all zeros; check the "
        "model's weights (stage evaluate gives its LM loss) and the embeddings of the calibration tokens",
    )

"""Block-wise dependency: how far a block's contribution turns when an earlier block is removed (FFN Fusion, sec. 3)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import LongTensor, Tensor
from tqdm.auto import tqdm

from distill.losses import hidden_cosine
from puzzle.model.modeling_decilm import DeciLMForCausalLM

JSON_NAME = "dependency.json"
MATRIX_NAME = "dependency.npy"


@dataclass(frozen=True, kw_only=True)
class Dependency:
    """Dependency between the blocks of one model, averaged over tokens. h(X) = f(X) - X is what block f adds."""

    matrix: Tensor
    """[num_blocks, num_blocks], fp64: cosine distance of block j's contribution in the full model to the one it makes
    when block i is removed, row i, column j. NaN where nothing is measured: j <= i, or either block is an identity."""
    direction_change: Tensor
    """[num_blocks], fp64: cosine distance of X to f(X) (section 5.5)."""
    contribution_ratio: Tensor
    """[num_blocks], fp64: ||h(X)|| / ||X|| (section 5.5)."""
    num_tokens: int

    def rows(self) -> list[list[float | None]]:
        """The matrix as JSON holds it, with null for NaN."""
        return [[None if math.isnan(value) else value for value in row] for row in self.matrix.tolist()]

    def save(self, directory: Path) -> None:
        """Write ``dependency.json`` (matrix, per-block figures, num_tokens) and ``dependency.npy`` (the matrix)."""
        per_block = zip(self.direction_change.tolist(), self.contribution_ratio.tolist(), strict=True)
        content: dict[str, Any] = {
            "matrix": self.rows(),
            "blocks": [{"direction_change": change, "contribution_ratio": ratio} for change, ratio in per_block],
            "num_tokens": self.num_tokens,
        }
        (directory / JSON_NAME).write_text(json.dumps(content, indent=1) + "\n")
        np.save(directory / MATRIX_NAME, self.matrix.numpy(), allow_pickle=False)


@torch.inference_mode()
def measure_dependency(model: DeciLMForCausalLM, sequences: LongTensor, *, batch_size: int) -> Dependency:
    """Measure the dependency matrix of ``model``, in the data type and on the device that it has.

    The hidden states of the full run are kept for one batch (num_blocks + 1 tensors [batch, seq, hidden]). The run
    without block i starts from the kept input of block i at block i + 1, so nothing before it is computed twice.

    Args:
        model: in fp32; distances below 1e-3 are what is looked for.
        sequences: [num_sequences, seq_len] token ids.
        batch_size: sequences per forward.
    """
    blocks = model.model.layers
    active = [index for index, block in enumerate(blocks) if block.has_attention or block.has_ffn]
    matrix = torch.full((len(blocks), len(blocks)), math.nan, dtype=torch.float64, device=model.device)
    matrix[active] = 0.0
    direction_change, contribution_ratio = torch.zeros(2, len(blocks), dtype=torch.float64, device=model.device)
    batches = sequences.split(batch_size)
    with tqdm(total=len(batches) * len(active), desc="dependency", unit="removal", leave=False) as progress:
        for batch in batches:
            weight = batch.shape[0] / sequences.shape[0]
            states, attention_inputs = _full_run(model, batch.to(model.device))
            for index in range(len(blocks)):
                before, after = states[index], states[index + 1]
                direction_change[index] += weight * _cosine_distance(after, before)
                contribution_ratio[index] += weight * ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean()
            for removed in active:
                matrix[removed] += weight * _distances_without(model, states, attention_inputs, removed)
                progress.update()
    return Dependency(
        matrix=matrix.clamp_min(0).cpu(),
        direction_change=direction_change.clamp_min(0).cpu(),
        contribution_ratio=contribution_ratio.cpu(),
        num_tokens=sequences.numel(),
    )


def _full_run(model: DeciLMForCausalLM, input_ids: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """Input of every block and the output of the last, each [batch, seq, hidden], and what every attention reads."""
    hidden = model.model.embed(input_ids)
    attention_inputs = model.model.attention_inputs(hidden)
    states = [hidden]
    for block in model.model.layers:
        states.append(block(states[-1], **attention_inputs))
    return states, attention_inputs


def _distances_without(
    model: DeciLMForCausalLM, states: list[Tensor], attention_inputs: dict[str, Any], removed: int
) -> Tensor:
    """Row ``removed`` of the matrix on one batch, [num_blocks], NaN where nothing is measured."""
    row = torch.full((len(model.model.layers),), math.nan, dtype=torch.float64, device=model.device)
    hidden = states[removed]
    for index, block in enumerate(model.model.layers[removed + 1 :], start=removed + 1):
        if not (block.has_attention or block.has_ffn):
            continue
        output = block(hidden, **attention_inputs)
        row[index] = _cosine_distance(output - hidden, states[index + 1] - states[index])
        hidden = output
    return row


def _cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean over tokens, in fp64: in fp32 1 - cos has a noise of 1e-7, and weakly dependent blocks are not far above."""
    return hidden_cosine(first.double(), second.double())

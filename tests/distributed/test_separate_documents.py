"""Documents kept apart where sequences are shared by several ranks, against one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from distill.data.batch import Batch
from distill.data.dataset import documents_apart
from distill.distributed import join, leave, rank, together
from distill.forward import forward_inputs
from distill.sequence_parallel import use_ulysses
from puzzle.model.checkpoint import load_model
from tests.distributed.conftest import RunInProcesses

EOS = 0


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 320, (2, 32), generator=generator)
    # One document crosses the border between the two parts, and one begins on it.
    tokens[0, [4, 20]] = EOS
    tokens[1, [15, 16, 30]] = EOS
    return documents_apart(Batch.of(tokens), EOS)


def _hidden_and_gradient(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    hidden = model.model(batch.input_ids, use_cache=False, **forward_inputs(batch, model)).last_hidden_state
    # A loss that weighs every position differently.
    (hidden * (batch.position_ids[..., None] + 1) * hidden.detach().sin()).sum().backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad
    assert gradient is not None
    return hidden.detach(), gradient


def _own_part(parent_dir: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    join()
    with together():
        model = load_model(parent_dir, dtype=torch.float32)
        group = distributed.group.WORLD
        assert group is not None
        use_ulysses(model, group)
        hidden, gradient = _hidden_and_gradient(model, _batch().sequence_part(rank(), 2))
        distributed.all_reduce(gradient)
    leave()
    # Tensors would be shared with a process that is gone.
    return hidden.numpy(), gradient.numpy()


def test_parts_of_sequences_keep_documents_apart(run_in_processes: RunInProcesses, pico_parent_dir: Path) -> None:
    parts = run_in_processes(2, _own_part, pico_parent_dir)
    hidden, gradient = _hidden_and_gradient(load_model(pico_parent_dir, dtype=torch.float32), _batch())
    # fp32; the two differ in the order of their sums.
    found = np.concatenate([part[0] for part in parts], axis=1)
    np.testing.assert_allclose(found, hidden.numpy(), atol=1e-4, rtol=1e-4)
    for part in parts:
        np.testing.assert_allclose(part[1], gradient.numpy(), atol=1e-3, rtol=1e-3)

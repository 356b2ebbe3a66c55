from __future__ import annotations

import copy
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fusion.dependency import measure_dependency
from puzzle.model.checkpoint import load_model

A = (2, 256)
FFN = (None, 256)
NO_FFN = (2, None)
IDENTITY = (None, None)
SEQUENCES = torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(0))


def contributions(model, input_ids):
    """[h_j(X)] of every block, through the model's own forward."""
    outputs = []

    def record(_, args, output):
        outputs.append(output - args[0])

    hooks = [block.register_forward_hook(record) for block in model.model.layers]
    model.model(input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


def brute_force(model, input_ids):
    """The definition: delete block i from the model, run the whole model again, compare what every later block adds."""
    full = contributions(model, input_ids)
    matrix = torch.full((len(full), len(full)), math.nan, dtype=torch.float64)
    for i in range(len(full)):
        without = copy.deepcopy(model)
        del without.model.layers[i]
        for j, contribution in enumerate(contributions(without, input_ids)[i:], start=i + 1):
            matrix[i, j] = (1 - torch.cosine_similarity(full[j].double(), contribution.double(), dim=-1)).mean()
    return matrix


@pytest.mark.parametrize("batch_size", [2, 5])
@torch.inference_mode()
def test_matrix_equals_the_definition(tmp_path, make_checkpoint, batch_size):
    make_checkpoint(tmp_path / "model", A, FFN, NO_FFN, FFN, FFN, A)
    model = load_model(tmp_path / "model", dtype=torch.float32)
    dependency = measure_dependency(model, SEQUENCES, batch_size=batch_size)
    # fp32 models that batch differently: distances of order 0.1 agree to rounding.
    torch.testing.assert_close(dependency.matrix, brute_force(model, SEQUENCES), rtol=1e-4, atol=1e-6, equal_nan=True)
    assert dependency.matrix.dtype == torch.float64
    assert dependency.num_tokens == 60


@torch.inference_mode()
def test_direction_change_and_contribution_ratio(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model", A, FFN, IDENTITY, FFN)
    model = load_model(tmp_path / "model", dtype=torch.float32)
    dependency = measure_dependency(model, SEQUENCES, batch_size=2)
    states = [model.model.embed(SEQUENCES)]
    for contribution in contributions(model, SEQUENCES):
        states.append(states[-1] + contribution)
    change = [(1 - torch.cosine_similarity(x, y, dim=-1)).mean().item() for x, y in pairwise(states)]
    ratio = [((y - x).norm(dim=-1) / x.norm(dim=-1)).mean().item() for x, y in pairwise(states)]
    assert dependency.direction_change.tolist() == pytest.approx(change, rel=1e-3, abs=1e-6)
    assert dependency.contribution_ratio.tolist() == pytest.approx(ratio, rel=1e-4)
    assert dependency.contribution_ratio[2] == 0


def test_identity_blocks_are_skipped(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model", A, FFN, IDENTITY, FFN)
    matrix = measure_dependency(load_model(tmp_path / "model"), SEQUENCES, batch_size=5).matrix
    measured = [(i, j) for i in range(4) for j in range(4) if not math.isnan(matrix[i, j])]
    assert measured == [(0, 1), (0, 3), (1, 3)]


def test_block_that_adds_nothing_is_not_depended_on(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model", A, FFN, FFN, FFN)
    model = load_model(tmp_path / "model")
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    matrix = measure_dependency(model, SEQUENCES, batch_size=5).matrix
    assert matrix[1, 2:].tolist() == [0, 0]
    assert matrix[0, 3] > 1e-3


def test_files(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model", A, FFN, FFN)
    dependency = measure_dependency(load_model(tmp_path / "model"), SEQUENCES, batch_size=4)
    dependency.save(tmp_path)
    content = json.loads((tmp_path / "dependency.json").read_text())
    assert content["num_tokens"] == 60
    assert content["matrix"][0][0] is None
    assert content["matrix"][1][2] == dependency.matrix[1, 2].item()
    assert [set(block) for block in content["blocks"]] == [{"direction_change", "contribution_ratio"}] * 3
    np.testing.assert_array_equal(np.load(tmp_path / "dependency.npy", allow_pickle=False), dependency.matrix.numpy())

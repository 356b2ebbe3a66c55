from __future__ import annotations

import pytest
import torch

from distill.data.batch import Batch

CPU = torch.device("cpu")
AWAY = torch.device("meta")
"""A device without values in place of a GPU: nothing can be copied back from it."""
TENSORS = ("input_ids", "labels", "position_ids", "sequence_ids")


@pytest.fixture
def batch() -> Batch:
    return Batch.of(torch.arange(24).reshape(4, 6))


def assert_equal(found: Batch, expected: Batch) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_a_batch_that_is_there_is_not_moved(batch: Batch) -> None:
    assert batch.to(CPU) is batch


def test_the_way_back_to_the_host_is_no_copy(batch: Batch) -> None:
    away = batch.to(AWAY)
    assert away.input_ids.device == away.labels.device == away.position_ids.device == AWAY
    assert away.sequence_ids is batch.sequence_ids
    assert away.to(CPU) is batch


def test_parts_of_a_moved_batch_have_theirs_on_the_host(batch: Batch) -> None:
    away = batch.to(AWAY)
    assert_equal(away.rows(1, 3).to(CPU), batch.rows(1, 3))
    assert_equal(list(away.split(3))[1].to(CPU), batch.rows(3, 4))
    assert_equal(away.sequence_part(1, 2).to(CPU), batch.sequence_part(1, 2))


def test_selected_sequences_are_copies(batch: Batch) -> None:
    chosen = batch.select(torch.tensor([3, 0, 3]))
    assert chosen.input_ids[:, 0].tolist() == [18, 0, 18]
    assert chosen.sequence_ids.tolist() == [3, 0, 3]
    chosen.labels.zero_()
    assert batch.labels[3, 0] == 19


@pytest.mark.gpu
def test_to_a_gpu_and_back(batch: Batch) -> None:
    away = batch.to(torch.device("cuda", 0))
    assert away.to(torch.device("cuda", 0)) is away
    assert torch.equal(away.labels.cpu(), batch.labels)
    assert away.rows(0, 2).to(CPU).input_ids.device == CPU

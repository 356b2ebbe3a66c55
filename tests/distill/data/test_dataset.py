from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data.dataset import Batches, TokenDataset, TokenSplit


def _split(num_tokens: int) -> TokenSplit:
    return TokenSplit(name="train", tokens=np.arange(num_tokens, dtype=np.uint16))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, size in (("train", 103), ("validation", 40), ("calibration", 24)):
        np.save(tmp_path / f"{name}.npy", np.arange(size, dtype=np.uint16))
    summary = {"vocab_size": 128, "eos_token_id": 0, "tokenizer_sha256": "abc", "unigram_entropy_nats": 4.5}
    (tmp_path / "data.json").write_text(json.dumps(summary))
    return tmp_path


def test_open(directory: Path) -> None:
    dataset = TokenDataset.open(directory)
    assert (dataset.vocab_size, dataset.tokenizer_sha256, dataset.unigram_entropy) == (128, "abc", 4.5)
    assert [dataset.split(name).num_tokens for name in ("train", "validation", "calibration")] == [103, 40, 24]
    with pytest.raises(ValueError, match="is no data directory"):
        TokenDataset.open(directory / "elsewhere")


def test_sequences_lie_side_by_side() -> None:
    split = _split(103)
    assert split.num_sequences(10) == 10
    rows = split.sequences(10, [3, 0])
    assert rows.dtype == torch.int64
    assert rows.tolist() == [list(range(30, 40)), list(range(10))]


def test_first_names_both_numbers_when_short() -> None:
    assert _split(103).first(2, 10).tolist() == [list(range(10)), list(range(10, 20))]
    message = r"11 sequences of 10 tokens asked of the train split, which has 10 \(103 tokens\)"
    with pytest.raises(ValueError, match=message):
        _split(103).first(11, 10)


def test_large_token_ids_survive() -> None:
    split = TokenSplit(name="train", tokens=np.array([70_000, 2**31], dtype=np.uint32))
    assert split.first(1, 2).tolist() == [[70_000, 2**31]]


def test_batch_is_a_pure_function_of_the_step() -> None:
    forward = Batches(_split(103), seq_len=10, batch_size=3, seed=7)
    in_order = [forward.batch(step) for step in range(20)]
    fresh = Batches(_split(103), seq_len=10, batch_size=3, seed=7)
    for step in (19, 0, 5, 5, 12):
        assert torch.equal(fresh.batch(step), in_order[step])
    other_seed = Batches(_split(103), seq_len=10, batch_size=3, seed=8)
    assert not all(torch.equal(other_seed.batch(step), in_order[step]) for step in range(5))


def test_every_epoch_sees_every_sequence_once_in_another_order() -> None:
    batches = Batches(_split(103), seq_len=10, batch_size=3, seed=0)
    firsts = [int(row[0]) for step in range(10) for row in batches.batch(step)]
    epochs = [firsts[start : start + 10] for start in range(0, 30, 10)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(0, 100, 10))
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_larger_than_an_epoch_repeats() -> None:
    assert Batches(_split(25), seq_len=10, batch_size=5, seed=0).batch(0).shape == (5, 10)


def test_split_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_len=200 is longer than the train split of 103 tokens"):
        Batches(_split(103), seq_len=200, batch_size=1, seed=0)

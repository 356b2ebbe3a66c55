from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data.batch import IGNORE_INDEX, Batch
from distill.data.dataset import Batches, TokenDataset, TokenSplit, documents_apart


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


def _told(describe_step: str) -> list[tuple[int, int]]:
    """First and last token of each sequence that is named."""
    _, _, spans = describe_step.partition(": tokens ")
    return [(int(first), int(last)) for first, last in (span.split("-") for span in spans.split(", "))]


@pytest.mark.parametrize("used_tokens", [0, 23])
def test_the_text_of_a_step_is_found_where_it_is_said_to_stand(directory: Path, used_tokens: int) -> None:
    split = TokenDataset.open(directory).split("train").beyond(used_tokens)
    batches = Batches(split, seq_len=10, batch_size=3, seed=7)
    stored = np.load(directory / "train.npy")
    for step in (9, 0, 4):  # step 2 or 3 spans the end of an epoch
        whole = batches.batch(step)
        said = batches.describe_step(step)
        rows = [stored[first : last + 1].tolist() for first, last in _told(said)]
        assert rows == whole.input_ids.tolist()
        counted = ", counted from token 23 on," if used_tokens else ""
        numbers = ", ".join(map(str, whole.sequence_ids.tolist()))
        assert said.startswith(f"sequences {numbers} of 10 tokens{counted} of {directory / 'train.npy'}: tokens ")


def test_of_many_sequences_the_first_are_named() -> None:
    batches = Batches(_split(403), seq_len=10, batch_size=30, seed=7)
    said = batches.describe_step(1)
    assert len(_told(said)) == 8
    assert " and 22 more of 10 tokens of train: tokens " in said
    assert [first for first, _ in _told(said)] == batches.batch(1).input_ids[:8, 0].tolist()


def test_batch_is_a_pure_function_of_the_step() -> None:
    forward = Batches(_split(103), seq_len=10, batch_size=3, seed=7)
    in_order = [forward.batch(step).input_ids for step in range(20)]
    fresh = Batches(_split(103), seq_len=10, batch_size=3, seed=7)
    for step in (19, 0, 5, 5, 12):
        assert torch.equal(fresh.batch(step).input_ids, in_order[step])
    other_seed = Batches(_split(103), seq_len=10, batch_size=3, seed=8)
    assert not all(torch.equal(other_seed.batch(step).input_ids, in_order[step]) for step in range(5))


def test_every_epoch_sees_every_sequence_once_in_another_order() -> None:
    batches = Batches(_split(103), seq_len=10, batch_size=3, seed=0)
    firsts = [int(row[0]) for step in range(10) for row in batches.batch(step).input_ids]
    epochs = [firsts[start : start + 10] for start in range(0, 30, 10)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(0, 100, 10))
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_larger_than_an_epoch_repeats() -> None:
    assert Batches(_split(25), seq_len=10, batch_size=5, seed=0).batch(0).input_ids.shape == (5, 10)


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_the_ranks_together_see_what_one_process_sees(num_ranks: int) -> None:
    settings = {"seq_len": 10, "batch_size": 6, "seed": 3, "separate_documents": True, "eos_token_id": 44}
    alone = Batches(_split(103), **settings)
    for step in (4, 0, 1):
        whole = alone.batch(step)
        # Each rank has a source of its own, as in a run that was resumed with more processes.
        shares = [Batches(_split(103), **settings).batch(step, rank, num_ranks) for rank in range(num_ranks)]
        for name in ("input_ids", "labels", "position_ids", "sequence_ids"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))


def test_sequences_are_numbered_as_in_their_split() -> None:
    split = _split(103)
    batch = Batches(split, seq_len=10, batch_size=4, seed=0).batch(1)
    assert torch.equal(split.sequences(10, batch.sequence_ids.tolist()), batch.input_ids)
    assert batch.labels[:, :-1].equal(batch.input_ids[:, 1:])
    assert batch.labels[:, -1].eq(IGNORE_INDEX).all()
    assert batch.position_ids.tolist() == [list(range(10))] * 4
    assert not batch.separate_documents


def test_batches_of_the_first_sequences_alone() -> None:
    batches = Batches(_split(103), seq_len=10, batch_size=2, seed=0, num_sequences=4)
    assert batches.num_sequences == 4
    assert sorted(i for step in (0, 1) for i in batches.batch(step).sequence_ids.tolist()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="11 sequences of 10 tokens asked of the train split, which has 10"):
        Batches(_split(103), seq_len=10, batch_size=2, seed=0, num_sequences=11)


def test_documents_apart() -> None:
    eos, ignored = 9, IGNORE_INDEX
    batch = documents_apart(Batch.of(torch.tensor([[1, 2, 9, 3, 9, 9, 4, 5], [9, 1, 2, 3, 4, 5, 6, 9]])), eos)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    # The end-of-text token is predicted, and predicts nothing: neither does the end of the sequence.
    assert batch.labels.tolist() == [
        [2, 9, ignored, 9, ignored, ignored, 5, ignored],
        [ignored, 2, 3, 4, 5, 6, 9, ignored],
    ]
    assert batch.separate_documents
    assert int(batch.num_targets()) == 10


def test_split_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_len=200 is longer than the train split of 103 tokens"):
        Batches(_split(103), seq_len=200, batch_size=1, seed=0)

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from distill.config import DataConfig, EvaluateConfig, SourceConfig
from distill.data.dataset import TokenDataset
from distill.data.packing import pack, training_texts
from distill.data.tokenizer import load_tokenizer, train_tokenizer
from distill.retrieval import (
    LENGTH_COLUMNS,
    NUM_CANDIDATES,
    SINGLE,
    TASKS,
    RetrievalTask,
    make_needles,
    make_probe,
    retrieval_accuracy,
)

LENGTH = 128
LONG = 256
"""Room for four needles in the tokens of the small vocabulary."""
MULTI_KEY, MULTI_VALUE = TASKS[1:]
WHOLE_KEY = 12
"""Tokens at the end of a cue that hold its key."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    directory = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randrange(3, 8))) for _ in range(60)]
    rows = [" ".join(rng.choices(words, k=40)) for _ in range(200)]
    (directory / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    data = DataConfig(
        sources=(SourceConfig(kind="text", path=str(directory / "rows.jsonl")),),
        train_tokens=3000,
        validation_tokens=600,
        calibration_tokens=100,
        tokenizer="train",
        vocab_size=500,
    )
    train_tokenizer(training_texts(data, seed=0), data.vocab_size, directory)
    pack(data, directory, seed=0)
    return TokenDataset.open(directory)


class CopyingModel(nn.Module):
    """Hand-made induction: expects what followed the last ``num_places`` earlier places with the same ``num_matched``
    final tokens."""

    def __init__(self, vocab_size: int, num_matched: int, num_places: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self._num_places = num_places
        self.head = nn.Embedding.from_pretrained(torch.eye(vocab_size))
        self._num_matched = num_matched

    def get_output_embeddings(self) -> nn.Embedding:
        return self.head

    def model(self, input_ids: Tensor, *, use_cache: bool, **_: object) -> SimpleNamespace:
        hidden = torch.zeros(*input_ids.shape, self.head.num_embeddings)
        for row, ids in enumerate(input_ids.tolist()):
            pattern = ids[-self._num_matched :]
            ends = range(len(ids) - 1, self._num_matched - 1, -1)
            matches = [end for end in ends if ids[end - self._num_matched : end] == pattern]
            for end in matches[: self._num_places]:
                hidden[row, -1, ids[end]] = 1.0
        return SimpleNamespace(last_hidden_state=hidden)


class ContextFreeModel(CopyingModel):
    """Prefers tokens in a fixed random order, whatever stands before."""

    def model(self, input_ids: Tensor, *, use_cache: bool, **_: object) -> SimpleNamespace:
        scores = torch.randn(self.head.num_embeddings, generator=torch.Generator().manual_seed(0))
        return SimpleNamespace(last_hidden_state=scores.expand(*input_ids.shape, -1))


def test_questions_hold_the_needle_at_every_depth(dataset: TokenDataset) -> None:
    needles = make_needles(dataset, length=LENGTH, num_needles=9, seed=0)
    assert needles.input_ids.shape == (9, LENGTH)
    assert needles.candidates.shape == (9, NUM_CANDIDATES)
    tokenizer = load_tokenizer(dataset.directory)
    starts = []
    for ids, candidates in zip(needles.input_ids.tolist(), needles.candidates.tolist(), strict=True):
        assert len(set(candidates)) == NUM_CANDIDATES
        text = tokenizer.decode(ids)
        cue = text[text.rindex("\nThe secret word of") :]
        value = tokenizer.decode([candidates[0]])
        assert text.count(cue) == 2
        assert f"{cue}{value}.\n" in text
        starts.append(text.index(cue) / len(text))
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert starts[-1] > 0.4  # the needle, then the question, are all that stands behind the deepest place


@pytest.mark.parametrize("task", [MULTI_KEY, MULTI_VALUE], ids=lambda task: task.name)
def test_every_needle_stands_in_the_text(dataset: TokenDataset, task: RetrievalTask) -> None:
    needles = make_needles(dataset, length=LONG, num_needles=6, seed=0, task=task)
    assert needles.input_ids.shape == (6, LONG)
    assert needles.candidates.shape == (6, task.values_per_key + NUM_CANDIDATES - 1)
    assert needles.num_true == task.values_per_key
    tokenizer = load_tokenizer(dataset.directory)
    for ids, candidates in zip(needles.input_ids.tolist(), needles.candidates.tolist(), strict=True):
        text = tokenizer.decode(ids)
        assert text.count("\nThe secret word of") == task.num_needles + 1
        cue = text[text.rindex("\nThe secret word of") :]
        values = [tokenizer.decode([candidate]) for candidate in candidates]
        own = [f"{cue}{value}.\n" in text for value in values]
        assert own == [True] * task.values_per_key + [False] * (NUM_CANDIDATES - 1)
        hidden = [f" is{value}.\n" in text for value in values]
        assert hidden == [index < task.num_needles for index in range(len(values))]


def test_other_keys_distract_a_model_that_does_not_read_the_key(dataset: TokenDataset) -> None:
    vocab_size = dataset.vocab_size
    needles = make_needles(dataset, length=LONG, num_needles=40, seed=0, task=MULTI_KEY)
    careful = retrieval_accuracy(CopyingModel(vocab_size, WHOLE_KEY), needles, batch_size=20)
    assert careful == {"accuracy_frac": 1.0, "chance_frac": 1 / NUM_CANDIDATES}
    # It takes the last of four needles, which is the asked one in a quarter of the questions: four standard errors of
    # 40 draws are 0.27.
    careless = CopyingModel(vocab_size, num_matched=2)
    assert abs(retrieval_accuracy(careless, needles, batch_size=20)["accuracy_frac"] - 0.25) < 0.27
    single = make_needles(dataset, length=LONG, num_needles=40, seed=0, task=SINGLE)
    assert retrieval_accuracy(careless, single, batch_size=20)["accuracy_frac"] == 1.0


def test_every_value_of_a_key_counts(dataset: TokenDataset) -> None:
    needles = make_needles(dataset, length=LONG, num_needles=8, seed=0, task=MULTI_VALUE)
    for num_places in (1, 3, 4):
        model = CopyingModel(dataset.vocab_size, WHOLE_KEY, num_places)
        assert retrieval_accuracy(model, needles, batch_size=8)["accuracy_frac"] == num_places / 4


def test_questions_depend_on_the_seed(dataset: TokenDataset) -> None:
    first, again, other = (make_needles(dataset, length=LENGTH, num_needles=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.candidates, again.candidates)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_a_model_that_copies_finds_everything(dataset: TokenDataset) -> None:
    needles = make_needles(dataset, length=LENGTH, num_needles=20, seed=0)
    model = CopyingModel(dataset.vocab_size, num_matched=6)
    # 20 questions in batches of 8: the last batch is short.
    assert retrieval_accuracy(model, needles, batch_size=8) == {"accuracy_frac": 1.0, "chance_frac": 1 / NUM_CANDIDATES}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_model_without_context_is_at_chance(dataset: TokenDataset, task: RetrievalTask) -> None:
    needles = make_needles(dataset, length=LONG, num_needles=400, seed=0, task=task)
    accuracy = retrieval_accuracy(ContextFreeModel(dataset.vocab_size, 1), needles, batch_size=100)["accuracy_frac"]
    # 400 questions at 1/16: four standard errors are 0.048, and less with several values to each.
    assert abs(accuracy - 1 / NUM_CANDIDATES) < 0.048


def test_equal_scores_count_as_wrong(dataset: TokenDataset) -> None:
    needles = make_needles(dataset, length=LENGTH, num_needles=4, seed=0)
    blind = CopyingModel(dataset.vocab_size, num_matched=LENGTH)
    assert retrieval_accuracy(blind, needles, batch_size=4)["accuracy_frac"] == 0.0


def test_lengths_that_cannot_be_asked_are_refused(dataset: TokenDataset) -> None:
    with pytest.raises(
        ValueError, match=r"evaluate\.lengths has 20, and a retrieval question \(single\) alone takes \d+"
    ):
        make_needles(dataset, length=20, num_needles=1, seed=0)
    with pytest.raises(ValueError, match=r"the data has 600; raise data\.validation_tokens or lower evaluate\.lengths"):
        make_needles(dataset, length=1024, num_needles=1, seed=0)


def test_a_probe_spends_the_tokens_of_the_main_evaluation_at_its_own_length(dataset: TokenDataset) -> None:
    config = EvaluateConfig(seq_len=64, num_sequences=8, batch_size=8, num_needles=5)
    probe = make_probe(dataset, config, length=LONG, seed=0)
    assert probe.sequences.shape == (2, LONG)
    assert probe.batch_size == 2
    measured = probe.measure(ContextFreeModel(dataset.vocab_size, 1), chunk_tokens=50)
    assert tuple(measured) == LENGTH_COLUMNS
    assert all(0 <= measured[task.column] <= 1 for task in TASKS)
    # Untrained: no better than a uniform guess over the vocabulary.
    assert measured["lm_loss"] > math.log(dataset.vocab_size)
    with pytest.raises(ValueError, match=r"1 sequences of 1024 tokens asked of the validation split"):
        make_probe(dataset, config, length=1024, seed=0)


def test_a_length_without_room_for_several_needles_leaves_their_columns_empty(dataset: TokenDataset) -> None:
    config = EvaluateConfig(seq_len=64, num_sequences=2, batch_size=2, num_needles=4)
    probe = make_probe(dataset, config, length=64, seed=0)
    measured = probe.measure(CopyingModel(dataset.vocab_size, WHOLE_KEY), chunk_tokens=50)
    assert measured["retrieval_accuracy_frac"] == 1.0
    assert measured[MULTI_KEY.column] is None
    assert measured[MULTI_VALUE.column] is None

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
from distill.retrieval import NUM_CANDIDATES, make_needles, make_probe, retrieval_accuracy

LENGTH = 128


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
    """Hand-made induction: expects what followed the last earlier place with the same ``num_matched`` final tokens."""

    def __init__(self, vocab_size: int, num_matched: int) -> None:
        super().__init__()
        self.head = nn.Embedding.from_pretrained(torch.eye(vocab_size))
        self._num_matched = num_matched

    def get_output_embeddings(self) -> nn.Embedding:
        return self.head

    def model(self, input_ids: Tensor, *, use_cache: bool) -> SimpleNamespace:
        hidden = torch.zeros(*input_ids.shape, self.head.num_embeddings)
        for row, ids in enumerate(input_ids.tolist()):
            pattern = ids[-self._num_matched :]
            for end in range(len(ids) - 1, self._num_matched - 1, -1):
                if ids[end - self._num_matched : end] == pattern:
                    hidden[row, -1, ids[end]] = 1.0
                    break
        return SimpleNamespace(last_hidden_state=hidden)


class ContextFreeModel(CopyingModel):
    """Prefers tokens in a fixed random order, whatever stands before."""

    def model(self, input_ids: Tensor, *, use_cache: bool) -> SimpleNamespace:
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


def test_a_model_without_context_is_at_chance(dataset: TokenDataset) -> None:
    needles = make_needles(dataset, length=LENGTH, num_needles=400, seed=0)
    accuracy = retrieval_accuracy(ContextFreeModel(dataset.vocab_size, 1), needles, batch_size=100)["accuracy_frac"]
    # 400 draws at 1/16: four standard errors are 0.048.
    assert abs(accuracy - 1 / NUM_CANDIDATES) < 0.048


def test_equal_scores_count_as_wrong(dataset: TokenDataset) -> None:
    needles = make_needles(dataset, length=LENGTH, num_needles=4, seed=0)
    blind = CopyingModel(dataset.vocab_size, num_matched=LENGTH)
    assert retrieval_accuracy(blind, needles, batch_size=4)["accuracy_frac"] == 0.0


def test_lengths_that_cannot_be_asked_are_refused(dataset: TokenDataset) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.lengths has 20, and a retrieval question alone takes \d+ tokens"):
        make_needles(dataset, length=20, num_needles=1, seed=0)
    with pytest.raises(ValueError, match=r"the data has 600; raise data\.validation_tokens or lower evaluate\.lengths"):
        make_needles(dataset, length=1024, num_needles=1, seed=0)


def test_a_probe_spends_the_tokens_of_the_main_evaluation_at_its_own_length(dataset: TokenDataset) -> None:
    config = EvaluateConfig(seq_len=64, num_sequences=6, batch_size=4, num_needles=5)
    probe = make_probe(dataset, config, length=LENGTH, seed=0)
    assert probe.sequences.shape == (3, LENGTH)
    assert probe.batch_size == 2
    measured = probe.measure(ContextFreeModel(dataset.vocab_size, 1), chunk_tokens=50)
    assert 0 <= measured["retrieval_accuracy_frac"] <= 1
    # Untrained: no better than a uniform guess over the vocabulary.
    assert measured["lm_loss"] > math.log(dataset.vocab_size)
    with pytest.raises(ValueError, match=r"1 sequences of 1024 tokens asked of the validation split"):
        make_probe(dataset, config, length=1024, seed=0)

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from distill.config import DataConfig, SourceConfig
from distill.data.packing import pack, training_texts, unigram_entropy
from distill.data.tokenizer import load_tokenizer, train_tokenizer

HELD_OUT = ("validation", "calibration")
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]


def _write_rows(path: Path, num_rows: int, *, seed: int, mark: str = "") -> None:
    rng = random.Random(seed)
    rows = [f"{mark}{i} " + " ".join(rng.choices(WORDS, k=rng.randrange(20, 60))) for i in range(num_rows)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def _config(*paths: Path, weights: tuple[float, ...] = (), **settings: object) -> DataConfig:
    sources = tuple(
        SourceConfig(kind="text", path=str(path), weight=weight)
        for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True)
    )
    budgets = {"train_tokens": 4000, "validation_tokens": 500, "calibration_tokens": 400}
    return DataConfig(sources=sources, tokenizer="train", vocab_size=300, **(budgets | settings))  # type: ignore[arg-type]


def _prepare(data: DataConfig, out: Path, *, seed: int = 0) -> dict:
    train_tokenizer(training_texts(data, seed=seed), data.vocab_size, out)
    return pack(data, out, seed=seed)


def _documents(out: Path, split: str) -> list[tuple[int, ...]]:
    tokens = np.load(out / f"{split}.npy", allow_pickle=False)
    ends = np.flatnonzero(tokens == load_tokenizer(out).eos_token_id)
    return [tuple(part.tolist()) for part in np.split(tokens, ends + 1) if len(part)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    _write_rows(tmp_path / "rows.jsonl", 300, seed=0)
    return tmp_path / "rows.jsonl"


def test_splits_meet_their_budgets_and_share_no_document(rows: Path, tmp_path: Path) -> None:
    summary = _prepare(_config(rows), tmp_path / "out")
    splits = {name: _documents(tmp_path / "out", name) for name in ("train", "validation", "calibration")}
    for name, budget in (("train", 4000), ("validation", 500), ("calibration", 400)):
        assert sum(map(len, splits[name])) == budget == summary["splits"][name]["num_tokens"]
        assert len(splits[name]) == summary["splits"][name]["num_documents"] > 1
    texts = [document for documents in splits.values() for document in documents]
    assert len(set(texts)) == len(texts)


def test_text_comes_back_whole(rows: Path, tmp_path: Path) -> None:
    _prepare(_config(rows), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    source = {json.loads(line)["text"] for line in rows.read_text().splitlines()}
    for split in ("train", "validation", "calibration"):
        *whole, _cut = _documents(tmp_path / "out", split)
        assert {tokenizer.decode(document[:-1]) for document in whole} <= source


def test_output_is_a_function_of_the_seed(rows: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _prepare(_config(rows), tmp_path / name, seed=seed)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert "data.json" in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert (tmp_path / "a" / "train.npy").read_bytes() != (tmp_path / "c" / "train.npy").read_bytes()


def test_summary_describes_the_data(rows: Path, tmp_path: Path) -> None:
    summary = _prepare(_config(rows), tmp_path / "out")
    assert summary == json.loads((tmp_path / "out" / "data.json").read_text())
    assert summary["vocab_size"] == 300
    assert 0 < summary["unigram_entropy_nats"] < np.log(300)
    assert summary["bytes_per_token"] > 1
    assert summary["sources"][0]["train_tokens"] == 4000
    assert np.load(tmp_path / "out" / "train.npy").dtype == np.uint16


def test_unigram_entropy_of_a_uniform_vocabulary_is_its_logarithm(tmp_path: Path) -> None:
    tokens = np.tile(np.arange(16, dtype=np.uint16), 10)
    np.save(tmp_path / "tokens.npy", tokens)
    assert unigram_entropy(tmp_path / "tokens.npy", tmp_path / "tokens.npy", 16) == pytest.approx(np.log(16))


@pytest.mark.parametrize(("num_sources", "least"), [(1, 250), (2, 60)])
def test_duplicates_within_and_across_sources_are_dropped(
    rows: Path, tmp_path: Path, num_sources: int, least: int
) -> None:
    """Of two equal sources the one that is read ahead leaves the other little, which then ends the mixture."""
    copies = [tmp_path / f"copy_{i}.jsonl" for i in range(num_sources)]
    for copy in copies:
        copy.write_text(rows.read_text() * 2)
    _prepare(_config(*copies, train_tokens=10**6), tmp_path / "out")
    documents = [d for split in ("train", "validation", "calibration") for d in _documents(tmp_path / "out", split)]
    assert least < len(documents) == len(set(documents)) <= 300


def test_a_short_train_split_says_which_source_ended_it(rows: Path, tmp_path: Path) -> None:
    summary = _prepare(_config(rows, train_tokens=10**6), tmp_path / "fewer")
    tokens = np.load(tmp_path / "fewer" / "train.npy", allow_pickle=False)
    assert 0 < len(tokens) == summary["splits"]["train"]["num_tokens"] < 10**6
    assert summary["ended_by"] == f"text {rows}"
    assert sorted(file.suffix for file in (tmp_path / "fewer").iterdir()).count(".npy") == 3
    assert _prepare(_config(rows), tmp_path / "enough")["ended_by"] is None


def test_too_little_held_out_text_is_refused_with_both_numbers(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.validation_tokens=1000000 asked, \d+ found: source text"):
        _prepare(_config(rows, validation_tokens=10**6), tmp_path / "out")


def test_long_documents_alone(tmp_path: Path) -> None:
    rng = random.Random(0)
    files = tmp_path / "files"
    files.mkdir()
    for index in range(60):
        num_words = 4_000 if index % 2 else 400
        text = f"file {index}\n" + "".join(f"{rng.choice(WORDS)}\n\n" for _ in range(num_words))
        (files / f"{index:02d}.txt").write_text(text)
    settings = {"train_tokens": 60_000, "validation_tokens": 15_000, "calibration_tokens": 15_000}
    summary = _prepare(_config(files, long_document_tokens=2_000, **settings), tmp_path / "long")
    tokenizer = load_tokenizer(tmp_path / "long")
    for split in ("train", "validation", "calibration"):
        *whole, _cut = _documents(tmp_path / "long", split)
        for document in whole:
            assert len(document) >= 2_000
            text = tokenizer.decode(document[:-1])
            name = text.split("\n", 1)[0].removeprefix("file ")
            assert text == (files / f"{int(name):02d}.txt").read_text()
    assert summary["sources"][0]["train_tokens"] == 60_000
    message = r"ended after 0 tokens and 60 documents below data\.long_document_tokens=100000; .* lower data\.long_doc"
    with pytest.raises(ValueError, match=message):
        _prepare(_config(files, long_document_tokens=100_000, **settings), tmp_path / "longer")


def test_mixture_follows_the_weights_and_names_the_source_that_ends_it(tmp_path: Path) -> None:
    _write_rows(tmp_path / "large.jsonl", 400, seed=1, mark="large")
    _write_rows(tmp_path / "small.jsonl", 40, seed=2, mark="small")
    paths = (tmp_path / "large.jsonl", tmp_path / "small.jsonl")
    summary = _prepare(_config(*paths, weights=(9.0, 1.0)), tmp_path / "out")
    large, small = (source["train_tokens"] for source in summary["sources"])
    # The hash decides which documents of the small source are held out: a few of the 8 that are read.
    assert 0.05 < small / (large + small) < 0.15
    budgets = {"train_tokens": 20_000, "validation_tokens": 200, "calibration_tokens": 50}
    dry = _prepare(_config(*paths, weights=(1.0, 9.0), **budgets), tmp_path / "dry")
    assert dry["ended_by"] == f"text {paths[1]}"


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (6.0, 3.0, 1.0)])
def test_tokens_of_three_sources_follow_their_weights(tmp_path: Path, weights: tuple[float, ...]) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for seed, path in enumerate(paths):
        _write_rows(path, 600, seed=seed, mark=path.stem)
    summary = _prepare(_config(*paths, weights=weights, train_tokens=30_000), tmp_path / "out")
    for source, weight in zip(summary["sources"], weights, strict=True):
        share = source["train_tokens"] / 30_000
        # A quarter of the documents may be held out, by hash: some more of one source than of another.
        assert share == pytest.approx(weight / sum(weights), rel=0.25)


def test_held_out_tokens_do_not_depend_on_the_train_budget(rows: Path, tmp_path: Path) -> None:
    for name, train_tokens in (("small", 1000), ("large", 8000)):
        _prepare(_config(rows, train_tokens=train_tokens), tmp_path / name)
    for split in ("validation", "calibration"):
        assert (tmp_path / "small" / f"{split}.npy").read_bytes() == (tmp_path / "large" / f"{split}.npy").read_bytes()


def _write_prose(path: Path, num_paragraphs: int, *, mark: str) -> None:
    """Paragraphs that say where they are from, several to a cut document."""
    rng = random.Random(mark)
    paragraphs = (f"{mark} {i} " + " ".join(rng.choices(WORDS, k=300)) + "\n\n" for i in range(num_paragraphs))
    path.write_text("".join(paragraphs))


def _marks(out: Path, split: str) -> list[tuple[str, int]]:
    """File and number of every paragraph in a split, in order."""
    text = load_tokenizer(out).decode(np.load(out / f"{split}.npy", allow_pickle=False).tolist())
    return [(name, int(number)) for name, number in re.findall(r"(file\w*) (\d+) ", text)]


def test_a_file_is_held_out_whole(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for index in range(60):
        _write_prose(files / f"{index:02d}.txt", 12, mark=f"file{index:02d}x")
    budgets = {"train_tokens": 250_000, "validation_tokens": 25_000, "calibration_tokens": 25_000}
    _prepare(_config(files, **budgets), tmp_path / "out")
    names = {split: {name for name, _ in _marks(tmp_path / "out", split)} for split in ("train", *HELD_OUT)}
    assert min(map(len, names.values())) > 1
    assert not names["train"] & (names["validation"] | names["calibration"])
    assert not names["validation"] & names["calibration"]
    # The documents of the held-out files are mixed: the first sequences are not all of one file.
    order = [name for name, _ in _marks(tmp_path / "out", "validation")]
    assert sum(first != second for first, second in pairwise(order)) > len(names["validation"])


def test_of_one_large_file_long_stretches_are_held_out(tmp_path: Path) -> None:
    """Of neighbouring paragraphs nearly none stand on different sides of a hold-out."""
    _write_prose(tmp_path / "corpus.txt", 2_000, mark="file")
    budgets = {"train_tokens": 10**6, "validation_tokens": 30_000, "calibration_tokens": 30_000}
    _prepare(_config(tmp_path / "corpus.txt", **budgets), tmp_path / "out")
    split_of = {number: split for split in ("train", *HELD_OUT) for _, number in _marks(tmp_path / "out", split)}
    assert len(split_of) > 1_500
    known = sorted(split_of)
    changes = sum(split_of[first] != split_of[second] for first, second in pairwise(known))
    # Some 33 stretches, a fourth of them held out; without them every fourth of some 440 documents would be, by itself.
    assert 1 <= changes <= 33


def test_cut_samples_are_not_closed_by_the_end_of_text(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        {"text": f"{i} " + " ".join(rng.choices(WORDS, k=40)), "num_tokens": 1, "ended": i % 2 == 0} for i in range(300)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(kind="generated", path=str(tmp_path / "text.jsonl"))
    data = replace(_config(tmp_path / "text.jsonl", train_tokens=10**6), sources=(source,))
    _prepare(data, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    text = tokenizer.decode(np.load(tmp_path / "out" / "train.npy", allow_pickle=False).tolist())
    by_number = {int(row["text"].split()[0]): row for row in rows}
    found = re.findall(r"(\d+) [a-z ]+(<\|endoftext\|>)?", text)
    assert len(found) > 150
    for number, end in found:
        assert bool(end) == by_number[int(number)]["ended"]

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distill.config import ObjectiveConfig, TrainConfig
from distill.teacher_cache import (
    FORMAT_VERSION,
    INDEX_NAME,
    CacheIndex,
    ShardRecord,
    TeacherCacheConfig,
    check_objective,
    check_run,
    check_tokens,
    hash_of_tokens,
)

TOKENS = np.arange(100, dtype=np.uint16)
SEQ_LEN = 8


def shard(split: str, first: int, end: int, tail_mass: float = 0.0) -> ShardRecord:
    return ShardRecord(
        split=split,
        first=first,
        end=end,
        num_bytes=0,
        sha256="",
        tokens_sha256=hash_of_tokens(TOKENS[first * SEQ_LEN : end * SEQ_LEN]),
        tail_mass=tail_mass,
    )


INDEX = CacheIndex(
    teacher="t",
    vocab_size=128_256,
    tokenizer_sha256="a" * 64,
    seq_len=SEQ_LEN,
    top_k=64,
    separate_documents=False,
    shards=(
        shard("train", 0, 4, 0.02),
        shard("train", 4, 8, 0.02),
        shard("train", 8, 10, 0.07),
        shard("validation", 0, 3),
    ),
)
TRAIN = TrainConfig(max_tokens=640, seq_len=SEQ_LEN, batch_size=2, eval_sequences=3)


def test_index_counts_sequences_and_weighs_shards_by_them() -> None:
    assert INDEX.num_sequences("train") == 10
    assert INDEX.num_sequences("validation") == 3
    assert INDEX.tail_mass("train") == pytest.approx((8 * 0.02 + 2 * 0.07) / 10)


@pytest.mark.parametrize(("vocab_size", "num_bytes"), [(65_536, 64 * 4 + 2), (65_537, 64 * 6 + 2)])
def test_bytes_per_token(vocab_size: int, num_bytes: int) -> None:
    assert replace(INDEX, vocab_size=vocab_size).bytes_per_token == num_bytes


def test_index_comes_back_from_its_file(tmp_path: Path) -> None:
    for record in INDEX.shards:
        (tmp_path / record.name).touch()
    INDEX.write(tmp_path)
    assert CacheIndex.read(tmp_path) == INDEX


def test_unreadable_indices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"holds no teacher signals: it has no {INDEX_NAME}; run stage cache_teacher"):
        CacheIndex.read(tmp_path)
    INDEX.write(tmp_path)
    content = json.loads((tmp_path / INDEX_NAME).read_text())
    (tmp_path / INDEX_NAME).write_text(json.dumps({**content, "format_version": 7}))
    with pytest.raises(ValueError, match=f"format version 7, this program reads {FORMAT_VERSION}"):
        CacheIndex.read(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({**content, "top_k": "many"}))
    with pytest.raises(ValueError, match=r"cannot be read .*run stage cache_teacher again"):
        CacheIndex.read(tmp_path)


def test_a_run_that_fits() -> None:
    check_run(INDEX, TRAIN, vocab_size=128_256, tokenizer_sha256="a" * 64)
    check_objective(ObjectiveConfig(kld=1.0, lm=0.1))


@pytest.mark.parametrize(
    ("train", "further", "message"),
    [
        (replace(TRAIN, seq_len=16), {}, "sequences of 8 tokens, this run has seq_len=16; set it to 8, or run"),
        (replace(TRAIN, separate_documents=True), {}, "separate_documents=False, this run has True"),
        (replace(TRAIN, eval_sequences=4), {}, "eval_sequences=4, but the teacher signals have 3 validation sequences"),
        (TRAIN, {"vocab_size": 151_936}, "vocabulary of 128256 rows, the student one of 151936"),
        (TRAIN, {"tokenizer_sha256": "b" * 64}, "tokenizer sha256 aaaaaaaaaaaa, the data given has bbbbbbbbbbbb"),
    ],
)
def test_runs_that_do_not_fit(train: TrainConfig, further: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(INDEX, train, **{"vocab_size": 128_256, "tokenizer_sha256": "a" * 64, **further})


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (ObjectiveConfig(kld=1, hidden_cosine=2), "hidden_cosine=2 compares hidden states.*give the input `teacher`"),
        (ObjectiveConfig(hidden_mse=3), "hidden_mse=3 compares hidden states"),
        (ObjectiveConfig(kld=1, temperature=2), "temperature=2: the mass of the tokens that are not in"),
    ],
)
def test_objectives_that_a_cache_cannot_serve(objective: ObjectiveConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_objective(objective)


def test_tokens_of_the_cache() -> None:
    check_tokens(INDEX, "train", TOKENS)
    check_tokens(INDEX, "train", TOKENS.astype(np.int64))
    with pytest.raises(ValueError, match="of 80 train tokens, the data has 79; give the data"):
        check_tokens(INDEX, "train", TOKENS[:79])
    for changed, sequences in ((3, "0 to 3"), (40, "4 to 7"), (70, "8 to 9")):
        other = TOKENS.copy()
        other[changed] += 1
        with pytest.raises(ValueError, match=f"of other data: sequences {sequences} of the train split differ"):
            check_tokens(INDEX, "train", other)


def test_configuration_in_sequences() -> None:
    config = TeacherCacheConfig(seq_len=8, max_tokens=100, shard_tokens=30)
    assert (config.num_sequences, config.shard_sequences) == (12, 3)
    assert replace(config, shard_tokens=1).shard_sequences == 1
    with pytest.raises(ValueError, match="max_tokens=7 is less than one sequence of seq_len=8"):
        TeacherCacheConfig(seq_len=8, max_tokens=7)
    with pytest.raises(ValueError, match=r"teacher_cache\.top_k must be > 0, got 0"):
        TeacherCacheConfig(seq_len=8, max_tokens=8, top_k=0)

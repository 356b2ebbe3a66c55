from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distill.data.dataset import TokenDataset
from distill.data.tokenizer import (
    END_OF_TEXT,
    encode_documents,
    load_tokenizer,
    require_same_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
    vocab_size_of,
)

TEXTS = [f"def function_{i}(argument):\n    return argument + {i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300, path)
    return path


def _dataset(directory: Path, vocab_size: int = 300) -> TokenDataset:
    return TokenDataset(
        directory=directory,
        vocab_size=vocab_size,
        eos_token_id=0,
        tokenizer_sha256=tokenizer_sha256(directory),
        unigram_entropy=1.0,
    )


def test_training_is_deterministic(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(TEXTS), 300, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert vocab_size_of(load_tokenizer(tmp_path)) == 300


def test_loads_with_transformers_and_round_trips_any_text(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    text = " naïve\t東京 🚀\n\n  end "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bulk_encoding_equals_single_encoding_and_adds_no_specials(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    bulk = list(encode_documents(tokenizer, TEXTS[:5]))
    assert bulk == [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS[:5]]


def test_the_name_of_a_special_token_in_a_text_is_text(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    (ids,) = encode_documents(tokenizer, [f"print('{END_OF_TEXT}')"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == f"print('{END_OF_TEXT}')"


def test_hash_survives_saving_again(directory: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() != b""
    assert tokenizer_sha256(tmp_path) == tokenizer_sha256(directory)


def test_hash_ignores_how_merges_are_spelt(directory: Path, tmp_path: Path) -> None:
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_sha256(tmp_path) == tokenizer_sha256(directory)


def test_hash_tells_tokenizers_apart(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS[:20], 300, tmp_path / "other_text")
    train_tokenizer(TEXTS, 299, tmp_path / "other_size")
    shutil.copytree(directory, tmp_path / "added")
    tokenizer = load_tokenizer(tmp_path / "added")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "added")
    paths = [directory, *(tmp_path / name for name in ("other_text", "other_size", "added"))]
    assert len({tokenizer_sha256(path) for path in paths}) == 4


def test_loads_beside_the_config_of_a_remote_code_model(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    config = {"model_type": "nemotron-nas", "vocab_size": 300, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eos_token_id == 0
    require_same_tokenizer(_dataset(directory), tmp_path, "parent")


def test_mismatch_names_both_sides(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 290, tmp_path)
    dataset = _dataset(directory)
    message = r"tokenizer of student \(290 tokens, .*data \(300 tokens, .*data\.tokenizer=parent"
    with pytest.raises(ValueError, match=message):
        require_same_tokenizer(dataset, tmp_path, "student")


def test_a_model_with_fewer_rows_than_tokens_is_refused(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"vocab_size": 256}')
    with pytest.raises(ValueError, match="vocabulary of parent has 256 rows, the data has token ids up to 299"):
        require_same_tokenizer(_dataset(directory), tmp_path, "parent")


def test_missing_tokenizer_and_missing_eos_are_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable tokenizer in"):
        load_tokenizer(tmp_path)
    shutil.copy(directory / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(tmp_path)

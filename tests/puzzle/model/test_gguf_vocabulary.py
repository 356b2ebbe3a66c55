from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")

from puzzle.model.gguf_vocabulary import read_vocabulary  # noqa: E402
from tests.readers.tokenizers_of_rules import KINDS, VOCAB_SIZE, train  # noqa: E402


@pytest.fixture
def tokenizer_of(tmp_path: Path) -> Callable[..., Path]:
    """Directory of a tokenizer of ``kind`` whose tokenizer.json has other values at the top level or in the model."""

    def make(kind: str, model: dict[str, Any] | None = None, **changed: Any) -> Path:
        train(kind, tmp_path / kind)
        path = tmp_path / kind / "tokenizer.json"
        content = json.loads(path.read_text()) | changed
        content["model"] |= model or {}
        path.write_text(json.dumps(content))
        return path.parent

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_rule_and_size_of_every_kind(kind: str, tokenizer_of: Callable[..., Path]) -> None:
    vocabulary = read_vocabulary(tokenizer_of(kind), VOCAB_SIZE)
    is_sentencepiece = kind in ("sentencepiece", "metaspace")
    assert (vocabulary.model, vocabulary.rule) == (("llama", "default") if is_sentencepiece else ("gpt2", kind))
    assert len(vocabulary.tokens) == len(vocabulary.types) == VOCAB_SIZE
    assert len(set(vocabulary.tokens)) == VOCAB_SIZE
    assert vocabulary.add_space_prefix is is_sentencepiece
    assert vocabulary.types[vocabulary.tokens.index("<s>")] == gguf.TokenType.CONTROL


def test_sentencepiece_has_bytes_an_unknown_token_and_scores_in_the_order_of_merges(
    tokenizer_of: Callable[..., Path],
) -> None:
    directory = tokenizer_of("sentencepiece")
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    vocabulary = read_vocabulary(directory, VOCAB_SIZE)
    assert vocabulary.types[0] == gguf.TokenType.UNKNOWN
    assert set(vocabulary.types[3:259]) == {gguf.TokenType.BYTE}
    assert vocabulary.scores is not None
    first, last = ("".join(merges[index]) for index in (0, -1))
    assert vocabulary.scores[vocabulary.tokens.index(first)] == 0
    assert vocabulary.scores[vocabulary.tokens.index(last)] == 1 - len(merges)


def test_rows_of_the_embedding_without_a_token_get_a_name(tokenizer_of: Callable[..., Path]) -> None:
    vocabulary = read_vocabulary(tokenizer_of("gpt-2"), VOCAB_SIZE + 2)
    assert vocabulary.tokens[-2:] == (f"[PAD{VOCAB_SIZE}]", f"[PAD{VOCAB_SIZE + 1}]")
    assert vocabulary.types[-2:] == (gguf.TokenType.UNUSED, gguf.TokenType.UNUSED)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("gpt-2", {"pre_tokenizer": None}, "splits text by no rule"),
        ("qwen2", {"normalizer": {"type": "Lowercase"}}, "after Lowercase, which llama.cpp is not known"),
        ("gpt-2", {"model": {"ignore_merges": True}}, "splits text by ByteLevel, which"),
        ("llama-bpe", {"model": {"ignore_merges": False}}, "not known to have a name"),
        ("gpt-2", {"model": {"type": "Unigram"}}, "a Unigram tokenizer has no place in GGUF"),
        ("sentencepiece", {"normalizer": {"type": "NFKC"}}, "prepares text with NFKC"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(
    kind: str, changed: dict[str, Any], message: str, tokenizer_of: Callable[..., Path]
) -> None:
    directory = tokenizer_of(kind, **changed)
    with pytest.raises(ValueError, match=message) as error:
        read_vocabulary(directory, VOCAB_SIZE)
    assert str(directory / "tokenizer.json") in str(error.value)


def test_more_tokens_than_rows_and_no_tokenizer_are_refused(tokenizer_of: Callable[..., Path], tmp_path: Path) -> None:
    directory = tokenizer_of("gpt-2")
    with pytest.raises(ValueError, match=r"has token \d+, and the model's embedding 300 rows"):
        read_vocabulary(directory, 300)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        read_vocabulary(tmp_path, 300)

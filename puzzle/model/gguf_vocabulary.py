"""A Hugging Face tokenizer as the vocabulary of a GGUF file.

llama.cpp splits text before the merges by rules that it has under names, so a tokenizer is carried over where its rule
is one of those that are known here, and refused otherwise. Two kinds: byte-level BPE (Llama 3, Qwen, SmolLM, GPT-2) and
SentencePiece with byte fallback (Llama 2, Mistral), whose scores follow from the order of the merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from distill.config import require
from puzzle.model.tensor_reader import read_json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3_RULE = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN_2_RULE = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST

RULES: dict[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (LLAMA_3_RULE, "bytes"): "llama-bpe",
    (QWEN_2_RULE, "bytes"): "qwen2",
}
"""Steps of a tokenizer's splitting -> what llama.cpp calls it."""

SPACE = "\u2581"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer."""

    model: str
    """``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece)."""
    rule: str
    """Name of the splitting rule."""
    tokens: tuple[str, ...]
    """As many as the embedding has rows: ids without a token have a name of their own."""
    types: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    """Of SentencePiece: pieces of higher score are merged first."""
    add_space_prefix: bool = False

    def add_to(self, writer: gguf.GGUFWriter, directory: Path) -> None:
        """Write all of it, with the special tokens, the merges and the chat template of the tokenizer ``directory``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.add_space_prefix)
        special = gguf.SpecialVocab(directory, load_merges=self.scores is None, n_vocab=len(self.tokens))
        # Unsaid, llama.cpp would go by the name of the rule.
        special.add_special_token.setdefault("bos", False)
        special.add_to_gguf(writer, quiet=True)


def read_vocabulary(directory: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of the tokenizer in ``directory`` for an embedding of ``vocab_size`` rows.

    Raises:
        ValueError: there is no tokenizer.json, it has more tokens than the embedding rows, or it splits text by a rule
            that llama.cpp is not known to have.
    """
    path = directory / "tokenizer.json"
    require(path.is_file(), f"{directory} has no tokenizer.json, from which a GGUF file gets its vocabulary")
    tokenizer = read_json(path)
    model = tokenizer["model"]
    require(model.get("type") == "BPE", f"{path}: a {model.get('type')} tokenizer has no place in GGUF, only BPE has")
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens", [])}
    names = {index: token for token, index in model["vocab"].items()}
    names |= {index: entry["content"] for index, entry in added.items()}
    require(
        max(names) < vocab_size,
        f"{path} has token {max(names)}, and the model's embedding {vocab_size} rows; give the model its own tokenizer",
    )
    is_sentencepiece = bool(model.get("byte_fallback"))
    tokens = tuple(names.get(index, f"[PAD{index}]") for index in range(vocab_size))
    types = tuple(_type(index, names, added, model) for index in range(vocab_size))
    if is_sentencepiece:
        return Vocabulary(
            model="llama",
            rule="default",
            tokens=tokens,
            types=types,
            scores=_scores(tokens, model["merges"]),
            add_space_prefix=_has_space_prefix(tokenizer, path),
        )
    return Vocabulary(model="gpt2", rule=_rule(tokenizer, path), tokens=tokens, types=types)


def _type(index: int, names: Mapping[int, str], added: Mapping[int, Any], model: Mapping[str, Any]) -> int:
    if index not in names:
        return int(gguf.TokenType.UNUSED)
    token = names[index]
    if model.get("byte_fallback") and token == model.get("unk_token"):
        return int(gguf.TokenType.UNKNOWN)
    if index in added:
        return int(gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED)
    if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int(gguf.TokenType.BYTE)
    return int(gguf.TokenType.NORMAL)


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a tokenizer.json's ``pre_tokenizer`` or ``normalizer``, in order."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return list(pre_tokenizer.get("pretokenizers") or pre_tokenizer.get("normalizers") or [])
    return [pre_tokenizer]


def _step_name(step: Mapping[str, Any]) -> str:
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return "ByteLevel" if step.get("use_regex", True) else "bytes"
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "Digits"
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return f"{step['type']} of another kind"


def _rule(tokenizer: Mapping[str, Any], path: Path) -> str:
    steps = tuple(_step_name(step) for step in _steps(tokenizer.get("pre_tokenizer")))
    rule = RULES.get(steps)
    normalizers = [step["type"] for step in _steps(tokenizer.get("normalizer"))]
    ignores_merges = bool(tokenizer["model"].get("ignore_merges"))
    # llama.cpp has no Unicode normalisation; Qwen's tokenizer asks for one that well-formed text does not feel.
    is_known = rule is not None and normalizers in ([], ["NFC"]) and ignores_merges == (rule == "llama-bpe")
    require(
        is_known,
        f"{path} splits text by {' and '.join(steps) or 'no rule'}"
        f"{', after ' + ' and '.join(normalizers) if normalizers else ''}, "
        f"which llama.cpp is not known to have a name for (known are {', '.join(RULES.values())}); "
        "convert a transformers export with llama.cpp's own converter, which asks for the name",
    )
    assert rule is not None
    return rule


def _has_space_prefix(tokenizer: Mapping[str, Any], path: Path) -> bool:
    normalizers, splitters = _steps(tokenizer.get("normalizer")), _steps(tokenizer.get("pre_tokenizer"))
    kinds = tuple(step["type"] for step in normalizers), tuple(step["type"] for step in splitters)
    if kinds == (("Prepend", "Replace"), ()) and normalizers[0]["prepend"] == SPACE:
        return True
    if kinds in (((), ("Metaspace",)), (("Replace",), ())):
        return bool(splitters) and splitters[0].get("prepend_scheme") != "never"
    found = ", ".join((*kinds[0], *kinds[1]))
    raise ValueError(
        f"{path} prepares text with {found}, which is not what llama.cpp does for SentencePiece; convert a "
        "transformers export with llama.cpp's own converter"
    )


def _scores(tokens: tuple[str, ...], merges: list[Any]) -> tuple[float, ...]:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return tuple(-float(ranks.get(token, len(merges))) for token in tokens)

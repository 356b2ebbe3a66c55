"""Tokenizers: train one, load one, and tell whether two are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.config import require

if TYPE_CHECKING:
    from distill.data.dataset import TokenDataset

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE on ``texts`` and save it to ``directory`` as a transformers fast tokenizer.

    Deterministic in the texts and their order. The vocabulary is smaller than ``vocab_size`` where the texts have no
    more pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tqdm(texts, desc="tokenizer text", unit="doc", leave=False), trainer=trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    # By hand: the class name that transformers 5 would write is unknown to the versions inside serving engines.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Tokenizer of a data or model directory; one in a slow format is converted.

    Raises ``ValueError`` where there is none, or none with an end-of-text token.
    """
    if (directory / "tokenizer.json").is_file():
        # AutoTokenizer would first read config.json, which it refuses for a nemotron-nas model without remote code.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"no usable tokenizer in {directory}; copy the model's tokenizer files there") from error
    require(
        tokenizer.eos_token_id is not None,
        f"the tokenizer in {directory} has no eos_token, which separates documents; set it in tokenizer_config.json",
    )
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of each text, without specials. The name of a special token inside a text is plain text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))


def tokenizer_sha256(directory: Path) -> str:
    """Hash of what a tokenizer maps: every token with its id, and the merges in their order.

    Independent of layout, key order, and of the version that saved the files, so the same tokenizer saved twice has
    the same hash.
    """
    vocabulary, merges = _canonical(directory)
    content = json.dumps([sorted(vocabulary.items()), merges], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def vocab_size_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest token id: rows that an embedding needs."""
    return 1 + max(tokenizer.get_vocab().values())


def require_same_tokenizer(dataset: TokenDataset, model_directory: Path, role: str) -> None:
    """Raise ``ValueError`` unless the model in ``model_directory`` reads the tokens that ``dataset`` is made of.

    ``role`` names the model in the message: parent, student, teacher...
    """
    way_out = (
        "prepare the data with data.tokenizer=parent and this model's parent as input, or take the model that fits"
    )
    found = tokenizer_sha256(model_directory)
    require(
        found == dataset.tokenizer_sha256,
        f"the tokenizer of {role} ({len(_canonical(model_directory)[0])} tokens, sha256 {found[:12]}) is not that of "
        f"the data ({dataset.vocab_size} tokens, sha256 {dataset.tokenizer_sha256[:12]}); {way_out}",
    )
    config = model_directory / "config.json"
    if config.is_file():
        num_rows = json.loads(config.read_text())["vocab_size"]
        require(
            num_rows >= dataset.vocab_size,
            f"the vocabulary of {role} has {num_rows} rows, the data has token ids up to {dataset.vocab_size - 1}; "
            f"{way_out}",
        )


def _canonical(directory: Path) -> tuple[dict[str, int], list[list[str]]]:
    """(token -> id with added tokens, merges as pairs) of the tokenizer in ``directory``."""
    file = directory / "tokenizer.json"
    if file.is_file():
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    else:
        content = json.loads(load_tokenizer(directory).backend_tokenizer.to_str())
    model = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score], the id is the position
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model.get("merges") or []]
    return vocabulary | added, merges

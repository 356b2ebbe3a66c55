"""Documents to one flat token array per split, with a description beside them.

A seeded hash of its first document says which split a region goes to, as a whole: a row, a file, or of a large
file a long stretch (:func:`distill.data.sources.regions`). Exact duplicates of documents are dropped. So held-out
text shares no document with the train split, and no file but for those large ones. Held-out splits do not depend on
``train_tokens``: runs that differ in it alone are held against the same validation and calibration tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from distill.config import DataConfig, SourceConfig, require
from distill.data.budget import SPLITS
from distill.data.sources import Region, interleave, regions
from distill.data.tokenizer import encode_documents, load_tokenizer, tokenizer_sha256, vocab_size_of

HELD_OUT_FRAC = 1 / 8
"""Share of regions that the hash gives to each held-out split until its budget is full; later ones go to train."""

TOKENIZER_SAMPLE_CHARS = 4_000_000
"""Text that a BPE learns from: its merges settle long before, and training time grows with the text."""

_ENCODE_BATCH_DOCUMENTS = 256
_COUNT_CHUNK_TOKENS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class DrawnDocument:
    """A document of text on its way to a split."""

    split: str
    """Where the hash wants its region."""
    region: int
    """Number of the region in its source."""
    text: str
    ended: bool
    """Whether an end-of-text token closes it."""


@dataclass(frozen=True, kw_only=True)
class PackedDocument:
    """A document in tokens."""

    split: str
    region: int
    tokens: list[int]
    """Token ids, closed by the end-of-text token unless the text was cut."""
    num_bytes: int
    """Length of the text in UTF-8."""


@dataclass(kw_only=True)
class SourceRead:
    """How much of a source has been read."""

    source: SourceConfig
    num_tokens: int = 0
    """Of all splits."""
    num_bytes: int = 0
    train_tokens: int = 0
    num_short: int = 0
    """Documents that were left out because they are short."""
    region: int = -1
    """The region that is being read."""
    split: str = "train"
    """Where that region goes."""

    def place(self, document: PackedDocument, writers: Mapping[str, SplitWriter | HeldOutWriter]) -> str:
        """The split of ``document``: the one where the first document of its region went, as the hash has it unless
        that split was full by then."""
        if document.region != self.region:
            self.region = document.region
            self.split = "train" if writers[document.split].is_full else document.split
        return self.split

    @property
    def name(self) -> str:
        """The source in messages."""
        kind, path = self.source.kind, self.source.path
        return kind if path is None or kind == "generated" else f"{kind} {path}"

    def summary(self) -> dict[str, Any]:
        """The source in ``data.json``."""
        source = self.source
        return {
            "kind": source.kind,
            "path": None if source.kind == "generated" else source.path,
            "weight": source.weight,
            "train_tokens": self.train_tokens,
        }


class SplitWriter:
    """Fills one ``.npy`` array up to a budget, never holding it in memory."""

    def __init__(self, path: Path, budget_tokens: int, vocab_size: int) -> None:
        dtype = np.uint16 if vocab_size < 1 << 16 else np.uint32
        self._path = path
        self._array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(budget_tokens,))
        _reserve(path)
        self.num_tokens = 0
        self.num_documents = 0

    @property
    def budget_tokens(self) -> int:
        """Tokens that the array has room for."""
        return len(self._array)

    @property
    def is_full(self) -> bool:
        """Whether the budget is met."""
        return self.num_tokens == self.budget_tokens

    def append(self, tokens: list[int]) -> int:
        """Add as many ``tokens`` as the budget has room for; returns how many."""
        kept = tokens[: self.budget_tokens - self.num_tokens]
        self._array[self.num_tokens : self.num_tokens + len(kept)] = kept
        self.num_tokens += len(kept)
        self.num_documents += bool(kept)
        return len(kept)

    def close(self) -> None:
        """Bring the file to disk, cut to the tokens that came."""
        self._array.flush()
        if not self.is_full:
            cut = self._path.with_suffix(".cut.npy")
            np.save(cut, self._array[: self.num_tokens], allow_pickle=False)
            cut.replace(self._path)


class HeldOutWriter:
    """Gathers documents up to a budget in memory and writes them in a seeded order: the first sequences of a held-out
    split, which evaluations read, are then of many files."""

    def __init__(self, writer: SplitWriter, *, seed: int) -> None:
        self._writer = writer
        self._rng = np.random.default_rng(seed)
        self._documents: list[NDArray[np.uint32]] = []
        self._num_gathered = 0

    @property
    def budget_tokens(self) -> int:
        """As of :class:`SplitWriter`."""
        return self._writer.budget_tokens

    @property
    def is_full(self) -> bool:
        """Whether the budget is met."""
        return self._num_gathered >= self.budget_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that will be written."""
        return min(self._num_gathered, self.budget_tokens)

    @property
    def num_documents(self) -> int:
        """Documents written; 0 before :meth:`close`."""
        return self._writer.num_documents

    def append(self, tokens: list[int]) -> int:
        """Keep a document, unless the budget is met; returns by how many tokens the split grows."""
        before = self.num_tokens
        if not self.is_full:
            self._documents.append(np.asarray(tokens, dtype=np.uint32))
            self._num_gathered += len(tokens)
        return self.num_tokens - before

    def close(self) -> None:
        """Write the documents; the last one is cut at the budget."""
        for index in self._rng.permutation(len(self._documents)):
            self._writer.append(self._documents[index].tolist())
        self._writer.close()


def _reserve(path: Path) -> None:
    """Claim the disk blocks of a sparse file: a store to a mapped page of a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)


def training_texts(data: DataConfig, *, seed: int) -> Iterator[str]:
    """Documents of the train split in the mixture's proportions, as many as a tokenizer learns from."""
    num_chars = 0
    streams = _document_streams(data, seed)
    for _, document in interleave(streams, _weights(data), size=lambda document: len(document.text)):
        if document.split == "train":
            yield document.text
            num_chars += len(document.text)
        if num_chars >= TOKENIZER_SAMPLE_CHARS:
            return


def pack(data: DataConfig, directory: Path, *, seed: int) -> dict[str, Any]:
    """Fill the splits with tokens of the sources, in the vocabulary of the tokenizer that stands in ``directory``.

    Writes ``train.npy``, ``validation.npy``, ``calibration.npy`` (1-D, uint16 or uint32) and ``data.json`` there and
    returns the content of the latter. Every document ends in the end-of-text token, but for sampled ones that were cut
    (:attr:`distill.data.sources.Document.ended`); the last one of a split is cut at the budget. The mixture ends where
    its first source does, which may leave the train split short.

    Raises:
        ValueError: there is not enough text for the held-out splits, or none for the train split.
    """
    tokenizer = load_tokenizer(directory)
    vocab_size = vocab_size_of(tokenizer)
    writers: dict[str, SplitWriter | HeldOutWriter] = {}
    for name in SPLITS:
        split_writer = SplitWriter(directory / f"{name}.npy", getattr(data, f"{name}_tokens"), vocab_size)
        writers[name] = split_writer if name == "train" else HeldOutWriter(split_writer, seed=seed)
    reads = [SourceRead(source=source) for source in data.sources]
    _fill(data, writers, reads, tokenizer, seed=seed)
    _require_held_out(data, writers, reads)
    for writer in writers.values():
        writer.close()
    summary = {
        "vocab_size": vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer_sha256": tokenizer_sha256(directory),
        "splits": {
            name: {"num_tokens": writer.num_tokens, "num_documents": writer.num_documents}
            for name, writer in writers.items()
        },
        "unigram_entropy_nats": unigram_entropy(directory / "train.npy", directory / "validation.npy", vocab_size),
        "bytes_per_token": sum(read.num_bytes for read in reads) / sum(read.num_tokens for read in reads),
        "sources": [read.summary() for read in reads],
        "ended_by": None if writers["train"].is_full else _first_dry(reads).name,
    }
    (directory / "data.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _fill(
    data: DataConfig,
    writers: Mapping[str, SplitWriter | HeldOutWriter],
    reads: list[SourceRead],
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
) -> None:
    """Read the mixture until all splits are full or a source is dry."""
    streams = [
        _encoded(stream, tokenizer, data.long_document_tokens, read)
        for stream, read in zip(_document_streams(data, seed), reads, strict=True)
    ]
    budget_tokens = sum(writer.budget_tokens for writer in writers.values())
    with tqdm(total=budget_tokens, desc="pack", unit="tok", unit_scale=True, leave=False) as progress:
        for index, document in interleave(streams, _weights(data), size=lambda item: len(item.tokens)):
            read = reads[index]
            split = read.place(document, writers)
            num_written = writers[split].append(document.tokens)
            read.num_tokens += len(document.tokens)
            read.num_bytes += document.num_bytes
            read.train_tokens += num_written if split == "train" else 0
            progress.update(num_written)
            if all(writer.is_full for writer in writers.values()):
                return


def unigram_entropy(train: Path, held_out: Path, vocab_size: int) -> float:
    """Cross-entropy in nats per token of ``held_out`` under the token frequencies of ``train`` (add-one smoothed).

    What a model reaches that ignores all context: the first bar for a trained one.
    """
    train_counts, held_out_counts = (_token_counts(path, vocab_size) for path in (train, held_out))
    log_probs = np.log((train_counts + 1) / (train_counts.sum() + vocab_size))
    return float(-(held_out_counts * log_probs).sum() / held_out_counts.sum())


def _token_counts(path: Path, vocab_size: int) -> NDArray[np.int64]:
    tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _COUNT_CHUNK_TOKENS):
        counts += np.bincount(tokens[start : start + _COUNT_CHUNK_TOKENS], minlength=vocab_size)
    return counts


def _weights(data: DataConfig) -> list[float]:
    return [source.weight for source in data.sources]


def _document_streams(data: DataConfig, seed: int) -> list[Iterator[DrawnDocument]]:
    """One stream per source; a text that any source gave before is left out."""
    seen: set[bytes] = set()
    whole_files = data.long_document_tokens > 0
    return [_unseen(regions(source, seed=seed, whole_files=whole_files), seen, seed) for source in data.sources]


def _unseen(stream: Iterator[Region], seen: set[bytes], seed: int) -> Iterator[DrawnDocument]:
    for number, region in enumerate(stream):
        digests = [_digest(document.text, seed) for document in region]
        draw = int.from_bytes(digests[0][:8], "big") / 2.0**64
        split = "validation" if draw < HELD_OUT_FRAC else "calibration" if draw < 2 * HELD_OUT_FRAC else "train"
        for document, digest in zip(region, digests, strict=True):
            if digest not in seen:
                seen.add(digest)
                yield DrawnDocument(split=split, region=number, text=document.text, ended=document.ended)


def _digest(text: str, seed: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16, key=str(seed).encode()).digest()


def _encoded(
    stream: Iterator[DrawnDocument], tokenizer: PreTrainedTokenizerFast, min_tokens: int, read: SourceRead
) -> Iterator[PackedDocument]:
    """Documents of at least ``min_tokens`` tokens; ``read`` counts the shorter ones."""
    while batch := list(islice(_long_enough(stream, min_tokens, read), _ENCODE_BATCH_DOCUMENTS)):
        encodings = encode_documents(tokenizer, [document.text for document in batch])
        for document, tokens in zip(batch, encodings, strict=True):
            if document.ended:
                tokens.append(tokenizer.eos_token_id)
            if len(tokens) < min_tokens:
                read.num_short += 1
                continue
            num_bytes = len(document.text.encode("utf-8"))
            yield PackedDocument(split=document.split, region=document.region, tokens=tokens, num_bytes=num_bytes)


def _long_enough(stream: Iterator[DrawnDocument], min_tokens: int, read: SourceRead) -> Iterator[DrawnDocument]:
    """Without what is short by its bytes already: to encode a whole corpus for its few long documents takes hours."""
    for document in stream:
        # A token is a byte at least; one more byte for the space that some tokenizers put before a text.
        if len(document.text.encode("utf-8")) + document.ended + 1 >= min_tokens:
            yield document
        else:
            read.num_short += 1


def _first_dry(reads: list[SourceRead]) -> SourceRead:
    """The source that ends the mixture: the least read for its weight."""
    return min(reads, key=lambda read: read.num_tokens / read.source.weight)


def _require_held_out(
    data: DataConfig, writers: Mapping[str, SplitWriter | HeldOutWriter], reads: list[SourceRead]
) -> None:
    """Raise ``ValueError`` for a held-out split short of its budget or an empty train split."""
    dry = _first_dry(reads)
    end = f"source {dry.name} (weight {dry.source.weight:g}) ended after {dry.num_tokens} tokens"
    way_out = "add text to it, lower its weight"
    if dry.num_short:
        end += f" and {dry.num_short} documents below data.long_document_tokens={data.long_document_tokens}"
        way_out += ", lower data.long_document_tokens"
    for split, writer in writers.items():
        require(
            writer.is_full or (split == "train" and writer.num_tokens > 0),
            f"data.{split}_tokens={writer.budget_tokens} asked, {writer.num_tokens} found: {end}; "
            f"{way_out}, or lower data.{split}_tokens",
        )

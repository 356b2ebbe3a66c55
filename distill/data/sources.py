"""Documents of text from the sources that a configuration names.

Torch-free. A source is an iterator of regions, stretches of neighbouring documents that are never torn apart between
the train split and a held-out one. Their order is a function of the seed alone.
"""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

from distill.config import SourceConfig, require

Item = TypeVar("Item")

MAX_DOCUMENT_CHARS = 8_192
"""Bound on one document cut from a larger file: a held-out split of 100,000 tokens still holds dozens of them."""

REGION_DOCUMENTS = 32
"""Most documents of a region: files of up to 256 KiB are one, so that they are held out whole; of a larger one, such as
a corpus in a single file, long stretches are."""

MIN_REGIONS = 32
"""A source of fewer files is cut into smaller regions until it has about so many: held-out splits need some of them."""

SHUFFLE_BUFFER_DOCUMENTS = 4_096
"""Documents held in memory while shuffling: at most 32 MiB of cut documents."""

SHUFFLE_BUFFER_LONG_DOCUMENTS = 256
"""The same where files are left whole."""

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
COMPRESSED_SUFFIXES: dict[str, Callable[..., TextIO]] = {".xz": lzma.open, ".gz": gzip.open}

# encodings is left out with the tests: most of it is tables of code points, one nearly the same as the next, and a
# held-out table would be no held-out text.
_NOT_TEXT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "encodings"}

_TOP_LEVEL_DEFINITION = re.compile(r"(def|class|async def)\b|@")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, never empty."""

    text: str
    ended: bool = True
    """Whether it stops where its author stopped; sampled text may be cut at a length."""


Region = tuple[Document, ...]
"""Neighbouring documents: a file, a part of a large one, or a row alone."""


def stdlib_files() -> list[Path]:
    """Source files of the running interpreter's standard library, sorted; tests and installed packages left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in root.rglob("*.py") if not _NOT_TEXT.intersection(file.relative_to(root).parts))
    return sorted(files)


def text_files(path: str) -> list[Path]:
    """Files that ``path`` (a file, a directory or a glob) stands for, sorted.

    Raises ``ValueError`` if nothing exists there or nothing there has a suffix of ``TEXT_SUFFIXES``.
    """
    if Path(path).is_dir():
        found = [file for file in Path(path).rglob("*") if file.is_file()]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True)]  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [file for file in found if file.is_file()]
        require(
            bool(found), f"data.sources: path={path} does not exist; give a file, a directory or a glob that matches"
        )
    files = sorted(file for file in found if _text_suffix(file) in TEXT_SUFFIXES)
    require(
        bool(files),
        f"data.sources: none of the {len(found)} files under path={path} ends in {' '.join(TEXT_SUFFIXES)} "
        f"(text may be compressed: {' '.join(COMPRESSED_SUFFIXES)}); rename or convert them",
    )
    return files


def regions(source: SourceConfig, *, seed: int, whole_files: bool = False) -> Iterator[Region]:
    """Regions of one source, shuffled: the order of files by the seed, then regions in a buffer.

    ``whole_files``: a text or source file is one document, however long; the buffer is then smaller.
    """
    if source.kind == "hub":
        stream = _each_alone(_hub_documents(source))
    else:
        files = stdlib_files() if source.kind == "python_stdlib" else text_files(str(source.path))
        random.Random(seed).shuffle(files)
        size = None if whole_files else _region_documents(files)
        stream = (region for file in files for region in _file_regions(file, source, size))
    buffer_documents = SHUFFLE_BUFFER_LONG_DOCUMENTS if whole_files else SHUFFLE_BUFFER_DOCUMENTS
    return shuffled(stream, seed=seed, buffer_size=buffer_documents, size=len)


def shuffled(
    items: Iterable[Item], *, seed: int, buffer_size: int, size: Callable[[Item], int] = lambda _: 1
) -> Iterator[Item]:
    """Shuffle a stream through a buffer whose items have at most ``buffer_size`` together."""
    rng = random.Random(seed)
    buffer: list[Item] = []
    filled = 0
    for item in items:
        buffer.append(item)
        filled += size(item)
        while filled > buffer_size:
            slot = rng.randrange(len(buffer))
            buffer[slot], buffer[-1] = buffer[-1], buffer[slot]
            drawn = buffer.pop()
            filled -= size(drawn)
            yield drawn
    rng.shuffle(buffer)
    yield from buffer


def interleave(
    streams: Sequence[Iterator[Item]], weights: Sequence[float], size: Callable[[Item], int]
) -> Iterator[tuple[int, Item]]:
    """Merge streams so that each one's share of the total size follows its weight; yields (stream index, item).

    Ends where the first stream runs dry, because beyond that point the weights could not hold.
    """
    taken = [0] * len(streams)
    while True:
        index = min(range(len(streams)), key=lambda i: taken[i] / weights[i])
        item = next(streams[index], None)
        if item is None:
            return
        taken[index] += size(item)
        yield index, item


def split_documents(
    lines: Iterable[str], *, starts_segment: Callable[[str, str], bool], max_chars: int = MAX_DOCUMENT_CHARS
) -> Iterator[str]:
    """Cut lines into documents of at most ``max_chars``, between segments wherever a segment fits.

    ``starts_segment(previous line, line)`` says where a cut is natural. A longer segment is cut between lines, a longer
    line anywhere.
    """
    document = ""
    for segment in _segments(lines, starts_segment, max_chars):
        if len(document) + len(segment) > max_chars:
            yield document
            document = ""
        document += segment
    yield document


def _segments(lines: Iterable[str], starts_segment: Callable[[str, str], bool], max_chars: int) -> Iterator[str]:
    segment, previous = "", ""
    for line in _bounded_lines(lines, max_chars):
        if starts_segment(previous, line) or len(segment) + len(line) > max_chars:
            yield segment
            segment = ""
        segment += line
        previous = line
    yield segment


def _bounded_lines(lines: Iterable[str], max_chars: int) -> Iterator[str]:
    for line in lines:
        for start in range(0, len(line), max_chars):
            yield line[start : start + max_chars]


def starts_definition(previous: str, line: str) -> bool:
    """A top-level def, class or decorator of Python source; what a decorator stands above stays with it."""
    return _TOP_LEVEL_DEFINITION.match(line) is not None and not previous.startswith("@")


def starts_paragraph(previous: str, line: str) -> bool:
    """The first line after blank ones."""
    return not previous.strip() and bool(line.strip())


def _text_suffix(file: Path) -> str:
    """Suffix that says the format, below a suffix of compression; '' for what cannot be read (compressed parquet)."""
    if file.suffix not in COMPRESSED_SUFFIXES:
        return file.suffix
    inner = Path(file.stem).suffix
    return "" if inner == ".parquet" else inner


def _region_documents(files: Sequence[Path]) -> int:
    """Documents to a region."""
    if len(files) >= MIN_REGIONS:
        return REGION_DOCUMENTS
    num_documents = sum(file.stat().st_size for file in files) // MAX_DOCUMENT_CHARS
    return min(REGION_DOCUMENTS, max(1, num_documents // MIN_REGIONS))


def _file_regions(file: Path, source: SourceConfig, region_documents: int | None) -> Iterator[Region]:
    """Regions of one file; where ``region_documents`` is None, the file is one document."""
    suffix = _text_suffix(file)
    if suffix == ".parquet":
        yield from _each_alone(_parquet_documents(file, source.text_field))
        return
    opener = COMPRESSED_SUFFIXES.get(file.suffix, open)
    try:
        with opener(file, mode="rt", encoding="utf-8") as lines:
            if suffix == ".jsonl":
                yield from _each_alone(_jsonl_documents(file, lines, source))
            elif region_documents is None:
                yield from _each_alone([Document(text=lines.read())])
            else:
                starts_segment = starts_definition if suffix == ".py" else starts_paragraph
                cut = (Document(text=text) for text in split_documents(lines, starts_segment=starts_segment))
                yield from _neighbours(cut, region_documents)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.sources: {file} is not UTF-8 ({error.reason}); convert it or leave it out of path"
        ) from error
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(
            f"data.sources: {file} cannot be decompressed ({error}); is it complete and rightly named?"
        ) from error


def _each_alone(documents: Iterable[Document]) -> Iterator[Region]:
    return ((document,) for document in documents if document.text.strip())


def _neighbours(documents: Iterable[Document], region_documents: int) -> Iterator[Region]:
    stream = (document for document in documents if document.text.strip())
    while region := tuple(islice(stream, region_documents)):
        yield region


def _jsonl_documents(file: Path, lines: Iterable[str], source: SourceConfig) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"data.sources: {where} is not JSON ({error.msg}); a .jsonl has one object per line"
            ) from error
        require(
            isinstance(row, dict), f"data.sources: {where} is a {type(row).__name__}; a .jsonl has one object per line"
        )
        # A column of that name in anyone else's text may mean anything.
        ended = bool(row["ended"]) if source.kind == "generated" else True
        yield Document(text=_row_text(row, source.text_field, where), ended=ended)


def _parquet_documents(file: Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data.sources: {file} is not a parquet file ({str(error).splitlines()[0]})") from error
    with table:
        _require_column(table.schema_arrow.names, text_field, str(file))
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield Document(text=_row_text({text_field: text}, text_field, str(file)))


def _hub_documents(source: SourceConfig) -> Iterator[Document]:
    from datasets import load_dataset

    rows = load_dataset(source.path, name=source.subset, split=source.split, revision=source.revision, streaming=True)
    for row in rows:
        yield Document(text=_row_text(row, source.text_field, f"{source.path}, split {source.split}"))


def _row_text(row: dict[str, Any], text_field: str, where: str) -> str:
    _require_column(row, text_field, where)
    text = row[text_field]
    if text is None:
        return ""
    require(
        isinstance(text, str),
        f"data.sources: text_field={text_field} of {where} is a {type(text).__name__}, not text; name a column of text",
    )
    # JSON can spell half a surrogate pair, which is no character and which no tokenizer takes.
    return str(text).encode("utf-8", errors="replace").decode("utf-8")


def _require_column(columns: Iterable[str], text_field: str, where: str) -> None:
    names = list(columns)
    require(
        text_field in names,
        f"data.sources: {where} has no column text_field={text_field}; set text_field to one of {', '.join(names)}",
    )

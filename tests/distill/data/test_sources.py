from __future__ import annotations

import gzip
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from distill.config import DataConfig, SourceConfig
from distill.data.sources import (
    MIN_REGIONS,
    REGION_DOCUMENTS,
    interleave,
    regions,
    shuffled,
    split_documents,
    starts_definition,
    stdlib_files,
    text_files,
)


def _texts(source: SourceConfig, *, seed: int = 0, whole_files: bool = False) -> list[str]:
    return [document.text for region in regions(source, seed=seed, whole_files=whole_files) for document in region]


def _text(path: Path, **settings: str) -> list[str]:
    return sorted(_texts(SourceConfig(kind="text", path=str(path), **settings)))


def test_stdlib_files_are_library_sources_without_tests() -> None:
    files = stdlib_files()
    names = {file.name for file in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert files == sorted(files)
    assert not any({"test", "tests", "site-packages", "__pycache__"} & set(file.parts) for file in files)


def test_stdlib_documents_hold_every_character_once() -> None:
    read = Counter[str]()
    for document in _texts(SourceConfig(kind="python_stdlib")):
        assert 0 < len(document) <= 8192
        read.update(document)
    expected = Counter[str]()
    for file in stdlib_files():
        text = file.read_text(encoding="utf-8")
        expected.update(text if text.strip() else "")
    assert read == expected


def test_order_depends_on_the_seed_alone() -> None:
    source = SourceConfig(kind="python_stdlib")
    first, again, other = (_texts(source, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_python_is_cut_before_definitions_and_not_below_a_decorator() -> None:
    lines = ["import os\n", "\n", "@cache\n", "def f():\n", "    return 1\n", "\n", "class A:\n", "    x = 1\n"]
    cut = list(split_documents(lines, starts_segment=starts_definition, max_chars=40))
    assert "".join(cut) == "".join(lines)
    assert cut == ["import os\n\n", "@cache\ndef f():\n    return 1\n\n", "class A:\n    x = 1\n"]


def test_long_lines_and_long_segments_are_bounded() -> None:
    lines = ["x" * 25 + "\n", "short\n", "another\n"]
    cut = list(split_documents(lines, starts_segment=lambda previous, line: False, max_chars=10))
    assert "".join(cut) == "".join(lines)
    assert max(map(len, cut)) <= 10


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"{letter * 5000}\n\n" for letter in "abc"]
    (tmp_path / "long.txt").write_text("".join(paragraphs))
    assert _text(tmp_path / "long.txt") == paragraphs


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py", ".txt.xz", ".md.gz"])
def test_text_kinds(tmp_path: Path, suffix: str) -> None:
    content = "Grüße\n\nzweite Zeile\n"
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(suffix).suffix, open)
    with opener(tmp_path / f"file{suffix}", "wt", encoding="utf-8") as stream:
        stream.write(content)
    assert _text(tmp_path) == [content]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".jsonl.gz"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    rows = [{"body": "one"}, {"body": "two\n\nparts"}, {"body": None}, {"body": " "}]
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(suffix).suffix, open)
    with opener(tmp_path / f"rows{suffix}", "wt", encoding="utf-8") as stream:
        stream.write("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert _text(tmp_path, text_field="body") == ["one", "two\n\nparts"]
    with pytest.raises(ValueError, match="no column text_field=text; set text_field to one of body"):
        _text(tmp_path)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(r'{"text": "a\ud83d b"}')
    assert _text(tmp_path) == ["a? b"]


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"document {i}" for i in range(600)], "number": list(range(600))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert _text(tmp_path / "*.parquet") == sorted(f"document {i}" for i in range(600))
    with pytest.raises(ValueError, match="no column text_field=body; set text_field to one of text, number"):
        _text(tmp_path, text_field="body")
    with pytest.raises(ValueError, match=r"text_field=number of .* is a int, not text"):
        _text(tmp_path, text_field="number")


def test_hub_reads_a_dataset_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    source = SourceConfig(kind="hub", path=str(tmp_path / "data"))
    assert sorted(_texts(source)) == ["one", "two"]


def test_directories_are_searched_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("z.md", "a/b/x.txt", "a/ignored.bin", "a/ignored.parquet.gz"):
        (tmp_path / name).write_text("text")
    assert text_files(str(tmp_path)) == [tmp_path / "a/b/x.txt", tmp_path / "z.md"]
    assert text_files(str(tmp_path / "**" / "*.txt")) == [tmp_path / "a/b/x.txt"]


def test_errors_name_the_file_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing does not exist; give a file, a directory or a glob"):
        text_files(str(tmp_path / "missing"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"none of the 1 files under .* ends in"):
        text_files(str(tmp_path))
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        _text(tmp_path)
    (tmp_path / "latin.txt").unlink()
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is not JSON"):
        _text(tmp_path / "rows.jsonl")
    (tmp_path / "plain.txt.xz").write_text("not compressed")
    with pytest.raises(ValueError, match=r"plain\.txt\.xz cannot be decompressed"):
        _text(tmp_path / "plain.txt.xz")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a parquet file"):
        _text(tmp_path / "bad.parquet")


def test_shuffle_with_a_small_buffer_loses_nothing() -> None:
    order = list(shuffled(range(100), seed=3, buffer_size=8))
    assert sorted(order) == list(range(100))
    assert order != list(range(100))
    assert order == list(shuffled(range(100), seed=3, buffer_size=8))


def test_interleave_follows_the_weights() -> None:
    streams = [iter(["aa"] * 1000), iter(["bbbb"] * 1000)]
    merged = list(islice(interleave(streams, [3.0, 1.0], size=len), 500))
    sizes = Counter[int]()
    for index, item in merged:
        sizes[index] += len(item)
    # The share is off by at most one item of each stream.
    assert abs(sizes[0] - 3 * sizes[1]) <= 2 + 3 * 4


def test_interleave_ends_with_the_first_dry_stream() -> None:
    merged = list(interleave([iter("a" * 3), iter("b" * 100)], [1.0, 1.0], size=len))
    assert "".join(item for _, item in merged) == "ababab"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "text"}, "kind=text needs a path"),
        ({"kind": "hub"}, "kind=hub needs a path"),
        ({"kind": "python_stdlib", "path": "x"}, "kind=python_stdlib has no use for path=x"),
        ({"kind": "text", "path": "x", "revision": "v1"}, "revision=v1 is for kind=hub, got kind=text"),
        ({"kind": "generated", "subset": "en"}, "subset=en is for kind=hub, got kind=generated"),
        ({"kind": "python_stdlib", "weight": 0.0}, "weight must be > 0, got 0.0"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(**settings)


def test_a_source_that_is_there_twice_is_refused() -> None:
    sources = (SourceConfig(kind="python_stdlib"), SourceConfig(kind="python_stdlib", weight=2.0))
    with pytest.raises(ValueError, match=r"kind=python_stdlib path=None is there twice; .* sum of the weights"):
        DataConfig(sources=sources, train_tokens=1, validation_tokens=1, calibration_tokens=1)


def test_whole_files_are_not_cut(tmp_path: Path) -> None:
    text = "".join(f"{letter * 5000}\n\n" for letter in "abc")
    (tmp_path / "long.txt").write_text(text)
    source = SourceConfig(kind="text", path=str(tmp_path / "long.txt"))
    assert _texts(source, whole_files=True) == [text]


def test_a_region_is_a_row_a_file_or_a_long_stretch_of_a_large_file(tmp_path: Path) -> None:
    paragraphs = [f"{number:06d} {'x' * 5000}\n\n" for number in range(2 * REGION_DOCUMENTS + 5)]
    (tmp_path / "large.txt").write_text("".join(paragraphs))
    for number in range(MIN_REGIONS):
        (tmp_path / f"small_{number}.txt").write_text("".join(paragraphs[:3]).upper())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(10)))
    found = list(regions(SourceConfig(kind="text", path=str(tmp_path)), seed=0))
    large = [region for region in found if "x" in region[0].text]
    assert sorted(map(len, large)) == [5, REGION_DOCUMENTS, REGION_DOCUMENTS]
    # Neighbours in the file are neighbours in the region.
    numbers = [[int(document.text[:6]) for document in region] for region in large]
    assert all(row == list(range(row[0], row[0] + len(row))) for row in numbers)
    assert [len(region) for region in found if "X" in region[0].text] == [3] * MIN_REGIONS
    assert [len(region) for region in found if "row" in region[0].text] == [1] * 10


def test_a_small_source_in_one_file_has_regions_to_hold_out(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("".join(f"{number:06d} {'x' * 8000}\n\n" for number in range(3 * MIN_REGIONS)))
    found = list(regions(SourceConfig(kind="text", path=str(tmp_path / "all.txt")), seed=0))
    # A little more than MIN_REGIONS: the size in documents is rounded down.
    assert MIN_REGIONS <= len(found) <= 2 * MIN_REGIONS


def test_shuffle_bounds_the_buffer_by_size() -> None:
    items = [(index,) * (1 + index % 5) for index in range(60)]
    pulled: list[int] = []

    def stream() -> Iterator[tuple[int, ...]]:
        for item in items:
            pulled.append(len(item))
            yield item

    drawn: list[tuple[int, ...]] = []
    for item in shuffled(stream(), seed=0, buffer_size=12, size=len):
        drawn.append(item)
        if len(pulled) < len(items):
            assert sum(pulled) - sum(map(len, drawn)) <= 12 + 5
    assert sorted(drawn) == items
    assert drawn != items


def test_sampled_text_says_whether_it_ended(tmp_path: Path) -> None:
    rows = [{"text": "whole", "ended": True}, {"text": "cut", "ended": False}]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, expected in (("generated", {"whole": True, "cut": False}), ("text", {"whole": True, "cut": True})):
        source = SourceConfig(kind=kind, path=str(tmp_path / "text.jsonl"))  # type: ignore[arg-type]
        found = {document.text: document.ended for region in regions(source, seed=0) for document in region}
        assert found == expected

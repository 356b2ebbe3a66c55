from __future__ import annotations

from pathlib import Path

import pytest

from distill.files import sha256_of, write_whole


def test_a_file_is_written_in_utf8_and_over_what_stood_there(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    for text in ("a long first text\n", "naïve\n"):
        write_whole(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.json"
    write_whole(path, "before")

    def torn(self: Path, text: str, encoding: str) -> int:
        with self.open("w", encoding=encoding) as file:
            file.write(text[:2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", torn)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, "after")
    assert path.read_text() == "before"
    # What is left over is written over by the next one.
    write_whole(path, "after")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "after"


def test_the_checksum_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # Of FIPS 180-2, appendix B.1.
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

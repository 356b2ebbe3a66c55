"""The writer's files as others read them, what it holds, and what a kill leaves behind."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from puzzle.model import tensor_reader
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import CheckpointWriter, TensorReader, load_model, read_architecture
from puzzle.model.safetensors_file import read_header
from puzzle.model.tensor_layout import tensor_shapes

LIMIT = 200_000
"""Bytes of a shard; the pico models have more than two."""


def random_tensors(architecture: Architecture, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(architecture)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(directory: Path, architecture: Architecture, tensors: dict[str, Tensor], **kwargs: Any) -> None:
    dtype = next(iter(tensors.values())).dtype
    with CheckpointWriter(directory, architecture, dtype=dtype, **kwargs) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def read_all(directory: Path) -> dict[str, Tensor]:
    with TensorReader(directory) as reader:
        return {name: reader.read(name) for name in reader.names()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_files_are_read_by_the_official_library(
    pico_architecture: Architecture, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = random_tensors(pico_architecture, dtype)
    write(tmp_path / "ours", pico_architecture, tensors)
    save_file(tensors, tmp_path / "official.safetensors", metadata={"format": "pt"})
    ours = tmp_path / "ours" / "model.safetensors"
    with safe_open(ours, framework="pt") as file, safe_open(tmp_path / "official.safetensors", "pt") as official:
        assert file.metadata() == official.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(official.keys()) == sorted(tensors)
        for name in tensors:
            assert file.get_tensor(name).dtype == dtype
            assert torch.equal(file.get_tensor(name), official.get_tensor(name))
    # The offsets in the file are those of aligned tensors.
    assert all(stored.offset % dtype.itemsize == 0 for stored in read_header(ours).values())
    assert int.from_bytes(ours.read_bytes()[:8], "little") % 8 == 0


def test_files_of_the_official_library_are_read(pico_architecture: Architecture, tmp_path: Path) -> None:
    tensors = random_tensors(pico_architecture) | {"scalar": torch.tensor(3, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors")
    with TensorReader(tmp_path) as reader:
        for name, tensor in tensors.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert torch.equal(reader.read(name), tensor)


def test_order_does_not_show(heterogeneous_architecture: Architecture, tmp_path: Path) -> None:
    tensors = random_tensors(heterogeneous_architecture)
    shuffled = list(tensors.items())
    random.Random(0).shuffle(shuffled)
    write(tmp_path / "ordered", heterogeneous_architecture, tensors, max_shard_bytes=LIMIT)
    write(tmp_path / "shuffled", heterogeneous_architecture, dict(shuffled), max_shard_bytes=LIMIT)
    assert len(list((tmp_path / "ordered").glob("*.safetensors"))) > 2
    assert contents(tmp_path / "ordered") == contents(tmp_path / "shuffled")


def test_tensor_is_on_disk_when_add_returns(heterogeneous_architecture: Architecture, tmp_path: Path) -> None:
    tensors = random_tensors(heterogeneous_architecture)
    writer = CheckpointWriter(tmp_path, heterogeneous_architecture, dtype=torch.float32, max_shard_bytes=LIMIT)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
        on_disk = b"".join(path.read_bytes() for path in tmp_path.glob("*.safetensors.part"))
        assert tensor.numpy().tobytes() in on_disk
    assert not list(tmp_path.glob("*.safetensors"))


def test_rows_come_one_after_another(pico_architecture: Architecture, tmp_path: Path) -> None:
    tensors = random_tensors(pico_architecture)
    with CheckpointWriter(tmp_path, pico_architecture, dtype=torch.float32) as writer:
        for name, tensor in tensors.items():
            writer.add_rows(name, tensor.double().split(7))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_all(tmp_path).items())


def test_too_few_and_too_many_rows_are_our_mistake(pico_architecture: Architecture, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, pico_architecture, dtype=torch.float32)
    with pytest.raises(AssertionError, match=r"4 of 256 bytes are missing"):
        writer.add_rows("model.norm.weight", [torch.zeros(63)])
    with pytest.raises(AssertionError, match="more than"):
        writer.add_rows("lm_head.weight", [torch.zeros(10_000, 64)])


def no_kernel_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two filesystems."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)


def half_kernel_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may copy less than it was asked for."""
    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *places: copy(a, b, min(count, 100), *places))


def no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range")


@pytest.mark.parametrize("limit", [None, no_kernel_copy, half_kernel_copy, no_such_call])
def test_copied_tensors_keep_every_bit(
    pico_architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: Any
) -> None:
    tensors = random_tensors(pico_architecture, torch.bfloat16)
    # A signalling NaN, which arithmetic would make a quiet one.
    tensors["model.norm.weight"].view(torch.int16)[:2] = 0x7F81
    write(tmp_path / "source", pico_architecture, tensors, max_shard_bytes=LIMIT)
    if limit:
        limit(monkeypatch)
    with (
        TensorReader(tmp_path / "source") as reader,
        CheckpointWriter(tmp_path / "out", pico_architecture, dtype=torch.bfloat16, max_shard_bytes=LIMIT) as writer,
    ):
        for name in reversed(reader.names()):
            writer.copy(name, reader)
    assert contents(tmp_path / "source") == contents(tmp_path / "out")


def test_copies_are_stacked_and_converted(pico_architecture: Architecture, tmp_path: Path) -> None:
    tensors = random_tensors(pico_architecture)
    halves = tensors | {f"half.{half}": rows for half, rows in enumerate(tensors["lm_head.weight"].split(120))}
    del halves["lm_head.weight"]
    save_file(halves, tmp_path / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype)
        with TensorReader(tmp_path) as reader, CheckpointWriter(out, pico_architecture, dtype=dtype) as writer:
            for name in tensors:
                sources = [name] if name in reader else [source for source in sorted(halves) if "half" in source]
                writer.copy(name, reader, *sources)
        assert all(torch.equal(tensor, tensors[name].to(dtype)) for name, tensor in read_all(out).items())


def test_copy_of_another_shape_is_refused(pico_architecture: Architecture, tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    writer = CheckpointWriter(tmp_path / "out", pico_architecture, dtype=torch.float32)
    with TensorReader(tmp_path) as reader, pytest.raises(ValueError, match=r"has shape \[3\], expected \[64\]"):
        writer.copy("model.norm.weight", reader)
    with TensorReader(tmp_path) as reader, pytest.raises(ValueError, match=r"has no tensor 'lm_head.weight'"):
        writer.copy("lm_head.weight", reader)


def test_reader_reads_rows(pico_architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors(pico_architecture, torch.bfloat16)
    write(tmp_path, pico_architecture, tensors, max_shard_bytes=LIMIT)
    # Three rows of the head and a bit: chunks are whole rows.
    monkeypatch.setattr(tensor_reader, "CHUNK_BYTES", 3 * 64 * 2 + 10)
    with TensorReader(tmp_path) as reader:
        assert torch.equal(reader.rows("lm_head.weight", 5, 9), tensors["lm_head.weight"][5:9])
        chunks = list(reader.row_chunks("lm_head.weight"))
        assert {len(chunk) for chunk in chunks[:-1]} == {3}
        assert torch.equal(torch.cat(chunks), tensors["lm_head.weight"])
        assert torch.equal(torch.cat(list(reader.row_chunks("model.norm.weight"))), tensors["model.norm.weight"])


def header_bytes(header: Any, num_bytes: int) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + bytes(num_bytes)


def entry(begin: int, end: int, **fields: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end]} | fields


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "claims a header of 0 bytes"),
        (b"\xff" * 100, "claims a header of"),
        (header_bytes(b"{]", 0), "Expecting"),
        (header_bytes([1], 0), "pop"),
        (header_bytes({"a": {"dtype": "F32"}}, 8), "data_offsets"),
        (header_bytes({"a": entry(0, 8, shape=[3])}, 8), r"F32 of shape \[3\] takes 12 bytes, not 8"),
        (header_bytes({"a": entry(0, 8)}, 7), r"it has \d+ bytes, its header describes \d+"),
        (header_bytes({"a": entry(0, 8)}, 9), r"it has \d+ bytes, its header describes \d+"),
        (header_bytes({"a": entry(0, 8), "b": entry(4, 12)}, 12), "leave a gap or overlap"),
        (header_bytes({"a": entry(8, 16)}, 16), "leave a gap or overlap"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"no readable safetensors file: .*{message}") as error:
        TensorReader(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_file_that_shrinks_while_it_is_read(pico_architecture: Architecture, tmp_path: Path) -> None:
    write(tmp_path, pico_architecture, random_tensors(pico_architecture))
    with TensorReader(tmp_path) as reader:
        os.truncate(tmp_path / "model.safetensors", 5_000)
        with pytest.raises(ValueError, match=r"ends before byte \d+, which its header promises"):
            reader.read("lm_head.weight")
        writer = CheckpointWriter(tmp_path / "out", pico_architecture, dtype=torch.float32)
        with pytest.raises(ValueError, match=r"ends before byte \d+, which its header promises"):
            writer.copy("lm_head.weight", reader)


class Killed(BaseException):
    """As SIGKILL leaves it: no handler cleans up."""


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Die in place of the call number ``moment`` that changes the disk."""
    calls = iter(range(1_000_000))

    def deadly(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (os, "pwrite"),
        (shutil, "copyfile"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "write_bytes"),
        (Path, "write_text"),
    ):
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))


def test_kill_at_any_moment_leaves_no_model(
    heterogeneous_architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(heterogeneous_architecture)
    moment = 0
    while True:
        directory = tmp_path / str(moment)
        try:
            with monkeypatch.context() as patch:
                kill_at(patch, moment)
                write(directory, heterogeneous_architecture, tensors, max_shard_bytes=LIMIT)
            break
        except Killed:
            for read in (read_architecture, load_model):
                with pytest.raises(ValueError, match=r"has no config.json"):
                    read(directory)
        moment += 1
    # One per tensor and per file's header, name and text at least: none was passed over.
    assert moment > len(tensors) + 2 * len(list(directory.glob("*.safetensors")))
    assert not list(directory.glob("*.part"))
    assert read_architecture(directory) == heterogeneous_architecture
    assert torch.equal(load_model(directory).lm_head.weight, tensors["lm_head.weight"])


def test_torn_directory_is_not_written_over(pico_architecture: Architecture, tmp_path: Path) -> None:
    CheckpointWriter(tmp_path, pico_architecture, dtype=torch.float32).add("model.norm.weight", torch.ones(64))
    with pytest.raises(ValueError, match="already holds weights"):
        CheckpointWriter(tmp_path, pico_architecture, dtype=torch.float32)

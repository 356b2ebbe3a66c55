"""Checkpoints copied tensor by tensor: whole, renamed, with some tensors from elsewhere, and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puzzle.model import safetensors_file, shard_writer
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import (
    CheckpointWriter,
    TensorReader,
    build_model,
    check_tensors,
    copy_checkpoint,
    read_architecture,
    save_model,
)
from puzzle.model.tensor_layout import tensor_shapes
from puzzle.model.tensor_reader import INDEX_FILE

GATE = "model.layers.1.mlp.gate_proj.weight"


def read_all(directory: Path) -> dict[str, Tensor]:
    with TensorReader(directory) as reader:
        return {name: reader.read(name) for name in reader.names()}


def save(directory: Path, architecture: Architecture, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    save_model(
        build_model(architecture, seed=5), directory, architecture=architecture, tokenizer_from=None, dtype=dtype
    )
    return read_all(directory)


def save_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_copy_has_the_same_bytes_and_holds_no_tensor(
    heterogeneous_architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "source", heterogeneous_architecture)

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor that is only moved passes through memory")

    with monkeypatch.context() as patch, TensorReader(tmp_path / "source") as reader:
        patch.setattr(safetensors_file, "read_into", refuse)
        patch.setattr(shard_writer, "write_from", refuse)
        copy_checkpoint(reader, tmp_path / "out", heterogeneous_architecture)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_renamed_tensors_and_tensors_from_elsewhere(pico_architecture: Architecture, tmp_path: Path) -> None:
    tensors = save(tmp_path / "source", pico_architecture)
    trained = {GATE: torch.ones(tensor_shapes(pico_architecture)[GATE], dtype=torch.float32)}
    save_tensors(tmp_path / "trained", trained)
    other = "model.layers.0.mlp.up_proj.weight"
    names = {name: name for name in tensors} | {other: "model.layers.2.mlp.up_proj.weight"}
    with TensorReader(tmp_path / "source") as reader, TensorReader(tmp_path / "trained") as instead:
        copy_checkpoint(reader, tmp_path / "out", pico_architecture, names=names, instead=(instead,))
    found = read_all(tmp_path / "out")
    # The data type is that of the source.
    expected = tensors | {GATE: trained[GATE].bfloat16(), other: tensors[names[other]]}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor), name
    assert read_architecture(tmp_path / "out") == pico_architecture


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors[GATE] = tensors[GATE][:8].clone()


def quantise(tensors: dict[str, Tensor]) -> None:
    tensors[GATE] = tensors[GATE].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(GATE), rf"it lacks \['{GATE}'\] and has \[\] besides"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"it lacks \[\] and has \['extra'\] besides"),
        (narrow, rf"{GATE} is \[8, 64\], config.json says \[\d+, 64\]; make the model anew"),
        (quantise, rf"{GATE} is stored as F8_E4M3, not as one of"),
    ],
    ids=["missing", "unknown", "another_shape", "quantised"],
)
def test_source_that_is_not_what_its_configuration_says(
    pico_architecture: Architecture, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = save(tmp_path / "source", pico_architecture)
    damage(tensors)
    save_tensors(tmp_path / "source", tensors)
    with TensorReader(tmp_path / "source") as reader:
        with pytest.raises(ValueError, match=message):
            check_tensors(reader, pico_architecture)
        with pytest.raises(ValueError, match=message):
            copy_checkpoint(reader, tmp_path / "out", pico_architecture)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (narrow, rf"trained: {GATE} is \[8, 64\], needed is \[\d+, 64\]"),
        (quantise, rf"trained: {GATE} is stored as F8_E4M3"),
    ],
)
def test_tensors_from_elsewhere_that_do_not_fit(
    pico_architecture: Architecture, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    trained = {GATE: save(tmp_path / "source", pico_architecture)[GATE]}
    damage(trained)
    save_tensors(tmp_path / "trained", trained)
    with (
        TensorReader(tmp_path / "source") as reader,
        TensorReader(tmp_path / "trained") as instead,
        pytest.raises(ValueError, match=message),
    ):
        copy_checkpoint(reader, tmp_path / "out", pico_architecture, instead=(instead,))
    assert not (tmp_path / "out").exists()


def test_cut_off_shard_is_refused_before_anything_is_written(pico_architecture: Architecture, tmp_path: Path) -> None:
    source, tensors = tmp_path / "source", save(tmp_path / "whole", pico_architecture)
    with CheckpointWriter(source, pico_architecture, dtype=torch.bfloat16, max_shard_bytes=100_000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    shard = max(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with (
        TensorReader(source) as reader,
        pytest.raises(ValueError, match=rf"{shard.name} is no readable safetensors file: it has \d+ bytes"),
    ):
        copy_checkpoint(reader, tmp_path / "out", pico_architecture)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has no weight_map from tensors to files"),
        ('{"weight_map": null}', "has no weight_map from tensors to files"),
        ('{"weight_map": ["model.safetensors"]}', "has no weight_map from tensors to files"),
        ('{"weight_map": {"lm_head.weight": 3}}', "has no weight_map from tensors to files"),
        ("[]", "holds a list, expected a JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_index_that_is_none_is_named(
    pico_architecture: Architecture, tmp_path: Path, content: str, message: str
) -> None:
    save(tmp_path, pico_architecture)
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{INDEX_FILE} {message}") as error:
        TensorReader(tmp_path)
    assert "\n" not in str(error.value)


def test_shard_that_is_damaged_shows_when_it_is_read(pico_architecture: Architecture, tmp_path: Path) -> None:
    """Opening a model of hundreds of shards reads none of them."""
    tensors = save(tmp_path / "whole", pico_architecture)
    source = tmp_path / "source"
    with CheckpointWriter(source, pico_architecture, dtype=torch.bfloat16, max_shard_bytes=100_000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    shard = min(source.glob("*.safetensors"))
    damaged = set(load_file(shard))
    shard.write_bytes(b"not safetensors")
    with TensorReader(source) as reader:
        for name in sorted(tensors.keys() - damaged):
            assert torch.equal(reader.read(name), tensors[name])
        with pytest.raises(ValueError, match="no readable safetensors file"):
            reader.shape(min(damaged))

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.config import RopeConfig
from distill.data.tokenizer import load_tokenizer
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, build_model, load_model, read_architecture, save_model
from puzzle.model.provider import DirectoryProvider

CPU = torch.device("cpu")


@pytest.fixture(params=["untied", "tied"])
def directory(
    request: pytest.FixtureRequest, heterogeneous_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path
) -> Path:
    """Every kind of block, in bf16, with a head of its own or a tied one."""
    architecture = replace(heterogeneous_architecture, tie_embeddings=request.param == "tied")
    model = build_model(architecture, seed=3)
    path = tmp_path / "model"
    save_model(model, path, architecture=architecture, tokenizer_from=pico_parent_dir, dtype=torch.bfloat16)
    return path


def test_the_empty_module_has_the_parameters_of_the_directory(directory: Path) -> None:
    provider = DirectoryProvider(directory)
    parameters = dict(provider.empty().named_parameters())
    assert sorted(parameters) == sorted(provider.names())
    with TensorReader(directory) as reader:
        assert sorted(reader.names()) == sorted(provider.names())
        for name, parameter in parameters.items():
            assert (parameter.device.type, parameter.dtype) == ("meta", torch.float32)
            assert tuple(parameter.shape) == reader.shape(name)
    assert provider.num_blocks == 6
    assert provider.dtype == torch.bfloat16


def test_loading_is_the_module_filled_tensor_by_tensor(directory: Path) -> None:
    provider = DirectoryProvider(directory)
    filled = provider.empty().to_empty(device=CPU)
    filled.tie_weights()  # to_empty makes two parameters of a tied one
    with torch.no_grad():
        for name, parameter in filled.named_parameters():
            parameter.copy_(provider.read(name))
    loaded = provider.load(device=CPU, dtype=torch.float32)
    assert not loaded.training
    input_ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(filled(input_ids).logits, loaded(input_ids).logits)


def test_writing_gives_the_directory_back(directory: Path, tmp_path: Path) -> None:
    provider = DirectoryProvider(directory)
    out = tmp_path / "out"
    # Wider than stored, and in another order: the stored data type comes back exactly.
    provider.write(out, ((name, provider.read(name).float()) for name in reversed(provider.names())))
    assert read_architecture(out) == read_architecture(directory)
    with TensorReader(out) as written, TensorReader(directory) as stored:
        assert written.names() == stored.names()
        for name in stored.names():
            assert written.dtype(name) == torch.bfloat16
            assert torch.equal(written.read(name), stored.read(name))
    assert load_tokenizer(out).get_vocab() == load_tokenizer(directory).get_vocab()


def test_another_architecture_with_the_same_tensors_takes_its_place(directory: Path, tmp_path: Path) -> None:
    longer = replace(read_architecture(directory), max_positions=1024, rope=RopeConfig(theta=50_000.0))
    provider = DirectoryProvider(directory, longer, written_dtype=torch.float32)
    model = provider.load(device=CPU, dtype=torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == longer.tie_embeddings
    input_ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        # The weights are those of the directory, the rotary angles are not.
        before = load_model(directory, dtype=torch.float32)(input_ids).logits
        assert not torch.allclose(model(input_ids).logits, before)
    out = tmp_path / "out"
    provider.write(out, ((name, provider.read(name)) for name in provider.names()))
    assert read_architecture(out) == longer
    with torch.no_grad():
        assert torch.equal(load_model(out)(input_ids).logits, model(input_ids).logits)


def test_an_architecture_with_other_tensors_is_refused(directory: Path) -> None:
    other = replace(read_architecture(directory), vocab_size=512)
    with pytest.raises(ValueError, match="its tensors are not those of the architecture that is to take its place"):
        DirectoryProvider(directory, other)


def test_a_directory_that_is_not_what_it_says_is_refused_before_weights_are_read(
    pico_parent_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").symlink_to(pico_parent_dir / "model.safetensors")
    text = (pico_parent_dir / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"vocab_size": 320', '"vocab_size": 384'))
    with pytest.raises(ValueError, match=r"is \[320, 64\], config.json says \[384, 64\]"):
        DirectoryProvider(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[1:], "1 tensors were not written"),
        (lambda tensors: [*tensors, tensors[0]], "is not a tensor that the architecture still lacks"),
        (lambda tensors: [(tensors[0][0], tensors[0][1][:-1]), *tensors[1:]], "has shape"),
    ],
)
def test_writing_other_tensors_is_refused_and_leaves_no_model(
    pico_parent_dir: Path, tmp_path: Path, change: object, message: str
) -> None:
    provider = DirectoryProvider(pico_parent_dir)
    tensors = [(name, provider.read(name)) for name in provider.names()]
    with pytest.raises(ValueError, match=message):
        provider.write(tmp_path / "out", change(tensors))  # type: ignore[operator]
    assert not (tmp_path / "out" / "config.json").exists()


def test_rows_are_read_as_they_stand_in_the_whole(pico_parent_dir: Path) -> None:
    provider = DirectoryProvider(pico_parent_dir)
    for name in provider.names():
        whole = provider.read(name)
        assert torch.equal(provider.read(name, range(1, len(whole) - 1)), whole[1:-1])
        assert provider.read(name, range(len(whole), len(whole))).shape == (0, *whole.shape[1:])


def test_it_can_be_sent_to_another_process(pico_parent_dir: Path) -> None:
    provider = pickle.loads(pickle.dumps(DirectoryProvider(pico_parent_dir)))
    name = provider.names()[0]
    with TensorReader(pico_parent_dir) as reader:
        assert torch.equal(provider.read(name), reader.read(name))


def test_megatron_is_told_the_architecture(pico_parent_dir: Path, pico_architecture: Architecture) -> None:
    pytest.importorskip("megatron.core")
    longer = replace(pico_architecture, max_positions=1024)
    assert DirectoryProvider(pico_parent_dir, longer).megatron().architecture == longer


def test_megatron_refuses_blocks_that_do_not_rotate(pico_parent_dir: Path, pico_architecture: Architecture) -> None:
    pytest.importorskip("megatron.core")
    own = pico_architecture.blocks[2]
    still = pico_architecture.with_block(2, replace(own, attention=replace(own.attention, rope=False)))
    with pytest.raises(ValueError, match=r"rotates queries and keys .* does not in blocks \[2\]; train it with engine"):
        DirectoryProvider(pico_parent_dir, still).megatron()

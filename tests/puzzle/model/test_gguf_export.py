"""GGUF files that we write, read back by the gguf package and by our own import; llama.cpp does in tests/readers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")

from distill.config import RopeConfig  # noqa: E402
from puzzle.model.architecture import (  # noqa: E402
    NO_ATTENTION,
    Architecture,
    AttentionConfig,
    BlockConfig,
    FFNConfig,
)
from puzzle.model.checkpoint import TensorReader, build_model, save_model  # noqa: E402
from puzzle.model.gguf_export import require_storable, write_gguf  # noqa: E402
from puzzle.model.gguf_vocabulary import read_vocabulary  # noqa: E402
from puzzle.model.rewritten_tensors import rewritten_tensors  # noqa: E402
from puzzle.model.tensor_layout import tensor_shapes  # noqa: E402

KV2, KV1 = AttentionConfig(num_kv_heads=2), AttentionConfig(num_kv_heads=1)
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@pytest.fixture
def architecture(pico_architecture: Architecture) -> Architecture:
    """Whole, FFN alone and wide, one KV head; scaled rotary positions."""
    subblocks = ((KV2, 512), (NO_ATTENTION, 1024), (KV1, 256))
    blocks = tuple(
        BlockConfig(attention=attention, ffn=FFNConfig(ffn_dim=width), parent_block_indices=(index,))
        for index, (attention, width) in enumerate(subblocks)
    )
    rope = RopeConfig(
        theta=1e4, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    )
    return replace(pico_architecture, blocks=blocks, rope=rope)


def _write(path: Path, architecture: Architecture, tokenizer: Path, dtype: torch.dtype) -> Path:
    """The model directory whose weights went into the GGUF file ``path``."""
    model_dir = path.with_suffix("")
    save_model(
        build_model(architecture, seed=0, dtype=dtype), model_dir, architecture=architecture, tokenizer_from=tokenizer
    )
    with TensorReader(model_dir) as reader:
        write_gguf(
            path,
            architecture,
            rewritten_tensors(reader, architecture, architecture),
            dtype=dtype,
            vocabulary=read_vocabulary(model_dir, architecture.vocab_size),
            tokenizer_from=model_dir,
        )
    return model_dir


def _tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with TensorReader(directory) as reader:
        yield from ((name, reader.read(name)) for name in sorted(reader.names()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_keep_their_type_and_vectors_become_fp32(
    tmp_path: Path, architecture: Architecture, pico_parent_dir: Path, dtype: torch.dtype
) -> None:
    _write(tmp_path / "model.gguf", architecture, pico_parent_dir, dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types[name] for name in types if "norm" in name or name == "rope_freqs.weight"} == {"F32"}
    assert {types[name] for name in types if "norm" not in name and name != "rope_freqs.weight"} == {DTYPES[dtype]}
    assert len(types) == len(tensor_shapes(architecture)) + 1
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [4, 0, 4]
    assert fields["deci.attention.head_count_kv"] == [2, 0, 1]
    assert fields["deci.feed_forward_length"] == [512, 1024, 256]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == 16
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert fields["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_there_unrounded(
    tmp_path: Path, architecture: Architecture, pico_parent_dir: Path, dtype: torch.dtype
) -> None:
    model_dir = _write(tmp_path / "model.gguf", architecture, pico_parent_dir, dtype)
    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    written = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, architecture.num_blocks)
    for name, tensor in _tensors(model_dir):
        theirs = written[names.get_name(name, try_suffixes=(".weight",))]
        # The rows of rotated heads change places, and nothing else.
        rows = (theirs.sort(dim=0).values, tensor.float().sort(dim=0).values)
        assert torch.equal(*(rows if name.endswith(("q_proj.weight", "k_proj.weight")) else (theirs, tensor.float())))


def test_llama3_scaling_becomes_divisors_of_the_frequencies(
    tmp_path: Path, architecture: Architecture, pico_parent_dir: Path
) -> None:
    _write(tmp_path / "model.gguf", architecture, pico_parent_dir, torch.float32)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    factors = tensors["rope_freqs.weight"]
    # Wavelengths below 16 positions stay, those above 64 become eight times as long.
    assert factors.shape == (8,)
    assert factors[0] == pytest.approx(1.0)
    assert 1.0 < factors[1] < factors[2] < 8.0
    assert factors[-1] == pytest.approx(8.0)
    assert (factors[1:] >= factors[:-1] * (1 - 1e-6)).all()


def test_rows_of_a_rotated_head_are_neighbours(
    tmp_path: Path, architecture: Architecture, pico_parent_dir: Path
) -> None:
    model_dir = _write(tmp_path / "model.gguf", architecture, pico_parent_dir, torch.float32)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    ours = dict(_tensors(model_dir))["model.layers.2.self_attn.k_proj.weight"]
    assert torch.equal(tensors["blk.2.attn_k.weight"][0::2], ours[:8])
    assert torch.equal(tensors["blk.2.attn_k.weight"][1::2], ours[8:])


def test_other_data_types_are_refused(architecture: Architecture) -> None:
    with pytest.raises(ValueError, match="stored as float64; GGUF takes float32, float16, bfloat16"):
        require_storable(architecture, torch.float64)

"""A model as one GGUF file of llama.cpp's ``deci`` architecture, streamed tensor by tensor and without rounding.

Matrices keep their data type, vectors become fp32, as llama.cpp wants them. It turns neighbouring channels together in
its rotary embedding where transformers turns halves, so the rows of query and key projections change places.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from distill.config import require
from puzzle.model.architecture import Architecture
from puzzle.model.configuration_decilm import DeciLMConfig
from puzzle.model.gguf_header import ROPE_FACTORS
from puzzle.model.gguf_rotary import ROTATED, rotary_neighbours
from puzzle.model.gguf_vocabulary import Vocabulary
from puzzle.model.hf_config import hf_config
from puzzle.model.tensor_layout import tensor_shapes

GGUF_NAME = "model.gguf"

_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def require_storable(architecture: Architecture, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` where a GGUF file cannot hold weights of ``dtype``."""
    known = ", ".join(str(known).removeprefix("torch.") for known in _TYPES)
    require(dtype in _TYPES, f"the model is stored as {str(dtype).removeprefix('torch.')}; GGUF takes {known}")


def write_gguf(
    path: Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    vocabulary: Vocabulary,
    tokenizer_from: Path,
) -> None:
    """Write ``tensors`` of ``architecture`` as the GGUF file ``path``.

    Args:
        tensors: name and tensor, in the order of :func:`puzzle.model.tensor_layout.tensor_shapes`.
        dtype: data type of matrices, one of fp32, fp16 and bf16.
        vocabulary: of the tokenizer in ``tokenizer_from``.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DECI])
    _add_settings(writer, architecture, dtype)
    vocabulary.add_to(writer, tokenizer_from)
    factors = _rope_factors(architecture)
    if factors is not None:
        _announce(writer, ROPE_FACTORS, tuple(factors.shape), dtype)
    shapes = tensor_shapes(architecture)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, architecture.num_blocks)
    for name, shape in shapes.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        _announce(writer, gguf_name, shape, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        if factors is not None:
            _write(writer, factors, dtype)
        for expected, (name, tensor) in zip(shapes, tensors, strict=True):
            assert name == expected, f"{name} comes in place of {expected}"
            rotated = name.endswith(ROTATED)
            _write(writer, rotary_neighbours(tensor, head_dim=architecture.head_dim) if rotated else tensor, dtype)
    finally:
        writer.close()


def _add_settings(writer: gguf.GGUFWriter, architecture: Architecture, dtype: torch.dtype) -> None:
    a, blocks = architecture, architecture.blocks
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(_TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(a.vocab_size)
    writer.add_context_length(a.max_positions)
    writer.add_embedding_length(a.hidden_dim)
    writer.add_block_count(a.num_blocks)
    # A block with heads and no KV heads has a linear layer for an attention.
    writer.add_head_count([0 if block.attention.is_no_op else a.num_heads for block in blocks])
    writer.add_head_count_kv([block.attention.num_kv_heads or 0 for block in blocks])
    writer.add_feed_forward_length([block.ffn.ffn_dim or 0 for block in blocks])
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(a.rope.theta)
    if a.rope.kind in ("linear", "yarn"):
        assert a.rope.factor is not None
        writer.add_rope_scaling_type(gguf.RopeScalingType(a.rope.kind))
        writer.add_rope_scaling_factor(a.rope.factor)
        if a.rope.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(a.rope.original_max_positions or a.max_positions)


def _rope_factors(architecture: Architecture) -> Tensor | None:
    """What llama.cpp divides the base frequencies by for llama3 scaling, [head_dim / 2]; None: nothing."""
    if architecture.rope.kind != "llama3":
        return None
    config = DeciLMConfig(**hf_config(architecture, "float32"))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float) / architecture.head_dim
    return architecture.rope.theta**-exponents / scaled


def _storage(shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    return dtype if len(shape) > 1 else torch.float32


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stored = _storage(shape, dtype)
    num_bytes = torch.Size(shape).numel() * stored.itemsize
    writer.add_tensor_info(name, shape, _array_type(stored), num_bytes, raw_dtype=_TYPES[stored][0])


def _array_type(stored: torch.dtype) -> type:
    # numpy has no bfloat16: its bits travel as integers.
    view = torch.empty((), dtype=torch.int16 if stored == torch.bfloat16 else stored)
    return view.numpy().dtype


def _write(writer: gguf.GGUFWriter, tensor: Tensor, dtype: torch.dtype) -> None:
    stored = tensor.to(_storage(tuple(tensor.shape), dtype)).contiguous()
    writer.write_tensor_data((stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored).numpy())

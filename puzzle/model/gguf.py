"""Import of a parent from a GGUF file of llama.cpp: its ``llama``, ``qwen2``, ``qwen3`` and ``deci`` architectures.

Streamed tensor by tensor: quantised weights are dequantised on the way. In ``llama`` and ``deci`` files the rows of the
query and key projections are in the order of llama.cpp's own rotary embedding; the import puts them back. Everything
that the header says of the architecture must be understood: what is not is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.config import require
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import CheckpointWriter
from puzzle.model.convert import check_tensors, pad_ffn
from puzzle.model.gguf_header import ROPE_FACTORS, GGUFHeader
from puzzle.model.gguf_rotary import ROTATED, rotary_halves
from puzzle.model.parent_layout import ParentLayout

_ELSEWHERE = "import the Hugging Face checkpoint instead"


def import_gguf(source: Path, out: Path, *, dtype: torch.dtype) -> Architecture:
    """Write the model of GGUF file ``source`` to directory ``out``, with its tokenizer.

    Raises:
        ValueError: not a whole GGUF file, an architecture, a setting, a quantisation or a tokenizer that is not
            supported, or tensors that are missing or unexpected. Nothing is written then.
    """
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(
            f"model.source={source} is not a readable GGUF file ({error}); is the download complete?"
        ) from error
    header = GGUFHeader(reader, source)
    layout = header.layout()
    architecture = layout.architecture
    stored = {tensor.name: tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS}
    names = _stored_names(layout, header.kind)
    expected = {names[name]: shape for name, shape in layout.unpadded_shapes().items()}
    found = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in stored.items()}
    check_tensors(expected, found, source, said_by="the header")
    _require_readable(reader, source)
    tokenizer = _tokenizer(source, header.kind)
    with CheckpointWriter(out, architecture, dtype=dtype) as writer:
        for name, stored_name in tqdm(names.items(), desc="import", unit="tensor", leave=False):
            tensor = stored[stored_name]
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
            if header.turns_neighbours and name.endswith(ROTATED):
                weight = rotary_halves(weight, head_dim=architecture.head_dim)
            writer.add(name, pad_ffn(name, weight, architecture))
    tokenizer.save_pretrained(out)
    return architecture


def _stored_names(layout: ParentLayout, kind: gguf.MODEL_ARCH) -> dict[str, str]:
    """Name of every tensor of ours in the file."""
    table = gguf.get_tensor_name_map(kind, layout.architecture.num_blocks)
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in layout.unpadded_shapes()}
    missing = sorted(name for name, stored in names.items() if stored is None)
    require(not missing, f"a GGUF file has no place for {', '.join(missing[:3])}; {_ELSEWHERE}")
    return {name: str(stored) for name, stored in names.items()}


def _require_readable(reader: gguf.GGUFReader, source: Path) -> None:
    for kind in sorted({tensor.tensor_type for tensor in reader.tensors}):
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros(block_bytes, dtype=np.uint8), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"model.source={source} has weights of type {kind.name}, which package gguf cannot dequantise; take "
                "another quantisation of this model, or its Hugging Face checkpoint"
            ) from error


def _tokenizer(source: Path, kind: gguf.MODEL_ARCH) -> PreTrainedTokenizerBase:
    # transformers reads the vocabulary of a deci file, but has no configuration of that name to choose a class by.
    chooser: Any = PreTrainedTokenizerFast if kind == gguf.MODEL_ARCH.DECI else AutoTokenizer
    try:
        tokenizer = chooser.from_pretrained(source.parent, gguf_file=source.name)
    except (ValueError, KeyError, NotImplementedError, TypeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"model.source={source}: its tokenizer cannot be read ({reason}); {_ELSEWHERE}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer

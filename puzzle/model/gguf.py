"""Import of a parent from a GGUF file of llama.cpp's ``llama`` architecture.

Streamed tensor by tensor: quantised weights are dequantised on the way. llama.cpp stores the rows of the query and key
projections in the order of its own rotary embedding; the import puts them back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from distill.config import RopeConfig, require
from puzzle.model.architecture import Architecture, dense_blocks, round_up_ffn_dim
from puzzle.model.checkpoint import CheckpointWriter
from puzzle.model.convert import check_tensors, pad_ffn

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_ROTATED = (".attn_q.weight", ".attn_k.weight")


def import_gguf(source: Path, out: Path, *, dtype: torch.dtype) -> Architecture:
    """Write the model of GGUF file ``source`` to directory ``out``, with its tokenizer.

    Raises:
        ValueError: not a GGUF file, another architecture than llama, or tensors that are missing or unexpected. Nothing
            is written then.
    """
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(
            f"model.source={source} is not a readable GGUF file ({error}); is the download complete?"
        ) from error
    architecture = _architecture(reader, source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {our_name(name): tuple(map(int, reversed(tensor.shape))) for name, tensor in tensors.items()}
    check_tensors(architecture, shapes, source)
    with CheckpointWriter(out, architecture, dtype=dtype) as writer:
        for name, tensor in tqdm(tensors.items(), desc="import", unit="tensor", leave=False):
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
            if name.endswith(_ROTATED):
                weight = undo_rotary_order(weight, head_dim=architecture.head_dim)
            writer.add(our_name(name), pad_ffn(our_name(name), weight, architecture))
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)
    return architecture


def our_name(name: str) -> str:
    """Name of a GGUF tensor in a checkpoint of ours; names that the llama architecture does not have stay."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    prefix, _, rest = name.partition(".")
    index, _, suffix = rest.partition(".")
    if prefix != "blk" or suffix not in _BLOCK_NAMES:
        return name
    return f"model.layers.{index}.{_BLOCK_NAMES[suffix]}"


def undo_rotary_order(weight: Tensor, *, head_dim: int) -> Tensor:
    """Rows of ``weight [heads * head_dim, hidden]`` from interleaved rotary pairs (llama.cpp) to halves (ours)."""
    rows, columns = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _architecture(reader: gguf.GGUFReader, source: Path) -> Architecture:
    name = _field(reader, "general.architecture")
    require(name == "llama", f"model.source={source} has architecture {name}; llama is the one that is read from GGUF")
    heads, hidden_dim = int(_required(reader, "attention.head_count")), int(_required(reader, "embedding_length"))
    source_ffn_dim = int(_required(reader, "feed_forward_length"))
    ffn_dim = round_up_ffn_dim(source_ffn_dim)
    num_kv_heads = int(_llama(reader, "attention.head_count_kv") or heads)
    names = {tensor.name: tensor for tensor in reader.tensors}
    require(
        "rope_freqs.weight" not in names,
        f"model.source={source} has rotary scaling baked into rope_freqs; import the Hugging Face checkpoint instead",
    )
    require(
        "token_embd.weight" in names, f"model.source={source} has no tensor token_embd.weight; is the file complete?"
    )
    return Architecture(
        vocab_size=int(names["token_embd.weight"].shape[1]),
        hidden_dim=hidden_dim,
        num_heads=heads,
        head_dim=int(_llama(reader, "attention.key_length") or hidden_dim // heads),
        blocks=dense_blocks(int(_required(reader, "block_count")), num_kv_heads, ffn_dim),
        max_positions=int(_required(reader, "context_length")),
        rope=_rope(reader, source),
        norm_eps=_short(_required(reader, "attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in names,
        source_ffn_dim=None if ffn_dim == source_ffn_dim else source_ffn_dim,
        token_ids={name: _field(reader, key) for name, key in _TOKEN_IDS.items()},
    )


def _rope(reader: gguf.GGUFReader, source: Path) -> RopeConfig:
    kind = _llama(reader, "rope.scaling.type") or "none"
    require(
        kind in ("none", "linear"),
        f"model.source={source} has rotary scaling {kind}, not none or linear; import the Hugging Face checkpoint",
    )
    theta = _short(_llama(reader, "rope.freq_base") or 10_000.0)
    if kind == "none":
        return RopeConfig(theta=theta)
    return RopeConfig(theta=theta, kind="linear", factor=_short(_required(reader, "rope.scaling.factor")))


def _field(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _llama(reader: gguf.GGUFReader, key: str) -> Any:
    return _field(reader, f"llama.{key}")


def _required(reader: gguf.GGUFReader, key: str) -> Any:
    value = _llama(reader, key)
    require(value is not None, f"the GGUF file has no llama.{key}; is it complete?")
    return value


def _short(value: float) -> float:
    """The shortest decimal that is this fp32 number: GGUF holds 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))

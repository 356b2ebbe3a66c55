"""Dense Hugging Face checkpoints to and from the nemotron-nas format, tensor by tensor.

The families of :mod:`puzzle.model.families` share the tensor names of the format, so import and export copy. The one
change is exact: FFN widths that the format cannot express are padded with channels of zeros, since silu(0) * 0 = 0, and
an export cuts them off again. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from distill.config import require
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import (
    INDEX_FILE,
    WEIGHTS_FILE,
    CheckpointWriter,
    TensorReader,
    copy_tokenizer,
    dtype_name,
    has_tokenizer,
    read_architecture,
    read_json,
)
from puzzle.model.families import dense_architecture, dense_config
from puzzle.model.hf_config import MODEL_TYPE, architecture_from_config
from puzzle.model.tensor_layout import EMBEDDING, HEAD, tensor_shapes

FFN_CHANNEL_AXIS = {"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 0, "mlp.down_proj.weight": 1}
"""Axis of the FFN's channels in each of its matrices."""

_ROTARY_BUFFER = ".rotary_emb.inv_freq"
"""Llama 2 checkpoints hold it, although it follows from the configuration."""


def import_hf(source: Path, out: Path, *, dtype: torch.dtype) -> Architecture:
    """Write the Hugging Face checkpoint ``source`` to directory ``out`` in our format, with the tokenizer that it has.

    A checkpoint that is in nemotron-nas format already is copied. ``dtype`` is that of all written tensors.

    Raises:
        ValueError: ``source`` is no safetensors checkpoint, its family or a setting is not supported, or its tensors
            are not those of its configuration. Nothing is written then.
    """
    architecture = source_architecture(source)
    with TensorReader(source) as reader:
        names = [name for name in reader.names() if not name.endswith(_ROTARY_BUFFER)]
        if architecture.tie_embeddings and HEAD in reader:
            _require_tied(reader)
            names.remove(HEAD)
        check_tensors(architecture, {name: reader.shape(name) for name in names}, source)
        with CheckpointWriter(out, architecture, dtype=dtype) as writer:
            for name in tqdm(names, desc="import", unit="tensor", leave=False):
                writer.add(name, pad_ffn(name, reader.read(name), architecture))
    if has_tokenizer(source):
        copy_tokenizer(source, out)
    return architecture


def source_architecture(source: Path) -> Architecture:
    """What the Hugging Face checkpoint ``source`` will be in our format.

    Raises:
        ValueError: ``source`` is no safetensors checkpoint, or its family or a setting is not supported.
    """
    _require_checkpoint(source)
    config = read_json(source / "config.json")
    own_format = config.get("model_type") == MODEL_TYPE
    return architecture_from_config(config) if own_format else dense_architecture(config)


def export_hf(model_dir: Path, out: Path, *, max_shard_bytes: int = 4 * 2**30) -> None:
    """Write the dense model ``model_dir`` to ``out`` as a checkpoint of the family that it came from.

    Tensors keep their data type; padding is cut off, so that an import followed by an export changes none.

    Raises:
        ValueError: the model is not dense (nothing is written), or the channels to be cut off are not zero.
    """
    architecture = read_architecture(model_dir)
    with TensorReader(model_dir) as reader:
        dtype = reader.dtype(EMBEDDING)
        config = dense_config(architecture, dtype=dtype_name(dtype))
        ffn_dim = int(config["intermediate_size"])
        shapes = _with_ffn_dim(tensor_shapes(architecture), ffn_dim)
        planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
        plan = split_torch_state_dict_into_shards(
            planned, filename_pattern=WEIGHTS_FILE.replace(".", "{suffix}."), max_shard_size=max_shard_bytes
        )
        out.mkdir(parents=True, exist_ok=True)
        for file, names in tqdm(plan.filename_to_tensors.items(), desc="export", unit="shard", leave=False):
            tensors = {name: _cut_ffn(name, reader.read(name), ffn_dim) for name in names}
            save_file(tensors, out / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (model_dir / "generation_config.json").is_file():
        shutil.copyfile(model_dir / "generation_config.json", out / "generation_config.json")
    if has_tokenizer(model_dir):
        copy_tokenizer(model_dir, out)


def check_tensors(architecture: Architecture, found: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Hold the tensors ``found`` in ``source`` (name -> shape) against those that ``architecture`` has before padding.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape; up to three are named.
    """
    expected = tensor_shapes(architecture)
    if architecture.source_ffn_dim is not None:
        expected = _with_ffn_dim(expected, architecture.source_ffn_dim)
    for what, names in (("lacks", expected.keys() - found.keys()), ("has unexpected", found.keys() - expected.keys())):
        require(
            not names,
            f"{source} {what} {len(names)} tensors: {', '.join(sorted(names)[:3])}; does config.json belong to it?",
        )
    wrong = [name for name, shape in expected.items() if found[name] != shape]
    shapes = ", ".join(f"{name} {list(found[name])} instead of {list(expected[name])}" for name in wrong[:3])
    require(not wrong, f"{source} has {len(wrong)} tensors of another shape than config.json says: {shapes}")


def pad_ffn(name: str, tensor: Tensor, architecture: Architecture) -> Tensor:
    """``tensor``; an FFN matrix of a padded parent gets channels of zeros up to the width in ``architecture``."""
    axis = _channel_axis(name)
    if axis is None or architecture.source_ffn_dim is None:
        return tensor
    missing = tensor_shapes(architecture)[name][axis] - tensor.shape[axis]
    return pad(tensor, (0, 0, 0, missing) if axis == 0 else (0, missing))


def _cut_ffn(name: str, tensor: Tensor, ffn_dim: int) -> Tensor:
    axis = _channel_axis(name)
    if axis is None or tensor.shape[axis] == ffn_dim:
        return tensor
    kept, cut = tensor.split([ffn_dim, tensor.shape[axis] - ffn_dim], dim=axis)
    require(
        not cut.any(),
        f"{name}: {cut.shape[axis]} channels beyond the parent's FFN width {ffn_dim} are not zero, so they must stay; "
        "use stage export, which keeps the padded width",
    )
    return kept.contiguous()


def _with_ffn_dim(shapes: Mapping[str, tuple[int, ...]], ffn_dim: int) -> dict[str, tuple[int, ...]]:
    """``shapes`` with another number of FFN channels."""
    changed = {}
    for name, shape in shapes.items():
        axis = _channel_axis(name)
        changed[name] = shape if axis is None else (*shape[:axis], ffn_dim, *shape[axis + 1 :])
    return changed


def _channel_axis(name: str) -> int | None:
    return FFN_CHANNEL_AXIS.get(".".join(name.split(".")[-3:]))


def _require_checkpoint(source: Path) -> None:
    require(
        (source / "config.json").is_file(),
        f"model.source={source} has no config.json; give a Hugging Face checkpoint directory, a GGUF file or a hub id",
    )
    if any(source.glob("*.safetensors")):
        return
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth") for file in source.glob(f"*.{suffix}"))
    found = f"only {pickles[0]}: pickles can run code and are never read" if pickles else "no weights"
    raise ValueError(
        f"model.source={source} has {found}; convert the weights to safetensors (transformers' save_pretrained does)"
    )


def _require_tied(reader: TensorReader) -> None:
    require(
        torch.equal(reader.read(HEAD), reader.read(EMBEDDING)),
        f"{reader.directory}: {HEAD} differs from {EMBEDDING}, though tied; set tie_word_embeddings=false there",
    )

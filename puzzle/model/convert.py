"""Hugging Face checkpoints to and from the nemotron-nas format, tensor by tensor.

The families of :mod:`puzzle.model.families` share the tensor names of the format, so import and export copy. What is
changed on the way is exact: FFN widths that the format cannot express are padded with channels of zeros, since
silu(0) * 0 = 0, and projections that a family stores as one matrix are dealt by rows; an export takes both back. Code
that comes with a checkpoint is never run.
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
from puzzle.model.families import FAMILIES, dense_config, parent_layout
from puzzle.model.hf_config import MODEL_TYPE, architecture_from_config, own_ffn_dim
from puzzle.model.parent_layout import ParentLayout, channel_axis
from puzzle.model.tensor_layout import EMBEDDING, HEAD, Shapes

_ROTARY_BUFFER = ".rotary_emb.inv_freq"
"""Llama 2 checkpoints hold it, although it follows from the configuration."""


def import_hf(source: Path, out: Path, *, dtype: torch.dtype) -> Architecture:
    """Write the Hugging Face checkpoint ``source`` to directory ``out`` in our format, with the tokenizer that it has.

    A checkpoint that is in nemotron-nas format already, ours or a third party's, keeps its tensors and its blocks.
    ``dtype`` is that of all written tensors.

    Raises:
        ValueError: ``source`` is no safetensors checkpoint, its family or a setting is not supported, or its tensors
            are not those of its configuration, or quantised. Nothing is written then.
    """
    layout = source_layout(source)
    architecture = layout.architecture
    with TensorReader(source) as reader:
        names = [name for name in reader.names() if not name.endswith(_ROTARY_BUFFER)]
        if architecture.tie_embeddings and HEAD in reader:
            _require_tied(reader)
            names.remove(HEAD)
        check_tensors(layout.stored_shapes(), {name: reader.shape(name) for name in names}, source)
        _require_floats(reader, names)
        with CheckpointWriter(out, architecture, dtype=dtype) as writer:
            for name, place in tqdm(layout.places().items(), desc="import", unit="tensor", leave=False):
                writer.add(name, pad_ffn(name, reader.rows(place.stored, place.start, place.stop), architecture))
    if has_tokenizer(source):
        copy_tokenizer(source, out)
    return architecture


def source_layout(source: Path) -> ParentLayout:
    """What the Hugging Face checkpoint ``source`` will be in our format, and how its file lays that out.

    Raises:
        ValueError: ``source`` is no safetensors checkpoint, or its family or a setting is not supported.
    """
    _require_checkpoint(source)
    config = read_json(source / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        return parent_layout(config)
    require(
        config.get("quantization_config") is None,
        "config.json has a quantization_config; import the unquantized checkpoint of this model",
    )
    architecture = architecture_from_config(config)
    return ParentLayout(architecture=architecture, ffn_dims=tuple(map(own_ffn_dim, config["block_configs"])))


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
        layout = ParentLayout(
            architecture=architecture,
            ffn_dims=(ffn_dim,) * architecture.num_blocks,
            fused=FAMILIES[architecture.family].fused_projections,
        )
        parts = _parts(layout)
        shapes = layout.stored_shapes()
        planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
        plan = split_torch_state_dict_into_shards(
            planned, filename_pattern=WEIGHTS_FILE.replace(".", "{suffix}."), max_shard_size=max_shard_bytes
        )
        out.mkdir(parents=True, exist_ok=True)
        for file, names in tqdm(plan.filename_to_tensors.items(), desc="export", unit="shard", leave=False):
            tensors = {
                name: torch.cat([_cut_ffn(part, reader.read(part), ffn_dim) for part in parts[name]]) for name in names
            }
            save_file(tensors, out / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (model_dir / "generation_config.json").is_file():
        shutil.copyfile(model_dir / "generation_config.json", out / "generation_config.json")
    if has_tokenizer(model_dir):
        copy_tokenizer(model_dir, out)


def _parts(layout: ParentLayout) -> dict[str, list[str]]:
    """Stored tensor -> the tensors of ours whose rows it has, in order."""
    parts: dict[str, list[str]] = {}
    for name, place in sorted(layout.places().items(), key=lambda item: item[1].start):
        parts.setdefault(place.stored, []).append(name)
    return parts


def check_tensors(
    expected: Shapes, found: Mapping[str, tuple[int, ...]], source: Path, *, said_by: str = "config.json"
) -> None:
    """Hold the tensors ``found`` in ``source`` (name -> shape) against those ``expected`` of what it says of itself.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape; up to three are named.
    """
    for what, names in (("lacks", expected.keys() - found.keys()), ("has unexpected", found.keys() - expected.keys())):
        require(
            not names,
            f"{source} {what} {len(names)} tensors: {', '.join(sorted(names)[:3])}; does {said_by} belong to it?",
        )
    wrong = [name for name, shape in expected.items() if found[name] != shape]
    shapes = ", ".join(f"{name} {list(found[name])} instead of {list(expected[name])}" for name in wrong[:3])
    require(not wrong, f"{source} has {len(wrong)} tensors of another shape than {said_by} says: {shapes}")


def pad_ffn(name: str, tensor: Tensor, architecture: Architecture) -> Tensor:
    """``tensor``; an FFN matrix of a narrower parent gets channels of zeros up to the width in ``architecture``."""
    axis = channel_axis(name)
    if axis is None:
        return tensor
    block = architecture.blocks[int(name.split(".")[2])]
    assert block.ffn.ffn_dim is not None, name
    missing = block.ffn.ffn_dim - tensor.shape[axis]
    return pad(tensor, (0, 0, 0, missing) if axis == 0 else (0, missing)) if missing else tensor


def _cut_ffn(name: str, tensor: Tensor, ffn_dim: int) -> Tensor:
    axis = channel_axis(name)
    if axis is None or tensor.shape[axis] == ffn_dim:
        return tensor
    kept, cut = tensor.split([ffn_dim, tensor.shape[axis] - ffn_dim], dim=axis)
    require(
        not cut.any(),
        f"{name}: {cut.shape[axis]} channels beyond the parent's FFN width {ffn_dim} are not zero, so they must stay; "
        "use stage export, which keeps the padded width",
    )
    return kept.contiguous()


def _require_checkpoint(source: Path) -> None:
    require(
        (source / "config.json").is_file(),
        f"model.source={source} has no config.json; give a Hugging Face checkpoint directory, a GGUF file or a hub id",
    )
    # AnyModel checkpoints have an index here and their shards in a folder.
    if any(source.glob("*.safetensors")) or (source / INDEX_FILE).is_file():
        return
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth") for file in source.glob(f"*.{suffix}"))
    found = f"only {pickles[0]}: pickles can run code and are never read" if pickles else "no weights"
    raise ValueError(
        f"model.source={source} has {found}; convert the weights to safetensors (transformers' save_pretrained does)"
    )


def _require_floats(reader: TensorReader, names: list[str]) -> None:
    for name in names:
        dtype = reader.dtype(name)
        require(
            dtype.is_floating_point,
            f"{reader.directory}: {name} is stored as {dtype_name(dtype)}; import the unquantized checkpoint",
        )


def _require_tied(reader: TensorReader) -> None:
    require(
        torch.equal(reader.read(HEAD), reader.read(EMBEDDING)),
        f"{reader.directory}: {HEAD} differs from {EMBEDDING}, though tied; set tie_word_embeddings=false there",
    )

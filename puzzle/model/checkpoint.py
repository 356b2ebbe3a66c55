"""Model directories: a Hugging Face checkpoint in the nemotron-nas format, read and written tensor by tensor.

Reading is lazy and writing goes straight to a tensor's place in its shard, so that surgery on a model needs memory for
what it computes, never for the model. Nothing here is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import prod, sqrt
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from distill.config import require
from distill.files import write_whole
from puzzle.model import configuration_decilm, modeling_decilm
from puzzle.model.architecture import Architecture
from puzzle.model.block_range import keep_blocks, tensor_places
from puzzle.model.configuration_decilm import DeciLMConfig
from puzzle.model.fp8 import E4M3, FP8_CONFIG, fp8_dtypes, fp8_shapes
from puzzle.model.hf_config import MODEL_TYPE, TOKEN_ID_KEYS, architecture_from_config, hf_config
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.shard_writer import ShardWriter
from puzzle.model.targets import Quantization
from puzzle.model.tensor_layout import EMBEDDING, HEAD, tensor_shapes
from puzzle.model.tensor_reader import INDEX_FILE, TensorReader, read_json, row_ranges
from puzzle.model.tensor_reader import WEIGHTS_FILE as WEIGHTS_FILE

REMOTE_CODE_FILES = tuple(Path(str(module.__file__)) for module in (configuration_decilm, modeling_decilm))
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``, as in ``config.json``."""
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_architecture(directory: Path) -> Architecture:
    """Architecture of a model directory; weights are looked for, not read.

    Raises:
        ValueError: ``directory`` is no nemotron-nas checkpoint, or one that this model cannot express.
    """
    expected = f"expected a model directory with config.json (model_type {MODEL_TYPE}) and *.safetensors"
    path = directory / "config.json"
    require(path.is_file(), f"{directory} has no config.json; {expected}")
    config = read_json(path)
    model_type = config.get("model_type")
    require(model_type == MODEL_TYPE, f"{path}: model_type is {model_type!r}; {expected}, import other models first")
    quantized = config.get("quantization_config") is not None
    require(not quantized, f"{path}: its weights are quantised, for engines; give the model from before its export")
    require(any(directory.glob("*.safetensors")), f"{directory} has no *.safetensors; {expected}")
    try:
        return architecture_from_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class CheckpointWriter:
    """A model directory that is written tensor by tensor, in any order. Use it as a context manager.

    Nothing but the tensor at hand is in memory. Weight files have their final names, and ``config.json`` is there,
    once everything is: a directory that a killed process leaves is not taken for a model.
    """

    def __init__(
        self,
        directory: Path,
        architecture: Architecture,
        *,
        dtype: torch.dtype,
        max_shard_bytes: int = 4 * 1024**3,
        quantization: Quantization = "none",
    ) -> None:
        """Start a checkpoint in ``directory``, which is made if needed.

        Args:
            dtype: data type of all stored tensors that are not quantised.
            max_shard_bytes: of the tensors of one file; a larger tensor has a file of its own.
            quantization: fp8_dynamic: the tensors are those of :func:`puzzle.model.fp8.quantized_tensors`.

        Raises:
            ValueError: ``directory`` already holds weights.
        """
        require(not any(directory.glob("*.safetensors*")), f"{directory} already holds weights; choose an empty one")
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.architecture = architecture
        self.dtype = dtype
        self._is_fp8 = quantization == "fp8_dynamic"
        self._missing = fp8_shapes(architecture) if self._is_fp8 else tensor_shapes(architecture)
        self._dtypes = fp8_dtypes(architecture, dtype) if self._is_fp8 else dict.fromkeys(self._missing, dtype)
        self._shards = ShardWriter(directory, self._missing, self._dtypes, max_shard_bytes=max_shard_bytes)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor`` as the checkpoint's tensor ``name``, in its stored data type.

        Raises:
            ValueError: the architecture has no such tensor (or it was added before), or one of another shape.
        """
        self._take(name, tuple(tensor.shape))
        row_bytes = prod(tensor.shape[1:]) * self._dtypes[name].itemsize
        ranges = row_ranges(tensor.shape[0], row_bytes) if tensor.ndim else ()
        pieces = (tensor[rows.start : rows.stop] for rows in ranges) if tensor.ndim else (tensor,)
        self._write(name, pieces)

    def add_rows(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write tensor ``name`` from ``pieces``: runs of its rows, in order, so that it is never in memory as a whole.

        Every piece has memory of its own: it is written while the next ones are made.

        Raises:
            ValueError: the architecture has no such tensor, or it was added before.
        """
        self._take(name, None)
        self._write(name, pieces)

    def copy(self, name: str, reader: TensorReader, *sources: str) -> None:
        """Write tensor ``name`` from ``sources`` of ``reader``, stacked along the first dimension; default: ``name``.

        Of the same data type, their bytes are moved as they are.

        Raises:
            ValueError: the architecture has no such tensor (or it was added before), or one of another shape.
        """
        sources = sources or (name,)
        shapes = [reader.shape(source) for source in sources]
        assert len({shape[1:] for shape in shapes}) == 1, f"{name}: {sources} of shapes {shapes} cannot be stacked"
        self._take(name, (sum(shape[0] for shape in shapes), *shapes[0][1:]))
        if all(reader.dtype(source) == self._dtypes[name] for source in sources):
            self._shards.copy(name, map(reader.place, sources))
        else:
            self._write(name, chain.from_iterable(reader.row_chunks(source) for source in sources))

    def _take(self, name: str, shape: tuple[int, ...] | None) -> None:
        require(name in self._missing, f"{self.directory}: {name!r} is not a tensor that the architecture still lacks")
        expected = self._missing[name]
        found = expected if shape is None else shape
        require(found == expected, f"{self.directory}: {name!r} has shape {list(found)}, expected {list(expected)}")
        del self._missing[name]

    def _write(self, name: str, pieces: Iterable[Tensor]) -> None:
        dtype = self._dtypes[name]

        def storable(piece: Tensor) -> Tensor:
            assert piece.dtype == dtype or dtype != E4M3, f"{name}: a cast to FP8 without a scale"
            return piece.detach().to(device="cpu", dtype=dtype).contiguous()

        self._shards.write(name, map(storable, pieces))

    def close(self) -> None:
        """Name the weight files, write the remote code, the index and, last, the configuration.

        Raises:
            ValueError: tensors of the architecture are missing.
        """
        missing = sorted(self._missing)
        require(not missing, f"{self.directory}: {len(missing)} tensors were not written: {', '.join(missing[:4])}")
        self._shards.finish()
        for path in REMOTE_CODE_FILES:
            shutil.copyfile(path, self.directory / path.name)
        token_ids = {key: value for key, value in self.architecture.token_ids.items() if value is not None}
        if token_ids:
            _write_json(self.directory / "generation_config.json", token_ids)
        if len(self._shards.files) > 1:
            metadata = {"total_size": self._shards.total_bytes}
            index = {"metadata": metadata, "weight_map": dict(sorted(self._shards.weight_map.items()))}
            _write_json(self.directory / INDEX_FILE, index)
        config = hf_config(self.architecture, dtype_name(self.dtype))
        if self._is_fp8:
            config["quantization_config"] = FP8_CONFIG
        _write_json(self.directory / "config.json", config)


def check_tensors(reader: TensorReader, architecture: Architecture) -> None:
    """Compare names, shapes and data types of all tensors with those of ``architecture``; the headers say them.

    Raises:
        ValueError: a tensor is missing, unknown, quantised or of another shape, or a shard is damaged.
    """
    expected, names = tensor_shapes(architecture), set(reader.names())
    lacking, unknown = sorted(expected.keys() - names), sorted(names - expected.keys())
    require(
        not lacking and not unknown,
        f"{reader.directory} does not hold what its config.json describes: it lacks {lacking[:4]} and has "
        f"{unknown[:4]} besides; make the model anew",
    )
    for name, shape in expected.items():
        stored = reader.shape(name)
        require(
            stored == shape,
            f"{reader.directory}: {name} is {list(stored)}, config.json says {list(shape)}; make the model anew",
        )
        reader.dtype(name)


def copy_checkpoint(
    reader: TensorReader,
    out_dir: Path,
    architecture: Architecture,
    *,
    names: Mapping[str, str] | None = None,
    instead: Sequence[TensorReader] = (),
) -> None:
    """Write a checkpoint of ``architecture`` whose tensors are all copied, from file to file.

    Everything is checked before: where this raises ``ValueError``, but for a file that changes meanwhile, nothing is
    written.

    Args:
        reader: a checkpoint; its data type is the new one's.
        out_dir: directory of the new checkpoint.
        architecture: of the new checkpoint.
        names: tensor of ``reader`` by tensor of ``architecture``; None: they have the same names.
        instead: tensors of these, under their names in ``architecture``, stand in place of those of ``reader``.

    Raises:
        ValueError: the tensors of ``reader`` are not those of its configuration or do not fit ``architecture``,
            weights are quantised, a shard is damaged, or ``out_dir`` holds weights.
    """
    check_tensors(reader, read_architecture(reader.directory))
    shapes = tensor_shapes(architecture)
    sources = {name: (reader, name if names is None else names[name]) for name in shapes}
    for other in instead:
        sources |= {name: (other, name) for name in shapes if name in other}
    for name, (source, stored) in sources.items():
        found, _ = source.shape(stored), source.dtype(stored)
        require(found == shapes[name], f"{source.directory}: {stored} is {list(found)}, needed is {list(shapes[name])}")
    with CheckpointWriter(out_dir, architecture, dtype=reader.dtype(EMBEDDING)) as writer:
        for name, (source, stored) in tqdm(sources.items(), desc="copy", unit="tensor", leave=False):
            writer.copy(name, source, stored)


def _empty_model(architecture: Architecture, dtype: torch.dtype) -> DeciLMForCausalLM:
    """The module on the meta device: no memory, no values."""
    config = DeciLMConfig(**hf_config(architecture, dtype_name(dtype)))
    with torch.device("meta"):
        model = DeciLMForCausalLM(config)
    model.generation_config = GenerationConfig(
        **{key: architecture.token_ids[key] for key in TOKEN_ID_KEYS if architecture.token_ids.get(key) is not None}
    )
    return model


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def _tie(model: DeciLMForCausalLM, architecture: Architecture) -> None:
    if architecture.tie_embeddings and model.model.embed_tokens is not None and model.lm_head is not None:
        model.lm_head.weight = model.model.embed_tokens.weight


def load_model(
    directory: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    blocks: range | None = None,
) -> DeciLMForCausalLM:
    """The model of ``directory`` in evaluation mode, by our own class: code in the directory is never run.

    Args:
        device: where the weights go, tensor by tensor.
        dtype: data type of the weights; None: as stored.
        blocks: consecutive blocks to load alone, the embedding with the first block, final norm and head with the last.
            Such a model runs block by block only, and no other tensor is read. None: the whole model.

    Raises:
        ValueError: no checkpoint, or its tensors are not exactly those of its configuration.
    """
    architecture = read_architecture(directory)
    expected = tensor_shapes(architecture)
    with TensorReader(directory) as reader:
        missing = sorted(expected.keys() - set(reader.names()))
        require(not missing, f"{directory} lacks tensors that its config.json asks for: {', '.join(missing[:4])}")
        extra = sorted(set(reader.names()) - expected.keys())
        require(not extra, f"{directory} has tensors that its config.json does not ask for: {', '.join(extra[:4])}")
        own = range(architecture.num_blocks) if blocks is None else blocks
        places = tensor_places(architecture, own)
        model = _empty_model(architecture, dtype or reader.dtype(next(iter(places))))
        keep_blocks(model, own)
        for name, place in places.items():
            stored, shape = reader.shape(name), expected[name]
            require(stored == shape, f"{directory}: {name} has shape {list(stored)}, config.json says {list(shape)}")
            _set_tensor(model, place, reader.read(name).to(device=device, dtype=dtype or reader.dtype(name)))
    _tie(model, architecture)
    return model.eval()


def model_of(
    architecture: Architecture, tensors: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype
) -> DeciLMForCausalLM:
    """A model in evaluation mode of ``tensors``, which are all that ``architecture`` has, in ``dtype``."""
    model = _empty_model(architecture, dtype)
    for name, tensor in tensors:
        _set_tensor(model, name, tensor.to(dtype))
    _tie(model, architecture)
    return model.eval()


def build_model(architecture: Architecture, *, seed: int, dtype: torch.dtype = torch.float32) -> DeciLMForCausalLM:
    """A randomly initialised model on the CPU, in evaluation mode; the global random state is left alone.

    Matrices are normal with deviation 0.02, those that write to the residual stream divided by sqrt(2 x blocks) so that
    its variance does not grow with depth (GPT-2); norms are one, biases zero.
    """
    generator = torch.Generator().manual_seed(seed)
    writes_residual = ("o_proj.weight", "down_proj.weight", "linear_attn.weight", "linear_mlp.weight")

    def initial(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        scale = sqrt(2 * architecture.num_blocks) if name.endswith(writes_residual) else 1.0
        return torch.empty(shape).normal_(0.0, 0.02 / scale, generator=generator)

    tensors = ((name, initial(name, shape)) for name, shape in tensor_shapes(architecture).items())
    return model_of(architecture, tensors, dtype=dtype)


def save_model(
    model: nn.Module,
    directory: Path,
    *,
    architecture: Architecture,
    tokenizer_from: Path | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``model`` as a model directory.

    Args:
        tokenizer_from: directory whose tokenizer goes along; None: no tokenizer.
        dtype: data type of the stored weights; None: that of the model's first parameter.

    Raises:
        ValueError: the tensors of ``model`` are not those of ``architecture``, or there is no tokenizer to copy.
    """
    tensors = model.state_dict()
    if architecture.tie_embeddings:
        tensors.pop(HEAD, None)
    with CheckpointWriter(directory, architecture, dtype=dtype or next(iter(tensors.values())).dtype) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, directory)


def has_tokenizer(directory: Path) -> bool:
    """Whether ``directory`` holds a tokenizer."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy the tokenizer files of ``source``.

    Raises:
        ValueError: ``source`` has no tokenizer.
    """
    require(has_tokenizer(source), f"{source} has no tokenizer, expected tokenizer.json or tokenizer.model")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)

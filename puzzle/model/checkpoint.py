"""Model directories: a Hugging Face checkpoint in the nemotron-nas format, read and written tensor by tensor.

Reading is lazy and writing flushes a shard when it is full, so that surgery on a model needs memory for one shard,
never for the model. Nothing here is pickled.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from math import prod, sqrt
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from distill.config import require
from puzzle.model import configuration_decilm, modeling_decilm
from puzzle.model.architecture import Architecture
from puzzle.model.block_range import keep_blocks, tensor_places
from puzzle.model.configuration_decilm import DeciLMConfig
from puzzle.model.hf_config import MODEL_TYPE, TOKEN_ID_KEYS, architecture_from_config, hf_config
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.tensor_layout import HEAD, tensor_shapes

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""Names in the header of a safetensors file."""


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``, as in ``config.json``."""
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file.

    Raises:
        ValueError: the file is not JSON or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
    require(any(directory.glob("*.safetensors")), f"{directory} has no *.safetensors; {expected}")
    try:
        return architecture_from_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class TensorReader:
    """Tensors of a safetensors directory, single-file or sharded, one at a time."""

    def __init__(self, directory: Path) -> None:
        """Look into the index and the header of a single file; no tensor is read.

        Raises:
            ValueError: there is no safetensors file, or a shard that the index names is missing or damaged.
        """
        self.directory = directory
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        if (directory / INDEX_FILE).is_file():
            self._files: dict[str, str] = read_json(directory / INDEX_FILE)["weight_map"]
            for file in sorted(set(self._files.values())):
                require((directory / file).is_file(), f"{directory}: shard {file} that {INDEX_FILE} names is missing")
        else:
            found = (directory / WEIGHTS_FILE).is_file()
            require(found, f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; expected one of them")
            self._files = dict.fromkeys(self._handle(WEIGHTS_FILE).keys(), WEIGHTS_FILE)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                handle = safe_open(self.directory / file, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(f"{self.directory / file} is no readable safetensors file: {error}") from error
            self._open[file] = self._stack.enter_context(handle)
        return self._open[file]

    def _locate(self, name: str) -> Any:
        file = self._files.get(name)
        require(file is not None, f"{self.directory} has no tensor {name!r}")
        assert file is not None
        handle = self._handle(file)
        require(name in handle.keys(), f"{self.directory / file} lacks the tensor {name!r} that the index places there")  # noqa: SIM118
        return handle

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor ``name``, from the header."""
        return tuple(self._locate(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Data type of tensor ``name``, from the header.

        Raises:
            ValueError: the weights are quantised.
        """
        stored = self._locate(name).get_slice(name).get_dtype()
        require(stored in DTYPES, f"{self.directory}: {name} is stored as {stored}, not as one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """Tensor ``name`` on the CPU, in its stored data type.

        Raises:
            ValueError: there is no such tensor.
        """
        return self._locate(name).get_tensor(name)


class CheckpointWriter:
    """A model directory that is written tensor by tensor, in any order. Use it as a context manager."""

    def __init__(
        self, directory: Path, architecture: Architecture, *, dtype: torch.dtype, max_shard_bytes: int = 4 * 1024**3
    ) -> None:
        """Start a checkpoint in ``directory``, which is made if needed.

        Args:
            dtype: data type of all stored tensors.
            max_shard_bytes: a shard is written before it would grow beyond this, and bounds the memory that is used.

        Raises:
            ValueError: ``directory`` already holds weights.
        """
        require(not any(directory.glob("*.safetensors*")), f"{directory} already holds weights; choose an empty one")
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.architecture = architecture
        self.dtype = dtype
        self._max_shard_bytes = max_shard_bytes
        self._missing = tensor_shapes(architecture)
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of ``tensor`` as the checkpoint's tensor ``name``, under the writer's data type.

        Raises:
            ValueError: the architecture has no such tensor (or it was added before), or one of another shape.
        """
        require(name in self._missing, f"{self.directory}: {name!r} is not a tensor that the architecture still lacks")
        expected = self._missing.pop(name)
        shape = tuple(tensor.shape)
        require(shape == expected, f"{self.directory}: {name!r} has shape {list(shape)}, expected {list(expected)}")
        num_bytes = prod(shape) * self.dtype.itemsize
        if self._shard and self._shard_bytes + num_bytes > self._max_shard_bytes:
            self._flush()
        # A copy, not a view: safetensors refuses tensors that share storage, and the caller may go on to change his.
        copied = tensor.detach().to(device="cpu", dtype=self.dtype, copy=True, memory_format=torch.contiguous_format)
        self._shard[name] = copied
        self._shard_bytes += num_bytes
        self._total_bytes += num_bytes

    def _part(self, index: int) -> Path:
        return self.directory / f"model-{index:05d}.safetensors.part"

    def _flush(self) -> None:
        save_file(self._shard, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def close(self) -> None:
        """Write the last shard, the index, the remote code and, last, the configuration.

        Raises:
            ValueError: tensors of the architecture are missing.
        """
        missing = sorted(self._missing)
        require(not missing, f"{self.directory}: {len(missing)} tensors were not written: {', '.join(missing[:4])}")
        if self._shard:
            self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self.directory / WEIGHTS_FILE)
        else:
            self._name_shards()
        for path in REMOTE_CODE_FILES:
            shutil.copyfile(path, self.directory / path.name)
        token_ids = {key: value for key, value in self.architecture.token_ids.items() if value is not None}
        if token_ids:
            _write_json(self.directory / "generation_config.json", token_ids)
        _write_json(self.directory / "config.json", hf_config(self.architecture, dtype_name(self.dtype)))

    def _name_shards(self) -> None:
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(index).rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        index_content = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self.directory / INDEX_FILE, index_content)


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


def build_model(architecture: Architecture, *, seed: int, dtype: torch.dtype = torch.float32) -> DeciLMForCausalLM:
    """A randomly initialised model on the CPU, in evaluation mode; the global random state is left alone.

    Matrices are normal with deviation 0.02, those that write to the residual stream divided by sqrt(2 x blocks) so that
    its variance does not grow with depth (GPT-2); norms are one, biases zero.
    """
    generator = torch.Generator().manual_seed(seed)
    model = _empty_model(architecture, dtype)
    writes_residual = ("o_proj.weight", "down_proj.weight", "linear_attn.weight", "linear_mlp.weight")
    for name, shape in tensor_shapes(architecture).items():
        if len(shape) == 1:
            tensor = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            scale = sqrt(2 * architecture.num_blocks) if name.endswith(writes_residual) else 1.0
            tensor = torch.empty(shape).normal_(0.0, 0.02 / scale, generator=generator)
        _set_tensor(model, name, tensor.to(dtype))
    _tie(model, architecture)
    return model.eval()


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

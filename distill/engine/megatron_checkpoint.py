"""Resume points of the Megatron engine: one file per rank, read at any layout.

Every rank writes the parts of master weights and moments that it keeps, so nothing is gathered and no rank holds more
than its own. A part is a run of elements of one tensor rank's shard. Where the number of tensor ranks stays, a rank
reads the runs that it keeps from then on; else it makes them of the shards, one parameter at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.config import require
from distill.engine.megatron_state import MASTER, MOMENTS, Optimizer

_FILES = "rank_*.safetensors"
_WAY_OUT = "remove the resume point to go on from an earlier one, or start anew"


class Layout(Protocol):
    """How a parameter of a stage is made of whole tensors (``puzzle.model.megatron_layout.TensorLayout``)."""

    name: str
    sources: tuple[str, ...]

    def shard(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """What one tensor rank holds of the whole tensors of :attr:`sources`."""

    def merge(self, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Undo of :meth:`shard`."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands, and what its stage is made of."""

    rank: int
    num_ranks: int
    tensor_rank: int
    num_tensor_ranks: int
    layouts: Sequence[Layout]
    shapes: Mapping[str, tuple[int, ...]]
    """Of the whole tensors, by name."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank writes."""

    rank: int
    tensors: dict[str, Tensor]
    header: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Write it into ``directory``, which all ranks share, without a message to any other."""
        directory.mkdir(exist_ok=True)
        metadata = {name: json.dumps(value) for name, value in self.header.items()}
        save_file(self.tensors, directory / f"rank_{self.rank:05d}.safetensors", metadata=metadata)

    def copied(self) -> Part:
        """The same in CPU memory, which later steps do not change."""
        return replace(self, tensors={name: tensor.to("cpu", copy=True) for name, tensor in self.tensors.items()})


def own_part(optimizer: Optimizer, parameters: Mapping[str, Any], place: Place) -> Part:
    """This rank's part of the state, itself.

    Args:
        optimizer: what is saved.
        parameters: of the stage, by name.
        place: of this process.
    """
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for layout in place.layouts:
        own = optimizer.own_part(parameters[layout.name])
        if own is not None:
            starts[layout.sources[0]] = own.start
            tensors |= {_key(layout, name): tensor for name, tensor in own.tensors.items()}
    header = {
        "num_ranks": place.num_ranks,
        "num_steps": optimizer.num_steps,
        "tensor_rank": place.tensor_rank,
        "num_tensor_ranks": place.num_tensor_ranks,
        "starts": starts,
    }
    return Part(rank=place.rank, tensors=tensors, header=header)


def load(directory: Path, optimizer: Optimizer, place: Place) -> None:
    """Undo of :meth:`Part.write`, also by another number of tensor, pipeline and data ranks; every rank calls it.

    Raises:
        ValueError: files are missing or damaged, or hold the state of another model.
    """
    layouts = {layout.name: layout for layout in place.layouts}
    with ExitStack() as stack:
        pieces = _Pieces(directory, stack)

        def values(name: str, start: int, end: int) -> dict[str, Tensor]:
            layout = layouts[name]
            read = pieces.run if pieces.num_tensor_ranks == place.num_tensor_ranks else _remade(pieces, layout, place)
            return {
                key: read(_key(layout, key), place.tensor_rank, start, end, _shard_size(layout, place))
                for key in (MASTER, *MOMENTS)
            }

        try:
            optimizer.set_own_parts(values)
        except SafetensorError as error:
            raise ValueError(f"{directory} cannot be read ({error}); {_WAY_OUT}") from error
        optimizer.num_steps = pieces.num_steps


Read = Callable[[str, int, int, int, int], Tensor]
"""(key, tensor rank, first element, element after the last one, elements of the shard) -> [elements]."""


def _remade(pieces: _Pieces, layout: Layout, place: Place) -> Read:
    """Reads from the shards of another number of tensor ranks."""

    def read(key: str, tensor_rank: int, start: int, end: int, size: int) -> Tensor:
        number = pieces.num_tensor_ranks
        shards = []
        for rank in range(number):
            shape = _shard_shape(layout, place, rank, number)
            shards.append(pieces.run(key, rank, 0, shape.numel(), shape.numel()).view(shape))
        whole = [tensor for _, tensor in layout.merge(shards)]
        return layout.shard(whole, tensor_rank, place.num_tensor_ranks).flatten()[start:end]

    return read


class _Pieces:
    """All files of a directory, of which only headers are read until a run of elements is asked for."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._found: dict[tuple[str, int], list[tuple[int, Any]]] = {}
        paths = sorted(directory.glob(_FILES))
        headers: list[dict[str, Any]] = []
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path} cannot be read ({error}); {_WAY_OUT}") from error
            headers.append({name: json.loads(value) for name, value in file.metadata().items()})
            for key in file.keys():  # noqa: SIM118 (no mapping)
                start = headers[-1]["starts"][key.partition(":")[2]]
                self._found.setdefault((key, headers[-1]["tensor_rank"]), []).append((start, file))
        wanted = headers[0]["num_ranks"] if headers else "those of all"
        require(
            bool(headers) and len(paths) == wanted,
            f"{directory} holds the state of {len(paths)} ranks, not of {wanted}; {_WAY_OUT}",
        )
        self.num_steps: int = headers[0]["num_steps"]
        self.num_tensor_ranks: int = headers[0]["num_tensor_ranks"]
        for found in self._found.values():
            found.sort(key=lambda piece: piece[0])

    def run(self, key: str, tensor_rank: int, start: int, end: int, size: int) -> Tensor:
        """Elements ``start`` to ``end`` of a shard of ``size`` elements."""
        parts, position, last = [], start, 0
        for first, file in self._found.get((key, tensor_rank), []):
            piece = file.get_slice(key)
            last = first + piece.get_shape()[0]
            if first <= position < min(last, end):
                parts.append(piece[position - first : min(last, end) - first])
                position = min(last, end)
        require(
            position == end and last == size,
            f"{self._directory}: of {key} on tensor rank {tensor_rank} there are {last} elements, not {size}: it is "
            f"of another model; {_WAY_OUT}",
        )
        return torch.cat(parts)


def _key(layout: Layout, name: str) -> str:
    """A parameter goes by its first tensor in the checkpoint, which it has in every stage and at every layout."""
    return f"{name}:{layout.sources[0]}"


def _shard_shape(layout: Layout, place: Place, rank: int, number: int) -> torch.Size:
    whole = [torch.empty(place.shapes[name], device="meta") for name in layout.sources]
    return layout.shard(whole, rank, number).shape


def _shard_size(layout: Layout, place: Place) -> int:
    return _shard_shape(layout, place, place.tensor_rank, place.num_tensor_ranks).numel()

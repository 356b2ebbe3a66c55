"""How the file of a parent lays out the tensors that a checkpoint of ours has. Torch-free.

Two things differ between formats, both exactly: an FFN may be narrower than the multiple of 256 that the nemotron-nas
format can express, and projections that read the same input may be stored as one (Phi-3). Names are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle.model.architecture import Architecture
from puzzle.model.tensor_layout import Shapes, block_prefix, tensor_shapes

FUSED_PROJECTIONS = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
"""Stored tensor -> the projections whose rows it has, in order; named relative to the block."""
_FFN_CHANNEL_AXIS = {"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 0, "mlp.down_proj.weight": 1}
"""Axis of the FFN's channels in each of its matrices."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor of ours stands in the parent's file."""

    stored: str
    """Name of the parent's tensor."""
    start: int
    """First row."""
    stop: int
    """First row that is not ours any more."""


@dataclass(frozen=True, kw_only=True)
class ParentLayout:
    """A parent's file against its :attr:`architecture` in our format."""

    architecture: Architecture
    ffn_dims: tuple[int | None, ...] = ()
    """FFN width of every block in the file, in channels; None, or no entry: as in the architecture."""
    fused: bool = False
    """Projections stand together, as in :data:`FUSED_PROJECTIONS`."""

    def unpadded_shapes(self) -> Shapes:
        """Shape of every tensor of ours before channels of zeros are added."""
        shapes = tensor_shapes(self.architecture)
        for index, width in enumerate(self.ffn_dims):
            if width is None:
                continue
            for name, axis in _FFN_CHANNEL_AXIS.items():
                full = block_prefix(index) + name
                shape = shapes[full]
                shapes[full] = (*shape[:axis], width, *shape[axis + 1 :])
        return shapes

    def places(self) -> dict[str, Place]:
        """Where every tensor of ours stands; several may share a stored one."""
        shapes = self.unpadded_shapes()
        places = {name: Place(stored=name, start=0, stop=shape[0]) for name, shape in shapes.items()}
        for index in range(self.architecture.num_blocks) if self.fused else ():
            for stored, parts in FUSED_PROJECTIONS.items():
                start = 0
                for part in (block_prefix(index) + part for part in parts):
                    if part in shapes:
                        stop = start + shapes[part][0]
                        places[part] = Place(stored=block_prefix(index) + stored, start=start, stop=stop)
                        start = stop
        return places

    def stored_shapes(self) -> Shapes:
        """Shape of every tensor in the parent's file."""
        shapes, stored = self.unpadded_shapes(), Shapes()
        for name, place in self.places().items():
            rows = max(place.stop, stored.get(place.stored, (0,))[0])
            stored[place.stored] = (rows, *shapes[name][1:])
        return stored


def channel_axis(name: str) -> int | None:
    """Axis of the FFN's channels in tensor ``name``; None: it has none."""
    return _FFN_CHANNEL_AXIS.get(".".join(name.split(".")[-3:]))

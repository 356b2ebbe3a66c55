"""Less memory for the activations of a training step: FFNs in tiles, block inputs on the CPU.

Both functions change how the modules of one causal LM run, in place, before it is wrapped for several ranks, and leave
names and values of its parameters alone. Block inputs come back bit by bit. Tiles give the same gradients up to the
order of additions: a weight's is the sum over the tiles, added up in fp32 (:mod:`distill.tile_weights`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.tile_weights import TiledModule

PIECE_BYTES = 32 * 2**20
"""Unit of CPU memory for block inputs. A power of two: pinned allocations are rounded up to the next one, which for
whole block inputs could double them."""


def tile_ffns(model: nn.Module, tile_tokens: int, *, compile: bool = False) -> None:
    """Run every FFN and every norm of ``model`` over tiles of the tokens, each computed again in the backward pass.

    The intermediate activations of an FFN are several times its width per token, and a fused FFN is tens of times wider
    than its neighbours: one tile of them exists at a time. The widest FFN takes ``tile_tokens`` tokens at once, others
    as many more as they are narrower, so that all tiles are of about the same size; a norm counts as an FFN of the
    hidden width (it saves fp32 copies of its input). With N tokens an FFN runs in tiles of equal size, up to rounding.

    Args:
        model: causal LM with the Hugging Face surface; its FFNs are ``mlp`` in every block, or absent.
        tile_tokens: tokens of the widest FFN's tile, over all sequences of a micro-batch.
        compile: compile what runs on a tile; a compiled block stops and goes on around the tiles.
    """
    assert tile_tokens > 0, "0 tokens mean no tiles: do not call"
    widths = {module: _width(module) for module in _tokenwise_modules(model)}
    widest = max(widths.values())
    for module, width in widths.items():
        run = torch.compile(module.forward, dynamic=False) if compile else module.forward
        module.forward = partial(_in_tiles, run, TiledModule(module, compiled=compile), tile_tokens * widest // width)


def offload_block_inputs(model: nn.Module) -> HostBuffers:
    """Keep the inputs of the blocks in CPU memory. The blocks are checkpointed: their inputs are all that is kept.

    On a GPU they leave through pinned memory on a stream of their own while the block computes, and come back one block
    ahead of the backward pass. In a parallel window the stream that runs beside the window's input stays on the device.

    Returns:
        The memory that they are kept in.
    """
    buffers = HostBuffers()
    for block in model.model.layers:
        recomputed = isinstance(block.forward, partial) and block.forward.func is checkpoint
        assert recomputed, "recomputation comes first: without it a block keeps more than its input"
        block.forward = partial(_offloaded, block.forward, buffers)
    return buffers


def _tokenwise_modules(model: nn.Module) -> Iterator[nn.Module]:
    """FFNs and norms: what maps every token on its own. A single matrix is left out: it keeps its input alone."""
    for block in model.model.layers:
        for name, child in block.named_children():
            if _is_norm(child) or (name == "mlp" and len(list(child.parameters())) > 1):
                yield child
    yield model.model.norm


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.ndim == 1 for parameter in parameters)


def _width(module: nn.Module) -> int:
    """Channels of the widest activation: the rows of the widest matrix, or the length of a norm's weight."""
    return max(parameter.shape[0] for parameter in module.parameters())


@torch.compiler.disable(recursive=False)
def _in_tiles(run: Callable[..., Tensor], module: TiledModule, tile_tokens: int, hidden: Tensor, *rest: Any) -> Tensor:
    num_tokens = hidden[..., 0].numel()
    if num_tokens <= tile_tokens:
        return run(hidden, *rest)
    num_tiles = -(-num_tokens // tile_tokens)
    tiles = hidden.reshape(1, num_tokens, -1).split(-(-num_tokens // num_tiles), dim=1)
    if torch.is_grad_enabled():
        weights = module.weights(len(tiles))
        # A random state would be kept per tile, for nothing.
        run = partial(checkpoint, partial(weights.run, run), use_reentrant=False, preserve_rng_state=False)
        outputs = [run(tile, *rest) for tile in tiles]
        weights.forget_casts()
    else:
        outputs = [run(tile, *rest) for tile in tiles]
    return torch.cat(outputs, dim=1).view(hidden.shape)


@torch.compiler.disable(recursive=False)
def _offloaded(run: Callable[..., Any], buffers: HostBuffers, *inputs: Any, **options: Any) -> Any:
    # Around the checkpoint these hooks see its inputs alone: what is computed inside goes through its own. Some
    # versions of torch add an empty tensor.
    def pack(tensor: Tensor) -> _Kept | Tensor:
        return buffers.keep(tensor) if tensor.numel() > 0 else tensor

    def unpack(kept: _Kept | Tensor) -> Tensor:
        return buffers.give_back(kept) if isinstance(kept, _Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return run(*inputs, **options)


class HostBuffers:
    """Tensors of a graph, kept in CPU memory from their forward pass to their backward pass.

    The memory is used again by the next step; it grows to what one step needs at most.
    """

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self._free: list[Tensor] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: Callable[[], _Kept | None] = lambda: None
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None

    def keep(self, tensor: Tensor) -> _Kept:
        """Start to copy ``tensor`` to the CPU."""
        self._release_what_left()
        kept = _Kept(tensor, self._pieces(tensor.nbytes, pinned=tensor.is_cuda), self._free, self._last)
        self._last = weakref.ref(kept)
        source = tensor.detach().contiguous()
        event = self._copy(source.device, lambda: kept.write(source))
        # The tensor may not be freed before it is copied; at the next block at the latest the device waits for that.
        self._leaving = None if event is None else (source, event)
        return kept

    def give_back(self, kept: _Kept) -> Tensor:
        """The tensor on its device again, and the one that was kept before it on its way there."""
        self._release_what_left()
        self._fetch(kept)
        tensor, event = kept.restored
        kept.restored = None
        if event is not None:
            torch.cuda.current_stream(tensor.device).wait_event(event)
        if (before := kept.before()) is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, kept: _Kept) -> None:
        if kept.restored is None:
            tensor = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
            kept.restored = (tensor, self._copy(kept.device, lambda: kept.read_into(tensor)))

    def _copy(self, device: torch.device, copy: Callable[[], None]) -> torch.cuda.Event | None:
        """Run ``copy`` behind what ``device`` does now. One stream for both ways keeps it in order with all others:
        a piece of memory is never written to before it was read."""
        if device.type != "cuda":
            copy()
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copy()
        return stream.record_event()

    def _release_what_left(self) -> None:
        if self._leaving is not None:
            tensor, event = self._leaving
            torch.cuda.current_stream(tensor.device).wait_event(event)
            self._leaving = None

    def _pieces(self, num_bytes: int, *, pinned: bool) -> list[Tensor]:
        pieces = []
        for _ in range(-(-num_bytes // PIECE_BYTES)):
            if not self._free:
                self._free.append(torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned))
                self.allocated_bytes += PIECE_BYTES
            pieces.append(self._free.pop())
        return pieces


class _Kept:
    """One tensor in CPU memory. Its pieces are free again once the graph lets go of it."""

    def __init__(
        self, tensor: Tensor, pieces: list[Tensor], free: list[Tensor], before: Callable[[], _Kept | None]
    ) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.before = before
        self.restored: Any = None
        self._pieces = pieces
        self._free = free

    def write(self, tensor: Tensor) -> None:
        """Fill the pieces from ``tensor``, which is contiguous."""
        for piece, part in self._parts(tensor):
            piece.copy_(part, non_blocking=True)

    def read_into(self, tensor: Tensor) -> None:
        """Undo of :meth:`write`."""
        for piece, part in self._parts(tensor):
            part.copy_(piece, non_blocking=True)

    def _parts(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        parts = tensor.view(-1).view(torch.uint8).split(PIECE_BYTES)
        for piece, part in zip(self._pieces, parts, strict=True):
            yield piece[: len(part)], part

    def __del__(self) -> None:
        if self.restored is not None and self.restored[1] is not None:
            # Fetched and never asked for: its memory on the device is not free before it is written.
            tensor, event = self.restored
            torch.cuda.current_stream(tensor.device).wait_event(event)
        self._free.extend(self._pieces)

"""Weights of a module that runs on tiles of its tokens: their gradients are summed over the tiles in fp32.

Autograd would add them up in the data type that the product ran with: over 256 tiles in bf16 a gradient's error grows
several times. Here each tile reads its weights through a node of its own, which adds the tile's gradient to a sum
in fp32; the last one hands the sum on. Whatever waits for a parameter's gradient sees one, in the parameter's type.
The sums take 4 bytes per weight of the one module whose backward pass runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[nn.Module, str]
"""Module and name of one of its own parameters."""


class TiledModule:
    """A module whose forward is called tile by tile.

    Args:
        module: every submodule reads its parameters as attributes, in its own forward.
        compiled: its forward is one compiled function. What replaces the weights has to stand before the call then,
            where weights that are gathered submodule by submodule (ZeRO-3) are not there yet: these stay as they are.
    """

    def __init__(self, module: nn.Module, *, compiled: bool = False) -> None:
        self.module = module
        self.compiled = compiled

    def weights(self, num_tiles: int) -> TileWeights:
        """The weights in one forward pass over ``num_tiles`` tiles, and in its backward pass."""
        return TileWeights(self, num_tiles)


class TileWeights:
    """The parameters of ``tiled``, as ``num_tiles`` tiles of one forward pass read them."""

    def __init__(self, tiled: TiledModule, num_tiles: int) -> None:
        self._tiled = tiled
        self._num_tiles = num_tiles
        self._casts: dict[Key, Tensor] = {}
        self._sums: dict[Key, tuple[int, Tensor]] = {}

    def run(self, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``forward(*inputs)`` of one tile, in which the module reads its weights through nodes of this tile."""
        module = self._tiled.module
        with ExitStack() as stack:
            self._replace(module, stack)
            for owner in module.modules():
                if owner is module:
                    continue
                if self._tiled.compiled:
                    self._replace(owner, stack)
                else:
                    # The last hook before the submodule's forward: earlier ones may gather its weights.
                    hook = owner.register_forward_pre_hook(lambda owner, _: self._replace(owner, stack))
                    stack.callback(hook.remove)
            return forward(*inputs)

    def forget_casts(self) -> None:
        """Free what was cast for the forward pass: the backward pass, which may be far, casts again."""
        self._casts.clear()

    def add(self, key: Key, gradient: Tensor) -> Tensor | None:
        """Add the ``gradient`` of one tile; the sum over all tiles once it is complete."""
        count, total = self._sums.pop(key, (0, None))
        if total is None:
            total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        else:
            total += gradient
        if count + 1 < self._num_tiles:
            self._sums[key] = (count + 1, total)
            return None
        self._casts.pop(key, None)
        return total

    def _replace(self, owner: nn.Module, stack: ExitStack) -> None:
        """Have attribute access on ``owner`` find this tile's nodes in front of the parameters, until ``stack`` ends.

        The parameters stay registered: what walks over the module's parameters meets themselves.
        """
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.numel() > 0 and name not in owner.__dict__:
                owner.__dict__[name] = _TileWeight.apply(parameter, self._as_read(owner, name), self, (owner, name))
                stack.callback(owner.__dict__.pop, name)

    def _as_read(self, owner: nn.Module, name: str) -> Tensor:
        """The parameter in the type of the product: under autocast cast here, once for all tiles."""
        parameter = owner._parameters[name]
        assert parameter is not None
        device = parameter.device.type
        dtype = torch.get_autocast_dtype(device)
        # Autocast would cast a weight that is no leaf for every tile again.
        if not (isinstance(owner, nn.Linear) and torch.is_autocast_enabled(device)) or parameter.dtype == dtype:
            return parameter.detach()
        if (owner, name) not in self._casts:
            self._casts[owner, name] = parameter.detach().to(dtype)
        return self._casts[owner, name]


class _TileWeight(torch.autograd.Function):
    """A parameter as one tile reads it, ``as_read``, without gradient of its own."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, as_read: Tensor, weights: TileWeights, key: Key) -> Tensor:
        ctx.weights, ctx.key = weights, key
        return as_read.view_as(as_read)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        # Autograd rounds the sum to the parameter's type.
        return ctx.weights.add(ctx.key, grad_outputs[0]), None, None, None

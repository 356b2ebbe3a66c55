"""Functions of large tensors, compiled where they run on a GPU: they then read and write each tensor once."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill.engine.base import expect_shapes

MAX_VARIANTS = 64
"""Of one compiled function: settings and data types, each for one number of tokens and for any."""


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose first argument is a tensor, compiled when that is first on a GPU; on a CPU as it stands."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        expect_shapes(MAX_VARIANTS)
        return torch.compile(function)

    @functools.wraps(function)
    def call(tensor: Tensor, *args: Any, **options: Any) -> Any:
        # Without Triton there is nothing that torch could compile to for a GPU.
        fuse = tensor.is_cuda and importlib.util.find_spec("triton") is not None
        return (compiled() if fuse else function)(tensor, *args, **options)

    return call


def at_least_fp32(tensor: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

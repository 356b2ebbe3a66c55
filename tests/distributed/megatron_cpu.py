"""megatron-core on a CPU, for tests: it asks torch for CUDA devices, and this answers with the CPU.

Inactive where there is CUDA. Megatron itself is not changed: calls of ``torch.cuda`` are answered for a machine with
one device, and a mode of torch's dispatcher turns the device ``cuda`` into the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_mode: TorchFunctionMode | None = None


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        answer = func(*args, **kwargs)
        # Megatron's optimizer tells parameters apart by this name.
        named_type = func is torch.Tensor.type and len(args) == 1 and not kwargs
        return answer.replace("torch.", "torch.cuda.") if named_type else answer


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


class _Stream:
    """A CUDA stream or event on which everything has happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def nothing(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = synchronize = record = wait = nothing

    def record_event(self, *_: Any) -> _Stream:
        return self

    def query(self) -> bool:
        return True


def _nothing_of_its_own() -> Callable[..., None]:
    return lambda *_, **__: None


def install() -> None:
    """Once in a process, before megatron-core is imported."""
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    answers = {
        "current_device": lambda: torch.device("cpu"),
        "device_count": lambda: 1,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        answers[name] = _nothing_of_its_own()  # torch.compile refuses one function under two names
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _nothing_of_its_own(), _nothing_of_its_own()

    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    _mode = _CudaIsCpu()
    _mode.__enter__()

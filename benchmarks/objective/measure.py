"""Measures one contender, in this process: time and memory of forward and backward, and how exact its gradients are.

    python benchmarks/objective/measure.py CONTENDER '{"divergence": "forward", ...}' RESULT.json

``run.py`` starts it. What it finds is written step by step: a process that dies later leaves what it had measured.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from contenders import COMPUTES_NO_LOSS, CONTENDERS, Goal, Loss, Problem, plain
from torch import Tensor

GIB = 1 << 30
LOGIT_STD = 5.0
"""Of random logits: the likeliest of 128,256 tokens then has a logit of 20 to 28, as in a trained model."""
STUDENT_NOISE = 0.03
"""What the student differs from the teacher by, relative to its weights and hidden states: a KL of about 0.02 nats."""
LIBRARIES = {"liger_fused": "liger-kernel", "liger_chunked": "liger-kernel", "trl": "trl"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One problem and how it is measured."""

    divergence: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str
    device: str
    warmup: int
    repeats: int
    exact_tokens: int
    """Tokens of the smaller problem that gradients are compared with fp64 on; 0: none."""


def make_problem(settings: Settings) -> Problem:
    """Random weights and states, the same for every contender."""
    device = torch.device(settings.device)
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, settings.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    def near(tensor: Tensor) -> Tensor:
        return (tensor + STUDENT_NOISE * tensor.std() * normal(*tensor.shape)).to(dtype)

    hidden = normal(settings.tokens, settings.hidden)
    head = normal(settings.vocab, settings.hidden) * (LOGIT_STD / settings.hidden**0.5)
    return Problem(
        student_hidden=near(hidden).requires_grad_(),
        student_head=near(head).requires_grad_(),
        teacher_hidden=hidden.to(dtype),
        teacher_head=head.to(dtype),
        labels=torch.randint(settings.vocab, (settings.tokens,), generator=generator, device=device),
    )


def run_once(loss: Loss, problem: Problem, name: str) -> Tensor:
    """Forward and backward. The gradients are left at the problem."""
    value = loss(problem)
    if name not in COMPUTES_NO_LOSS:
        value.backward()
    return value.detach()


def clear(problem: Problem) -> None:
    for tensor in problem.trained:
        tensor.grad = None


class Clock:
    """Milliseconds between two points of the device's work."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        if not self._on_gpu:
            return 1000 * (end - start)
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def measure_speed(loss: Loss, name: str, settings: Settings) -> dict[str, Any]:
    """Median time and peak memory, gradients included, of steps that start without gradients."""
    problem, clock = make_problem(settings), Clock(settings.device)
    on_gpu = settings.device == "cuda"
    started = time.perf_counter()
    value = run_once(loss, problem, name)
    if on_gpu:
        torch.cuda.synchronize()
    first_s = time.perf_counter() - started
    for _ in range(settings.warmup):
        clear(problem)
        run_once(loss, problem, name)
    clear(problem)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    inputs = torch.cuda.memory_allocated() if on_gpu else None
    times = []
    for _ in range(settings.repeats):
        clear(problem)
        start = clock.now()
        run_once(loss, problem, name)
        times.append((start, clock.now()))
    milliseconds = sorted(clock.milliseconds(*pair) for pair in times)
    # On a CPU the process's own peak, with Python and libraries: for a look, not for comparison.
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "loss": None if name in COMPUTES_NO_LOSS else float(value),
        "first_s": first_s,
        "median_ms": statistics.median(milliseconds),
        "min_ms": milliseconds[0],
        "max_ms": milliseconds[-1],
        "peak_gib": peak / GIB,
        "inputs_gib": None if inputs is None else inputs / GIB,
    }


def measure_error(loss: Loss, name: str, settings: Settings) -> dict[str, Any]:
    """Norm of the gradients' difference from those of the plain formula in fp64, relative to the latter's norm."""
    full = make_problem(settings)
    exact = full.slice(settings.exact_tokens, torch.float64)
    run_once(plain(Goal(divergence=settings.divergence)), exact, "plain")
    references = [tensor.grad for tensor in exact.trained]
    own = full.slice(settings.exact_tokens, getattr(torch, settings.dtype))
    del full, exact
    run_once(loss, own, name)
    errors = {}
    for part, tensor, reference in zip(("hidden", "head"), own.trained, references, strict=True):
        difference = torch.linalg.vector_norm(tensor.grad.double() - reference)
        errors[f"{part}_gradient_error"] = float(difference / torch.linalg.vector_norm(reference))
    return errors


def main() -> None:
    name, settings_json, path = sys.argv[1:]
    settings = Settings(**json.loads(settings_json))
    found: dict[str, Any] = {"contender": name, **asdict(settings)}
    library = LIBRARIES.get(name)
    if library is not None:
        try:
            found["version"] = f"{library} {version(library)}"
        except PackageNotFoundError:
            found["note"] = f"{library} is not installed"
            Path(path).write_text(json.dumps(found))
            return
    loss = CONTENDERS[name](Goal(divergence=settings.divergence))
    found |= measure_speed(loss, name, settings)
    Path(path).write_text(json.dumps(found))
    if settings.exact_tokens and name not in COMPUTES_NO_LOSS:
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        try:
            found |= measure_error(loss, name, settings)
        except (RuntimeError, TypeError) as error:
            found["note"] = f"gradients were not compared: {error}"
        Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

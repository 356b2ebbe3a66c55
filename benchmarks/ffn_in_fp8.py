"""Time of one wide FFN and of as many narrow ones, in bf16 and FP8, for ``benchmarks/quantization.py --speed``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from fp8_linear import Fp8Linear
from torch import Tensor, nn

from distill.config import require
from puzzle.model.fp8 import quantize

TOKENS = {"decode": 16, "prefill": 2048}
"""Tokens that run through the FFNs at once."""
MULTIPLE = 16
"""Of both dimensions of a matrix, where torch._scaled_mm takes them."""
FLUSH_BYTES = 256 * 2**20
"""Written between repeats: more than any cache on a GPU."""
REPEATS, WARMUP = 50, 3
Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A fused FFN and its members, which are of equal width."""

    hidden_dim: int
    width: int
    members: int

    def __post_init__(self) -> None:
        require(
            self.members > 1 and self.hidden_dim % MULTIPLE == 0 and self.width % (MULTIPLE * self.members) == 0,
            f"an FFN of {self.hidden_dim} x {self.width} channels for {self.members} members: FP8 on a GPU needs at "
            f"least two members and dimensions, the members' too, that are multiples of {MULTIPLE}; pass --shape",
        )


class Ffn(nn.Module):
    """Norm, SwiGLU and residual, with gate and up in one matrix as engines have it."""

    def __init__(self, hidden_dim: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(hidden_dim, device=device, dtype=torch.bfloat16), requires_grad=False)
        self.gate_up: nn.Module = _linear(hidden_dim, 2 * width, device)
        self.down: nn.Module = _linear(width, hidden_dim, device)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.norm, 1e-5)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)

    def in_fp8(self, *, scaled_mm: bool) -> Ffn:
        """The same, changed in place."""
        self.gate_up = Fp8Linear(self.gate_up, scaled_mm=scaled_mm)
        self.down = Fp8Linear(self.down, scaled_mm=scaled_mm)
        return self


def _linear(num_in: int, num_out: int, device: torch.device) -> nn.Linear:
    linear = nn.Linear(num_in, num_out, bias=False, device=device, dtype=torch.bfloat16)
    return linear.requires_grad_(False)


def ffns(
    widths: Sequence[int], hidden_dim: int, device: torch.device, *, fp8: bool, scaled_mm: bool = True
) -> list[Ffn]:
    """FFNs of ``widths``, with random weights."""
    made = [Ffn(hidden_dim, width, device) for width in widths]
    return [ffn.in_fp8(scaled_mm=scaled_mm) for ffn in made] if fp8 else made


def whole(chain: Sequence[Ffn], hidden: Tensor) -> Run:
    """One pass through all of ``chain``."""

    def run() -> Tensor:
        output = hidden
        for ffn in chain:
            output = ffn(output)
        return output

    return run


def matmuls(chain: Sequence[Ffn], hidden: Tensor) -> Run:
    """The matrix products of that pass alone, on inputs that lie ready."""
    jobs = [product(linear, hidden.shape[0]) for ffn in chain for linear in (ffn.gate_up, ffn.down)]

    def run() -> list[object]:
        return [job() for job in jobs]

    return run


def product(linear: nn.Module, num_tokens: int) -> Run:
    weight = linear.weight
    inputs = torch.randn(num_tokens, weight.shape[1], device=weight.device, dtype=torch.bfloat16)
    if isinstance(linear, Fp8Linear):
        values, scale = quantize(inputs)
        return lambda: linear.multiply(values, scale, torch.bfloat16)
    return lambda: linear(inputs)


@torch.inference_mode()
def measure_speed(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Microseconds by phase, what is timed, number of FFNs and format."""
    torch.manual_seed(0)
    layouts = {"unfused": [shape.width // shape.members] * shape.members, "fused": [shape.width]}
    rows = []
    for layout, widths in layouts.items():
        for kind in ("bf16", "fp8"):
            chain = ffns(widths, shape.hidden_dim, device, fp8=kind == "fp8")
            for phase, num_tokens in TOKENS.items():
                hidden = torch.randn(num_tokens, shape.hidden_dim, device=device, dtype=torch.bfloat16)
                for part, make in (("matmuls", matmuls), ("FFN", whole)):
                    us = graph_us(make(chain, hidden), device)
                    rows.append(
                        {"phase": phase, "tokens": num_tokens, "part": part, "layout": layout, "format": kind}
                        | {"widths": widths, "hidden_dim": shape.hidden_dim, "us": us}
                    )
            del chain
    return rows


def graph_us(run: Run, device: torch.device) -> float:
    """Median microseconds of ``run`` as a CUDA graph, with nothing of it in the cache."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    times = []
    for _ in range(REPEATS + WARMUP):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return median(times[WARMUP:])


def require_fp8(device: torch.device) -> None:
    """Raise ``ValueError`` where ``device`` cannot multiply in FP8."""
    major, minor = torch.cuda.get_device_capability(device)
    require(
        (major, minor) >= (8, 9),
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}: FP8 needs 8.9; leave --speed "
        "and --scaled-mm out",
    )


def speed_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown; none where nothing was timed."""
    if not rows:
        return []
    us = {(row["phase"], row["part"], row["layout"], row["format"]): row["us"] for row in rows}
    unfused = next(row for row in rows if row["layout"] == "unfused")
    lines = [
        "",
        f"{len(unfused['widths'])} FFNs of {unfused['widths'][0]} channels and the one that they are fused to, hidden "
        f"dimension {unfused['hidden_dim']}; microseconds. Gains are of time: unfused in bf16 over what is named.",
        "",
        "| phase | tokens | timed | unfused bf16 | fused bf16 | unfused FP8 | fused FP8 "
        "| fusion | FP8 | both | product |",
        f"|{'---|' * 11}",
    ]
    for phase, tokens in TOKENS.items():
        for part in ("matmuls", "FFN"):
            base, fused, fp8, both = (
                us[phase, part, layout, kind] for kind in ("bf16", "fp8") for layout in ("unfused", "fused")
            )
            times = " | ".join(f"{value:.1f}" for value in (base, fused, fp8, both))
            gains = " | ".join(
                f"{gain:.2f}x" for gain in (base / fused, base / fp8, base / both, base**2 / fused / fp8)
            )
            lines.append(f"| {phase} | {tokens} | {part} | {times} | {gains} |")
    return lines

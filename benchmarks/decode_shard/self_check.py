"""Every Triton kernel against plain torch on the present device.

The first thing that a worker does on a GPU. Shapes are small and awkward: widths that no tile divides, a context that
ends inside a block, unequal sequences. Without a GPU the same runs under ``TRITON_INTERPRET=1`` with float16 in the
place of bfloat16, which the interpreter cannot multiply; it also cuts where e4m3 rounds, so that products that
quantise on the way are held to a wider tolerance there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from products import FP8, FP8_MAX, Activation, Weight, Workspace, candidates, reference
from token_ops import Context, Heads, PlainOps, TokenOps, TritonOps
from torch import Tensor

TOLERANCE = 0.01
"""Relative, in the norm of the whole output: bfloat16 rounds to 0.004 of a value at most."""
FP8_TOLERANCE = 0.02
"""Products of e4m3 values: tensor cores add them up with about 13 bits."""
QUANTISED_TOLERANCE = 0.05
"""Outputs in e4m3: a value at the border between two codes may fall to either, up to 0.0625 of it."""
INTERPRETER_TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kernel in one case; ``error`` is relative, ``message`` says why nothing came out."""

    name: str
    error: float | None
    tolerance: float
    message: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


def self_check(device: torch.device) -> Iterator[Finding]:
    """Findings of all kernels, in fp8 and in 16 bits, as they come."""
    torch.manual_seed(0)
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    workspace = Workspace(device)
    yield from _check_products(device, half, workspace)
    yield from _check_token_ops(device, half, workspace)


def failed_token_ops(findings: list[Finding]) -> set[str]:
    """Names of the operators of :class:`TokenOps` that must not run as Triton kernels."""
    return {finding.name.split()[0] for finding in findings if not finding.passed} & {"norm", "rotate", "attend"}


def random_activation(num_tokens: int, width: int, mode: str, half: torch.dtype, device: torch.device) -> Activation:
    """Normal values in the given form."""
    values = torch.randn(num_tokens, width, device=device)
    amax = values.abs().amax(dim=1)
    if mode == "scaled":
        scale = amax / FP8_MAX
        return Activation(values=(values / scale[:, None]).to(FP8), scale=scale)
    return Activation(
        values=values.to(half), amax=values.to(half).float().abs().amax(dim=1) if mode == "amax" else None
    )


def random_weight(num_rows: int, width: int, fp8: bool, half: torch.dtype, device: torch.device) -> Weight:
    """Normal values, with fp8 under a random scale per row."""
    values = torch.randn(num_rows, width, device=device)
    if fp8:
        return Weight(values=values.to(FP8), scale=torch.rand(num_rows, device=device) + 0.5)
    return Weight(values=values.to(half))


def _check_products(device: torch.device, half: torch.dtype, workspace: Workspace) -> Iterator[Finding]:
    on_cpu = device.type == "cpu"
    cases = [(1, 208, 1040), (3, 208, 1040)] if on_cpu else [(1, 1344, 2064), (3, 1344, 2064)]
    for num_tokens, num_rows, width in cases:
        for mode, gated in (("plain", False), ("plain", True), ("scaled", False), ("scaled", True), ("amax", False)):
            x = random_activation(num_tokens, width, mode, half, device)
            weight = random_weight(num_rows * (2 if gated else 1), width, mode != "plain", half, device)
            expected = reference(x, weight, gated=gated)
            tolerance = TOLERANCE if mode == "plain" else FP8_TOLERANCE
            if on_cpu and mode == "amax":
                tolerance = INTERPRETER_TOLERANCE
            for way, product in candidates(x, weight, gated=gated, workspace=workspace).items():
                name = f"product {way} {mode}{' gated' if gated else ''} [{num_tokens}, {num_rows}, {width}]"

                def errors(product=product, x=x, weight=weight, expected=expected, gated=gated) -> float:
                    out = torch.full(expected.shape, float("nan"), dtype=half, device=device)
                    amax = torch.zeros(expected.shape[0], device=device)
                    # Twice: a kernel that leaves its workspace dirty fails the second time.
                    for _ in range(2):
                        amax.zero_()
                        product(x, weight, out, amax)
                    error = _relative_error(out, expected)
                    if gated and weight.scale is not None:
                        error = max(error, _relative_error(amax, expected.abs().amax(dim=1)))
                    return error

                yield _finding(name, errors, tolerance)


def _check_token_ops(device: torch.device, half: torch.dtype, workspace: Workspace) -> Iterator[Finding]:
    kernels, plain = TritonOps(workspace), PlainOps()
    for fp8 in (False, True):
        for heads in (
            Heads(num_heads=16, num_kv_heads=1, head_dim=128),
            Heads(num_heads=9, num_kv_heads=3, head_dim=64),
        ):
            where = f"{'fp8' if fp8 else '16 bits'} heads {heads.num_heads}/{heads.num_kv_heads}x{heads.head_dim}"
            for name, case in (("norm", _norm_case), ("rotate", _rotate_case), ("attend", _attend_case)):
                run = partial(case, heads=heads, fp8=fp8, half=half, device=device)
                tolerance = (
                    INTERPRETER_TOLERANCE if fp8 and device.type == "cpu" else QUANTISED_TOLERANCE if fp8 else TOLERANCE
                )
                yield _finding(f"{name} {where}", partial(_compared, run, kernels, plain), tolerance)


def _compared(run: Callable[[TokenOps], list[Tensor]], kernels: TokenOps, plain: TokenOps) -> float:
    pairs = zip(run(kernels), run(plain), strict=True)
    return max(_relative_error(found, expected) for found, expected in pairs)


def _norm_case(ops: TokenOps, *, heads: Heads, fp8: bool, half: torch.dtype, device: torch.device) -> list[Tensor]:
    width = heads.qkv_width
    residual, added = _seeded((3, width), half, device, 1), _seeded((3, width), half, device, 2)
    weight, out = _seeded((width,), half, device, 3), _empty_activation(3, width, fp8, half, device)
    amax = torch.ones(3, device=device)
    ops.norm(residual, added, weight, out, amax, 1e-5)
    first = _plain(out)
    ops.norm(residual, None, weight, out, amax, 1e-5)
    return [residual, first, _plain(out)]


def _rotate_case(ops: TokenOps, *, heads: Heads, fp8: bool, half: torch.dtype, device: torch.device) -> list[Tensor]:
    qkv = _seeded((3, heads.qkv_width), half, device, 1)
    cache = _seeded((2, 3, heads.num_kv_heads, 200, heads.head_dim), half, device, 2)
    ops.rotate(qkv, _context(heads, device), cache, heads)
    return [qkv[:, : heads.width].clone(), cache]


def _attend_case(ops: TokenOps, *, heads: Heads, fp8: bool, half: torch.dtype, device: torch.device) -> list[Tensor]:
    qkv = _seeded((3, heads.qkv_width), half, device, 1)
    cache = _seeded((2, 3, heads.num_kv_heads, 200, heads.head_dim), half, device, 2)
    out = _empty_activation(3, heads.width, fp8, half, device)
    ops.attend(qkv, _context(heads, device), cache, heads, out)
    return [_plain(out)]


def _context(heads: Heads, device: torch.device) -> Context:
    angles = torch.arange(200, device=device)[:, None] / 100.0 ** torch.linspace(
        0, 1, heads.head_dim // 2, device=device
    )
    positions = torch.tensor([5, 130, 199], dtype=torch.int32, device=device)
    return Context(positions=positions, cosines=angles.cos().contiguous(), sines=angles.sin().contiguous())


def _empty_activation(num_tokens: int, width: int, fp8: bool, half: torch.dtype, device: torch.device) -> Activation:
    values = torch.zeros(num_tokens, width, dtype=FP8 if fp8 else half, device=device)
    return Activation(values=values, scale=torch.zeros(num_tokens, device=device) if fp8 else None)


def _plain(x: Activation) -> Tensor:
    return x.values.float() if x.scale is None else x.values.float() * x.scale[:, None]


def _seeded(shape: tuple[int, ...], half: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, half)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def _finding(name: str, errors: Callable[[], float], tolerance: float) -> Finding:
    try:
        error = errors()
    except Exception as failure:
        # Whatever a compiler or a library raises rules this way out.
        return Finding(name=name, error=None, tolerance=tolerance, message=f"{type(failure).__name__}: {failure}"[:300])
    return Finding(name=name, error=error if error == error else float("inf"), tolerance=tolerance)

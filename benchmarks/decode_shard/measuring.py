"""The measurements of one process, each as a flat record."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from picking import Picker
from products import FP8, Workspace
from reductions import Method, Reduction, check_reduction
from self_check import Finding, failed_token_ops, self_check
from shard import DecodeShard, Machinery, Ring, Setting
from timing import barrier, graph_ms, median_ms
from token_ops import PlainOps, TokenOps, TritonOps
from torch import distributed

from distill.config import RopeConfig
from puzzle.model.architecture import Architecture, dense_blocks

NUM_CHAINED_REDUCTIONS = 32
"""All-reduces in one graph of the measurement of one."""
FFN_GRAPH_BYTES = 512 * 2**20
"""Weights that one graph of FFN runs goes through, so that none is in a cache when its turn comes again."""
MAX_FFN_REPEATS = 64


@dataclass(kw_only=True)
class Bench:
    """One process's device and what it has learnt about it.

    Args:
        device: where to measure.
        picker: picks the products.
        weight_bytes: size of the ring of weights.
        cache_bytes: size of the ring of KV caches.
        triton: whether this project's kernels may run.
    """

    device: torch.device
    picker: Picker
    weight_bytes: int
    cache_bytes: int
    triton: bool = True
    findings: list[Finding] = field(default_factory=list)
    _ops: TokenOps | None = None
    _machinery: Machinery | None = None

    def check_kernels(self) -> list[Finding]:
        """The self-check; operators that fail run as plain torch from then on."""
        if self.triton:
            self.findings = list(self_check(self.device))
        self.use_kernels(failed_token_ops(self.findings))
        return self.findings

    def use_kernels(self, failed: set[str]) -> None:
        """Run the operators of ``failed``, or all where ``triton`` is off, as plain torch and the others as kernels."""
        kernels, plain = TritonOps(self.picker.workspace), PlainOps()
        names = ("norm", "rotate", "attend")
        self._ops = _Mixed(
            **{name: getattr(plain if name in failed or not self.triton else kernels, name) for name in names}
        )

    def layout(
        self, architecture: Architecture, *, fp8: bool, batch: int, kv_tokens: int, num_ranks: int,
        reduce: Method, replays: int, breakdown: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """Decode latency of one layout's share, with its parts by operator class measured apart."""
        setting = Setting(
            fp8=fp8, batch=batch, kv_tokens=kv_tokens, num_ranks=num_ranks, reduce=reduce, device=self.device
        )
        machinery = self.machinery(setting)
        machinery.weights.taken_bytes = 0
        shard = DecodeShard(architecture, setting, machinery).build_model()
        barrier()
        samples = graph_ms(shard.run, replays=replays, device=self.device)
        record = _latency(samples, shard, batch)
        ring = machinery.weights
        record["distinct_weights"] = min(1.0, ring.num_bytes / ring.taken_bytes)
        if breakdown:
            record["breakdown_ms"] = {
                op_class: median_ms(lambda op_class=op_class: shard.run(op_class), replays=10, device=self.device)
                for op_class in shard.op_classes
            }
        record["picks"] = self.picker.picks()
        return record

    def ffn_run(
        self, *, hidden_dim: int, width: int, num_members: int, fp8: bool, batch: int, reduce: Method, replays: int
    ) -> dict[str, Any]:
        """``num_members`` FFNs of ``width`` (channels of this rank) one after another, and one of the summed width."""
        setting = Setting(fp8=fp8, batch=batch, kv_tokens=64, num_ranks=1, reduce=reduce, device=self.device)
        machinery = self.machinery(setting)
        itemsize = 1 if fp8 else 2
        repeats = max(1, min(MAX_FFN_REPEATS, FFN_GRAPH_BYTES // (3 * hidden_dim * width * num_members * itemsize)))
        times = {}
        for name, widths in (("sequential", [width] * num_members), ("fused", [width * num_members])):
            shard = DecodeShard(_ffn_only(hidden_dim, max(widths)), setting, machinery).build_ffns(widths * repeats)
            barrier()
            times[name] = median(graph_ms(shard.run, replays=replays, device=self.device)) / repeats
        return {
            "sequential_ms": times["sequential"],
            "fused_ms": times["fused"],
            "speedup": times["sequential"] / times["fused"],
            "saved_us_per_ffn": (times["sequential"] - times["fused"]) * 1e3 / (num_members - 1),
        }

    def all_reduce_us(self, method: Method, *, hidden_dim: int, batch: int) -> float:
        """Microseconds of one all-reduce of a hidden state, in a chain of them."""
        check_reduction(method, self.device)
        reduction = Reduction(method, (batch, hidden_dim), torch.bfloat16, self.device)

        def chain() -> None:
            for _ in range(NUM_CHAINED_REDUCTIONS):
                reduction()

        barrier()
        return median_ms(chain, device=self.device) * 1e3 / NUM_CHAINED_REDUCTIONS

    def machinery(self, setting: Setting) -> Machinery:
        """Kernels and memory for a data type; the memory of the last other type is given back."""
        dtype = FP8 if setting.fp8 else setting.half
        if self._machinery is None or self._machinery.weights.dtype != dtype:
            self._machinery = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self._ops is None:
                self.check_kernels()
            assert self._ops is not None
            # FP8 weights have their scale apart; 16-bit ones are as large as those of a model.
            weights = Ring(self.weight_bytes, dtype, self.device, std=1.0 if setting.fp8 else 0.01)
            cache = Ring(self.cache_bytes, setting.half, self.device)
            self._machinery = Machinery(ops=self._ops, picker=self.picker, weights=weights, cache=cache)
        return self._machinery


@dataclass(frozen=True, kw_only=True)
class _Mixed:
    """Operators that come from different implementations."""

    norm: Any
    rotate: Any
    attend: Any


def make_bench(
    device: torch.device, *, weight_bytes: int, cache_bytes: int, picks_path: Any, keeps_picks: bool, triton: bool
) -> Bench:
    """A bench with rings that fit the memory that is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        weight_bytes = min(weight_bytes, int(0.75 * free))
    picker = Picker(device=device, workspace=Workspace(device), path=picks_path, keeps=keeps_picks, triton=triton)
    return Bench(device=device, picker=picker, weight_bytes=weight_bytes, cache_bytes=cache_bytes, triton=triton)


def num_processes() -> int:
    """Processes that measure together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _latency(samples: list[float], shard: DecodeShard, batch: int) -> dict[str, Any]:
    milliseconds = median(samples)
    deciles = quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else [milliseconds] * 9
    return {
        "ms": milliseconds,
        "p10_ms": deciles[0],
        "p90_ms": deciles[-1],
        "tokens_per_s": batch * 1e3 / milliseconds,
        "read_gb": shard.read_bytes / 1e9,
        "tb_per_s": shard.read_bytes / milliseconds / 1e9,
        "num_ops": len(shard.ops),
        "num_all_reduces": shard.num_all_reduces,
    }


def _ffn_only(hidden_dim: int, width: int) -> Architecture:
    padded = -(-width // 256) * 256
    return Architecture(
        vocab_size=256,
        hidden_dim=hidden_dim,
        num_heads=1,
        head_dim=64,
        blocks=dense_blocks(1, 1, padded),
        max_positions=64,
        rope=RopeConfig(theta=10_000.0),
    )

"""The rates of this device, by quick measurements: what the roofline needs where no hardware file says it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed

from distill import distributed as processes
from distill.config import RopeConfig
from puzzle.analytic import Operators, phases
from puzzle.config import CostConfig, HardwareConfig, WorkloadConfig
from puzzle.cost import random_stack
from puzzle.latency import Step, Timer, blocks_step, cpu_timer, cuda_timer, interleaved_ms, torch_dtype
from puzzle.model import stats
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.shard import Shard, Subblock

READ_BYTES = 256 * 2**20
"""Weights that are read to measure the bandwidth, beyond most caches; as many as the parent has if these are fewer."""
MATMUL_DIM = {"cpu": 1024, "cuda": 8192}
NUM_TINY_BLOCKS = 16
"""Attentions, and as many FFNs: some hundred operators, so that what a whole run costs does not count."""
NUM_CHAINED_REDUCTIONS = 8
"""All-reduces in one timed run. All ranks must start equally many, so their number cannot follow a clock."""
SMALL_REDUCTION_BYTES, LARGE_REDUCTION_BYTES = 2**10, 64 * 2**20
"""Sizes between which the line lies that stands for all others in the model."""

Measured = tuple[Step, Callable[[float], float]]
"""Work, and the rate that follows from its seconds."""

_NOTHING = BlockConfig(attention=NO_ATTENTION, ffn=NO_FFN, parent_block_indices=(0,))
_TINY = Architecture(
    vocab_size=1,
    hidden_dim=64,
    num_heads=1,
    head_dim=64,
    blocks=(_NOTHING,),
    max_positions=16,
    rope=RopeConfig(theta=10_000.0),
)


def calibrate(
    hardware: HardwareConfig,
    parent: Architecture,
    *,
    workload: WorkloadConfig,
    device: torch.device,
    config: CostConfig,
) -> HardwareConfig:
    """``hardware`` with its null rates measured here, those of the all-reduce aside.

    Matrix products: one square product. Bandwidth: a large matrix times a vector, which is what decoding does; it stays
    in the caches where the weights of ``parent`` would. Kernel launch: a chain of the operators of blocks so small that
    nothing else counts, inside of a CUDA graph where there is CUDA.
    """
    weight_bytes = stats.weight_bytes(parent, workload.bytes_per_value) // workload.tensor_parallel
    work: dict[str, Callable[[WorkloadConfig, torch.device], Measured]] = {
        "flops_per_s": _square_product,
        "bytes_per_s": partial(_matrix_times_vector, min(READ_BYTES, weight_bytes)),
        "kernel_launch_s": _tiny_operators,
    }
    missing = {name: make for name, make in work.items() if getattr(hardware, name) is None}
    if not missing:
        return hardware
    made = {name: make(workload, device) for name, make in missing.items()}
    steps = {name: step for name, (step, _) in made.items()}
    samples = interleaved_ms(steps, device=device, repeats=config.repeats, warmup=config.warmup, desc="calibrate")
    rates: dict[str, Any] = {name: made[name][1](median(values) / 1e3) for name, values in samples.items()}
    return replace(hardware, **rates)


def _random(shape: tuple[int, int], workload: WorkloadConfig, device: torch.device) -> Tensor:
    # Random numbers: GPUs draw less power on zeros, and clock higher.
    values = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(0))
    return values.to(torch_dtype(workload))


def _square_product(workload: WorkloadConfig, device: torch.device) -> Measured:
    dim = MATMUL_DIM[device.type]
    matrix = _random((dim, dim), workload, device)
    product = torch.empty_like(matrix)
    return lambda: torch.matmul(matrix, matrix, out=product), lambda seconds: 2 * dim**3 / seconds


def _matrix_times_vector(num_bytes: int, workload: WorkloadConfig, device: torch.device) -> Measured:
    dim = MATMUL_DIM[device.type]
    matrix = _random((max(1, num_bytes // workload.bytes_per_value // dim), dim), workload, device)
    vector = _random((1, dim), workload, device)
    return lambda: torch.nn.functional.linear(vector, matrix), lambda seconds: matrix.nbytes / seconds


def _tiny_operators(workload: WorkloadConfig, device: torch.device) -> Measured:
    tiny = replace(workload, batch_size=1, prefill_tokens=1, generated_tokens=1, tensor_parallel=1)
    shard, (_, decode) = Shard(parent=_TINY, num_ranks=1), phases(tiny)
    pair: list[Subblock] = [AttentionConfig(num_kv_heads=1), FFNConfig(ffn_dim=256)]
    subblocks = pair * NUM_TINY_BLOCKS
    operators = Operators(shard=shard, workload=tiny, phase=decode)
    num_kernels = sum(work.num_kernels for subblock in subblocks for work in operators.subblock(subblock))
    model = random_stack(shard, subblocks, dtype=torch_dtype(tiny), device=device)
    step = blocks_step(model.model, list(model.model.layers), tiny, decode)
    return step, lambda seconds: seconds / num_kernels


def calibrate_all_reduce(
    hardware: HardwareConfig, *, workload: WorkloadConfig, device: torch.device, config: CostConfig
) -> HardwareConfig:
    """``hardware`` with the null rates of its all-reduce measured over the processes of this run, if they are as many
    as the workload's ranks. All processes must call it.
    """
    names = ("all_reduce_s", "all_reduce_bytes_per_s")
    missing = [name for name in names if getattr(hardware, name) is None]
    ranks = workload.tensor_parallel
    if not missing or not can_measure_all_reduce(workload):
        return hardware
    sizes = (SMALL_REDUCTION_BYTES, LARGE_REDUCTION_BYTES)
    small_ms, large_ms = measured_all_reduce_ms(sizes, workload=workload, device=device, config=config).values()
    # Noise may turn the line over where links are as fast as memory.
    seconds = max(large_ms - small_ms, 1e-6) / 1e3
    rates: dict[str, Any] = {
        "all_reduce_s": small_ms / 1e3,
        "all_reduce_bytes_per_s": 2 * (ranks - 1) / ranks * (LARGE_REDUCTION_BYTES - SMALL_REDUCTION_BYTES) / seconds,
    }
    return replace(hardware, **{name: rates[name] for name in missing})


def can_measure_all_reduce(workload: WorkloadConfig) -> bool:
    """Whether as many processes run as the workload has ranks, more than one."""
    return processes.world_size() == workload.tensor_parallel > 1


def measured_all_reduce_ms(
    sizes: Collection[int], *, workload: WorkloadConfig, device: torch.device, config: CostConfig
) -> dict[int, float]:
    """Milliseconds of an all-reduce over all processes, by the bytes that each contributes, in ascending order.

    All processes must call it with the same sizes; the times are this process's own. On CUDA the all-reduces run inside
    of a CUDA graph, as those of serving engines do.
    """
    assert can_measure_all_reduce(workload)
    times = {}
    for num_bytes in sorted(sizes):
        timer = _reduction_timer(num_bytes, torch_dtype(workload), device)
        samples = [timer(1) for _ in range(config.warmup + config.repeats)][config.warmup :]
        times[num_bytes] = median(samples) / NUM_CHAINED_REDUCTIONS
    return times


def _reduction_timer(num_bytes: int, dtype: torch.dtype, device: torch.device) -> Timer:
    # Zeros: whatever else is added up time and again would overflow.
    values = torch.zeros(max(1, num_bytes // dtype.itemsize), dtype=dtype, device=device)

    def step() -> None:
        for _ in range(NUM_CHAINED_REDUCTIONS):
            distributed.all_reduce(values)

    return cuda_timer(step) if device.type == "cuda" else cpu_timer(step)

"""Time of work on this device: under a CUDA graph, as serving engines run a decode step."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import distributed

Run = Callable[[], object]


def graph_ms(run: Run, *, replays: int = 20, device: torch.device) -> list[float]:
    """Milliseconds of every replay of ``run`` as one CUDA graph; on the CPU of plain runs by the wall clock.

    With several processes all must call this together where ``run`` communicates.
    """
    if device.type != "cuda":
        run()
        return [_wall_ms(run) for _ in range(min(replays, 2))]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph: it empties the allocator's cache each time. NCCL's watchdog thread asks for events
    # meanwhile, which the default mode takes for an error.
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    for _ in range(2):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    torch.cuda.synchronize(device)
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def median_ms(run: Run, *, replays: int = 20, device: torch.device) -> float:
    """Median of :func:`graph_ms`."""
    return median(graph_ms(run, replays=replays, device=device))


def barrier() -> None:
    """Wait for the other processes, if there are any."""
    if distributed.is_initialized():
        distributed.barrier()


def _wall_ms(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3

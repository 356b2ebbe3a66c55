"""How long things take: one rule for a subblock, a stack of blocks and a whole model.

On CUDA a step is captured in a CUDA graph and timed with CUDA events over replays: how fast the host launches kernels
does not count, as in serving engines, which do the same. On the CPU it is timed by the wall clock. Steps that are to be
compared take turns, so that drift of clocks and load hits all alike; medians count.

A prefill runs the whole prompt of the whole batch and gives the logits of its last position. A decode step runs one
token per sequence in the middle of the generation: the prompt and half of the generated tokens are in the KV cache.
Rotary angles and masks are made before the clock starts, as serving engines do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill.config import require
from puzzle.analytic import Phase, phases
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM, DeciLMModel

MIN_SAMPLE_MS = 2.0
"""A step that is shorter is run several times per sample: the clock's own error is some microseconds."""
NUM_CAPTURE_WARMUP = 3
"""Runs before a CUDA graph is captured, in which libraries allocate what must not be allocated during capture."""

Step = Callable[[], Any]
"""Work to time. Reads and writes the same memory every time."""
Timer = Callable[[int], float]
"""Number of runs -> milliseconds per run."""


class FixedCache:
    """A KV cache of fixed length for timing: it is always full, and new tokens overwrite its last positions.

    Its buffers are made on first use and keep their addresses, so that a step with it can be captured in a CUDA graph.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Store ``key`` and ``value [batch, num_kv_heads, new_tokens, head_dim]`` of one attention.

        Returns:
            Keys and values to attend to: the cache ``[batch, num_kv_heads, num_tokens, head_dim]``, or, where the new
            tokens are as many or more (a prompt), the new ones.
        """
        if layer_idx not in self._layers:
            shape = (*key.shape[:2], self.num_tokens, key.shape[3])
            self._layers[layer_idx] = (key.new_zeros(shape), value.new_zeros(shape))
        num_kept = min(key.shape[2], self.num_tokens)
        for cached, new in zip(self._layers[layer_idx], (key, value), strict=True):
            cached[:, :, -num_kept:] = new[:, :, -num_kept:]
        return (key, value) if key.shape[2] >= self.num_tokens else self._layers[layer_idx]


def torch_dtype(workload: WorkloadConfig) -> torch.dtype:
    """Data type of weights, activations and KV cache."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[workload.dtype]


def require_positions(workload: WorkloadConfig, architecture: Architecture, name: str) -> None:
    """Raise ``ValueError`` where the prompt and the generated tokens do not fit the model's positions."""
    require(
        workload.max_context_tokens <= architecture.max_positions,
        f"workload.prefill_tokens={workload.prefill_tokens} + workload.generated_tokens={workload.generated_tokens} "
        f"is beyond the {architecture.max_positions} positions of {name}; lower them",
    )


def require_memory(weight_bytes: int, device: torch.device) -> None:
    """Raise ``ValueError`` where models with ``weight_bytes`` in all do not fit a CUDA device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        require(
            weight_bytes < free,
            f"benchmark: the models' weights take {weight_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
            "compare fewer models, or with workload.dtype=bfloat16",
        )


@torch.inference_mode()
def attention_arguments(model: DeciLMModel, workload: WorkloadConfig, phase: Phase) -> dict[str, Any]:
    """Keyword arguments of every block's forward in ``phase``, with a cache of their own."""
    window = model.config.sliding_window
    weight = model.norm.weight
    hidden = weight.new_zeros(workload.batch_size, phase.new_tokens, weight.shape[0])
    first = phase.context_tokens - phase.new_tokens
    positions = torch.arange(first, phase.context_tokens, device=weight.device)[None]
    shared = model.attention_inputs(hidden, position_ids=positions)
    if phase.new_tokens == 1:
        # The newest token sees all that the cache holds.
        shared["attention_mask"] = None
    return {**shared, "past_key_values": FixedCache(min(phase.context_tokens, window or phase.context_tokens))}


def blocks_step(
    model: DeciLMModel, blocks: Sequence[DeciLMDecoderLayer], workload: WorkloadConfig, phase: Phase
) -> Step:
    """Step that runs some blocks of ``model``, one after another, on a fixed random input."""
    weight = model.norm.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (workload.batch_size, phase.new_tokens, weight.shape[0])
    hidden = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
    arguments = attention_arguments(model, workload, phase)

    def step() -> Tensor:
        output = hidden
        for block in blocks:
            output = block(output, **arguments)
        return output

    return step


def model_step(model: DeciLMForCausalLM, workload: WorkloadConfig, phase: Phase) -> Step:
    """Step that runs a whole model on fixed random tokens and gives the logits of the last position."""
    weight = model.model.norm.weight
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch_size, phase.new_tokens)
    input_ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(weight.device)
    arguments = attention_arguments(model.model, workload, phase)

    def step() -> Tensor:
        hidden = model.model.embed(input_ids)
        for output in model.model.block_outputs(hidden, **arguments):
            hidden = output
        return model.lm_head(model.model.norm(hidden[:, -1:]))

    return step


@torch.inference_mode()
def peak_memory_bytes(model: DeciLMForCausalLM, workload: WorkloadConfig) -> int:
    """Most CUDA memory that weights, KV cache and activations of one model take while it prefills and decodes."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    extra = 0
    for phase in phases(workload):
        # Libraries allocate workspaces on first use, which would all count for the model that comes first.
        model_step(model, workload, phase)()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model_step(model, workload, phase)()
        extra = max(extra, torch.cuda.max_memory_allocated() - before)
    return weights + extra


@torch.inference_mode()
def interleaved_ms(
    steps: Mapping[str, Step], *, device: torch.device, repeats: int, warmup: int, desc: str
) -> dict[str, list[float]]:
    """Time steps in turns.

    Args:
        steps: what to time, by name.
        device: where the steps run; on CUDA it must be the current device.
        repeats: rounds; in each round every step is timed once.
        warmup: rounds before the first that counts.
        desc: label of the progress bar.

    Returns:
        Milliseconds per run, one value per round, by name; values at one index are from one round.
    """
    if device.type == "cuda":
        # One pool for all graphs: they never run at once, and the activations of every model would not fit.
        pool = torch.cuda.graph_pool_handle()
        timers = {name: cuda_timer(step, pool) for name, step in steps.items()}
    else:
        timers = {name: cpu_timer(step) for name, step in steps.items()}
    num_runs = {name: max(1, round(MIN_SAMPLE_MS / max(timer(1), 1e-3))) for name, timer in timers.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for index in tqdm(range(warmup + repeats), desc=desc, unit="round", leave=False):
        # Every other round goes backwards, so that linear drift cancels.
        for name in list(timers)[:: -1 if index % 2 else 1]:
            milliseconds = timers[name](num_runs[name])
            if index >= warmup:
                samples[name].append(milliseconds)
    return samples


def models_ms(
    models: Mapping[str, DeciLMForCausalLM],
    workload: WorkloadConfig,
    *,
    device: torch.device,
    repeats: int,
    warmup: int,
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of whole models by phase, model and round; see :func:`interleaved_ms`."""
    rounds: dict[str, dict[str, list[float]]] = {}
    for phase in phases(workload):
        steps = {name: model_step(model, workload, phase) for name, model in models.items()}
        rounds[phase.name] = interleaved_ms(steps, device=device, repeats=repeats, warmup=warmup, desc=phase.name)
    return rounds


def speed(name: str, rounds: Mapping[str, Mapping[str, list[float]]], workload: WorkloadConfig) -> dict[str, float]:
    """Summary of one of the models that :func:`models_ms` timed, against the one called ``parent``."""
    prefill_ms, decode_ms = median(rounds["prefill"][name]), median(rounds["decode"][name])
    # The prompt gives the first token.
    request_ms = prefill_ms + (workload.generated_tokens - 1) * decode_ms
    return {
        "prefill_ms": prefill_ms,
        "decode_ms": decode_ms,
        "request_ms": request_ms,
        "prefill_spread": spread(rounds["prefill"][name]),
        "decode_spread": spread(rounds["decode"][name]),
        "prefill_vs_parent": median_ratio(rounds["prefill"][name], rounds["prefill"]["parent"]),
        "decode_vs_parent": median_ratio(rounds["decode"][name], rounds["decode"]["parent"]),
        "decode_tokens_per_s": 1e3 * workload.batch_size / decode_ms,
        "request_tokens_per_s": 1e3 * workload.batch_size * workload.generated_tokens / request_ms,
    }


def median_ratio(samples: Sequence[float], reference: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return median(a / b for a, b in zip(samples, reference, strict=True))


def spread(samples: Sequence[float]) -> float:
    """Interquartile range over the median: how far the median can be trusted."""
    if len(samples) == 1:
        return 0.0
    first, middle, third = quantiles(samples, n=4, method="inclusive")
    return (third - first) / middle


@contextmanager
def cpu_threads(num_threads: int | None) -> Iterator[None]:
    """Run with ``num_threads`` torch threads on the CPU; None: torch's default."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_timer(step: Step) -> Timer:
    """Timer of ``step`` by the wall clock."""
    step()

    def milliseconds(num_runs: int) -> float:
        start = time.perf_counter()
        for _ in range(num_runs):
            step()
        return (time.perf_counter() - start) * 1e3 / num_runs

    return milliseconds


def cuda_timer(step: Step, pool: Any = None) -> Timer:
    """Timer of ``step`` as a CUDA graph by CUDA events, on the current device; ``pool`` is shared with other graphs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_CAPTURE_WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The thread that watches over NCCL asks the driver for events meanwhile: only this thread's calls are captured.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def milliseconds(num_runs: int) -> float:
        start.record()
        for _ in range(num_runs):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / num_runs

    return milliseconds

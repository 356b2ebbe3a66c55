"""The roofline against sums that are done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from puzzle.analytic import Phase, analytic_table, mean_attended_tokens, phases, swiglu_widths
from puzzle.config import HardwareConfig, WorkloadConfig
from puzzle.model import stats
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, AttentionConfig, FFNConfig

WORKLOAD = WorkloadConfig(batch_size=3, prefill_tokens=32, generated_tokens=16, dtype="bfloat16")
ENDLESS = 1e30
SUBBLOCKS = (
    AttentionConfig(num_kv_heads=2),
    AttentionConfig(num_kv_heads=1),
    AttentionConfig(kind="linear"),
    NO_ATTENTION,
    FFNConfig(ffn_dim=512),
    FFNConfig(ffn_dim=256),
    FFNConfig(kind="linear"),
    NO_FFN,
)


def hardware(*, flops=ENDLESS, num_bytes=ENDLESS, launch_s=0.0):
    return HardwareConfig(flops_per_s=flops, bytes_per_s=num_bytes, kernel_launch_s=launch_s)


def table(architecture, device, workload=WORKLOAD):
    return analytic_table(architecture, SUBBLOCKS, workload=workload, hardware=device)


@pytest.mark.parametrize("window", [1, 3, 5, 8, 100])
@pytest.mark.parametrize(("new", "context"), [(8, 8), (1, 8), (4, 8), (1, 1)])
def test_mean_attended_tokens(new, context, window):
    attended = [min(position, window) for position in range(context - new + 1, context + 1)]
    phase = Phase(name="test", new_tokens=new, context_tokens=context)
    assert mean_attended_tokens(phase, window) == round(sum(attended) / new)


def test_compute_bound_decode_is_the_flops_of_the_model(pico_architecture):
    costs = table(pico_architecture, hardware(flops=1.0)).model(block.name for block in pico_architecture.blocks)
    flops = WORKLOAD.batch_size * stats.flops_per_token(pico_architecture, phases(WORKLOAD)[1].context_tokens)
    assert costs.decode_ms == pytest.approx(1e3 * flops)


def test_compute_bound_prefill_grows_with_the_prompt(pico_architecture):
    row = table(pico_architecture, hardware(flops=1.0)).subblock("ffn", "w512")
    assert row.prefill_ms == pytest.approx(WORKLOAD.prefill_tokens * row.decode_ms)


def test_memory_bound_decode_reads_weights_cache_and_activations(pico_architecture):
    costs = table(pico_architecture, hardware(num_bytes=1.0))
    attention = costs.subblock("attention", "kv1")
    inner_dim = (4 + 1 + 1 + 4) * 16
    expected = attention.weight_bytes + 3 * 40 * attention.kv_bytes_per_token + 3 * (2 * 64 + inner_dim) * 2
    assert attention.decode_ms == pytest.approx(1e3 * expected)
    ffn = costs.subblock("ffn", "w256")
    assert ffn.decode_ms == pytest.approx(1e3 * (ffn.weight_bytes + 3 * (2 * 64 + 3 * 256) * 2))


def test_sliding_window_bounds_the_cache(pico_architecture):
    short = table(replace(pico_architecture, sliding_window=8), hardware(num_bytes=1.0))
    full = table(pico_architecture, hardware(num_bytes=1.0))
    assert (short.kv_tokens, full.kv_tokens) == (8, 48)
    saved_bytes = 3 * (40 - 8) * full.subblock("attention", "kv2").kv_bytes_per_token
    saved_ms = full.subblock("attention", "kv2").decode_ms - short.subblock("attention", "kv2").decode_ms
    assert saved_ms == pytest.approx(1e3 * saved_bytes)


def test_no_op_is_free(pico_architecture):
    costs = table(pico_architecture, hardware(flops=1.0, num_bytes=1.0, launch_s=1.0))
    no_op = costs.block("no_op+no_op")
    assert (no_op.prefill_ms, no_op.decode_ms, no_op.params, no_op.memory_bytes) == (0.0, 0.0, 0, 0)


def test_a_merge_saves_the_launches_and_one_norm(pico_architecture):
    costs = table(pico_architecture, hardware(launch_s=1e-3))
    assert costs.ffn_merge_saving.decode_ms == pytest.approx(costs.subblock("ffn", "w512").decode_ms)
    costs = table(pico_architecture, hardware(num_bytes=1.0))
    assert costs.ffn_merge_saving.decode_ms == pytest.approx(1e3 * 2 * (64 + 3 * 2 * 64))


def test_sizes_are_those_of_the_architecture(pico_architecture):
    """The head dimension is the model's own, not hidden / heads, and tied embeddings count once."""
    architecture = replace(pico_architecture, head_dim=32, tie_embeddings=True)
    costs = table(architecture, hardware())
    model = costs.model(block.name for block in architecture.blocks)
    assert model.params == stats.num_params(architecture)
    assert model.kv_bytes_per_token == stats.kv_bytes_per_token(architecture, 2) == 4 * 2 * 2 * 32 * 2
    assert model.memory_bytes == stats.weight_bytes(architecture, 2) + 3 * 48 * model.kv_bytes_per_token


def test_a_rate_that_is_missing(pico_architecture):
    with pytest.raises(ValueError, match=r"costs.hardware: flops_per_s, kernel_launch_s of H100 is null"):
        table(pico_architecture, HardwareConfig(name="H100", bytes_per_s=1.0))


def test_swiglu_widths():
    assert swiglu_widths(SUBBLOCKS) == [512, 256]

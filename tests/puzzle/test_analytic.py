"""The roofline against sums that are done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from puzzle.analytic import (
    NORM_BYTES,
    Phase,
    Reduction,
    analytic_table,
    mean_attended_tokens,
    modelled_all_reduce,
    phases,
    swiglu_widths,
)
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


def hardware(*, flops=ENDLESS, num_bytes=ENDLESS, launch_s=0.0, all_reduce_s=0.0, link=ENDLESS):
    return HardwareConfig(
        flops_per_s=flops,
        bytes_per_s=num_bytes,
        kernel_launch_s=launch_s,
        all_reduce_s=all_reduce_s,
        all_reduce_bytes_per_s=link,
    )


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


def norm_bytes(num_rows, dim):
    return NORM_BYTES["bfloat16"] * num_rows * dim


def test_memory_bound_decode_reads_weights_cache_and_activations(pico_architecture):
    """Three sequences of one token each, forty of them cached; 64 channels, 64 query and 16 key channels."""
    costs = table(pico_architecture, hardware(num_bytes=1.0))
    attention = costs.subblock("attention", "kv1")
    products = (64 + 64) + 2 * (64 + 16) + (64 + 64)
    rotations, written, attended = 10 * (64 + 16), 4 * 16, 2 * 64
    values = 3 * (products + rotations + written + attended + 3 * 64)
    expected = attention.weight_bytes + 3 * 40 * attention.kv_bytes_per_token + 2 * values + norm_bytes(3, 64)
    assert attention.decode_ms == pytest.approx(1e3 * expected)
    ffn = costs.subblock("ffn", "w256")
    values = 3 * (3 * (64 + 256) + 2 * 256 + 3 * 256 + 3 * 64)
    assert ffn.decode_ms == pytest.approx(1e3 * (ffn.weight_bytes + 2 * values + norm_bytes(3, 64)))


def test_operators_do_not_overlap(pico_architecture):
    """Norms wait for memory while products are bound by arithmetic: their times add up, neither hides the other."""
    flops = table(pico_architecture, hardware(flops=1e3)).subblock("ffn", "linear").prefill_ms
    both = table(pico_architecture, hardware(flops=1e3, num_bytes=1e6)).subblock("ffn", "linear").prefill_ms
    moved = norm_bytes(3 * 32, 64) + 2 * 64 + 2 * 3 * 3 * 32 * 64
    assert both - flops == pytest.approx(1e3 * moved / 1e6, rel=1e-6)


def test_head_norms_take_time(pico_architecture):
    launches = hardware(launch_s=1e-3)
    plain = table(pico_architecture, launches).subblock("attention", "kv2")
    normed = table(replace(pico_architecture, qk_norm=True), launches).subblock("attention", "kv2")
    assert normed.decode_ms - plain.decode_ms == pytest.approx(2 * 8)


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
    # Two merged FFNs read the input of two projections once, and write the output and the residual of one.
    saved_values = 3 * (3 * 64 + 3 * 64)
    saved_bytes = 2 * saved_values + norm_bytes(3, 64) + 2 * 64
    assert costs.ffn_merge_saving.decode_ms == pytest.approx(1e3 * saved_bytes)


def test_sizes_are_those_of_the_architecture(pico_architecture):
    """The head dimension is the model's own, not hidden / heads, and tied embeddings count once."""
    architecture = replace(pico_architecture, head_dim=32, tie_embeddings=True)
    costs = table(architecture, hardware())
    model = costs.model(block.name for block in architecture.blocks)
    assert model.params == stats.num_params(architecture)
    assert model.kv_bytes_per_token == stats.kv_bytes_per_token(architecture, 2) == 4 * 2 * 2 * 32 * 2
    assert model.memory_bytes == stats.weight_bytes(architecture, 2) + 3 * 48 * model.kv_bytes_per_token


def test_a_rate_that_is_missing(pico_architecture):
    with pytest.raises(ValueError, match=r"costs.hardware: flops_per_s, kernel_launch_s of H100 is null; give numbers"):
        table(pico_architecture, HardwareConfig(name="H100", bytes_per_s=1.0))
    with pytest.raises(ValueError, match=r"all_reduce_s, all_reduce_bytes_per_s is null.* start 2 processes"):
        table(
            pico_architecture,
            HardwareConfig(flops_per_s=1.0, bytes_per_s=1.0, kernel_launch_s=0.0),
            replace(WORKLOAD, tensor_parallel=2),
        )


def test_swiglu_widths():
    assert swiglu_widths(SUBBLOCKS) == [512, 256]


def test_all_reduce_in_a_ring():
    all_reduce = modelled_all_reduce(hardware(all_reduce_s=1e-3, link=1e6), 4)
    assert all_reduce(1000) == pytest.approx(1.0 + 1.5 * 1000 / 1e6 * 1e3)
    assert modelled_all_reduce(HardwareConfig(), 1)(1000) == 0.0


def test_a_rank_of_two_does_half_of_the_products(pico_architecture):
    """Norms, which every rank computes, are no products."""
    device = hardware(flops=1.0)
    whole = table(pico_architecture, device)
    half = table(pico_architecture, device, replace(WORKLOAD, tensor_parallel=2))
    for kind, variant in (("attention", "kv2"), ("attention", "linear"), ("ffn", "w512"), ("ffn", "linear")):
        assert half.subblock(kind, variant).decode_ms == pytest.approx(whole.subblock(kind, variant).decode_ms / 2)
    # The one KV head stands on both ranks.
    key_and_value_ms = 1e3 * 3 * 2 * 2 * 64 * 16
    kv1 = half.subblock("attention", "kv1").decode_ms
    assert kv1 == pytest.approx((whole.subblock("attention", "kv1").decode_ms + key_and_value_ms) / 2)
    assert half.overhead.decode_ms == pytest.approx(whole.overhead.decode_ms / 2)


def test_every_subblock_ends_in_an_all_reduce_and_a_merge_saves_one(pico_architecture):
    workload = replace(WORKLOAD, tensor_parallel=2)
    costs = table(pico_architecture, hardware(all_reduce_s=0.5, link=1e6), workload)
    hidden_ms = [1e3 * (0.5 + 3 * tokens * 64 * 2 / 1e6) for tokens in (32, 1)]
    for row in costs.subblocks:
        expected = [0.0, 0.0] if row.variant == "no_op" else hidden_ms
        assert [row.prefill_ms, row.decode_ms] == pytest.approx(expected)
    assert costs.ffn_merge_saving.decode_ms == pytest.approx(hidden_ms[1])
    # The embeddings are reduced; the logits only gathered, which goes half of the way.
    logits_ms = 1e3 * (0.5 + 3 * 320 * 2 / 2 / 1e6)
    assert costs.overhead.decode_ms == pytest.approx(hidden_ms[1] + logits_ms)


def test_sizes_are_all_that_is_asked_for(pico_architecture):
    workload, asked = replace(WORKLOAD, tensor_parallel=2), set()
    reduction = Reduction(parent=pico_architecture, workload=workload, all_reduce=lambda size: asked.add(size) or 0.0)
    for phase in phases(workload):
        reduction.subblock_ms(phase)
        reduction.outside_ms(phase)
    assert reduction.sizes() == asked


def test_bytes_are_those_of_one_rank_and_parameters_those_of_all(pico_architecture):
    costs = table(pico_architecture, hardware(), replace(WORKLOAD, tensor_parallel=4))
    attention = costs.subblock("attention", "kv2")
    assert attention.params == stats.attention_params(pico_architecture, AttentionConfig(num_kv_heads=2))
    assert attention.weight_bytes == 2 * (64 + (2 * 16 + 2 * 16) * 64)
    assert attention.kv_bytes_per_token == 2 * 2 * 16
    assert costs.overhead.params == stats.other_params(pico_architecture)
    assert costs.overhead.weight_bytes == 2 * (2 * 80 * 64 + 64)
    assert costs.hardware == "4 x this device"


def test_a_no_op_saves_its_norm_too(pico_architecture):
    whole = table(pico_architecture, hardware()).subblock("ffn", "w512")
    assert whole.params == 3 * 64 * 512 + 64

"""What is built, differenced and clamped; the clock itself is a stand-in wherever its values count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill.config import RopeConfig
from puzzle import cost
from puzzle.config import CostConfig, HardwareConfig, SpaceConfig, WorkloadConfig
from puzzle.cost import Meter, calibrate, measured_table, random_model, subblock_variants
from puzzle.model import stats
from puzzle.model.architecture import NO_FFN, AttentionConfig, FFNConfig

CPU = torch.device("cpu")
WORKLOAD = WorkloadConfig(batch_size=2, prefill_tokens=8, generated_tokens=4)
CONFIG = CostConfig(repeats=2, warmup=0)
SPACE = SpaceConfig(kv_heads=(1,), attention_linear=True, ffn_fracs=(0.5,), ffn_linear=True, ffn_no_op=True)
CONSTANT_MS = 5.0


@pytest.fixture
def clock(monkeypatch):
    """A device on which a block takes 1 ms per million parameters and token, and every run 5 ms more."""
    repeats_seen = []

    def blocks_step(model, blocks, workload, phase):
        num_params = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        return CONSTANT_MS + 1e-6 * num_params * phase.new_tokens

    def interleaved_ms(steps, *, device, repeats, warmup, desc):
        repeats_seen.append(repeats)
        return {name: [step if isinstance(step, float) else 0.25] * repeats for name, step in steps.items()}

    monkeypatch.setattr(cost, "blocks_step", blocks_step)
    monkeypatch.setattr(cost, "interleaved_ms", interleaved_ms)
    return repeats_seen


def test_variants_are_distinct_and_the_parents_come_first(pico_architecture):
    names = [subblock.name for subblock in subblock_variants(pico_architecture, SPACE)]
    assert names == ["kv2", "kv1", "linear", "no_op", "w512", "w256", "linear", "no_op"]


def test_what_does_not_grow_with_the_blocks_cancels(pico_architecture, clock):
    subblocks = subblock_variants(pico_architecture, SPACE)
    table = measured_table(pico_architecture, subblocks, workload=WORKLOAD, config=CONFIG, device=CPU)
    for row in table.subblocks:
        assert row.decode_ms == pytest.approx(1e-6 * row.params)
        assert row.prefill_ms == pytest.approx(8 * row.decode_ms)
    assert [row.decode_ms for row in table.subblocks if row.variant == "no_op"] == [0.0, 0.0]
    # Two FFNs have one norm more than one of twice the width.
    assert table.ffn_merge_saving.decode_ms == pytest.approx(1e-6 * pico_architecture.hidden_dim)
    assert table.overhead.decode_ms == 0.25
    assert table.clamped == ()
    assert table.model(block.name for block in pico_architecture.blocks).params == stats.num_params(pico_architecture)


def test_a_difference_below_zero_is_measured_again_then_clamped_by_name(pico_architecture, clock, monkeypatch):
    monkeypatch.setattr(cost, "blocks_step", lambda model, blocks, workload, phase: 1.0 / len(blocks))
    meter = Meter(parent=pico_architecture, workload=WORKLOAD, config=CONFIG, device=CPU)
    assert meter.subblock_ms(FFNConfig(ffn_dim=256)) == (0.0, 0.0)
    assert meter.clamped == ["ffn w256 prefill_ms", "ffn w256 decode_ms"]
    assert clock == [2, 4, 8, 2, 4, 8]
    table = measured_table(
        pico_architecture, (AttentionConfig(num_kv_heads=2), NO_FFN), workload=WORKLOAD, config=CONFIG, device=CPU
    )
    assert table.clamped == ("attention kv2 prefill_ms", "attention kv2 decode_ms")
    assert table.ffn_merge_saving.decode_ms == 0.0


def test_a_merge_that_does_not_pay_saves_nothing(pico_architecture, clock, monkeypatch):
    monkeypatch.setattr(cost, "blocks_step", lambda model, blocks, workload, phase: float(-len(blocks)))
    table = measured_table(pico_architecture, (FFNConfig(ffn_dim=256),), workload=WORKLOAD, config=CONFIG, device=CPU)
    assert (table.ffn_merge_saving.prefill_ms, table.ffn_merge_saving.decode_ms) == (0.0, 0.0)
    assert set(table.clamped) >= {"ffn_merge_saving prefill_ms", "ffn_merge_saving decode_ms"}


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_blocks_under_the_real_clock(pico_architecture, dtype, sliding_window):
    architecture = replace(pico_architecture, sliding_window=sliding_window)
    subblocks = subblock_variants(architecture, SPACE)
    workload = replace(WORKLOAD, dtype=dtype)
    table = measured_table(architecture, subblocks, workload=workload, config=replace(CONFIG, repeats=1), device=CPU)
    assert [row.variant for row in table.subblocks] == [subblock.name for subblock in subblocks]
    assert table.overhead.decode_ms > 0
    # A row is above 0 or is named; a no-op is neither.
    zeros = {f"{row.subblock} {row.variant} decode_ms" for row in table.subblocks if row.decode_ms == 0}
    assert zeros - set(table.clamped) == {"attention no_op decode_ms", "ffn no_op decode_ms"}


@torch.inference_mode()
def test_a_random_model_is_the_architecture_and_stays_finite(heterogeneous_architecture):
    architecture = replace(
        heterogeneous_architecture,
        rope=RopeConfig(theta=10_000.0, kind="linear", factor=2.0),
        qk_norm=True,
        qkv_bias=True,
    )
    model = random_model(architecture, dtype=torch.bfloat16, device=CPU)
    assert sum(parameter.numel() for parameter in model.parameters()) == stats.num_params(architecture)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.zeros(1, 8, dtype=torch.long)).logits.isfinite().all()
    again = random_model(architecture, dtype=torch.bfloat16, device=CPU)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_calibration_fills_what_is_null():
    given = HardwareConfig(name="box", flops_per_s=1e12)
    filled = calibrate(given, dtype=torch.float32, device=CPU, config=replace(CONFIG, repeats=1))
    assert (filled.name, filled.flops_per_s) == ("box", 1e12)
    assert filled.bytes_per_s > 0
    assert 0 < filled.kernel_launch_s < 1
    assert calibrate(filled, dtype=torch.float32, device=CPU, config=CONFIG) == filled


@pytest.mark.gpu
def test_costs_on_a_gpu(pico_architecture):
    device = torch.device("cuda", torch.cuda.current_device())
    subblocks = subblock_variants(pico_architecture, SPACE)
    table = measured_table(
        pico_architecture, subblocks, workload=replace(WORKLOAD, dtype="bfloat16"), config=CONFIG, device=device
    )
    assert table.subblock("attention", "kv2").decode_ms > 0
    assert table.overhead.decode_ms > 0
    filled = calibrate(HardwareConfig(), dtype=torch.bfloat16, device=device, config=CONFIG)
    # Above any CPU, below any GPU of the decade.
    assert 1e12 < filled.flops_per_s < 1e17
    assert 1e10 < filled.bytes_per_s < 1e14

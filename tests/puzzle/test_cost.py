"""What is built, differenced and clamped; the clock itself is a stand-in wherever its values count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill.config import RopeConfig
from puzzle import cost
from puzzle.analytic import phases
from puzzle.config import CostConfig, SpaceConfig, WorkloadConfig
from puzzle.cost import Meter, measured_table, random_model, random_stack, subblock_variants
from puzzle.latency import blocks_step
from puzzle.model import stats
from puzzle.model.architecture import NO_FFN, AttentionConfig, FFNConfig
from puzzle.shard import Shard

CPU = torch.device("cpu")
WORKLOAD = WorkloadConfig(batch_size=2, prefill_tokens=8, generated_tokens=4)
CONFIG = CostConfig(repeats=2, warmup=0)
SPACE = SpaceConfig(kv_heads=(1,), attention_linear=True, ffn_fracs=(0.5,), ffn_linear=True, ffn_no_op=True)
CONSTANT_MS = 5.0


def measure(architecture, subblocks, *, workload=WORKLOAD, config=CONFIG, device=CPU, all_reduce=lambda size: 0.0):
    return measured_table(
        architecture,
        subblocks,
        workload=workload,
        config=config,
        device=device,
        hardware="a device",
        all_reduce=all_reduce,
    )


@pytest.fixture
def clock(monkeypatch):
    """A device on which a block takes 1 ms per million parameters and token, a head 0.25 ms, every run 5 ms more."""
    repeats_seen = []

    def blocks_step(model, blocks, workload, phase):
        num_params = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        return CONSTANT_MS + 1e-6 * num_params * phase.new_tokens

    def interleaved_ms(steps, *, device, repeats, warmup, desc):
        repeats_seen.append(repeats)
        if all(isinstance(step, float) for step in steps.values()):
            return {name: [step] * repeats for name, step in steps.items()}
        return {"long": [CONSTANT_MS + 0.25] * repeats, "short": [CONSTANT_MS] * repeats}

    monkeypatch.setattr(cost, "blocks_step", blocks_step)
    monkeypatch.setattr(cost, "interleaved_ms", interleaved_ms)
    return repeats_seen


def test_variants_are_distinct_and_the_parents_come_first(pico_architecture):
    names = [subblock.name for subblock in subblock_variants(pico_architecture, SPACE)]
    assert names == ["kv2", "kv1", "linear", "no_op", "w512", "w256", "linear", "no_op"]


def test_what_does_not_grow_with_the_blocks_cancels(pico_architecture, clock):
    subblocks = subblock_variants(pico_architecture, SPACE)
    table = measure(pico_architecture, subblocks)
    for row in table.subblocks:
        assert row.decode_ms == pytest.approx(1e-6 * row.params)
        assert row.prefill_ms == pytest.approx(8 * row.decode_ms)
    assert [row.decode_ms for row in table.subblocks if row.variant == "no_op"] == [0.0, 0.0]
    # Two FFNs have one norm more than one of twice the width.
    assert table.ffn_merge_saving.decode_ms == pytest.approx(1e-6 * pico_architecture.hidden_dim)
    assert table.overhead.decode_ms == 0.25
    assert table.clamped == ()
    assert (table.source, table.hardware, table.workload) == ("measured", "a device", WORKLOAD)
    assert table.model(block.name for block in pico_architecture.blocks).params == stats.num_params(pico_architecture)


def test_a_difference_below_zero_is_measured_again_then_clamped_by_name(pico_architecture, clock, monkeypatch):
    monkeypatch.setattr(cost, "blocks_step", lambda model, blocks, workload, phase: 1.0 / len(blocks))
    meter = Meter(parent=pico_architecture, workload=WORKLOAD, config=CONFIG, device=CPU)
    assert meter.subblock_ms(FFNConfig(ffn_dim=256)) == (0.0, 0.0)
    assert meter.clamped == ["ffn w256 prefill_ms", "ffn w256 decode_ms"]
    assert clock == [2, 4, 8, 2, 4, 8]
    table = measure(pico_architecture, (AttentionConfig(num_kv_heads=2), NO_FFN))
    assert table.clamped == ("attention kv2 prefill_ms", "attention kv2 decode_ms")
    assert table.ffn_merge_saving.decode_ms == 0.0


def test_a_merge_that_does_not_pay_saves_nothing(pico_architecture, clock, monkeypatch):
    monkeypatch.setattr(cost, "blocks_step", lambda model, blocks, workload, phase: float(-len(blocks)))
    table = measure(pico_architecture, (FFNConfig(ffn_dim=256),))
    assert (table.ffn_merge_saving.prefill_ms, table.ffn_merge_saving.decode_ms) == (0.0, 0.0)
    assert set(table.clamped) >= {"ffn_merge_saving prefill_ms", "ffn_merge_saving decode_ms"}


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_blocks_under_the_real_clock(pico_architecture, dtype, sliding_window):
    architecture = replace(pico_architecture, sliding_window=sliding_window)
    subblocks = subblock_variants(architecture, SPACE)
    workload = replace(WORKLOAD, dtype=dtype)
    table = measure(architecture, subblocks, workload=workload, config=replace(CONFIG, repeats=1))
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


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@torch.inference_mode()
def test_a_stack_of_shares_has_their_shapes_and_runs(pico_architecture, num_ranks):
    architecture = replace(pico_architecture, qkv_bias=True, qk_norm=True)
    subblocks = [subblock for subblock in subblock_variants(architecture, SPACE) if not subblock.is_no_op]
    shard = Shard(parent=architecture, num_ranks=num_ranks)
    model = random_stack(shard, subblocks, dtype=torch.float32, device=CPU)
    for block, subblock in zip(model.model.layers, subblocks, strict=True):
        assert {name: tuple(p.shape) for name, p in block.named_parameters()} == shard.shapes(subblock)
    for phase in phases(WORKLOAD):
        output = blocks_step(model.model, list(model.model.layers), WORKLOAD, phase)()
        assert output.shape == (2, phase.new_tokens, 64)
        assert output.isfinite().all()


@torch.inference_mode()
def test_shares_of_an_ffn_add_up_to_the_whole(pico_architecture):
    """Exact algebra of the split that the shapes stand for; fp32 sums in another order."""
    whole = random_stack(
        Shard(parent=pico_architecture, num_ranks=1), [FFNConfig(ffn_dim=512)], dtype=torch.float32, device=CPU
    ).model.layers[0]
    hidden, total = torch.randn(2, 3, 64), torch.zeros(2, 3, 64)
    for rank in range(4):
        part = random_stack(
            Shard(parent=pico_architecture, num_ranks=4), [FFNConfig(ffn_dim=512)], dtype=torch.float32, device=CPU
        ).model.layers[0]
        rows = slice(128 * rank, 128 * (rank + 1))
        part.mlp.gate_proj.weight.copy_(whole.mlp.gate_proj.weight[rows])
        part.mlp.up_proj.weight.copy_(whole.mlp.up_proj.weight[rows])
        part.mlp.down_proj.weight.copy_(whole.mlp.down_proj.weight[:, rows])
        total += part.ffn_update(hidden)
    torch.testing.assert_close(total, whole.ffn_update(hidden), rtol=1e-5, atol=1e-6)


def test_a_rank_pays_for_its_share_and_the_all_reduce(pico_architecture, clock):
    workload = replace(WORKLOAD, tensor_parallel=2)
    subblocks = subblock_variants(pico_architecture, SPACE)
    table = measure(pico_architecture, subblocks, workload=workload, all_reduce=lambda size: size / 1e3)
    hidden_ms = 2 * 64 * 4 / 1e3
    for row in table.subblocks:
        expected = 0.0 if row.variant == "no_op" else 1e-6 * row.weight_bytes / 4 + hidden_ms
        assert row.decode_ms == pytest.approx(expected)
    # Two of the merged FFNs are reduced apart, and have one norm more.
    assert table.ffn_merge_saving.decode_ms == pytest.approx(hidden_ms + 1e-6 * 64)
    assert table.overhead.decode_ms == pytest.approx(0.25 + hidden_ms + 2 * 320 * 4 / 2 / 1e3)


def test_memory_that_is_too_small_is_the_users_error(pico_architecture, monkeypatch):
    def interleaved_ms(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cost, "interleaved_ms", interleaved_ms)
    with pytest.raises(ValueError, match=r"batch size 2 with 8 \+ 4 tokens does not fit the memory of a device; lower"):
        measure(pico_architecture, (FFNConfig(ffn_dim=256),))


@pytest.mark.gpu
def test_costs_on_a_gpu(pico_architecture):
    device = torch.device("cuda", torch.cuda.current_device())
    subblocks = subblock_variants(pico_architecture, SPACE)
    for num_ranks in (1, 2):
        workload = replace(WORKLOAD, dtype="bfloat16", tensor_parallel=num_ranks)
        table = measure(pico_architecture, subblocks, workload=workload, device=device)
        assert table.subblock("attention", "kv2").decode_ms > 0
        assert table.overhead.decode_ms > 0

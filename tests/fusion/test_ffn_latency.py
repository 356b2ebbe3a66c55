"""Latencies of FFNs, most of them with a stand-in for the clock."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusion import ffn_latency
from fusion.ffn_latency import all_reduce_ms, measure_ffns, timed_widths
from fusion.group_scores import scored_groups
from puzzle.analytic import modelled_all_reduce
from puzzle.config import CostConfig, HardwareConfig, WorkloadConfig
from puzzle.cost import Meter
from puzzle.model import stats
from puzzle.model.architecture import FFNConfig
from puzzle.shard import Shard

A = (2, 256)
FFN = (None, 256)
WIDE = (None, 512)
WORKLOAD = WorkloadConfig(batch_size=2, prefill_tokens=8, generated_tokens=4)
CPU = torch.device("cpu")


def test_all_widths_are_timed_where_they_are_few(make_architecture):
    architecture = make_architecture(A, FFN, FFN, FFN, A, (None, 512))
    groups = scored_groups(architecture, None)
    assert timed_widths(architecture, groups, num_widths=16) == (256, 512, 768)
    assert timed_widths(architecture, groups, num_widths=2) == (256, 768)


def test_timed_widths_are_near_a_geometric_series_of_widths_that_occur(make_architecture):
    architecture = make_architecture(A, *[FFN] * 64)
    widths = timed_widths(architecture, scored_groups(architecture, None), num_widths=10)
    assert len(widths) == 10
    assert (widths[0], widths[-1]) == (256, 64 * 256)
    assert all(width % 256 == 0 for width in widths)
    # From one to two of the narrowest is as small a step as there is.
    assert all(narrow < wide <= 2 * narrow for narrow, wide in pairwise(widths))


def measure(architecture, widths, **fields):
    settings = {"workload": WORKLOAD, "device": CPU, "repeats": 3, "warmup": 0, "hardware": "a device", **fields}
    return measure_ffns(architecture, widths, **settings)


@pytest.fixture
def clock(monkeypatch):
    """A device on which a block takes 1 ms per million parameters and token, and every run 5 ms more."""
    rounds = []

    def step(blocks, hidden):
        return 5.0 + 1e-6 * hidden.shape[1] * sum(p.numel() for block in blocks for p in block.parameters())

    def interleaved_ms(steps, *, device, repeats, warmup, desc):
        rounds.append((desc, len(steps), repeats))
        return {name: [step] * repeats for name, step in steps.items()}

    monkeypatch.setattr(ffn_latency, "_step", step)
    monkeypatch.setattr(ffn_latency, "interleaved_ms", interleaved_ms)
    return rounds


def test_all_widths_take_turns_and_what_does_not_grow_cancels(make_architecture, clock):
    latencies, clamped = measure(make_architecture(A, FFN, WIDE), (768, 256, 512))
    assert [row.ffn_dim for row in latencies] == [256, 512, 768]
    for row in latencies:
        assert row.decode_ms == pytest.approx(1e-6 * (3 * row.ffn_dim * 32 + 32))
        assert row.prefill_ms == pytest.approx(8 * row.decode_ms)
    assert clamped == ()
    assert clock == [("prefill", 6, 3), ("decode", 6, 3)]


def test_under_tensor_parallelism_one_rank_is_timed(make_architecture, clock):
    latencies, _ = measure(make_architecture(A, FFN, WIDE), (256, 768), workload=replace(WORKLOAD, tensor_parallel=4))
    assert [row.ffn_dim for row in latencies] == [256, 768]
    for row in latencies:
        assert row.decode_ms == pytest.approx(1e-6 * (3 * row.ffn_dim // 4 * 32 + 32))


def test_stacks_share_their_matrices_and_compute_ffns(make_architecture, monkeypatch):
    """The steps themselves: a chain of FFNs of the width, over parts of the same weights."""
    kept = {}

    def interleaved_ms(steps, *, device, repeats, warmup, desc):
        kept[desc] = {name: step() for name, step in steps.items()}
        return {name: [2.0 if name.endswith(" 0") else 1.0] * repeats for name in steps}

    stacks = []

    def meta_stack(*arguments, **fields):
        stacks.append(original(*arguments, **fields))
        return stacks[-1]

    original = ffn_latency.meta_stack
    monkeypatch.setattr(ffn_latency, "interleaved_ms", interleaved_ms)
    monkeypatch.setattr(ffn_latency, "meta_stack", meta_stack)
    latencies, _ = measure(make_architecture(A, FFN, WIDE), (256, 768))
    assert kept["prefill"]["768 0"].shape == (2, 8, 32)
    assert kept["decode"]["256 1"].shape == (2, 1, 32)
    narrow, wide = (stack.model.layers for stack in stacks)
    assert narrow[0].mlp.gate_proj.weight.data_ptr() == wide[0].mlp.gate_proj.weight.data_ptr()
    assert narrow[1].mlp.gate_proj.weight.data_ptr() > narrow[0].mlp.down_proj.weight.data_ptr()
    assert wide[0].mlp.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    # The shorter stack has as many weights as the model, which is smaller than any cache.
    architecture = make_architecture(A, FFN, WIDE)
    num_copies = -(-stats.num_params(architecture) // stats.ffn_params(architecture, FFNConfig(ffn_dim=256)))
    assert len(narrow) == 2 * num_copies
    assert latencies[0].decode_ms == 1.0 / num_copies


class Allocations(TorchDispatchMode):
    """Bytes of every storage that operators make, the meta device aside."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.kept[storage.data_ptr()] = storage  # alive, so that no address comes twice
        return output


def test_memory_holds_the_largest_stack_and_no_second_one(make_architecture):
    architecture = make_architecture(A, *[FFN] * 8)
    shard = Shard(parent=architecture, num_ranks=1)
    widths = (256, 512, 1024, 2048)
    with Allocations() as allocations:
        stacks = ffn_latency._stacks(shard, widths, WORKLOAD, CPU)
    matrices = {width: 2 * stack.num_copies * 3 * width * 32 * 4 for width, stack in stacks.items()}
    num_bytes = [storage.nbytes() for storage in allocations.kept.values()]
    # The pool has the norms' values too; nothing else has more than a norm has.
    assert sorted(num_bytes)[-2] <= 32 * 4
    assert max(matrices.values()) <= max(num_bytes) <= 1.01 * max(matrices.values())
    assert sum(num_bytes) <= 1.05 * max(matrices.values())


@pytest.mark.gpu
def test_memory_of_a_gpu_holds_the_largest_stack_alone(make_architecture):
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = replace(make_architecture(A, *[FFN] * 8), hidden_dim=1024)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    stacks = ffn_latency._stacks(Shard(parent=architecture, num_ranks=1), (256, 2048), WORKLOAD, device)
    largest = max(2 * stack.num_copies * 3 * width * 1024 * 4 for width, stack in stacks.items())
    # Norms, and blocks of the allocator.
    assert torch.cuda.max_memory_allocated(device) - before <= 1.05 * largest


def test_all_reduces_are_those_of_the_analytic_costs(make_architecture):
    hardware = HardwareConfig(all_reduce_s=1e-5, all_reduce_bytes_per_s=1e9)
    architecture = make_architecture(A, FFN, WIDE)
    workload = replace(WORKLOAD, tensor_parallel=4, dtype="bfloat16")
    model = modelled_all_reduce(hardware, 4)
    # Two sequences of 32 channels in two bytes; eight tokens each in prefill.
    assert all_reduce_ms(architecture, workload, hardware) == (model(2 * 8 * 32 * 2), model(2 * 32 * 2))
    assert all_reduce_ms(architecture, WORKLOAD, HardwareConfig()) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"tensor_parallel=4 every FFN ends in an all-reduce.*hardware=h100_sxm"):
        all_reduce_ms(architecture, workload, HardwareConfig())


def test_a_time_not_above_zero_is_measured_again_then_clamped_by_name(make_architecture, monkeypatch):
    rounds = []

    def interleaved_ms(steps, *, device, repeats, warmup, desc):
        rounds.append((desc, sorted(steps), repeats))
        is_noise = desc == "decode"
        return {n: [1.0 if is_noise and n == "256 0" else 3.0 - float(n[-1])] * repeats for n in steps}

    monkeypatch.setattr(ffn_latency, "interleaved_ms", interleaved_ms)
    latencies, clamped = measure(make_architecture(A, FFN, WIDE), (256, 512))
    assert clamped == ("ffn w256 decode_ms",)
    assert latencies[0].decode_ms == 0.0
    assert latencies[1].decode_ms > 0
    assert rounds[2:] == [("decode", ["256 0", "256 1"], 6), ("decode", ["256 0", "256 1"], 12)]


def test_memory_that_is_too_small_is_the_users_error(make_architecture, monkeypatch):
    def interleaved_ms(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ffn_latency, "interleaved_ms", interleaved_ms)
    with pytest.raises(ValueError, match=r"FFNs of up to 512 channels .* do not fit the memory of a device; lower"):
        measure(make_architecture(A, FFN, FFN), (256, 512))


@pytest.mark.gpu
def test_latencies_on_a_gpu_are_those_of_the_cost_tables(make_architecture):
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = make_architecture(A, FFN, WIDE)
    workload = replace(WORKLOAD, dtype="bfloat16")
    latencies, _ = measure(architecture, (256, 768), workload=workload, device=device, repeats=10, warmup=2)
    meter = Meter(parent=architecture, workload=workload, config=CostConfig(repeats=10, warmup=2), device=device)
    for row in latencies:
        # Two medians of the same kernels, apart in time.
        assert row.decode_ms == pytest.approx(meter.subblock_ms(FFNConfig(ffn_dim=row.ffn_dim))[1], rel=0.3)

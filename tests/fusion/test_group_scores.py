"""Scores against models that are really fused or really lack an FFN; latencies with a stand-in for the clock."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from distill.config import EngineConfig
from distill.data.tokenizer import tokenizer_sha256
from fusion import group_scores
from fusion.config import GroupScoreConfig
from fusion.fuse import fuse_checkpoint
from fusion.group_scores import measure_ffns, score_groups, scored_groups, timed_widths
from fusion.group_table import GroupTable
from launch.registry import ScoreGroupsStage
from launch.stage import StageContext
from launch.stages import score_groups as stage
from puzzle.config import CostConfig, WorkloadConfig
from puzzle.cost import Meter
from puzzle.model import stats
from puzzle.model.architecture import FFNConfig
from puzzle.model.checkpoint import copy_tokenizer, load_model

A = (2, 256)
FFN = (None, 256)
WIDE = (None, 512)
NO_FFN = (2, None)
IDENTITY = (None, None)
BLOCKS = (A, FFN, WIDE, FFN, NO_FFN, FFN, IDENTITY, FFN, FFN)
"""Runs 1-3 and 7-8, the latter at the end; block 5 has no neighbour."""
SEQUENCES = torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(0))
SEQ_LEN = 16
WORKLOAD = WorkloadConfig(batch_size=2, prefill_tokens=8, generated_tokens=4)
CPU = torch.device("cpu")


@torch.inference_mode()
def divergence(model, other, sequences):
    """KL(model || other), its standard error over sequences and other's LM loss, through the models' own forward."""
    log_p, log_q = (m(sequences).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    klds = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
    lm_loss = -log_q.gather(-1, sequences[:, 1:, None]).mean()
    return klds.mean().item(), (klds.std() / len(klds) ** 0.5).item(), lm_loss.item()


def values(score):
    return score.kld, score.kld_stderr, score.lm_loss


@pytest.mark.parametrize("norm", ["folded", "last"])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_group_scores_as_the_model_that_is_fused(tmp_path, make_checkpoint, norm, batch_size):
    """Batches of two sequences, and of all five with three models in a forward."""
    architecture = make_checkpoint(tmp_path / "model", *BLOCKS)
    model = load_model(tmp_path / "model")
    scores = score_groups(model, architecture, SEQUENCES, norm=norm, batch_size=batch_size)
    assert [(group.first, group.last, group.ffn_dim) for group in scores.groups] == [
        (1, 2, 768),
        (1, 3, 1024),
        (2, 3, 768),
        (7, 8, 512),
    ]
    for group in scores.groups:
        out = tmp_path / f"fused-{group.first}-{group.last}"
        fuse_checkpoint(tmp_path / "model", out, [(group.first, group.last)], norm)
        expected = divergence(model, load_model(out), SEQUENCES)
        assert expected[0] > 1e-2
        # fp32 models that sum in another order; folding rounds every product once.
        assert values(group) == pytest.approx(expected, rel=1e-3)
    assert scores.lm_loss == pytest.approx(divergence(model, model, SEQUENCES)[2], rel=1e-5)


def test_the_norms_tell_members_apart(tmp_path, make_checkpoint):
    architecture = make_checkpoint(tmp_path / "model", A, FFN, FFN)
    model = load_model(tmp_path / "model")
    folded, last = (score_groups(model, architecture, SEQUENCES, norm=n, batch_size=5) for n in ("folded", "last"))
    assert abs(folded.groups[0].kld - last.groups[0].kld) > 1e-3
    assert folded.removals == last.removals


@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_removal_scores_as_the_model_without_that_ffn(tmp_path, make_checkpoint, batch_size):
    architecture = make_checkpoint(tmp_path / "model", *BLOCKS)
    model = load_model(tmp_path / "model")
    scores = score_groups(model, architecture, SEQUENCES, norm="folded", batch_size=batch_size)
    assert [removal.block for removal in scores.removals] == [1, 2, 3, 5, 7, 8]
    for removal in scores.removals:
        without = copy.deepcopy(model)
        without.model.layers[removal.block] = nn.Identity()
        without.model.layers[removal.block].forward = lambda hidden, **_: hidden
        # fp32 models that batch differently.
        assert values(removal) == pytest.approx(divergence(model, without, SEQUENCES), rel=1e-3)


def test_bf16_scores_come_near_to_fp32(tmp_path, make_checkpoint):
    architecture = make_checkpoint(tmp_path / "model", *BLOCKS, dtype=torch.bfloat16)
    exact, rounded = (
        score_groups(load_model(tmp_path / "model", dtype=d), architecture, SEQUENCES, norm="folded", batch_size=5)
        for d in (torch.float32, torch.bfloat16)
    )
    for a, b in zip(exact.groups, rounded.groups, strict=True):
        # The same weights; bf16 products have a relative error of 2^-9, in logits of order 1.
        assert b.kld == pytest.approx(a.kld, rel=0.05)


def test_groups_stay_within_runs_and_the_longest_length(make_architecture):
    architecture = make_architecture(A, FFN, FFN, FFN, FFN, A, FFN, FFN, A, FFN)
    assert scored_groups(architecture, 2) == ((1, 2), (2, 3), (3, 4), (6, 7))
    assert scored_groups(architecture, 3) == ((1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (6, 7))
    assert len(scored_groups(architecture, None)) == 4 * 3 // 2 + 1


def test_groups_leave_fused_ffns_out(make_architecture):
    architecture = make_architecture(A, FFN, FFN, FFN, FFN)
    fused = replace(architecture.blocks[2], parent_block_indices=(2, 7))
    assert scored_groups(architecture.with_block(2, fused), None) == ((3, 4),)


def test_nothing_to_group_is_refused(make_architecture):
    with pytest.raises(ValueError, match=r"group_scores: no two neighbouring blocks of the 4 .* remove neighbouring"):
        scored_groups(make_architecture(A, FFN, A, FFN), None)


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

    def blocks_step(model, blocks, workload, phase):
        return 5.0 + 1e-6 * phase.new_tokens * sum(p.numel() for block in blocks for p in block.parameters())

    def interleaved_ms(steps, *, device, repeats, warmup, desc):
        rounds.append((desc, len(steps), repeats))
        return {name: [step] * repeats for name, step in steps.items()}

    monkeypatch.setattr(group_scores, "blocks_step", blocks_step)
    monkeypatch.setattr(group_scores, "interleaved_ms", interleaved_ms)
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

    def random_stack(*arguments, **fields):
        stacks.append(original(*arguments, **fields))
        return stacks[-1]

    original = group_scores.random_stack
    monkeypatch.setattr(group_scores, "interleaved_ms", interleaved_ms)
    monkeypatch.setattr(group_scores, "random_stack", random_stack)
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


def test_a_time_not_above_zero_is_measured_again_then_clamped_by_name(make_architecture, monkeypatch):
    rounds = []

    def interleaved_ms(steps, *, device, repeats, warmup, desc):
        rounds.append((desc, sorted(steps), repeats))
        is_noise = desc == "decode"
        return {n: [1.0 if is_noise and n == "256 0" else 3.0 - float(n[-1])] * repeats for n in steps}

    monkeypatch.setattr(group_scores, "interleaved_ms", interleaved_ms)
    latencies, clamped = measure(make_architecture(A, FFN, WIDE), (256, 512))
    assert clamped == ("ffn w256 decode_ms",)
    assert latencies[0].decode_ms == 0.0
    assert latencies[1].decode_ms > 0
    assert rounds[2:] == [("decode", ["256 0", "256 1"], 6), ("decode", ["256 0", "256 1"], 12)]


def test_memory_that_is_too_small_is_the_users_error(make_architecture, monkeypatch):
    def interleaved_ms(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(group_scores, "interleaved_ms", interleaved_ms)
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


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_a_cpu(tmp_path, make_checkpoint):
    architecture = make_checkpoint(tmp_path / "model", *BLOCKS)
    on_cpu, on_gpu = (
        score_groups(load_model(tmp_path / "model", device=d), architecture, SEQUENCES, norm="folded", batch_size=16)
        for d in (CPU, torch.device("cuda", torch.cuda.current_device()))
    )
    for a, b in zip((*on_cpu.groups, *on_cpu.removals), (*on_gpu.groups, *on_gpu.removals), strict=True):
        assert values(b) == pytest.approx(values(a), rel=1e-3)  # fp32 on both, sums in another order


def context(out: Path) -> StageContext:
    out.mkdir()
    return StageContext(
        out=out, resume=out.parent / "resume", pool=out.parent / "pool", run_name="test", step_name=out.name
    )


@pytest.fixture
def child(tmp_path, make_checkpoint, pico_parent_dir):
    """Attention, three FFNs, attention, two FFNs; a tokenizer of 320 tokens."""
    make_checkpoint(tmp_path / "child", A, FFN, WIDE, FFN, A, FFN, FFN, vocab_size=320)
    copy_tokenizer(pico_parent_dir, tmp_path / "child")
    return tmp_path / "child"


@pytest.fixture
def data(tmp_path, child):
    directory = tmp_path / "data"
    directory.mkdir()
    tokens = np.random.default_rng(0).integers(0, 320, 8 * SEQ_LEN).astype(np.uint16)
    np.save(directory / "calibration.npy", tokens)
    summary = {
        "vocab_size": 320,
        "eos_token_id": 0,
        "unigram_entropy_nats": 5.0,
        "tokenizer_sha256": tokenizer_sha256(child),
    }
    (directory / "data.json").write_text(json.dumps(summary))
    return directory


def run(child, data, out, *, workload=WORKLOAD, **fields):
    settings = {"num_sequences": 6, "seq_len": SEQ_LEN, "batch_size": 4, "num_widths": 3, "repeats": 2, "warmup": 0}
    config = ScoreGroupsStage(
        group_scores=GroupScoreConfig(**{**settings, **fields}), workload=workload, engine=EngineConfig(device="cpu")
    )
    return stage.run(config, {"model": SimpleNamespace(path=child), "data": SimpleNamespace(path=data)}, context(out))


def test_stage_end_to_end(tmp_path, child, data):
    result = run(child, data, tmp_path / "scores", norm="last", workload=replace(WORKLOAD, num_cpu_threads=1))
    table = GroupTable.read(tmp_path / "scores" / "groups.json")
    assert (table.norm, table.num_tokens) == ("last", 6 * SEQ_LEN)
    assert [(group.first, group.last) for group in table.groups] == [(1, 2), (1, 3), (2, 3), (5, 6)]
    assert [removal.block for removal in table.removals] == [1, 2, 3, 5, 6]
    # 256, 512, 768 and 1024 occur; three are timed.
    assert [row.ffn_dim for row in table.latencies] == [256, 512, 1024]
    assert table.workload["generated_tokens"] == 4
    assert table.hardware
    saved = result.metrics["fastest"]["saved_decode_ms"]
    group = table.group(result.metrics["fastest"]["first"], result.metrics["fastest"]["last"])
    members = [512 if index == 2 else 256 for index in range(group.first, group.last + 1)]
    assert saved == table.saved_ms(members, "decode")
    assert result.metrics["cheapest"]["kld"] == min(group.kld for group in table.groups)
    assert result.headline.startswith("4 groups; cheapest ")
    assert "ms of decode saved" in result.headline


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_len": 129}, r"group_scores.seq_len=129 is beyond the 128 positions"),
        ({"num_sequences": 1}, r"group_scores.num_sequences must be >= 2, got 1"),
        ({"num_sequences": 9}, "9 sequences of 16 tokens asked of the calibration split"),
        ({"num_widths": 1}, r"group_scores.num_widths must be >= 2, got 1"),
        ({"workload": WorkloadConfig(prefill_tokens=128)}, r"workload.prefill_tokens=128 .* beyond the 128 positions"),
        (
            {"workload": WorkloadConfig(prefill_tokens=8, generated_tokens=8, tensor_parallel=3)},
            r"workload.tensor_parallel=3 does not divide the 4 query heads",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path, child, data, fields, message):
    with pytest.raises(ValueError, match=message):
        run(child, data, tmp_path / "scores", **fields)
    assert list(tmp_path.glob("scores/*")) == []


def test_model_without_two_neighbouring_ffns_is_refused(tmp_path, make_checkpoint, child, data):
    make_checkpoint(tmp_path / "dense", A, FFN, A, vocab_size=320)
    copy_tokenizer(child, tmp_path / "dense")
    with pytest.raises(ValueError, match="no two neighbouring blocks of the 3"):
        run(tmp_path / "dense", data, tmp_path / "scores")


def test_model_with_parallel_windows_is_refused(make_architecture):
    architecture = replace(make_architecture(A, A, A, FFN, FFN), parallel_windows=((0, 1),))
    with pytest.raises(ValueError, match="score_groups takes blocks one after another"):
        scored_groups(architecture, None)

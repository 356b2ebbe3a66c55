"""Scores against models that are really fused or really lack an FFN."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
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
from fusion.group_scores import score_groups, scored_groups
from fusion.group_table import GroupTable
from launch.config import compose_stage
from launch.stage import StageContext
from launch.stage_configs import MeasureCostsStage, ScoreGroupsStage
from launch.stages import score_groups as stage
from puzzle import score_metrics
from puzzle.config import HardwareConfig, WorkloadConfig
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
    architecture = make_architecture(A, *[FFN] * 6)
    fused = replace(architecture.blocks[3], parent_block_indices=(3, 9))
    assert scored_groups(architecture.with_block(3, fused), None) == ((1, 2), (4, 5), (4, 6), (5, 6))
    assert scored_groups(architecture.with_block(3, fused), 2) == ((1, 2), (4, 5), (5, 6))


def test_a_block_that_only_keeps_the_place_of_a_removed_one_is_not_fused(make_architecture):
    architecture = make_architecture(A, FFN, FFN, FFN)
    heir = replace(architecture.blocks[2], parent_block_indices=(2, 7), dropped_parent_indices=(7,))
    assert scored_groups(architecture.with_block(2, heir), None) == ((1, 2), (1, 3), (2, 3))


def compiled_scores(monkeypatch, model, architecture, **fields):
    """Scores through torch.compile, and how many graphs it made; no code is generated."""
    compile_ = torch.compile
    block_options = []

    def compile_eagerly(function, **options):
        if isinstance(getattr(function, "__self__", None), nn.Module):
            block_options.append(options)
        return compile_(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(score_metrics, "_compiled", lambda: score_metrics._of_logits)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Torch would go on without compiling where shapes are more than it expects.
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1, fail_on_recompile_limit_hit=True):
        scores = score_groups(model, architecture, SEQUENCES, compile=True, **fields)
    assert block_options == [{"dynamic": False}] * architecture.num_blocks
    assert not torch._dynamo.utils.counters["graph_break"]
    return scores, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("norm", "batch_size", "num_graphs"),
    [
        # Batches of two sequences and of one: four shapes of blocks, two widths of members.
        ("folded", 2, 2 * (4 + 2)),
        # Five sequences of one model; of two models, which only blocks behind a group see: of two shapes.
        ("last", 16, (4 + 2) + 2),
    ],
)
def test_compiled_shapes_are_few_and_none_is_left_out(
    tmp_path, make_checkpoint, monkeypatch, norm, batch_size, num_graphs
):
    architecture = make_checkpoint(tmp_path / "model", A, FFN, WIDE, FFN, NO_FFN, FFN, FFN)
    fields = {"norm": norm, "batch_size": batch_size}
    eager = score_groups(load_model(tmp_path / "model"), architecture, SEQUENCES, **fields)
    scores, num_compiled = compiled_scores(monkeypatch, load_model(tmp_path / "model"), architecture, **fields)
    # The same operators in the same order.
    assert scores == eager
    assert num_compiled == num_graphs


@pytest.mark.parametrize("num_models", [1, 3, 4])
def test_a_forward_holds_a_power_of_two_of_models(tmp_path, make_checkpoint, monkeypatch, num_models):
    architecture = make_checkpoint(tmp_path / "model", A, *[FFN] * 6)
    seen = []
    through = group_scores._GroupRuns._through

    def recording(runs, hidden, blocks):
        seen.append(len(hidden) // 5)
        return through(runs, hidden, blocks)

    monkeypatch.setattr(group_scores._GroupRuns, "_through", recording)
    score_groups(load_model(tmp_path / "model"), architecture, SEQUENCES, norm="last", batch_size=5 * num_models)
    assert set(seen) == {n for n in (1, 2, 4) if n <= num_models}


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("norm", ["folded", "last"])
def test_compiled_members_round_as_compiled_blocks_do(tmp_path, make_checkpoint, norm):
    """Fusing an FFN that adds nothing changes nothing: what is left of the divergence is how members round."""
    architecture = make_checkpoint(tmp_path / "model", A, FFN, FFN, FFN)
    eager, compiled = (load_model(tmp_path / "model", dtype=torch.bfloat16) for _ in range(2))
    for model in (eager, compiled):
        nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    expected = score_groups(eager, architecture, SEQUENCES, norm=norm, batch_size=5)
    scores = score_groups(compiled, architecture, SEQUENCES, norm=norm, batch_size=5, compile=True)
    nothing, *others = scores.groups
    assert (nothing.first, nothing.last) == (1, 2)
    # fp32 log-probabilities that a compiled and an eager softmax gave; members run eagerly leave 1.5e-5.
    assert abs(nothing.kld) < 1e-7
    for a, b in zip(expected.groups[1:], others, strict=True):
        assert b.kld == pytest.approx(a.kld, rel=0.05)  # bf16 rounded in other places


def test_nothing_to_group_is_refused(make_architecture):
    with pytest.raises(ValueError, match=r"group_scores: no two neighbouring blocks of the 4 .* remove neighbouring"):
        scored_groups(make_architecture(A, FFN, A, FFN), None)


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


RANKS = replace(WORKLOAD, tensor_parallel=2)
LINKS = HardwareConfig(name="two of them", all_reduce_s=1e-3, all_reduce_bytes_per_s=1e6)


def test_under_tensor_parallelism_each_ffn_ends_in_a_modelled_all_reduce(tmp_path, child, data):
    result = run(child, data, tmp_path / "scores", workload=RANKS, hardware=LINKS)
    table = GroupTable.read(tmp_path / "scores" / "groups.json")
    # Two sequences of 32 channels in fp32, of which each rank sends as many bytes as it holds; in prefill eight tokens.
    assert table.all_reduce_decode_ms == pytest.approx(1 + 2 * 32 * 4 / 1e3)
    assert table.all_reduce_prefill_ms == pytest.approx(1 + 8 * 2 * 32 * 4 / 1e3)
    assert table.ffn_ms(256, "decode") == table.latencies[0].decode_ms + table.all_reduce_decode_ms
    assert "2 tensor-parallel ranks, all-reduce modelled: two of them)" in result.headline
    assert result.metrics["all_reduce"] == {
        "source": "modelled",
        "hardware": "two of them",
        "prefill_ms": table.all_reduce_prefill_ms,
        "decode_ms": table.all_reduce_decode_ms,
    }


def test_on_a_single_rank_there_is_no_all_reduce(tmp_path, child, data):
    result = run(child, data, tmp_path / "scores", hardware=LINKS)
    table = GroupTable.read(tmp_path / "scores" / "groups.json")
    assert (table.all_reduce_prefill_ms, table.all_reduce_decode_ms, table.all_reduce_hardware) == (0.0, 0.0, None)
    assert result.metrics["all_reduce"] is None
    assert "all-reduce" not in result.headline


def test_rates_of_the_links_are_those_of_the_cost_table():
    config = compose_stage(ScoreGroupsStage, ["hardware@costs.hardware=h100_sxm"]).group_scores
    assert config.hardware == compose_stage(MeasureCostsStage, ["hardware@costs.hardware=h100_sxm"]).costs.hardware
    assert config.hardware.name == "NVIDIA H100 SXM"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workload": RANKS}, r"has no all_reduce_s and no all_reduce_bytes_per_s; .*hardware@costs.hardware=h100_sxm"),
        (
            {"workload": RANKS, "hardware": replace(LINKS, all_reduce_s=None)},
            r"workload.tensor_parallel=2 every FFN ends in an all-reduce.* has no all_reduce_s; name a device",
        ),
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

"""The stages on a pico child, from the measurements to the fused model and its controls."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill.config import EngineConfig
from distill.data.tokenizer import tokenizer_sha256
from fusion.config import DependencyConfig, FuseConfig, GroupScoreConfig
from fusion.group_table import FFNLatency, GroupScore, GroupTable, RemovalScore
from launch.stage import StageContext
from launch.stage_configs import FuseStage, MeasureDependencyStage, ScoreGroupsStage
from launch.stages import fuse, measure_dependency, score_groups
from puzzle.config import WorkloadConfig
from puzzle.model.checkpoint import copy_tokenizer, load_model, read_architecture

A = (2, 256)
FFN = (None, 256)
SEQ_LEN = 16


def context(out: Path) -> StageContext:
    out.mkdir()
    return StageContext(
        out=out, resume=out.parent / "resume", pool=out.parent / "pool", run_name="test", step_name=out.name
    )


def artifact(path: Path, *, fingerprint: str = "a" * 64, model: str = "a" * 64) -> SimpleNamespace:
    manifest = SimpleNamespace(fingerprint=fingerprint, inputs={"model": SimpleNamespace(fingerprint=model)})
    return SimpleNamespace(path=path, manifest=manifest)


@pytest.fixture
def child(tmp_path, make_checkpoint, pico_parent_dir):
    """Attention, four FFNs, attention, two FFNs; a tokenizer of 320 tokens."""
    make_checkpoint(tmp_path / "child", A, FFN, FFN, (None, 512), FFN, A, FFN, FFN, vocab_size=320)
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


def measure(child, data, out, **fields):
    config = MeasureDependencyStage(
        dependency=DependencyConfig(**{"num_sequences": 6, "seq_len": SEQ_LEN, "batch_size": 4, **fields}),
        engine=EngineConfig(device="cpu"),
    )
    return measure_dependency.run(config, {"model": artifact(child), "data": artifact(data)}, context(out))


def test_measure_then_fuse(tmp_path, child, data):
    measured = measure(child, data, tmp_path / "dependency")
    matrix = json.loads((tmp_path / "dependency" / "dependency.json").read_text())["matrix"]
    runs = {(run["first"], run["last"]): run["largest_dependency"] for run in measured.metrics["attention_free_runs"]}
    assert runs.keys() == {(1, 4), (6, 7)}
    assert runs[6, 7] == matrix[6][7]
    assert measured.metrics["num_tokens"] == 6 * SEQ_LEN
    assert "within attention-free blocks" in measured.headline

    bound = max(matrix[1][2], matrix[1][3], matrix[2][3])
    config = FuseStage(fuse=FuseConfig(max_dependency=bound))
    inputs = {"model": artifact(child), "dependency": artifact(tmp_path / "dependency")}
    result = fuse.run(config, inputs, context(tmp_path / "fused"))
    record = {
        "first": 1,
        "last": 3,
        "parent_block_indices": [1, 2, 3],
        "ffn_dim": 1024,
        "block": 1,
        "largest_dependency": bound,
        "kld": None,
        "saved_ms": None,
    }
    written = json.loads((tmp_path / "fused" / "fusion.json").read_text())
    assert written["groups"] == result.metrics["groups"] == [record]
    assert (written["norm"], written["treatment"], written["removed"]) == ("folded", "fuse", [])
    assert 0 < written["verify"]["max_relative_error_fp32"] < 1e-6
    assert result.headline.startswith("3 FFNs -> 1 fused (blocks 1-3, dependency up to 0.")
    assert load_model(tmp_path / "fused").config.num_hidden_layers == 6
    assert tokenizer_sha256(tmp_path / "fused") == tokenizer_sha256(child)


def test_fuse_without_dependency(tmp_path, child):
    config = FuseStage(fuse=FuseConfig(leave_last_out=False, norm="last"))
    result = fuse.run(config, {"model": artifact(child)}, context(tmp_path / "fused"))
    assert [(group["first"], group["last"], group["ffn_dim"]) for group in result.metrics["groups"]] == [
        (1, 4, 1280),
        (6, 7, 512),
    ]
    assert result.metrics["groups"][0]["largest_dependency"] is None
    assert "6 FFNs -> 2 fused (blocks 1-4, 6-7), width 1280 and 512; 8 -> 4 blocks" in result.headline


WIDTHS = {1: 256, 2: 256, 3: 512, 4: 256, 6: 256, 7: 256}
"""FFNs of the attention-free blocks of the child."""


def group_table(**fields):
    """Scores of the child: an FFN of w channels takes 1 ms + w / 2560 ms to decode, so that a merge saves 1 ms."""
    groups = [(first, last) for first in range(1, 5) for last in range(first + 1, 5)] + [(6, 7)]
    table = GroupTable(
        num_tokens=96,
        norm="folded",
        lm_loss=5.7,
        groups=tuple(
            GroupScore(
                first=first,
                last=last,
                ffn_dim=sum(WIDTHS[index] for index in range(first, last + 1)),
                kld=0.01 * (last - first) ** 2,
                kld_stderr=0.001,
                lm_loss=5.8,
            )
            for first, last in groups
        ),
        removals=tuple(RemovalScore(block=i, kld=1 / i, kld_stderr=0.01, lm_loss=5.9) for i in WIDTHS),
        latencies=tuple(
            FFNLatency(ffn_dim=width, prefill_ms=2 + width / 256, decode_ms=1 + width / 2560)
            for width in range(256, 1281, 256)
        ),
        hardware="none",
        workload=asdict(WorkloadConfig()),
    )
    return replace(table, **fields)


def run_fuse(child, out, table=None, **fields):
    inputs = {"model": artifact(child)}
    if table is not None:
        directory = out.parent / f"{out.name}-scores"
        directory.mkdir()
        table.write(directory / "groups.json")
        inputs["group_scores"] = artifact(directory)
    result = fuse.run(FuseStage(fuse=FuseConfig(**fields)), inputs, context(out))
    return result, json.loads((out / "fusion.json").read_text())


def test_most_gain_within_a_divergence(tmp_path, child):
    fields = {"choose": "most_gain", "leave_last_out": False, "max_kld": 0.055}
    result, written = run_fuse(child, tmp_path / "fused", group_table(), **fields)
    groups = written["groups"]
    # Three of the first run and the pair: 0.04 + 0.01 nats for 2 + 1 ms.
    assert sorted(group["last"] - group["first"] for group in groups) == [1, 2]
    assert [group["kld"] for group in groups] == [0.04, 0.01]
    assert [group["saved_ms"] for group in groups] == pytest.approx([2.0, 1.0])
    fused = read_architecture(tmp_path / "fused")
    for group in groups:
        block = fused.blocks[group["block"]]
        assert block.ffn.ffn_dim == group["ffn_dim"]
        assert list(block.parent_block_indices) == group["parent_block_indices"]
    assert result.metrics["kld_sum"] == pytest.approx(0.05)
    assert result.metrics["saved_ms"] == pytest.approx(3.0)
    assert "saves 3 ms per decoded token; KLD of the groups one by one sums to 0.05" in result.headline


def test_reverse(tmp_path, child):
    result, written = run_fuse(child, tmp_path / "reversed", treatment="reverse", leave_last_out=False)
    assert result.headline == "order of 6 FFNs reversed within blocks 1-4, 6-7; nothing fused"
    assert (written["treatment"], written["verify"], written["removed"]) == ("reverse", {}, [])
    assert (result.metrics["kld_sum"], result.metrics["saved_ms"], result.metrics["num_fused_ffns"]) == (None, None, 0)
    assert [group["block"] for group in written["groups"]] == [None, None]
    assert [group["parent_block_indices"] for group in written["groups"]] == [[1, 2, 3, 4], [6, 7]]
    architecture = read_architecture(tmp_path / "reversed")
    assert [block.parent_block_indices for block in architecture.blocks] == [(i,) for i in (0, 4, 3, 2, 1, 5, 7, 6)]
    assert tokenizer_sha256(tmp_path / "reversed") == tokenizer_sha256(child)
    load_model(tmp_path / "reversed")


def test_remove_as_much_as_fusion_saves(tmp_path, child):
    """Fusing 1-4 and 6-7 saves 4 ms; removals cost 1 / block, so 7, 6, 4 and 3 go: 3 x 1.1 + 1.2 ms."""
    fields = {"treatment": "remove", "leave_last_out": False}
    result, written = run_fuse(child, tmp_path / "removed", group_table(), **fields)
    assert (written["treatment"], written["verify"], written["removed"]) == ("remove", {}, [7, 6, 4, 3])
    done = {"removed_ms": 4.5, "removal_kld_sum": 1 / 7 + 1 / 6 + 1 / 4 + 1 / 3, "target_ms": 4.0}
    for place in (written, result.metrics):
        assert {name: place[name] for name in done} == pytest.approx(done)
    assert (result.metrics["kld_sum"], result.metrics["saved_ms"]) == (None, None), "nothing was fused"
    assert {(group["kld"], group["saved_ms"], group["block"]) for group in written["groups"]} == {(None, None, None)}
    assert result.headline == (
        "4 of 6 FFNs removed (blocks 3, 4, 6, 7), 4.5 ms less per decoded token where fusing 1-4, 6-7 would save 4; "
        "KLD of the removals one by one sums to 0.893; 8 -> 4 blocks"
    )
    architecture = read_architecture(tmp_path / "removed")
    assert [block.parent_block_indices for block in architecture.blocks] == [(0,), (1,), (2, 3, 4), (5, 6, 7)]
    assert load_model(tmp_path / "removed").config.num_hidden_layers == 4


def test_reversed_groups_state_nothing_of_fusion_as_their_own(tmp_path, child):
    fields = {"treatment": "reverse", "leave_last_out": False}
    result, written = run_fuse(child, tmp_path / "reversed", group_table(), **fields)
    assert {(group["kld"], group["saved_ms"]) for group in written["groups"]} == {(None, None)}
    assert (result.metrics["kld_sum"], result.metrics["saved_ms"]) == (None, None)
    assert written.keys().isdisjoint({"removed_ms", "removal_kld_sum", "target_ms"})


def test_a_run_that_lacks_a_removed_ffn_is_fused(tmp_path, child):
    """What stands for a removed FFN beside its own is no fused FFN, so that it may become one."""
    fields = {"treatment": "remove", "num_removed": 3, "leave_last_out": False}
    run_fuse(child, tmp_path / "removed", group_table(), **fields)
    assert [block.member_indices for block in read_architecture(tmp_path / "removed").blocks] == [
        (0,),
        (1,),
        (2,),
        (3,),
        (5,),
    ]
    _, written = run_fuse(tmp_path / "removed", tmp_path / "fused", leave_last_out=False)
    assert [(group["first"], group["last"]) for group in written["groups"]] == [(1, 3)]
    block = read_architecture(tmp_path / "fused").blocks[1]
    assert block.member_indices == (1, 2, 3)
    assert block.is_fused
    assert list(block.parent_block_indices) == written["groups"][0]["parent_block_indices"] == [1, 2, 3, 4]
    load_model(tmp_path / "fused")


def test_remove_a_number(tmp_path, child):
    """Without scores of groups this long, what fusing would save is not known, and not needed."""
    table = group_table()
    table = replace(table, groups=(table.groups[0],), latencies=table.latencies[:2])
    fields = {"treatment": "remove", "num_removed": 1, "leave_last_out": False, "latency": "prefill"}
    result, written = run_fuse(child, tmp_path / "removed", table, **fields)
    assert written["removed"] == [7]
    assert written["target_ms"] is result.metrics["target_ms"] is None
    assert written["removed_ms"] == pytest.approx(3.0)
    assert result.headline.startswith("1 of 6 FFNs removed (blocks 7), 3 ms less of prefill; KLD of the removals")


def test_score_then_fuse(tmp_path, child, data):
    """What stage score_groups writes, stage fuse reads; the divergence of a group is that of the fused model."""
    config = ScoreGroupsStage(
        group_scores=GroupScoreConfig(num_sequences=6, seq_len=SEQ_LEN, num_widths=3, repeats=1, warmup=0),
        workload=WorkloadConfig(prefill_tokens=4, generated_tokens=4),
        engine=EngineConfig(device="cpu"),
    )
    inputs = {"model": artifact(child), "data": artifact(data)}
    score_groups.run(config, inputs, context(tmp_path / "scores"))
    table = GroupTable.read(tmp_path / "scores" / "groups.json")
    _, written = run_fuse(child, tmp_path / "fused", table, groups=((1, 3),))
    assert written["groups"][0]["kld"] == table.group(1, 3).kld > 0

    sequences = torch.from_numpy(np.load(data / "calibration.npy").astype(np.int64)).view(-1, SEQ_LEN)[:6]
    with torch.inference_mode():
        before, after = (
            load_model(path)(sequences).logits[:, :-1].double().log_softmax(-1) for path in (child, tmp_path / "fused")
        )
    kld = (before.exp() * (before - after)).sum(-1).mean().item()
    # Folded weights and fp32 logits round; the divergence is a difference of second order.
    assert table.group(1, 3).kld == pytest.approx(kld, rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_length": 5}, "nothing to fuse; attention-free runs of this model: 1-4, 6-7"),
        ({"groups": ((4, 6),)}, r"block 5 of group \[4, 6\] has attention kv2"),
        ({"groups": ((1, 3), (3, 4))}, r"\[1, 3\] and \[3, 4\] overlap"),
        ({"groups": ((6, 8),)}, r"\[6, 8\] must name at least two blocks within 0..7"),
        ({"groups": ((1, 3),), "tensor_parallel": 3}, r"\[1, 3\] is 1024 channels wide, which the ranks cannot share"),
        ({"tensor_parallel": 7}, "fuse.tensor_parallel=7 forbids 3 of 3 groups"),
        (
            {"max_gib_per_rank": 1e-6},
            r"max_gib_per_rank=1e-06 forbids 3 of 3 groups .* 0.0001831 GiB on each of 1 ranks",
        ),
        ({"groups": ((0, 2),), "treatment": "reverse"}, r"block 0 of group \[0, 2\] has attention kv2"),
    ],
)
def test_refused_fusion_leaves_nothing(tmp_path, child, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        run_fuse(child, tmp_path / "fused", **fields)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "fused").iterdir()) == []


def test_model_that_a_target_cannot_load_is_not_fused(tmp_path, child):
    result, _ = run_fuse(child, tmp_path / "fused", targets=("vllm", "llama_cpp", "megatron"))
    assert result.metrics["num_fused_ffns"] > 0
    config = json.loads((child / "config.json").read_text()) | {"sliding_window": 4}
    (child / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"fuse\.targets: llama_cpp cannot load .* window .*; leave llama_cpp out of"):
        run_fuse(child, tmp_path / "refused", targets=("vllm", "llama_cpp"))
    assert list((tmp_path / "refused").iterdir()) == []


def test_group_of_one_is_refused_by_the_configuration():
    with pytest.raises(ValueError, match=r"fuse.groups: \[3, 3\] must name at least two blocks"):
        FuseStage(fuse=FuseConfig(groups=((3, 3),)))


def test_fused_blocks_are_not_fused_again(tmp_path, child):
    run_fuse(child, tmp_path / "once", groups=((1, 2),))
    with pytest.raises(ValueError, match=r"block 1 of group \[1, 2\] is already fused from parent blocks \[1, 2\]"):
        run_fuse(tmp_path / "once", tmp_path / "twice", groups=((1, 2),))
    assert list((tmp_path / "twice").iterdir()) == []
    _, written = run_fuse(tmp_path / "once", tmp_path / "rest", leave_last_out=False)
    assert [(group["first"], group["last"]) for group in written["groups"]] == [(2, 3), (5, 6)]
    with pytest.raises(
        ValueError, match=r"nothing to fuse; attention-free runs of this model: .* \(fused already: 1, 2, 4\)"
    ):
        run_fuse(tmp_path / "rest", tmp_path / "none", leave_last_out=False)
    assert list((tmp_path / "none").iterdir()) == []


def test_model_without_a_tokenizer_is_refused_first(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "bare", A, FFN, FFN, FFN)
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        run_fuse(tmp_path / "bare", tmp_path / "fused")
    assert list((tmp_path / "fused").iterdir()) == []


def test_scores_of_another_model_or_norm_are_refused(tmp_path, child):
    with pytest.raises(ValueError, match=r"group scores of norm=folded, but fuse.norm=last"):
        run_fuse(child, tmp_path / "fused", group_table(), norm="last")
    assert list((tmp_path / "fused").iterdir()) == []
    inputs = {"model": artifact(child), "group_scores": artifact(tmp_path, model="b" * 64)}
    with pytest.raises(
        ValueError, match="the table of group scores was made from model bbbbbbbbbbbb, the model given is aaaaaaaaaa"
    ):
        fuse.run(FuseStage(fuse=FuseConfig()), inputs, context(tmp_path / "other"))


@pytest.mark.parametrize("fields", [{"choose": "most_gain"}, {"treatment": "remove"}])
def test_configuration_that_needs_scores_says_so_before_anything_runs(fields):
    setting = "=".join(*fields.items())
    with pytest.raises(ValueError, match=f"fuse.{setting} needs the input `group_scores`"):
        FuseStage(fuse=FuseConfig(**fields)).check_inputs(["model"])


def test_measurement_beyond_the_positions_or_the_data_is_refused(tmp_path, child, data):
    with pytest.raises(ValueError, match=r"dependency.seq_len=129 is beyond the 128 positions"):
        measure(child, data, tmp_path / "one", seq_len=129)
    with pytest.raises(ValueError, match="9 sequences of 16 tokens asked of the calibration split"):
        measure(child, data, tmp_path / "two", num_sequences=9)


def test_model_without_an_attention_free_run_is_measured_too(tmp_path, make_checkpoint, child, data):
    make_checkpoint(tmp_path / "dense", A, A, A, vocab_size=320)
    copy_tokenizer(child, tmp_path / "dense")
    result = measure(tmp_path / "dense", data, tmp_path / "dependency")
    assert result.metrics["attention_free_runs"] == []
    assert "no two neighbouring blocks without attention" in result.headline


def test_matrix_of_another_model_is_refused(tmp_path, child):
    dependency = artifact(tmp_path, model="b" * 64)
    with pytest.raises(ValueError, match="matrix was made from model bbbbbbbbbbbb, the model given is aaaaaaaaaaaa"):
        fuse.run(
            FuseStage(fuse=FuseConfig()),
            {"model": artifact(child), "dependency": dependency},
            context(tmp_path / "fused"),
        )

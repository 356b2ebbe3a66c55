"""Both stages on a pico child, from the measurement of the dependency to the fused model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distill.config import EngineConfig
from distill.data.tokenizer import tokenizer_sha256
from fusion.config import DependencyConfig, FuseConfig
from launch.registry import FuseStage, MeasureDependencyStage
from launch.stage import StageContext
from launch.stages import fuse, measure_dependency
from puzzle.model.checkpoint import copy_tokenizer, load_model

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
        "largest_dependency": bound,
    }
    written = json.loads((tmp_path / "fused" / "fusion.json").read_text())
    assert written["groups"] == result.metrics["groups"] == [record]
    assert written["norm"] == "folded"
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


def test_refused_fusion_leaves_nothing(tmp_path, child):
    with pytest.raises(ValueError, match="nothing to fuse"):
        fuse.run(FuseStage(fuse=FuseConfig(min_length=5)), {"model": artifact(child)}, context(tmp_path / "fused"))
    assert list((tmp_path / "fused").iterdir()) == []


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

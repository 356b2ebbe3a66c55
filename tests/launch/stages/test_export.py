from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.stage import StageContext, StageResult
from launch.stage_configs import ExportStage
from launch.stages import export
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import build_model, load_model, read_architecture, save_model
from puzzle.model.config import ExportConfig
from puzzle.model.targets import TARGETS

KV2, FFN = AttentionConfig(num_kv_heads=2), FFNConfig(ffn_dim=512)
KV1 = AttentionConfig(num_kv_heads=1)
WHOLE, DUMMY, ATTENTION_ALONE, FFN_ALONE = (KV2, FFN), (NO_ATTENTION, NO_FFN), (KV2, NO_FFN), (NO_ATTENTION, FFN)


def _run(model_dir: Path, out: Path, **config: Any) -> StageResult:
    stage = ExportStage(export=ExportConfig(**config))
    context = StageContext(
        out=out, resume=out.parent / "resume", pool=out.parent / "pool", run_name="run", step_name="export"
    )
    return export.run(stage, {"model": SimpleNamespace(path=model_dir)}, context)  # type: ignore[dict-item]


def _save(
    architecture: Architecture, subblocks: tuple[tuple[AttentionConfig, FFNConfig], ...], tokenizer: Path, path: Path
) -> Path:
    blocks = tuple(
        BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(index,))
        for index, (attention, ffn) in enumerate(subblocks)
    )
    architecture = architecture.with_blocks(blocks)
    save_model(build_model(architecture, seed=0), path, architecture=architecture, tokenizer_from=tokenizer)
    return path


@pytest.fixture
def child_dir(pico_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path) -> Path:
    subblocks = (WHOLE, DUMMY, ATTENTION_ALONE, FFN_ALONE, DUMMY)
    return _save(pico_architecture, subblocks, pico_parent_dir, tmp_path / "child")


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))).logits


def _names(directory: Path) -> list[str]:
    return [block.name for block in read_architecture(directory).blocks]


def test_targets_that_agree_share_the_artifact_and_not_one_logit_changes(child_dir: Path, tmp_path: Path) -> None:
    result = _run(child_dir, tmp_path / "out", targets=("transformers", "vllm", "mlx"))
    assert _names(tmp_path / "out") == ["kv2+w512", "kv2+no_op", "no_op+w512"]
    assert [block.parent_block_indices for block in read_architecture(tmp_path / "out").blocks] == [(0,), (2,), (3,)]
    assert torch.equal(_logits(load_model(tmp_path / "out")), _logits(load_model(child_dir)))
    assert result.metrics["num_dropped_blocks"] == 2
    assert result.metrics["paths"] == {"transformers": ".", "vllm": ".", "mlx": "."}
    assert "vllm (without the 2 dummy blocks 1, 4)" in result.headline


def test_targets_that_differ_have_a_directory_each_and_share_what_is_equal_on_disk(
    pico_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path
) -> None:
    subblocks = (FFN_ALONE, (KV1, FFN), WHOLE)
    model_dir = _save(pico_architecture, subblocks, pico_parent_dir, tmp_path / "child")
    result = _run(model_dir, tmp_path / "out", targets=("transformers", "vllm", "sglang", "mlx", "megatron"))
    assert result.metrics["paths"] == {name: name for name in ("transformers", "vllm", "sglang", "mlx", "megatron")}
    assert {name: _names(tmp_path / "out" / name) for name in result.metrics["paths"]} == {
        "transformers": ["no_op+w512", "kv1+w512", "kv2+w512"],
        "mlx": ["no_op+w512", "kv1+w512", "kv2+w512"],
        "vllm": ["kv1+w512", "kv1+w512", "kv2+w512"],
        "sglang": ["kv2+w512", "kv2+w512", "kv2+w512"],
        "megatron": ["kv2+w512", "kv2+w512", "kv2+w512"],
    }
    expected = _logits(load_model(model_dir))
    for name in result.metrics["paths"]:
        assert torch.equal(_logits(load_model(tmp_path / "out" / name)), expected), name
    inodes = {name: (tmp_path / "out" / name / "model.safetensors").stat().st_ino for name in result.metrics["paths"]}
    assert inodes["transformers"] == inodes["mlx"]
    assert inodes["sglang"] == inodes["megatron"]
    assert len(set(inodes.values())) == 3


def test_export_loads_as_remote_code_with_its_tokenizer(child_dir: Path, tmp_path: Path) -> None:
    _run(child_dir, tmp_path / "out", max_shard_gib=100_000 / 2**30)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(_logits(model), _logits(load_model(child_dir)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len(tokenizer) == 320


def test_report_covers_every_engine(
    child_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _run(child_dir, tmp_path / "out", targets=("transformers", "llama_cpp"))
    reports = json.loads((tmp_path / "out" / "compatibility.json").read_text())["targets"]
    assert [report["target"] for report in reports] == list(TARGETS)
    assert {report["status"] for report in reports} == {"loads_rewritten"}
    paths = {report["target"]: report["path"] for report in reports}
    assert paths == dict.fromkeys(TARGETS) | {"transformers": "transformers", "llama_cpp": "llama_cpp/model.gguf"}
    printed = capsys.readouterr().out
    assert "after an exact rewrite" in printed
    assert "block 1 with an FFN of 256 zero channels" in printed


def test_megatron_gets_layers_and_flags(pico_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path) -> None:
    model_dir = _save(pico_architecture, (WHOLE, FFN_ALONE), pico_parent_dir, tmp_path / "child")
    _run(model_dir, tmp_path / "out", targets=("megatron",))
    layers = json.loads((tmp_path / "out" / "megatron_layers.json").read_text())
    assert layers["rope_scaling"] == {"rope_type": "llama3", "factor": 1.0}
    assert [block["attention"]["no_op"] for block in layers["block_configs"]] == [False, True]
    flags = (tmp_path / "out" / "megatron_arguments.txt").read_text().splitlines()
    assert {"--num-layers 2", "--num-query-groups 2", "--rotary-base 10000", "--swiglu"} <= set(flags)
    assert "--untie-embeddings-and-output-weights" in flags
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] is None


def test_target_that_cannot_load_fails_before_anything_is_written(
    pico_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path
) -> None:
    linear = AttentionConfig(kind="linear")
    model_dir = _save(pico_architecture, (WHOLE, (linear, FFN)), pico_parent_dir, tmp_path / "child")
    expected = r"export\.targets: vllm cannot load.*linear layer; mlx cannot load.*; leave vllm, mlx out of"
    with pytest.raises(ValueError, match=expected) as error:
        _run(model_dir, tmp_path / "out", targets=("llama_cpp", "vllm", "mlx"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"export\.targets is empty; name an engine"):
        _run(model_dir, tmp_path / "out", targets=())


def test_weights_that_are_no_numbers_are_refused(child_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(child_dir / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(tensors, child_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model\.layers\.3\.mlp\.up_proj\.weight holds values that are infinite or no"
    ):
        _run(child_dir, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_tokenizer_that_gguf_cannot_hold_is_refused_before_anything_is_written(child_dir: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((child_dir / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (child_dir / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"splits text by Whitespace of another kind.*known are gpt-2, smollm"):
        _run(child_dir, tmp_path / "out", targets=("transformers", "llama_cpp"))
    assert not (tmp_path / "out").exists()


def test_missing_gguf_package_is_named(child_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_gguf(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("puzzle.model.gguf"):
            raise ModuleNotFoundError("no gguf", name="gguf")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(ValueError, match=r"needs package gguf; run `pip install -e '\.\[gguf\]'`, or leave llama_cpp"):
        _run(child_dir, tmp_path / "out", targets=("llama_cpp",))
    assert not (tmp_path / "out").exists()


def test_model_whose_tensors_are_not_its_own_is_refused(child_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(child_dir / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, child_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \['model\.norm\.weight'\]"):
        _run(child_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_families_beyond_the_format_are_refused_by_feature(
    pico_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path
) -> None:
    architecture = replace(pico_architecture, qk_norm=True, family="qwen3")
    model_dir = _save(architecture, (WHOLE,), pico_parent_dir, tmp_path / "child")
    for target in TARGETS[1:]:
        with pytest.raises(ValueError, match=f"{target} cannot load this model: queries and keys are normalised"):
            _run(model_dir, tmp_path / target, targets=(target,))
        assert not (tmp_path / target).exists()

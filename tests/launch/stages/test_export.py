from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.stage import StageContext, StageResult
from launch.stage_configs import ExportStage
from launch.stages import export
from puzzle.config import ExportConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import build_model, load_model, read_architecture, save_model

KV2, FFN = AttentionConfig(num_kv_heads=2), FFNConfig(ffn_dim=512)


def _run(model_dir: Path, out: Path, **config: Any) -> StageResult:
    stage = ExportStage(export=ExportConfig(**config))
    context = StageContext(
        out=out, resume=out.parent / "resume", pool=out.parent / "pool", run_name="run", step_name="export"
    )
    return export.run(stage, {"model": SimpleNamespace(path=model_dir)}, context)  # type: ignore[dict-item]


@pytest.fixture
def child_dir(pico_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path) -> Path:
    """Blocks: whole, dummy, attention alone, FFN alone, dummy."""
    subblocks = ((KV2, FFN), (NO_ATTENTION, NO_FFN), (KV2, NO_FFN), (NO_ATTENTION, FFN), (NO_ATTENTION, NO_FFN))
    blocks = tuple(
        BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(index,))
        for index, (attention, ffn) in enumerate(subblocks)
    )
    architecture = pico_architecture.with_blocks(blocks)
    model = build_model(architecture, seed=0)
    save_model(model, tmp_path / "child", architecture=architecture, tokenizer_from=pico_parent_dir)
    return tmp_path / "child"


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))).logits


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("transformers", "vllm"), ["kv2+w512", "kv2+no_op", "no_op+w512"]),
        (("transformers", "llama_cpp"), ["kv2+w512", "kv2+w256", "no_op+w512"]),
    ],
)
def test_export_changes_blocks_and_not_one_logit(
    child_dir: Path, tmp_path: Path, targets: tuple[Any, ...], names: list[str]
) -> None:
    result = _run(child_dir, tmp_path / "out", targets=targets)
    blocks = read_architecture(tmp_path / "out").blocks
    assert [block.name for block in blocks] == names
    assert [block.parent_block_indices for block in blocks] == [(0,), (2,), (3,)]
    assert torch.equal(_logits(load_model(tmp_path / "out")), _logits(load_model(child_dir)))
    assert all(target in result.headline for target in targets)
    assert result.metrics["num_dropped_blocks"] == 2


def test_export_loads_as_remote_code_with_its_tokenizer(child_dir: Path, tmp_path: Path) -> None:
    _run(child_dir, tmp_path / "out", max_shard_gib=100_000 / 2**30)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(_logits(model), _logits(load_model(child_dir)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len(tokenizer) == 320


def test_report_covers_every_engine(child_dir: Path, tmp_path: Path) -> None:
    _run(child_dir, tmp_path / "out", targets=("transformers",))
    reports = json.loads((tmp_path / "out" / "compatibility.json").read_text())["targets"]
    status = {report["target"]: report["status"] for report in reports}
    expected = {"transformers": "loads", "vllm": "loads", "sglang": "loads", "llama_cpp": "cannot", "mlx": "loads"}
    assert status == expected | {"megatron": "cannot"}


def test_target_that_cannot_load_fails_before_anything_is_written(child_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"export\.targets: megatron cannot load.*llama3.*leave megatron out") as error:
        _run(child_dir, tmp_path / "out", targets=("vllm", "megatron"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()

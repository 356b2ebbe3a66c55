from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.stage import StageContext, StageResult
from launch.stage_configs import ImportParentStage
from launch.stages import import_parent
from puzzle.model.checkpoint import TensorReader, has_tokenizer, read_architecture
from puzzle.model.config import ModelConfig


def _run(out: Path, **model: Any) -> StageResult:
    context = StageContext(
        out=out, resume=out.parent / "resume", pool=out.parent / "pool", run_name="run", step_name="parent"
    )
    return import_parent.run(ImportParentStage(model=ModelConfig(**model)), {}, context)


def test_directory_is_imported_with_its_tokenizer(pico_parent_dir: Path, tmp_path: Path) -> None:
    result = _run(tmp_path / "out", source=str(pico_parent_dir))
    assert read_architecture(tmp_path / "out") == read_architecture(pico_parent_dir)
    assert has_tokenizer(tmp_path / "out")
    with TensorReader(tmp_path / "out") as reader:
        assert reader.dtype("model.norm.weight") == torch.bfloat16
    assert result.headline.endswith("4 blocks, family llama")
    assert result.metrics["num_blocks"] == 4


def test_hub_model_is_fetched_without_pickles_or_code(
    pico_parent_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def hub_snapshot(repository: str, revision: str | None, **options: Any) -> Path:
        asked.update(repository=repository, revision=revision, **options)
        return pico_parent_dir

    monkeypatch.setattr(import_parent, "hub_snapshot", hub_snapshot)
    _run(tmp_path / "out", source="owner/pico", revision="v1")
    assert (asked["repository"], asked["revision"]) == ("owner/pico", "v1")
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"][1:])
    assert read_architecture(tmp_path / "out").num_blocks == 4


def test_missing_tokenizer_is_named_before_the_weights_are_read(pico_parent_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / file).symlink_to(pico_parent_dir / file)
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        _run(tmp_path / "out", source=str(tmp_path / "bare"))
    assert not (tmp_path / "out").exists()


def test_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pico.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "puzzle.model.gguf", raising=False)
    with pytest.raises(ValueError, match=r"needs package gguf; run `pip install -e '\.\[gguf\]'`"):
        _run(tmp_path / "out", source=str(tmp_path / "pico.gguf"))

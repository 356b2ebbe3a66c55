from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distill.config import PLACEMENT
from launch.artifact import (
    MANIFEST_NAME,
    Artifact,
    DamagedArtifactError,
    Manifest,
    Recipe,
    commit,
    fingerprinted_config,
    record_files,
)


def committed(path: Path) -> Artifact:
    path.mkdir()
    (path / "weights").mkdir()
    (path / "weights" / "a.bin").write_bytes(b"0123456789")
    (path / "notes.txt").write_text("hello")
    recipe = Recipe(stage="fuse", stage_version=1, config={"norm": "folded"})
    manifest = Manifest(
        kind="model",
        stage=recipe.stage,
        stage_version=recipe.stage_version,
        fingerprint=recipe.fingerprint,
        config=recipe.config,
        externals={},
        inputs={},
        files=record_files(path),
        headline="done",
        metrics={"loss": 1.5},
        tokens={"distill": 10},
        seconds=0.1,
        provenance={},
        created_at="2026-01-01T00:00:00+00:00",
    )
    return commit(path, manifest)


def test_round_trip(tmp_path: Path) -> None:
    artifact = committed(tmp_path / "a")
    loaded = Artifact.load(tmp_path / "a")
    assert loaded == artifact
    assert [record.name for record in loaded.manifest.files] == ["notes.txt", "weights/a.bin"]
    loaded.verify()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b"0123"), "has 4 bytes, its manifest says 10"),
        (lambda file: file.write_bytes(b"012345678X"), "was altered"),
    ],
)
def test_damage_names_the_file_and_the_way_out(tmp_path: Path, harm, message: str) -> None:
    artifact = committed(tmp_path / "a")
    harm(tmp_path / "a" / "weights" / "a.bin")
    with pytest.raises(DamagedArtifactError, match=message) as caught:
        artifact.verify()
    assert "a.bin" in str(caught.value)
    assert f"remove {tmp_path / 'a'}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_size_check_does_not_read_content(tmp_path: Path) -> None:
    artifact = committed(tmp_path / "a")
    (tmp_path / "a" / "weights" / "a.bin").write_bytes(b"012345678X")
    artifact.verify(checksums=False)
    with pytest.raises(DamagedArtifactError):
        artifact.verify(checksums=True)


@pytest.mark.parametrize(("field_name", "value"), [("config", {"norm": "last"}), ("kind", "data"), ("tokens", {})])
def test_altered_manifest_is_found(tmp_path: Path, field_name: str, value: object) -> None:
    committed(tmp_path / "a")
    file = tmp_path / "a" / MANIFEST_NAME
    content = json.loads(file.read_text())
    content[field_name] = value
    file.write_text(json.dumps(content))
    with pytest.raises(DamagedArtifactError, match="was altered"):
        Artifact.load(tmp_path / "a")


def test_truncated_manifest_is_found(tmp_path: Path) -> None:
    committed(tmp_path / "a")
    file = tmp_path / "a" / MANIFEST_NAME
    file.write_text(file.read_text()[:100])
    with pytest.raises(DamagedArtifactError, match="cannot be read"):
        Artifact.load(tmp_path / "a")


def test_directory_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an artifact"):
        Artifact.load(tmp_path)


def test_fingerprint_covers_everything_but_placement() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        lr: float
        betas: tuple[float, float] = (0.9, 0.95)
        device: str = field(default="cpu", metadata=PLACEMENT)

    def fingerprint(config: Config, **changes) -> str:
        parts = {"stage": "s", "stage_version": 1, "externals": {}, "inputs": {"data": "f0"}}
        return Recipe(config=fingerprinted_config(config), **{**parts, **changes}).fingerprint

    base = fingerprint(Config(lr=1.0))
    assert fingerprint(Config(lr=1.0, device="cuda")) == base
    different = [
        fingerprint(Config(lr=2.0)),
        fingerprint(Config(lr=1.0, betas=(0.9, 0.9))),
        fingerprint(Config(lr=1.0), stage="t"),
        fingerprint(Config(lr=1.0), stage_version=2),
        fingerprint(Config(lr=1.0), externals={"file": "x"}),
        fingerprint(Config(lr=1.0), inputs={"data": "f1"}),
    ]
    assert len({base, *different}) == len(different) + 1

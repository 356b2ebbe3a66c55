"""Artifacts that training stages start from: pico models, and tokens of a language that can be learnt."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from distill.data.tokenizer import load_tokenizer, tokenizer_sha256
from launch.artifact import Artifact, Manifest, Recipe, commit
from puzzle.model.architecture import NO_ATTENTION
from puzzle.model.checkpoint import build_model, load_model, read_architecture, save_model


def artifact_at(path: Path, kind: str, tokens: dict[str, int] | None = None) -> Artifact:
    """``path`` as an artifact that was not committed there, whose training tokens are ``tokens`` by stage."""
    manifest = Manifest(
        kind=kind,
        stage=kind,
        stage_version=1,
        fingerprint=Recipe(stage=kind, stage_version=1, config={}).fingerprint,
        config={},
        externals={},
        inputs={},
        files=(),
        headline="",
        metrics={},
        tokens=tokens or {},
        seconds=0.0,
        provenance={},
        created_at="",
    )
    return Artifact(path=path, manifest=manifest)


def commit_artifact(path: Path, kind: str, tokens: dict[str, int] | None = None) -> Artifact:
    """``path`` as a committed artifact."""
    return commit(path, artifact_at(path, kind, tokens).manifest)


def toy_language(num_tokens: int, vocab_size: int, seed: int) -> np.ndarray:
    """Each token is followed by its double plus one, but for one in eight."""
    rng = np.random.default_rng(seed)
    tokens, noise = [1], rng.random(num_tokens)
    for index in range(1, num_tokens):
        following = (2 * tokens[-1] + 1) % 64
        tokens.append(int(rng.integers(64)) if noise[index] < 0.125 else following)
    return np.asarray(tokens, dtype=np.uint16) % vocab_size


def write_data(
    directory: Path, tokenizer_from: Path, *, train_tokens: int = 8192, validation_tokens: int = 1024
) -> Artifact:
    """A data artifact in the vocabulary of the tokenizer in ``tokenizer_from``."""
    directory.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_from / file, directory / file)
    vocab_size = len(load_tokenizer(directory))
    for seed, (name, length) in enumerate((("train", train_tokens), ("validation", validation_tokens))):
        np.save(directory / f"{name}.npy", toy_language(length, vocab_size, seed))
    summary = {
        "vocab_size": vocab_size,
        "eos_token_id": 0,
        "tokenizer_sha256": tokenizer_sha256(directory),
        "unigram_entropy_nats": 4.2,
    }
    (directory / "data.json").write_text(json.dumps(summary))
    return commit_artifact(directory, "data")


def write_teacher(directory: Path, parent_dir: Path) -> Artifact:
    """The parent with larger weights: what its attention says matters, and it prefers some tokens to others."""
    model = load_model(parent_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 5
    save_model(model, directory, architecture=read_architecture(parent_dir), tokenizer_from=parent_dir)
    return commit_artifact(directory, "model")


def write_student(directory: Path, teacher_dir: Path, dtype: torch.dtype = torch.bfloat16) -> Artifact:
    """The teacher without the attention of its two middle blocks, with some distillation behind it."""
    parent = read_architecture(teacher_dir)
    architecture = parent
    for index in (1, 2):
        architecture = architecture.with_block(index, replace(parent.blocks[index], attention=NO_ATTENTION))
    model = build_model(architecture, seed=0)
    model.load_state_dict(load_model(teacher_dir).state_dict(), strict=False)
    save_model(model, directory, architecture=architecture, tokenizer_from=teacher_dir, dtype=dtype)
    return commit_artifact(directory, "model", tokens={"pretrain": 7, "build_library": 9, "distill": 100})
